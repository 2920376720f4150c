"""Prunable units of a layer: neurons of its MLP, key-value groups of its attention.

MLP and attention are *parts* of a layer; each consists of *units*. A unit reads the hidden states through rows of some
linear layers and writes through input columns of another. To prune it is to delete those rows and columns:

- `mlp`: a neuron is a row of gate_proj and of up_proj, and a column of down_proj.
- `attention`: a group is a key head and a value head, all query heads that read them, and their columns of o_proj.
  Whole groups keep the model's ratio of query to key-value heads, as any code for grouped-query attention expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config imports the structures' names from here and must not load torch
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

STRUCTURES = {"mlp": ("mlp",), "attention": ("attention",), "mlp+attention": ("mlp", "attention")}
PARTS = ("mlp", "attention")  # scoring covers them all
UNITS = {"mlp": "neurons", "attention": "key-value groups"}  # their names in messages and tables

Scores = dict[str, "list[Tensor]"]  # by part: float32 (units,) per layer
Kept = dict[str, "list[Tensor]"]  # by pruned part: ascending int64 indices of the units that stay, per layer


@dataclass(frozen=True)
class Part:
    """A part of one layer.

    Attributes:
        inputs: the linear layers whose rows the units read through.
        output: the linear layer whose input columns they write through.
        units: number of units. All have the same number of rows and of columns; those of one unit are contiguous.
    """

    inputs: tuple[nn.Linear, ...]
    output: nn.Linear
    units: int

    @property
    def columns(self) -> int:
        """Columns of `output` per unit."""
        return self.output.in_features // self.units

    @property
    def parameters(self) -> int:
        """Parameters per unit: its rows with their biases, and its columns."""
        rows = sum(linear.out_features * (linear.in_features + (linear.bias is not None)) for linear in self.inputs)
        return (rows + self.output.out_features * self.output.in_features) // self.units

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """All linear layers of the part."""
        return (*self.inputs, self.output)

    def matrices(self) -> list[Tensor]:
        """The weights by unit: a matrix (units, weights) for every linear layer."""
        rows = [linear.weight.reshape(self.units, -1) for linear in self.inputs]
        return [*rows, self.output.weight.T.reshape(self.units, -1)]

    def per_unit(self, values: Tensor) -> Tensor:
        """Sum over the columns of every unit: (..., units * columns) -> (..., units)."""
        return values if self.columns == 1 else values.unflatten(-1, (self.units, self.columns)).sum(-1)

    def columns_of(self, units: Tensor) -> Tensor:
        """The columns of `output` of some units: (count,) int64 -> (count * columns,) int64."""
        return spread(units, self.columns)


def spread(units: Tensor, size: int) -> Tensor:
    """Row or column indices of units that take `size` each: (count,) int64 -> (count * size,) int64."""
    return (units[:, None] * size + units.new_tensor(range(size))).flatten()


def part_of(layer: nn.Module, name: str) -> Part:
    """A part of a decoder layer, by its name in `PARTS`."""
    if name == "mlp":
        mlp = layer.mlp
        return Part((mlp.gate_proj, mlp.up_proj), mlp.down_proj, mlp.down_proj.in_features)
    block = layer.self_attn
    groups = block.k_proj.out_features // block.head_dim
    return Part((block.q_proj, block.k_proj, block.v_proj), block.o_proj, groups)


def parts(model: PreTrainedModel, name: str) -> list[Part]:
    """One part of all layers, first to last."""
    return [part_of(layer, name) for layer in model.model.layers]


def save_scores(file: Path, scores: Scores) -> None:
    """Write scores to a safetensors file, under `layers.<index>.<part>`."""
    from safetensors.torch import save_file

    save_file({f"layers.{i}.{name}": layer for name, layers in scores.items() for i, layer in enumerate(layers)}, file)


def read_scores(file: Path) -> Scores:
    """Read a file written by `save_scores`."""
    from safetensors.torch import load_file

    stored = load_file(file)
    scores: Scores = {}
    for name in PARTS:
        count = sum(key.endswith(f".{name}") for key in stored)
        scores[name] = [stored[f"layers.{i}.{name}"] for i in range(count)]
    return scores

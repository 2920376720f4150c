"""What can be cut from a layer: neurons of its MLP, key-value groups of its attention.

Both are *units* of a *part* of the layer. A unit reads the hidden states through rows of some linear layers and writes
through input columns of another, so that cutting it is deleting those rows and columns:

- `mlp`: a neuron is a row of gate_proj and of up_proj, and a column of down_proj.
- `attention`: a group is a key and a value head with all query heads that read them, and their columns of o_proj. Whole
  groups keep the model's ratio of query to key-value heads, so that any code for grouped-query attention runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config reads the names of the structures without paying for torch
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

STRUCTURES = {"mlp": ("mlp",), "attention": ("attention",), "mlp+attention": ("mlp", "attention")}
PARTS = ("mlp", "attention")  # all of them: what is scored
UNITS = {"mlp": "neurons", "attention": "key-value groups"}  # for people

Scores = dict[str, "list[Tensor]"]  # by part, float32 (units,) per layer
Kept = dict[str, "list[Tensor]"]  # by part that is cut, the ascending int64 indices that stay, per layer


@dataclass(frozen=True)
class Part:
    """A part of one layer, as it is now.

    Attributes:
        inputs: the linear layers whose rows the units read through.
        output: the linear layer whose input columns they write through.
        units: how many there are; each has the same number of rows and of columns, those of a unit side by side.
    """

    inputs: tuple[nn.Linear, ...]
    output: nn.Linear
    units: int

    @property
    def columns(self) -> int:
        """Of `output`, for each unit."""
        return self.output.in_features // self.units

    @property
    def parameters(self) -> int:
        """Of one unit: its rows with their biases, and its columns."""
        rows = sum(linear.out_features * (linear.in_features + (linear.bias is not None)) for linear in self.inputs)
        return (rows + self.output.out_features * self.output.in_features) // self.units

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """All its linear layers."""
        return (*self.inputs, self.output)

    def matrices(self) -> list[Tensor]:
        """The weights of every unit, a matrix (units, weights) for each linear layer."""
        rows = [linear.weight.reshape(self.units, -1) for linear in self.inputs]
        return [*rows, self.output.weight.T.reshape(self.units, -1)]

    def per_unit(self, values: Tensor) -> Tensor:
        """(..., columns of all units) -> (..., units), the sum over each unit's columns."""
        return values if self.columns == 1 else values.unflatten(-1, (self.units, self.columns)).sum(-1)

    def columns_of(self, units: Tensor) -> Tensor:
        """The columns of `output` that some units, (count,) int64, write through: (count * columns,) int64."""
        return spread(units, self.columns)


def spread(units: Tensor, size: int) -> Tensor:
    """The indices that units, (count,), of so many rows or columns each take: (count * size,) int64."""
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
    """That part of every layer, first to last."""
    return [part_of(layer, name) for layer in model.model.layers]


def save_scores(file: Path, scores: Scores) -> None:
    """Write scores to a safetensors file, under `layers.<index>.<part>`."""
    from safetensors.torch import save_file

    save_file({f"layers.{i}.{name}": layer for name, found in scores.items() for i, layer in enumerate(found)}, file)


def read_scores(file: Path) -> Scores:
    """What `save_scores` wrote."""
    from safetensors.torch import load_file

    stored = load_file(file)
    found: Scores = {}
    for name in PARTS:
        count = sum(key.endswith(f".{name}") for key in stored)
        found[name] = [stored[f"layers.{i}.{name}"] for i in range(count)]
    return found

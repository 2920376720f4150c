"""Prunable units of a layer: neurons of its MLP, key-value groups of its attention.

MLP and attention are *parts* of a layer; each consists of *units*. A unit reads the hidden states through rows of some
linear layers and writes through input columns of another. To prune it is to delete those rows and columns:

- `mlp`: a neuron is a row of every layer that reads the hidden states (gate_proj and up_proj in Llama), and a column of
  the one that writes (down_proj).
- `attention`: a group is a key head and a value head, all query heads that read them, and their columns of the output
  (o_proj). Whole groups keep the model's ratio of query to key-value heads, as any code for grouped-query attention
  expects.

Which rows and columns these are in a family says its layout (`layout.py`). A part that loses all of its units writes
nothing, and a layer that loses both of its parts is gone: so whole *sublayers* and *layers* can be pruned, too.

In a mixture of experts, a unit of `mlp` is a neuron inside an expert, and whole experts are units of a third part,
`experts`; see `mixtures.py`. Its dense layers and shared experts have no units: they stay as they are, or go with
their layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfprune.models.families import head_size, layout_of, queries_of
from hfprune.models.layout import QUERIES, Layout

if TYPE_CHECKING:  # the config imports the structures' names from here and must not load torch
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

PARTS = ("mlp", "attention")  # scoring covers them all
IN_TURN = ("attention", "mlp")  # as a layer computes them
DEPTH = ("sublayers", "attention_sublayers", "layers")  # structures whose parts go with all of their units
WITH_EXPERTS = "mlp+experts"  # whole experts go, and neurons inside those that stay
LAYER_OF_EXPERTS = {"attention", "experts"}  # the parts that make up a layer in a mixture of experts
MIXED = {f"mlp+{name}": name for name in DEPTH}  # first some of these go, then neurons of the MLPs that stay
TWO_STAGES = "mlp+attention_sublayers"  # of 2SSP, which says how many go
STRUCTURES = {
    "mlp": ("mlp",),
    "attention": ("attention",),
    "mlp+attention": PARTS,
    "experts": ("experts",),
    WITH_EXPERTS: ("experts", "mlp"),  # in this order: neurons inside the experts that stay
    **dict.fromkeys(DEPTH, PARTS),
    **dict.fromkeys(MIXED, ("mlp",)),  # what is scored
}
UNITS = {"mlp": "neurons", "attention": "key-value groups", "experts": "experts"}  # names in messages and tables

# By part: float32 (units,) per layer; of neurons inside experts (experts, units). Empty for a layer without such units.
Scores = dict[str, "list[Tensor]"]
Kept = dict[str, "list[Tensor]"]  # by pruned part: ascending int64 indices of the units that stay, per layer; as scores
Sublayer = tuple[str, int]  # a part and the number of its layer


def matrix(linear: nn.Module) -> Tensor:
    """The weights of a linear layer, (out, in). A view: what is written into it changes the layer."""
    return linear.weight.T if hasattr(linear, "nf") else linear.weight  # GPT-2's Conv1D holds them the other way round


@dataclass(frozen=True)
class Part:
    """A part of one layer.

    Attributes:
        name: the part's name, one of `PARTS`.
        inputs: the linear layers whose rows the units read through.
        output: the linear layer whose input columns they write through. A unit's columns are neighbours.
        units: number of units. All have the same number of rows and of columns.
        columns: columns of `output` per unit.
        sections: of each input, the relative sizes of its sections, see `layout.Rows`.
        per_head: modules whose weight has a row for every head, see `layout.Block`.
        block: the module that computes the part.
        attends: whether its operations grow with the square of the tokens.
    """

    name: str
    inputs: tuple[nn.Module, ...]
    output: nn.Module
    units: int
    columns: int
    sections: tuple[tuple[int, ...], ...]
    per_head: tuple[nn.Module, ...]
    block: nn.Module
    attends: bool = False

    @property
    def width(self) -> int:
        """Columns of `output`."""
        return matrix(self.output).shape[1]

    @property
    def parameters(self) -> int:
        """Parameters per unit: its rows with their biases, and its columns; 0 if there is no unit."""
        rows = sum(linear.weight.numel() + (0 if linear.bias is None else len(linear.bias)) for linear in self.inputs)
        heads = sum(module.weight.numel() for module in self.per_head)
        return (rows + heads + self.output.weight.numel()) // max(1, self.units)

    @property
    def whole(self) -> int:
        """Parameters that go when the part loses all of its units: those of its units, and the bias of its output."""
        return self.units * self.parameters + (0 if self.output.bias is None else len(self.output.bias))

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """All linear layers of the part."""
        return (*self.inputs, self.output)

    def blocks_of_rows(self, number: int) -> list[tuple[int, int]]:
        """For each section of `inputs[number]`, its first row and the rows of one unit."""
        sections, rows = self.sections[number], matrix(self.inputs[number]).shape[0]
        sizes = [rows * size // sum(sections) for size in sections]
        return [(sum(sizes[:i]), size // max(1, self.units)) for i, size in enumerate(sizes)]

    def rows_of(self, units: Tensor, number: int) -> Tensor:
        """The rows of `inputs[number]` of some units, section by section: (count,) int64 -> (rows,) int64."""
        import torch

        return torch.cat([first + spread(units, size) for first, size in self.blocks_of_rows(number)])

    def by_unit(self, rows: Tensor, number: int) -> Tensor:
        """Values for the rows of `inputs[number]`, by unit: (rows, ...) -> (units, rows of a unit, ...)."""
        import torch

        blocks = self.blocks_of_rows(number)
        return torch.cat(
            [rows[first : first + size * self.units].unflatten(0, (self.units, size)) for first, size in blocks], 1
        )

    def matrices(self) -> list[Tensor]:
        """The weights by unit: a matrix (units, weights) for every section of every linear layer."""
        rows = [
            matrix(linear)[first : first + size * self.units].reshape(self.units, -1)
            for number, linear in enumerate(self.inputs)
            for first, size in self.blocks_of_rows(number)
        ]
        return [*rows, matrix(self.output).T.reshape(self.units, -1)]

    def per_unit(self, values: Tensor) -> Tensor:
        """Sum over the columns of every unit: (..., units * columns) -> (..., units)."""
        return values if self.columns == 1 else values.unflatten(-1, (self.units, self.columns)).sum(-1)

    def columns_of(self, units: Tensor) -> Tensor:
        """The columns of `output` of some units: (count,) int64 -> (count * columns,) int64."""
        return spread(units, self.columns)


AnyPart = "Part | WholeExperts | ExpertNeurons | None"


def spread(units: Tensor, size: int) -> Tensor:
    """Row or column indices of units that take `size` each: (count,) int64 -> (count * size,) int64."""
    return (units[:, None] * size + units.new_tensor(range(size))).flatten()


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, first to last."""
    return model.base_model.get_submodule(layout_of(model).layers)


def kinds_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the parts that a model has."""
    return (*PARTS, "experts") if layout_of(model).mixture else PARTS


def parts(model: PreTrainedModel, name: str) -> list[AnyPart]:
    """One part of all layers, first to last; None for layers without it."""
    return [part_of(model, name, number) for number in range(len(layers_of(model)))]


def part_of(model: PreTrainedModel, name: str, number: int) -> AnyPart:
    """A part of layer `number`. Of a mixture of experts, `mlp` and `experts` of a dense layer are None."""
    layout, layer = layout_of(model), layers_of(model)[number]
    if layout.mixture and name != "attention":
        from hfprune.models.mixtures import ExpertNeurons, WholeExperts, experts_in

        experts = experts_in(model, number)
        return experts and (ExpertNeurons(experts) if name == "mlp" else WholeExperts(experts))
    block = layout.block(name)
    queries = queries_of(model.config, layout)
    sections = tuple(tuple(queries if size == QUERIES else size for size in rows.sections) for rows in block.rows)
    modules = dict(layer.named_modules())
    path = block.output_among(modules)
    output, inputs = modules[path], tuple(modules[rows.path] for rows in block.rows)
    per_head = tuple(modules[path] for path in block.per_head if path in modules)
    width = matrix(output).shape[1]
    columns = columns_per_unit(model.config, layout, name, width)
    owner = modules[path.rpartition(".")[0] if path in block.others else block.module or ""]
    attends = name == "attention" and path == block.output
    return Part(name, inputs, output, width // columns, columns, sections, per_head, owner, attends)


def columns_per_unit(config: Any, layout: Layout, name: str, width: int) -> int:
    """How many of the `width` columns of a part's output layer one unit writes through."""
    if not layout.block(name).rows:
        return max(1, width)
    return 1 if name == "mlp" else queries_of(config, layout) * head_size(config)


DEPTH_SHARE = (
    "of what neurons and whole layers or sublayers give together, the share of the whole ones; null goes with "
    f"{TWO_STAGES} alone, which then splits as 2SSP does"
)


def check_depth_share(share: float | None, structure: str) -> None:
    """Refuse a share of whole sublayers or layers without a structure that has both, and such a structure without it.

    Raises:
        ValueError: it is so.
    """
    if share is not None and structure not in MIXED:
        raise ValueError(f"'depth_share' goes with structure {' or '.join(MIXED)}, not {structure}")
    if share is None and structure in MIXED and structure != TWO_STAGES:
        raise ValueError(
            f"structure {structure} needs 'depth_share': the share of the removed parameters that whole "
            f"{MIXED[structure]} give, such as 0.5"
        )


def check_experts_share(share: float | None, structure: str) -> None:
    """Refuse a share of whole experts without the structure that has them and neurons.

    Raises:
        ValueError: it is so.
    """
    if share is not None and structure != WITH_EXPERTS:
        raise ValueError(f"'experts_share' goes with structure {WITH_EXPERTS}, not {structure}")


def layers_that_stay(kept: Kept) -> list[int]:
    """The numbers of the layers that stay: those that keep a unit."""
    if {*kept} not in ({*PARTS}, LAYER_OF_EXPERTS):
        return list(range(len(next(iter(kept.values()), []))))
    return [number for number, units in enumerate(zip(*kept.values(), strict=True)) if any(map(len, units))]


def save_scores(file: Path, scores: Scores) -> None:
    """Write scores to a safetensors file, under `layers.<index>.<part>`."""
    from safetensors.torch import save_file

    save_file({f"layers.{i}.{name}": layer for name, layers in scores.items() for i, layer in enumerate(layers)}, file)


def read_scores(file: Path) -> Scores:
    """Read a file written by `save_scores`."""
    from safetensors.torch import load_file

    stored = load_file(file)
    scores: Scores = {}
    for name in UNITS:
        if count := sum(key.endswith(f".{name}") for key in stored):
            scores[name] = [stored[f"layers.{i}.{name}"] for i in range(count)]
    return scores

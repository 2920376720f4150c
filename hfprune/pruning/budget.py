"""From a budget in parameters to a number of units: how many of each part to keep, or why the budget cannot be met."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from hfprune.errors import UserError
from hfprune.models.families import (
    chosen_of,
    expert_parameters,
    experts_of,
    fewest_experts,
    groups_of,
    hidden_size,
    layout_for,
    layout_of,
    neuron_parameters,
    setting,
)
from hfprune.models.layout import Block, Layout
from hfprune.models.units import (
    DEPTH,
    IN_TURN,
    MIXED,
    PARTS,
    STRUCTURES,
    UNITS,
    WITH_EXPERTS,
    Scores,
    columns_per_unit,
    kinds_of,
    layers_of,
    parts,
)
from hfprune.pruning.allocation import ALLOCATIONS, fewest_kept
from hfprune.pruning.criteria import rankers, ranks
from hfprune.pruning.order import Step, best_steps, removable_sizes, removed_by, steps_of, those_that_go
from hfprune.pruning.refit_names import IN_EXPERTS
from hfprune.pruning.saving import SAVINGS, Latency, Memory, Widths, largest_within, saving_of

if TYPE_CHECKING:  # a workflow refuses budgets without paying for torch
    from transformers import PreTrainedModel

EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")  # endings of names
# Endings of the names of parameters: beside weights and biases, those of Apertus' activation, of the attention and the
# experts of gpt-oss, of the router of ERNIE, and of linear attention.
PARAMETERS = (
    ".weight", ".bias", ".alpha_p", ".alpha_n",
    ".sinks", ".gate_up_proj", ".down_proj", "_proj_bias", ".moe_statics.e_score_correction_bias", ".A_log", ".dt_bias",
)  # fmt: skip
STAYS = {  # what these structures leave at least
    "layers": "a layer", "sublayers": "an attention and an MLP", "attention_sublayers": "an attention",
}  # fmt: skip
BALANCE = 1.5  # of 2SSP, its alpha: the larger, the more attention goes
STEPS = (1, 8, 32, 64, 128, 256)  # what MLP widths may be multiples of
DEFAULT_STEPS = ((2048, 256), (256, 64), (0, 1))  # from this hidden size on: this step
BUDGET = (  # the settings of a cut that say how much goes
    "ratio", "ratio_of", "target_parameters", "structure", "attention_share", "allocation", "round_to", "depth_share",
    "context", "latencies", "experts_share",
)  # fmt: skip
METHOD = ("criterion", "refit")  # what `check` is told of a cut beside its budget
NO_REFIT = (
    "refit {refit!r}: of a mixture of experts, 'least_squares' and 'sequential' refit what loses neurons (structures "
    "mlp and mlp+experts), and 'sequential' the experts that stay (structures experts and layers). No other refit goes "
    "with one. Set it to one of these, or to 'none'."
)
OTHER_CACHE = "attention of this family keeps more, or less, than a key and a value for each head. Set it to 'all'."
EXPERT_STEPS = ((256, 64), (0, 8))  # inside experts, which are a few hundred neurons wide
ALIGNED = 8  # numbers in 16 bytes, of which torch's grouped products of experts need a multiple


def default_step(hidden: int, steps: tuple[tuple[int, int], ...] = DEFAULT_STEPS) -> int:
    """What MLP widths of a model of this hidden size are multiples of, unless `round_to` says otherwise.

    Quantised types and GPU kernels take rows in blocks: a width that is no multiple costs space and time there. In a
    model of a hidden size below 256 a block would be too large a part of a layer.
    """
    return next(step for least, step in steps if hidden >= least)


@dataclass(frozen=True)
class Shape:
    """What of a model counts for a budget.

    Attributes:
        total: all parameters, tied embeddings once.
        units: by part, how many units each layer has.
        parameters: by part, those of one unit.
        hidden: hidden size.
        refusals: by part, and by `units.DEPTH`, that cannot be cut, why, and what can be instead; for "cache" why its
            memory is not counted.
        mixture: what more counts if it is a mixture of experts, or else None.
        sublayers: by part, the parameters of the whole part in each layer, without norms of hidden states.
        layers: parameters of each layer.
        caches: of each layer, whether its attention keeps keys and values; in a hybrid not all do.
    """

    total: int
    units: dict[str, list[int]]
    parameters: dict[str, int]
    hidden: int
    refusals: dict[str, str] = field(default_factory=dict)
    mixture: ExpertCounts | None = None
    sublayers: dict[str, list[int]] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    caches: list[bool] = field(default_factory=list)

    @property
    def whole(self) -> dict[str, list[int]]:
        """By part that goes as a whole, in turn: how many units each layer has, of experts in all groups together."""
        if self.mixture is None:
            return {name: self.units[name] for name in IN_TURN}
        experts = [count * self.mixture.groups for count in self.units["experts"]]
        return {"attention": self.units["attention"], "experts": experts}


@dataclass(frozen=True)
class ExpertCounts:
    """What of a mixture of experts counts for a budget. Its units are counted in one expert, or in one group of them.

    Attributes:
        count: number of experts of a layer.
        groups: number of groups of experts.
        fewest: the fewest experts that every group keeps.
        chosen: to how many a token is sent.
    """

    count: int
    groups: int
    fewest: int
    chosen: int

    def rows(self, part: str) -> int:
        """In how many experts, or groups, a unit of a part goes at once."""
        return {"mlp": self.count, "experts": self.groups}.get(part, 1)


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a model."""
    from hfprune.models.loading import count_parameters

    layout, parts_by_name = layout_of(model), {name: parts(model, name) for name in kinds_of(model)}
    return Shape(
        count_parameters(model),
        {name: [part.units if part else 0 for part in layers] for name, layers in parts_by_name.items()},
        {name: max(part.parameters for part in filter(None, layers)) for name, layers in parts_by_name.items()},
        hidden_size(model.config),
        refusals(layout),
        _expert_counts(model.config, layout),
        {} if layout.mixture else {name: [part.whole for part in layers] for name, layers in parts_by_name.items()},
        [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers_of(model)],
        [part.attends for part in parts_by_name["attention"]],
    )


def units_shapes(shape: Shape, part: str) -> list[tuple[int, ...]]:
    """The shapes of a part's scores, per layer, see `units.Scores`."""
    experts, units = shape.mixture, shape.units[part]
    if experts and part == "experts":
        return [(experts.groups * width,) for width in units]
    return [(experts.count, width) if experts and part == "mlp" and width else (width,) for width in units]


def refusals(layout: Layout) -> dict[str, str]:
    """See `Shape`."""
    reasons = {"mlp": layout.mixture.refused if layout.mixture else layout.mlp.refused}
    reasons |= {"attention": layout.attention.refused}
    reasons |= {"experts": None if layout.mixture else "the model has no experts: it is dense. Cut mlp."}
    reasons |= {structure: layout.depth_refused(structure) for structure in DEPTH}
    reasons |= {"cache": None if layout.attention.rows else OTHER_CACHE}
    return {name: reason for name, reason in reasons.items() if reason}


def _expert_counts(config: Any, layout: Layout) -> ExpertCounts | None:
    """See `Shape`."""
    if (mixture := layout.mixture) is None:
        return None
    groups, fewest = groups_of(config, mixture), fewest_experts(config, mixture)
    return ExpertCounts(experts_of(config), groups, fewest, chosen_of(config))


def shape_on_disk(folder: Path) -> Shape:
    """The shape of the checkpoint in `folder`, from its config and the headers of its safetensors files alone."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as stored:
            shapes |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    if config.get("tie_word_embeddings") and any(name.endswith(EMBEDDINGS) for name in shapes):
        shapes.pop("lm_head.weight", None)
    layout, hidden = layout_for(config), hidden_size(config)
    mixture, experts = layout.mixture, _expert_counts(config, layout)
    outputs = tuple(f".{path}.weight" for path in (layout.attention.output, *layout.attention.others))
    first = next(name for name in shapes if name.endswith(tuple(f"{layout.layers}.0{output}" for output in outputs)))
    before = first[: first.rindex(f"{layout.layers}.0.")] + f"{layout.layers}."  # some lack a prefix
    count = sum(name.startswith(before) and name.endswith(outputs) for name in shapes)
    numbers = range(min(count, config.get("num_hidden_layers", count)))
    further = tuple(f"{before}{number}." for number in range(len(numbers), count))  # that predict tokens further ahead
    sizes = {
        name: math.prod(shape)
        for name, shape in shapes.items()
        if name.endswith(PARAMETERS) and not name.startswith(further)
    }
    units, parameters, sublayers = {}, {}, {}
    for name in PARTS:
        if mixture and name == "mlp":
            continue
        block = layout.block(name)
        own = [f"{before}{number}.{_output_on_disk(block, f'{before}{number}.', sizes)}" for number in numbers]
        widths = [sizes[f"{output}.weight"] // hidden for output in own]
        units[name] = [width // columns_per_unit(config, layout, name, width) for width in widths]
        paths = [f"{rows.path}.{kind}" for rows in block.rows for kind in ("weight", "bias")]
        paths += [f"{path}.weight" for path in block.per_head]
        of_units = [
            sizes[f"{output}.weight"] + sum(sizes.get(f"{before}{number}.{path}", 0) for path in paths)
            for number, output in zip(numbers, own, strict=True)
        ]
        parameters[name] = max(size // max(1, count) for size, count in zip(of_units, units[name], strict=True))
        biases = [sizes.get(f"{output}.bias", 0) for output in own]  # belong to no unit
        sublayers[name] = [size + bias for size, bias in zip(of_units, biases, strict=True)]
    if mixture:
        width = setting(config, mixture.size)
        is_sparse = [f"{before}{number}.{mixture.stored}" in sizes for number in numbers]
        units["mlp"] = [width * sparse for sparse in is_sparse]
        parameters["mlp"] = experts.count * neuron_parameters(config, mixture)
        units["experts"] = [experts.count // experts.groups * sparse for sparse in is_sparse]
        parameters["experts"] = experts.groups * expert_parameters(config, mixture)
    layers = [sum(size for key, size in sizes.items() if key.startswith(f"{before}{number}.")) for number in numbers]
    attends = [f"{before}{number}.{layout.attention.output}.weight" in sizes for number in numbers]
    return Shape(
        sum(sizes.values()), units, parameters, hidden, refusals(layout), experts, {} if mixture else sublayers, layers,
        attends,
    )  # fmt: skip


def _output_on_disk(block: Block, layer: str, sizes: Mapping[str, int]) -> str:
    """The path of a block's output layer in the decoder layer whose tensors' names begin with `layer`."""
    return block.output_among({path for path in block.others if f"{layer}{path}.weight" in sizes})


@dataclass(frozen=True)
class Capacity:
    """How much of one part can be removed, over all layers.

    Attributes:
        units: number of units in each layer.
        fewest: number of units that the allocation keeps in each layer at least.
        parameters: parameters of one unit.
        step: smallest number of units, over all layers, that the allocation can remove.
    """

    units: list[int]
    fewest: list[int]
    parameters: int
    step: int

    @property
    def removable(self) -> int:
        """Number of parameters that can be removed."""
        return (sum(self.units) - sum(self.fewest)) * self.parameters


@dataclass(frozen=True)
class Budget:
    """A budget in units.

    Attributes:
        share: share of all parameters to remove.
        keep: for each part that is cut, the number of units to keep over all layers, not yet rounded. Empty where
            whole sublayers or layers go: `order.best_steps` says which.
        round_to: what MLP widths are multiples of.
        groups: number of groups of experts, all of which keep equally many.
        gone: with `units.MIXED`, the steps that go first; `keep` is of the MLPs that stay.
    """

    share: float
    keep: dict[str, float]
    round_to: int
    groups: int = 1
    gone: tuple[Step, ...] = ()


def units_to_keep(
    shape: Shape,
    ratio: float | None = None,
    ratio_of: str = "all",
    target_parameters: int | None = None,
    structure: str = "mlp",
    attention_share: float | None = None,
    allocation: str = "uniform",
    round_to: int | None = None,
    scores: Scores | None = None,
    depth_share: float | None = None,
    order: Sequence[Step] | None = None,
    experts_share: float | None = None,
) -> Budget:
    """The number of units to keep for a budget.

    Args:
        shape: of the dense model.
        ratio: share to remove of what `ratio_of` names; None where `target_parameters` is set.
        ratio_of: "all": of all parameters, tied embeddings counted once; "mlp": of the MLPs' neurons, all of one size.
        target_parameters: number of parameters to keep.
        structure: a name in `structures.STRUCTURES`.
        attention_share: with "mlp+attention", the share of the removed parameters that comes from attention. None:
            what attention loses in one ranking of all units of the model, by the allocation's `priority`.
        allocation: how the budget is shared among layers. It decides how many units a layer keeps at least.
        round_to: one of `STEPS`, of which MLP widths are multiples; None for `default_step`.
        scores: needed where two parts are cut without a share of one. Without them all removed parameters come from the
            neurons as far as possible, which is enough to see whether the budget can be met.
        depth_share: with `units.MIXED`, the share of the removed parameters that comes from whole sublayers or layers.
            None: with `units.TWO_STAGES`, 2SSP's split.
        order: of these, the first to go first; None: the last layers go first, which is enough to see the same.
        experts_share: with `units.WITH_EXPERTS`, the share of the removed parameters that comes from whole experts.
            None: that with which the scores of all that goes have the lowest sum.

    Raises:
        UserError: the structure cannot be cut, does not hold that much, or nothing would be removed.
    """
    if structure in DEPTH:
        _refuse_depth(shape, structure)
        return _depth_budget(shape, structure, ratio, target_parameters)
    if structure in MIXED:
        _refuse_depth(shape, structure)
        return _mixed_budget(shape, structure, ratio, target_parameters, allocation, round_to, depth_share, order)
    round_to, capacities = _capacities(shape, structure, allocation, round_to)
    if structure == WITH_EXPERTS:
        return _experts_budget(shape, ratio, target_parameters, round_to, experts_share, capacities, scores)
    total, removable = shape.total, _removable(shape, structure, capacities, round_to)
    of = total if ratio_of == "all" else sum(capacities["mlp"].units) * capacities["mlp"].parameters
    budget, remove, possible = _to_remove(total, removable, ratio, ratio_of, of, target_parameters)
    half_a_unit = min(capacity.parameters for capacity in capacities.values()) / 2
    if remove > removable + half_a_unit:
        rows = shape.mixture.rows if shape.mixture else lambda _part: 1
        least = " and ".join(
            f"{rows(name) * sum(capacity.fewest):,} of {rows(name) * sum(capacity.units):,} {UNITS[name]}"
            for name, capacity in capacities.items()
        )
        least += f" (a token is sent to {shape.mixture.chosen} of a layer)" if structure == "experts" else ""
        raise UserError(
            f"{budget}: takes {remove:,.0f} parameters. Structure {structure!r} with allocation {allocation!r} and "
            f"round_to {round_to} leaves at least {least}, and can remove {removable:,} parameters. The {possible}."
        )
    smallest = _smallest(capacities)
    if remove <= smallest / 2:
        raise UserError(
            f"{budget}: takes {remove:,.0f} parameters, less than half of the {smallest:,} that structure "
            f"{structure!r} with allocation {allocation!r} and round_to {round_to} removes at least "
            f"({smallest / total:.4g} of all parameters): nothing would go."
        )
    if len(capacities) == 1:
        removed = {structure: remove}
    else:
        removed = _split(capacities, remove, attention_share, allocation, scores)
    keep = {name: sum(capacity.units) - removed[name] / capacity.parameters for name, capacity in capacities.items()}
    return Budget(remove / total, keep, round_to, shape.mixture.groups if shape.mixture else 1)


def _capacities(shape: Shape, structure: str, allocation: str, round_to: int | None) -> tuple[int, dict[str, Capacity]]:
    """What MLP widths are multiples of, and by part that is cut how much of it can be removed.

    Raises:
        UserError: the structure cannot be cut so.
    """
    if faults := [shape.refusals[name] for name in STRUCTURES[structure] if name in shape.refusals]:
        raise UserError(f"structure {structure!r}: {faults[0]}")
    if shape.mixture:
        _refuse_widths(structure, allocation, round_to)
    elif faults := [name for name in STRUCTURES[structure] if 0 in shape.units[name]]:
        raise UserError(
            f"structure {structure!r}: the {faults[0]} of some layers is gone already. Cut sublayers or layers."
        )
    round_to = round_to or default_step(shape.hidden, EXPERT_STEPS if shape.mixture else DEFAULT_STEPS)
    return round_to, {name: capacity_of(shape, name, allocation, round_to) for name in STRUCTURES[structure]}


def _smallest(capacities: Mapping[str, Capacity]) -> int:
    """The fewest parameters that can be removed."""
    return min(capacity.step * capacity.parameters for capacity in capacities.values())


def _removable(shape: Shape, structure: str, capacities: Mapping[str, Capacity], round_to: int) -> int:
    """The most parameters that can be removed."""
    if structure == WITH_EXPERTS:
        whole = capacities["experts"]
        most = whole.removable // (whole.step * whole.parameters)
        return whole.removable + _inside(shape, most, round_to).removable
    return sum(capacity.removable for capacity in capacities.values())


def refuse_saving(
    shape: Shape, saving: Memory | Latency, ratio: float, structure: str, allocation: str, round_to: int | None
) -> None:
    """Refuse a ratio of memory or latency that the fewest units that can stay take more than.

    Raises:
        UserError: they do, or the structure cannot be cut.
    """
    round_to, capacities = _capacities(shape, structure, allocation, round_to)
    least = saving.share({name: capacity.fewest for name, capacity in capacities.items()})
    if least > 1 - ratio:
        raise UserError(
            f"ratio {ratio} of {saving.record['of']}: structure {structure!r} with allocation {allocation!r} and "
            f"round_to {round_to} leaves at least {math.ceil(least * 10_000) / 10_000} of it. The largest ratio that "
            f"allows is {max(0, math.floor((1 - least) * 10_000) / 10_000)}."
        )


def parameters_for(
    shape: Shape, saving: Memory | Latency, ratio: float, structure: str, allocation: str, round_to: int | None,
    widths: Callable[[int], Widths],
) -> int:  # fmt: skip
    """The largest `target_parameters` that saves this share of memory or latency.

    Args:
        shape, structure, allocation, round_to: see `units_to_keep`.
        saving: what the share is of.
        ratio: the share to save.
        widths: of the model that is cut to so many parameters.

    Raises:
        UserError: there is none.
    """
    refuse_saving(shape, saving, ratio, structure, allocation, round_to)
    round_to, capacities = _capacities(shape, structure, allocation, round_to)
    fewest = shape.total - _removable(shape, structure, capacities, round_to)
    most = shape.total - _smallest(capacities) // 2 - 1
    return largest_within(1 - ratio, fewest, most, lambda target: saving.share(widths(target)))


def refuse_method(shape: Shape, structure: str, criterion: str, refit: str) -> None:
    """Refuse a criterion or a refit that the structure, or the model, does not allow.

    Raises:
        UserError: there is one.
    """
    mixture = shape.mixture is not None
    if structure in (*DEPTH, *MIXED):
        _refuse_depth(shape, structure)
    ranked = () if structure in DEPTH else STRUCTURES[structure]
    if unranked := [part for part in ranked if not ranks(criterion, part, mixture)]:
        where = " inside experts" if mixture and unranked == ["mlp"] else ""
        raise UserError(
            f"criterion {criterion!r} does not rank {UNITS[unranked[0]]}{where}, which structure {structure!r} cuts. "
            f"Those that do: {', '.join(rankers(STRUCTURES[structure], mixture))}."
        )
    if mixture and refit not in ("none", *IN_EXPERTS.get(structure, ())):
        raise UserError(NO_REFIT.format(refit=refit))


def _refuse_depth(shape: Shape, structure: str) -> None:
    """Refuse to remove whole sublayers or layers where they have to stay, or go alone."""
    reason = shape.refusals.get(MIXED.get(structure, structure))
    if shape.mixture and structure in MIXED and not reason:
        reason = "whole layers of a mixture of experts go alone. Set it to 'layers'."
    if reason:
        raise UserError(f"structure {structure!r}: {reason}")


def _refuse_widths(structure: str, allocation: str, round_to: int | None) -> None:
    """Refuse, of a mixture of experts, a cut that would need widths per layer.

    Raises:
        UserError: it is such a cut.
    """
    if structure != WITH_EXPERTS and len(STRUCTURES[structure]) > 1:
        raise UserError(
            f"structure {structure!r}: of a mixture of experts, attention is cut alone. Set it to one of experts, mlp, "
            f"{WITH_EXPERTS}, attention."
        )
    if allocation != "uniform":
        raise UserError(
            f"allocation {allocation!r}: the config of a mixture of experts holds one number for all layers, so that "
            "all keep the same. Set it to 'uniform'."
        )
    if "mlp" in STRUCTURES[structure] and round_to and round_to < ALIGNED:
        raise UserError(
            f"round_to {round_to}: torch multiplies experts together, whose widths have to be multiples of {ALIGNED} "
            f"for that. Set it to {ALIGNED} or more."
        )


def _to_remove(
    total: int, removable: int, ratio: float | None, ratio_of: str, of: int, target_parameters: int | None
) -> tuple[str, float, str]:
    """A budget in words, the parameters to remove, and in words the budget that removes all that can be removed.

    Raises:
        UserError: the target is not smaller than the model.
    """
    if target_parameters is None:
        largest = math.floor(removable / of * 10_000) / 10_000
        return f"ratio {ratio} of {ratio_of} parameters", ratio * of, f"largest ratio that allows is {largest}"
    budget = f"target_parameters {target_parameters}"
    if target_parameters >= total:
        raise UserError(f"{budget}: the model has {total:,} parameters; the target has to be smaller.")
    return budget, float(total - target_parameters), f"smallest target_parameters that allows is {total - removable}"


def _depth_budget(shape: Shape, structure: str, ratio: float | None, target_parameters: int | None) -> Budget:
    """The budget where whole sublayers or layers go.

    Raises:
        UserError: they do not hold that much, or nothing would be removed.
    """
    sizes = removable_sizes(shape, structure)
    removable, smallest = sum(sizes), min(sizes, default=0)
    budget, remove, possible = _to_remove(shape.total, removable, ratio, "all", shape.total, target_parameters)
    stays = _stays(shape, structure)
    if not sizes:
        raise UserError(f"{budget}: structure {structure!r} leaves at least {stays}, and there is no more. Cut mlp.")
    if remove > removable + smallest / 2:
        raise UserError(
            f"{budget}: takes {remove:,.0f} parameters. Structure {structure!r} leaves at least {stays}, and can "
            f"remove {removable:,} parameters. The {possible}."
        )
    if remove <= smallest / 2:
        raise UserError(
            f"{budget}: takes {remove:,.0f} parameters, less than half of the {smallest:,} that structure "
            f"{structure!r} removes at least ({smallest / shape.total:.4g} of all parameters): nothing would go."
        )
    return Budget(remove / shape.total, {}, 1)


def _stays(shape: Shape, structure: str) -> str:
    """What a structure in `units.DEPTH` leaves at least, in words."""
    kinds = ["attention"] * (not all(shape.caches)) + ["experts"] * (shape.mixture is not None)
    return STAYS[structure] + (f" with {' and one with '.join(kinds)}" if kinds else "")


def _mixed_budget(
    shape: Shape, structure: str, ratio: float | None, target_parameters: int | None, allocation: str,
    round_to: int | None, depth_share: float | None, order: Sequence[Step] | None,
) -> Budget:  # fmt: skip
    """The budget where some sublayers or layers go, and neurons of the MLPs that stay make up the rest.

    Raises:
        UserError: one of the two cannot give its share.
    """
    if "mlp" in shape.refusals:
        raise UserError(f"structure {structure!r}: {shape.refusals['mlp']}")
    depth, round_to = MIXED[structure], round_to or default_step(shape.hidden)
    sizes, stays = removable_sizes(shape, depth), _stays(shape, depth)
    removable, smallest = sum(sizes), min(sizes, default=0)
    budget, remove, _ = _to_remove(shape.total, removable, ratio, "all", shape.total, target_parameters)
    if not sizes:
        raise UserError(f"{budget}: structure {structure!r} leaves at least {stays}: none can go. Cut mlp.")
    of_depth = depth_share * remove if depth_share else attention_of_two_stages(shape, remove)
    asked = f"{budget} with {f'depth_share {depth_share}' if depth_share else 'the split of 2SSP'}: "
    asked += f"{depth} take {of_depth:,.0f} of {remove:,.0f} parameters"
    if of_depth > removable + smallest / 2:
        raise UserError(
            f"{asked}, of which {removable:,} can be removed where at least {stays} stays. The largest "
            f"depth_share that allows is {math.floor(removable / remove * 10_000) / 10_000}."
        )
    if depth_share and of_depth <= smallest / 2:
        larger = math.ceil(smallest / 2 / remove * 10_000) / 10_000
        remedy = f"Set a depth_share above {larger}" if smallest < remove else "Remove more, or cut mlp"
        raise UserError(
            f"{asked}, less than half of the smallest of them, which has {smallest:,}: none would go. {remedy}."
        )
    gone = best_steps(shape, order or those_that_go(shape, steps_of(shape, depth)[::-1]), of_depth)
    capacity, rest = capacity_of(without(shape, gone), "mlp", allocation, round_to), remove - removed_by(shape, gone)
    asked += f", and {remove - rest:,.0f} go with whole ones"
    least = capacity.step * capacity.parameters
    if rest > capacity.removable + capacity.parameters / 2:
        raise UserError(
            f"{asked}. Neurons have to make up {rest:,.0f}; with allocation {allocation!r} and round_to {round_to} the "
            f"MLPs that stay can give {capacity.removable:,}. Set a larger depth_share, or remove less."
        )
    if rest <= least / 2:
        raise UserError(
            f"{asked}. Neurons have to make up {max(0, rest):,.0f}, less than half of the {least:,} that they give at "
            f"least with allocation {allocation!r} and round_to {round_to}: none would go. Set a smaller depth_share, "
            f"or structure {depth!r}."
        )
    keep = {"mlp": sum(capacity.units) - rest / capacity.parameters}
    return Budget(remove / shape.total, keep, round_to, gone=tuple(gone))


def attention_of_two_stages(shape: Shape, remove: float) -> int:
    """2SSP's split: the parameters of the attention sublayers that go, of those to remove.

    With s the share of the layers' parameters to remove, round(L s**((P_mlp / P_attention) / `BALANCE`)) of the L
    attention sublayers go: few if the share is small or MLPs are large. At least one stays.
    """
    sizes = [size for size in shape.sublayers["attention"] if size]
    share = min(1.0, remove / sum(shape.layers))
    count = round(len(sizes) * share ** (sum(shape.sublayers["mlp"]) / sum(shape.sublayers["attention"]) / BALANCE))
    return min(count, len(sizes) - 1) * max(sizes)


def _experts_budget(
    shape: Shape, ratio: float | None, target_parameters: int | None, round_to: int, experts_share: float | None,
    capacities: Mapping[str, Capacity], scores: Scores | None,
) -> Budget:  # fmt: skip
    """The budget where some experts go, and neurons inside those that stay make up the rest.

    Raises:
        UserError: one of the two cannot give its share, or both together do not hold that much.
    """
    counts, whole = shape.mixture, capacities["experts"]
    at_once = whole.step * whole.parameters  # an expert of every group of every layer
    most, inside = whole.removable // at_once, partial(_inside, shape, round_to=round_to)
    removable = _removable(shape, WITH_EXPERTS, capacities, round_to)
    budget, remove, possible = _to_remove(shape.total, removable, ratio, "all", shape.total, target_parameters)
    where = f"Structure {WITH_EXPERTS!r} with round_to {round_to}"
    if experts_share is None:
        rests = {gone: remove - gone * at_once for gone in range(most + 1)}
        rests = {gone: rest for gone, rest in rests.items() if _gives(inside(gone), rest, at_once if gone else 0)}
        if not rests:
            raise UserError(
                f"{budget}: takes {remove:,.0f} parameters. {where} can remove {removable:,}, and no fewer than "
                f"{min(at_once, inside(0).step * inside(0).parameters):,}. The {possible}."
            )
        gone = _cheapest(shape, {gone: _width(inside(gone), rest, round_to) for gone, rest in rests.items()}, scores)
    else:
        wanted = experts_share * remove
        gone, asked = round(wanted / at_once), f"{budget} with experts_share {experts_share}"
        asked += f": experts take {wanted:,.0f} of {remove:,.0f} parameters"
        if gone > most:
            raise UserError(
                f"{asked}, of which {most * at_once:,} can be removed (a token is sent to {counts.chosen} of a layer). "
                f"The largest experts_share that allows is {math.floor(most * at_once / remove * 10_000) / 10_000}."
            )
        if not gone:
            larger = math.ceil(at_once / 2 / remove * 10_000) / 10_000
            remedy = f"Set an experts_share above {larger}" if larger < 1 else "Remove more, or cut mlp"
            raise UserError(
                f"{asked}, less than half of the {at_once:,} that one expert of every group and layer has: none would "
                f"go. {remedy}."
            )
        neurons, rest = inside(gone), remove - gone * at_once
        least = neurons.step * neurons.parameters
        asked += f", and {gone * at_once:,} go with whole ones. Neurons inside the others have to make up "
        if rest > neurons.removable + neurons.parameters / 2:
            raise UserError(
                f"{asked}{rest:,.0f}; with round_to {round_to} they can give {neurons.removable:,}. Set a larger "
                "experts_share, or remove less."
            )
        if rest <= least / 2:
            raise UserError(
                f"{asked}{max(0, rest):,.0f}, less than half of the {least:,} that they give at least with round_to "
                f"{round_to}: none would go. Set a smaller experts_share, or structure 'experts'."
            )
    neurons, rest = inside(gone), max(0, remove - gone * at_once)
    keep = {"experts": sum(whole.units) - gone * whole.step, "mlp": sum(neurons.units) - rest / neurons.parameters}
    return Budget(remove / shape.total, keep, round_to, counts.groups)


def _inside(shape: Shape, gone: int, round_to: int) -> Capacity:
    """The neurons inside the experts that stay where so many of every group go."""
    counts = shape.mixture
    neuron = shape.parameters["mlp"] // counts.count * (counts.count - gone * counts.groups)
    left = replace(shape, parameters=shape.parameters | {"mlp": neuron})
    return capacity_of(left, "mlp", "uniform", round_to)


def _gives(neurons: Capacity, rest: float, whole: int) -> bool:
    """Whether neurons can make up so many parameters, to half of what can go at least.

    Args:
        neurons: inside the experts that stay.
        rest: less than 0 if more have gone with whole experts than are to go.
        whole: parameters of the experts that go at once; 0 if none go, so that some neurons have to.
    """
    least = neurons.step * neurons.parameters
    lowest = -min(whole, least) / 2 if whole else least / 2
    return lowest < rest <= neurons.removable + neurons.parameters / 2


def _width(neurons: Capacity, rest: float, round_to: int) -> int:
    """How many neurons an expert keeps where so many parameters go in all."""
    width, layers = max(neurons.units), neurons.step // round_to
    kept = round((width - max(0, rest) / neurons.parameters / layers) / round_to) * round_to
    return max(round_to, min(kept, width // round_to * round_to))


def _cheapest(shape: Shape, widths: Mapping[int, int], scores: Scores | None) -> int:
    """How many experts of every group go where all that goes has the lowest scores together; the fewest without scores.

    Args:
        shape: of the model.
        widths: how many neurons stay in each expert, by how many experts go.
        scores: of experts and neurons.
    """
    lost = dict.fromkeys(widths, 0.0)
    for experts, neurons in zip(scores["experts"], scores["mlp"], strict=True) if scores else ():
        if not len(experts):
            continue
        worst_first = experts.double().unflatten(0, (shape.mixture.groups, -1)).sort(dim=1, stable=True)
        sums = neurons.double().sort(1).values.cumsum(1)  # of each expert's lowest one, two, ... neurons
        by_group = sums.unflatten(0, (shape.mixture.groups, -1))
        by_group = by_group.gather(1, worst_first.indices[..., None].expand_as(by_group))
        for gone, width in widths.items():
            silent = sums.shape[1] - width
            lost[gone] += worst_first.values[:, :gone].sum().item()
            lost[gone] += by_group[:, gone:, silent - 1].sum().item() if silent else 0.0
    return min(lost, key=lost.get)


def without(shape: Shape, gone: Sequence[Step]) -> Shape:
    """The shape of a model's MLPs that stay without these steps. `total` is of the whole model that is left."""
    sublayers = {sublayer for step in gone for sublayer in step}
    staying = [units for number, units in enumerate(shape.units["mlp"]) if units and ("mlp", number) not in sublayers]
    return replace(shape, total=shape.total - removed_by(shape, gone), units={"mlp": staying})


def capacity_of(shape: Shape, name: str, allocation: str, round_to: int) -> Capacity:
    """How much of a part can be removed.

    Raises:
        UserError: a layer is narrower than the fewest units to keep.
    """
    units, step = shape.units[name], round_to if name == "mlp" else 1
    fewest = fewest_kept(allocation, units, step)
    if name == "experts":
        fewest = [min(width, shape.mixture.fewest) for width in units]
    if too_wide := [width for width, least in zip(units, fewest, strict=True) if least > width]:
        raise UserError(f"round_to {round_to}: a layer has only {too_wide[0]} neurons; set a smaller `round_to`.")
    layers = sum(map(bool, units)) if allocation == "uniform" else 1  # all of them at a time, or each alone
    return Capacity(units, fewest, shape.parameters[name], step * layers)


def _split(
    capacities: Mapping[str, Capacity],
    remove: float,
    attention_share: float | None,
    allocation: str,
    scores: Scores | None,
) -> dict[str, float]:
    """Number of parameters to remove from each part: whole groups from attention, the rest from neurons.

    Raises:
        UserError: a part has fewer removable parameters than its share of the budget.
    """
    mlp, attention = capacities["mlp"], capacities["attention"]
    if attention_share is None:
        groups = _groups_among_the_lowest(capacities, remove, allocation, scores) if scores else 0
    else:
        groups = attention_share * remove / attention.parameters
        for name, wanted in (("attention", attention_share * remove), ("mlp", (1 - attention_share) * remove)):
            if wanted > capacities[name].removable:
                fitting = 1 - mlp.removable / remove if name == "mlp" else attention.removable / remove
                raise UserError(
                    f"attention_share {attention_share}: takes {wanted:,.0f} parameters of {name}, of which "
                    f"{capacities[name].removable:,} can be removed. The {'smallest' if name == 'mlp' else 'largest'} "
                    f"attention_share that allows is {fitting:.4f}."
                )
    # A group is large: never remove more of them than the budget, as long as neurons can make up the rest.
    needed = math.ceil((remove - mlp.removable) / attention.parameters / attention.step) * attention.step
    allowed = math.floor(remove / attention.parameters / attention.step) * attention.step
    removed_groups = max(needed, 0, min(allowed, round(groups / attention.step) * attention.step))
    removed_groups = min(removed_groups, sum(attention.units) - sum(attention.fewest))
    from_attention = removed_groups * attention.parameters
    return {"attention": from_attention, "mlp": max(0.0, remove - from_attention)}


def _groups_among_the_lowest(capacities: Mapping[str, Capacity], remove: float, allocation: str, scores: Scores) -> int:
    """Number of key-value groups among the removed units when the lowest go by the allocation's order of both parts.

    The `fewest` best units of every layer always stay.
    """
    import torch

    names, values, sizes = [], [], []
    for name, capacity in capacities.items():
        for layer, least in zip(scores[name], capacity.fewest, strict=True):
            priority = ALLOCATIONS[allocation].priority(layer.double(), capacity.parameters)
            free = priority.sort(descending=True).values[least:]
            values.append(free)
            sizes.append(torch.full_like(free, capacity.parameters))
            names.append(torch.full_like(free, name == "attention"))
    order = torch.cat(values).argsort(stable=True)
    cumulative = torch.cat(sizes)[order].cumsum(0)
    removed = order[cumulative <= remove]
    return int(torch.cat(names)[removed].sum())


def check(folder: Path, cuts: list[dict[str, Any]]) -> None:
    """Refuse, before anything is scored, cuts whose budget the checkpoint in `folder` cannot meet.

    Args:
        folder: of the dense checkpoint.
        cuts: settings `BUDGET` of cuts, those that are not the defaults, with `criterion` and `refit`.

    Raises:
        UserError: one line for each that cannot be made.
    """
    try:
        shape = shape_on_disk(folder)
    except (KeyError, StopIteration):  # the family, or a key for which transformers has a default: `prune` will see
        return
    faults = []
    for cut in cuts:
        method = {name: cut[name] for name in METHOD}
        budget = {name: cut[name] for name in cut if name not in (*METHOD, *SAVINGS.values())}
        try:
            refuse_method(shape, cut["structure"], **method)
            if saving := _saving_on_disk(folder, shape, cut):
                names = ("ratio", "structure", "allocation", "round_to")
                refuse_saving(shape, saving, **{name: budget[name] for name in names})
            else:
                units_to_keep(shape, **budget)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))


def _saving_on_disk(folder: Path, shape: Shape, cut: Mapping[str, Any]) -> Memory | Latency | None:
    """What the ratio of a cut of the checkpoint in `folder` is of, see `saving_of`."""
    if (ratio_of := cut.get("ratio_of", "all")) not in SAVINGS:
        return None
    config = None
    if ratio_of == "memory":
        from hfprune.models.widths import read_config

        config = read_config(folder)
    return saving_of(shape, ratio_of, cut["structure"], config, cut["context"], cut["latencies"])

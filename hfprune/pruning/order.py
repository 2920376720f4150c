"""The order in which whole sublayers or layers go, and how far down that order a budget reaches.

A *sublayer* is the attention or the MLP of one layer. An order lists *steps*: the sublayers that go together, which are
both of a layer where whole layers go.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfprune.models.units import IN_TURN, MIXED, PARTS, TWO_STAGES, Kept, Sublayer

if TYPE_CHECKING:  # a workflow refuses budgets without paying for torch
    from hfprune.pruning.budget import Shape

Step = tuple[Sublayer, ...]
CRITERIA = {  # what orders steps, and where it comes from
    "block_influence": "1 - cosine of what enters and what leaves: ShortGPT, arXiv 2403.03853",
    "greedy_kl": "KL to the dense model for each parameter freed, measured anew after each step: after FinerCut, arXiv "
    "2405.18218",
    "greedy_perplexity": "perplexity of the text, measured anew after each step: SLEB, arXiv 2402.09025; BlockPruner, "
    "arXiv 2406.10594",
}
SEARCHES = ("greedy_kl", "greedy_perplexity")  # those that measure
BESIDE_NEURONS = dict.fromkeys(MIXED, "greedy_kl") | {TWO_STAGES: "greedy_perplexity"}  # orders what goes whole


def steps_of(units: dict[str, list[int]], structure: str) -> list[Step]:
    """Every step that a structure allows, in the order of the model.

    Args:
        units: by part, those of each layer. A sublayer without units is gone already.
        structure: a name in `units.DEPTH`.
    """
    names = ("attention",) if structure == "attention_sublayers" else IN_TURN
    layers = [[(name, number) for name in names if units[name][number]] for number in range(len(units["mlp"]))]
    if structure == "layers":
        return [tuple(layer) for layer in layers if layer]
    return [(sublayer,) for layer in layers for sublayer in layer]


def may_go(step: Step, steps: Sequence[Step]) -> bool:
    """Whether a part of each kind is left without a step, of all `steps`."""
    return _kinds(steps) == _kinds(other for other in steps if other != step)


def _kinds(steps: Iterable[Step]) -> set[str]:
    return {name for step in steps for name, _ in step}


def removable_sizes(shape: Shape, structure: str) -> list[int]:
    """Parameters of the steps that can go, the smallest first, where a part of each kind stays."""
    remaining, sizes = steps_of(shape.units, structure), []
    for step in sorted(remaining, key=lambda step: size_of(shape, step)):
        if may_go(step, remaining):
            remaining.remove(step)
            sizes.append(size_of(shape, step))
    return sizes


def size_of(shape: Shape, step: Step) -> int:
    """Parameters that go with a step."""
    number = step[0][1]
    whole = sum(shape.units[name][number] > 0 for name in PARTS)
    if len(step) == whole:  # nothing of the layer is left, no norm either
        return shape.layers[number]
    return sum(shape.sublayers[name][number] for name, number in step)


def removed_by(shape: Shape, steps: Sequence[Step]) -> int:
    """Parameters that go with all of these steps together."""
    gone: dict[int, list[Sublayer]] = {}
    for step in steps:
        gone.setdefault(step[0][1], []).extend(step)
    return sum(size_of(shape, tuple(sublayers)) for sublayers in gone.values())


def best_steps(shape: Shape, order: Sequence[Step], remove: float) -> list[Step]:
    """The steps that a budget takes: those first in order that fit.

    One fits if it exceeds what is still to be removed by no more than half of the smallest step. So the budget is met
    to within that half as long as small ones are left. After that, larger ones go if they bring the sum nearer to it.

    Args:
        shape: of the model.
        order: its steps, the first to go first.
        remove: number of parameters.
    """
    smallest = min((size_of(shape, step) for step in order), default=0)
    taken: list[Step] = []
    for most in (smallest / 2, None):
        for step in order:
            size = size_of(shape, step)
            if step not in taken and size <= remove + (size / 2 if most is None else most):
                taken.append(step)
                remove -= size
    return taken


def kept_without(units: dict[str, list[int]], gone: Iterable[Step]) -> Kept:
    """All units but those of the steps that go.

    Args:
        units: by part, those of each layer.
        gone: the steps.
    """
    import torch

    sublayers = {sublayer for step in gone for sublayer in step}
    return {
        name: [torch.arange(0 if (name, number) in sublayers else count) for number, count in enumerate(units[name])]
        for name in PARTS
    }


def save_order(file: Path, order: Sequence[Step], measures: Sequence[float]) -> None:
    """Write an order, with the measure by which each step was chosen."""
    lines = [{"sublayers": step, "measure": measure} for step, measure in zip(order, measures, strict=True)]
    file.write_text(json.dumps(lines) + "\n", encoding="utf-8")


def read_order(file: Path) -> tuple[list[Step], list[float]]:
    """Read a file written by `save_order`."""
    lines = json.loads(file.read_text(encoding="utf-8"))
    order = [tuple((name, number) for name, number in line["sublayers"]) for line in lines]
    return order, [line["measure"] for line in lines]

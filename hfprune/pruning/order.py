"""The order in which whole sublayers or layers go, and how far down that order a budget reaches.

A *sublayer* is the attention or the MLP of one layer, or its experts. An order lists *steps*: the sublayers that go
together, which are both of a layer where whole layers go.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfprune.models.units import MIXED, TWO_STAGES, Kept, Sublayer

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


def ordered(structure: str, share: float | None) -> str:
    """The structure of the order by which a cut removes what goes whole.

    Args:
        structure: of the cut, in `units.DEPTH` or `units.MIXED`.
        share: its depth_share. None with 2SSP's structure: the order then knows how many that method removes.
    """
    return structure if structure == TWO_STAGES and share is None else MIXED.get(structure, structure)


def steps_of(shape: Shape, structure: str) -> list[Step]:
    """Every step that a structure allows, in the order of the model.

    Args:
        shape: of the model. A sublayer without units is gone already, or there are dense layers among others.
        structure: a name in `units.DEPTH`.
    """
    whole = shape.whole
    names = ("attention",) if structure == "attention_sublayers" else [*whole]
    layers = [[(name, number) for name in names if whole[name][number]] for number in range(len(shape.layers))]
    if structure == "layers":
        return [tuple(layer) for layer in layers if layer]
    return [(sublayer,) for layer in layers for sublayer in layer]


def may_go(shape: Shape, step: Step, steps: Sequence[Step]) -> bool:
    """Whether a part of each kind is left without a step, of all `steps`, in a model of this shape."""
    return _kinds(shape, steps) == _kinds(shape, (other for other in steps if other != step))


def _kinds(shape: Shape, steps: Iterable[Step]) -> set[str]:
    """What parts there are in these steps, and whether one keeps keys and values, by which a cache counts tokens."""
    sublayers = [sublayer for step in steps for sublayer in step]
    caches = {"cache" for name, number in sublayers if name == "attention" and shape.caches[number]}
    return {name for name, _ in sublayers} | caches


def those_that_go(shape: Shape, steps: Sequence[Step]) -> list[Step]:
    """The steps in their order, but for those that have to stay, so that a part of each kind is left.

    Args:
        shape: of the model.
        steps: all of them, the first to go first.
    """
    remaining, gone = list(steps), []
    for step in steps:
        if may_go(shape, step, remaining):
            remaining.remove(step)
            gone.append(step)
    return gone


def removable_sizes(shape: Shape, structure: str) -> list[int]:
    """Parameters of the steps that can go, the smallest first, where a part of each kind stays."""
    steps = sorted(steps_of(shape, structure), key=lambda step: size_of(shape, step))
    return [size_of(shape, step) for step in those_that_go(shape, steps)]


def size_of(shape: Shape, step: Step) -> int:
    """Parameters that go with a step."""
    number = step[0][1]
    whole = sum(layers[number] > 0 for layers in shape.whole.values())
    if len(step) == whole:  # nothing of the layer is left, no norm either
        return shape.layers[number]
    return sum(shape.sublayers[name][number] for name, number in step)


def removed_by(shape: Shape, steps: Sequence[Step]) -> int:
    """Parameters that go with all of these steps together."""
    gone: dict[int, list[Sublayer]] = {}
    for step in steps:
        gone.setdefault(step[0][1], []).extend(step)
    return sum(size_of(shape, tuple(sublayers)) for sublayers in gone.values())


def next_steps(shape: Shape, steps: Sequence[Step], gone: Sequence[Step], share: float) -> list[Step]:
    """The steps that may go after others; none if a budget of this share is met, see `best_steps`.

    Args:
        shape: of the model.
        steps: all that the structure allows.
        gone: those that went.
        share: of all parameters.
    """
    smallest, before = min((size_of(shape, step) for step in steps), default=0), set(gone)
    if share * shape.total - sum(size_of(shape, step) for step in gone) < smallest / 2:
        return []
    remaining = [step for step in steps if step not in before]
    return [step for step in remaining if may_go(shape, step, remaining)]


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


def kept_without(shape: Shape, gone: Iterable[Step]) -> Kept:
    """All units but those of the steps that go, of a model of this shape."""
    import torch

    sublayers = {sublayer for step in gone for sublayer in step}
    return {
        name: [torch.arange(0 if (name, number) in sublayers else count) for number, count in enumerate(layers)]
        for name, layers in shape.whole.items()
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

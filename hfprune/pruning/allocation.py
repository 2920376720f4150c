"""From scores and a budget to the units to keep: a registry of allocations.

An allocation decides how *wide* each layer is after the cut. Each layer then keeps its units with the highest scores.

To add one: write its function and a line in `ALLOCATIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config reads the names of the allocations without paying for torch
    from torch import Tensor


def per_parameter(scores: Tensor, parameters: int) -> Tensor:
    """How much score the parameters of a unit buy."""
    return scores / parameters


def standard_scores(scores: Tensor, _parameters: int = 1) -> Tensor:
    """z-scores of one layer's units: (s - mean) / standard deviation; all 0 where the scores are equal."""
    centred = scores - scores.mean()
    deviation = centred.norm() / math.sqrt(max(1, len(scores) - 1))
    return centred / deviation if deviation > 0 else centred


@dataclass(frozen=True)
class Allocation:
    """A way to share a budget among the layers.

    Attributes:
        widths: a function of (scores, keep, fewest, step) that returns the number of units to keep in each layer. The
            arguments are the scores of every layer, (units,) each; the number of units to keep over all layers, not
            yet rounded; the fewest units to keep in each layer; and the step. Results are multiples of the step and at
            least `fewest`.
        floor: share of each layer's units that always stays; at least one step stays.
        source: the publication.
        priority: where neurons and key-value groups are ranked together, the order in which units stay: a function of
            one layer's float64 scores and the parameters of one unit.
    """

    widths: Callable[[list[Tensor], float, list[int], int], list[int]]
    floor: float
    source: str
    priority: Callable[[Tensor, int], Tensor] = per_parameter


def uniform(scores: list[Tensor], keep: float, fewest: list[int], step: int) -> list[int]:
    """The same share of every layer, each rounded to the nearest multiple of `step`."""
    share = keep / sum(map(len, scores))
    return [
        max(least, min(step * round(share * len(layer) / step), len(layer) // step * step))
        for layer, least in zip(scores, fewest, strict=True)
    ]


def ranked_together(scores: list[Tensor], keep: float, fewest: list[int], step: int) -> list[int]:
    """The best units of the whole model, after the `fewest` best of every layer.

    Each layer's units, best first, form blocks of `step`. Within a layer, blocks get worse. So the best blocks of all
    layers maximise the sum of the kept scores, among all widths that are multiples of `step`.
    """
    blocks: list[tuple[float, int]] = []
    for number, (layer, least) in enumerate(zip(scores, fewest, strict=True)):
        best_first = layer.double().sort(descending=True).values[least : len(layer) // step * step]
        blocks += [(gain, number) for gain in best_first.view(-1, step).sum(1).tolist()]
    blocks.sort(key=lambda block: -block[0])  # stable: among equals the first layer's
    widths = list(fewest)
    for _, number in blocks[: max(0, round(keep / step) - sum(fewest) // step)]:
        widths[number] += step
    return widths


def standardized(scores: list[Tensor], keep: float, fewest: list[int], step: int) -> list[int]:
    """As `ranked_together`, of z-scores: for criteria whose scores have a scale of their own in each layer."""
    return ranked_together([standard_scores(layer.double()) for layer in scores], keep, fewest, step)


ALLOCATIONS = {
    "uniform": Allocation(uniform, 0.0, "High-Fidelity Pruning, arXiv 2603.08083"),
    "global": Allocation(ranked_together, 0.1, "one ranking over all layers, as LLM-Pruner's, arXiv 2305.11627"),
    "standardized": Allocation(
        standardized, 0.1, "one ranking of z-scores, after FLAP, arXiv 2312.11983", standard_scores
    ),
}


def fewest_kept(allocation: str, widths: list[int], step: int) -> list[int]:
    """The fewest units that an allocation keeps in layers of these widths: its floor, rounded up to whole steps."""
    return [step * max(1, math.ceil(ALLOCATIONS[allocation].floor * width / step)) for width in widths]


def allocate(allocation: str, scores: list[Tensor], keep: float, step: int) -> list[Tensor]:
    """The units to keep.

    Args:
        allocation: a name in `ALLOCATIONS`.
        scores: (units,) for each layer.
        keep: number of units to keep over all layers; a fraction is rounded. Outside what the allocation allows, the
            nearest allowed number counts.
        step: every layer keeps a multiple of it.

    Returns:
        For each layer the int64 indices to keep, ascending. Among equal scores the lower index stays.

    Raises:
        AssertionError: the allocation misses the number by more than rounding to `step` explains.
    """
    fewest = fewest_kept(allocation, [len(layer) for layer in scores], step)
    widths = ALLOCATIONS[allocation].widths(scores, keep, fewest, step)
    widest = sum(len(layer) // step * step for layer in scores)
    target = min(max(keep, sum(fewest)), widest)  # the nearest number that whole steps allow
    assert abs(sum(widths) - target) <= step * len(scores), (
        f"allocation {allocation!r} keeps {sum(widths)} units of {target:.1f}: a fault of the allocation"
    )
    return [
        layer.sort(dim=-1, descending=True, stable=True).indices[:width].sort().values
        for layer, width in zip(scores, widths, strict=True)
    ]

"""From scores and a budget to the neurons that stay: a registry of ways to share the budget among the layers.

An allocation decides how *wide* each layer stays. Which neurons those are, their scores say: the best of each layer.

To add one: write its function and its line in `ALLOCATIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config reads the names of the allocations without paying for torch
    from torch import Tensor


@dataclass(frozen=True)
class Allocation:
    """A way to share a budget among the layers.

    Attributes:
        widths: the scores of every layer, (neurons,) each; how many neurons stay in all, as the budget asks, not yet
            rounded; the fewest that may stay in each layer, multiples of the step; the step -> how many stay in each
            layer, multiples of the step, no fewer than the fewest.
        floor: the share of each layer's neurons that stays in any case; at least one step does.
        source: where it comes from.
    """

    widths: Callable[[list[Tensor], float, list[int], int], list[int]]
    floor: float
    source: str


def uniform(scores: list[Tensor], keep: float, fewest: list[int], step: int) -> list[int]:
    """The same share of every layer, each rounded to the nearest multiple of `step`."""
    share = keep / sum(map(len, scores))
    return [
        max(least, min(step * round(share * len(layer) / step), len(layer) // step * step))
        for layer, least in zip(scores, fewest, strict=True)
    ]


def ranked_together(scores: list[Tensor], keep: float, fewest: list[int], step: int) -> list[int]:
    """The best neurons of the whole model, beside the `fewest` best of every layer.

    Each layer's neurons, best first, are taken `step` at a time. As such blocks get worse within a layer, taking the
    best blocks of all layers maximises the sum of the scores kept among all widths that are multiples of `step`.
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


ALLOCATIONS = {
    "uniform": Allocation(uniform, 0.0, "High-Fidelity Pruning, arXiv 2603.08083"),
    "global": Allocation(ranked_together, 0.1, "one ranking over all layers, as LLM-Pruner's, arXiv 2305.11627"),
}


def fewest_kept(allocation: str, widths: list[int], step: int) -> list[int]:
    """The fewest neurons that an allocation leaves in layers of these widths: its floor, rounded up to `step`s."""
    return [step * max(1, math.ceil(ALLOCATIONS[allocation].floor * width / step)) for width in widths]


def allocate(allocation: str, scores: list[Tensor], keep: float, step: int) -> list[Tensor]:
    """The neurons that stay.

    Args:
        allocation: a name in `ALLOCATIONS`.
        scores: (neurons,) per layer.
        keep: how many stay in all; a fraction is rounded. Between what `fewest_kept` adds up to and all of them.
        step: every layer keeps a multiple of it, and has at least one.

    Returns:
        Per layer the int64 indices that stay, ascending. Among equal scores the lower index stays.

    Raises:
        AssertionError: the allocation keeps more or fewer than was asked for, by more than rounding to `step` explains.
    """
    fewest = fewest_kept(allocation, [len(layer) for layer in scores], step)
    widths = ALLOCATIONS[allocation].widths(scores, keep, fewest, step)
    widest = sum(len(layer) // step * step for layer in scores)
    target = min(max(keep, sum(fewest)), widest)  # nearest to the budget that whole steps can come
    assert abs(sum(widths) - target) <= step * len(scores), (
        f"allocation {allocation!r} keeps {sum(widths)} units of {target:.1f}: a fault of the allocation"
    )
    return [
        layer.sort(dim=-1, descending=True, stable=True).indices[:width].sort().values
        for layer, width in zip(scores, widths, strict=True)
    ]

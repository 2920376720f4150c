"""From scores and a budget to the units to keep: a registry of allocations.

An allocation decides how *wide* each layer is after the cut. Each layer then keeps its units with the highest scores.

To add one: write its function and a line in `ALLOCATIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
class Layers:
    """What an allocation may read of the layers.

    Attributes:
        scores: (units,) for each layer; (rows, units) where each row keeps its own, such as the experts of a layer.
        influence: (layers,) float64, how far each layer turns the residual stream, by the measure that the allocation
            names; None if it names none.
    """

    scores: list[Tensor]
    influence: Tensor | None = None

    @property
    def units(self) -> list[int]:
        """How many units each layer has, or each of its rows."""
        return [layer.shape[-1] for layer in self.scores]


@dataclass(frozen=True)
class Allocation:
    """A way to share a budget among the layers.

    Attributes:
        widths: a function of (layers, keep, fewest, step) that returns the number of units to keep in each layer. The
            arguments are what it may read of the layers; the number of units to keep over all layers, not yet rounded;
            the fewest units to keep in each layer; and the step. Results are multiples of the step and at least
            `fewest`.
        floor: share of each layer's units that always stays; at least one step stays.
        source: the publication.
        priority: where neurons and key-value groups are ranked together, the order in which units stay: a function of
            one layer's float64 scores and the parameters of one unit.
        influence: the measure of the layers' influence that it reads, see `influence.py`. It takes a forward pass over
            the calibration text.
    """

    widths: Callable[[Layers, float, list[int], int], list[int]]
    floor: float
    source: str
    priority: Callable[[Tensor, int], Tensor] = per_parameter
    influence: Literal["angle", "cosine"] | None = None


def uniform(layers: Layers, keep: float, fewest: list[int], step: int) -> list[int]:
    """The same share of every layer, each rounded to the nearest multiple of `step`."""
    share = keep / sum(layers.units)
    return [
        max(least, min(step * round(share * units / step), units // step * step))
        for units, least in zip(layers.units, fewest, strict=True)
    ]


def ranked_together(layers: Layers, keep: float, fewest: list[int], step: int) -> list[int]:
    """The best units of the whole model, after the `fewest` best of every layer.

    Each layer's units, best first, form blocks of `step`. Within a layer, blocks get worse. So the best blocks of all
    layers maximise the sum of the kept scores, among all widths that are multiples of `step`.
    """
    blocks: list[tuple[float, int]] = []
    for number, (layer, least) in enumerate(zip(layers.scores, fewest, strict=True)):
        best_first = layer.double().sort(descending=True).values[least : len(layer) // step * step]
        blocks += [(gain, number) for gain in best_first.view(-1, step).sum(1).tolist()]
    blocks.sort(key=lambda block: -block[0])  # stable: among equals the first layer's
    widths = list(fewest)
    for _, number in blocks[: max(0, round(keep / step) - sum(fewest) // step)]:
        widths[number] += step
    return widths


def standardized(layers: Layers, keep: float, fewest: list[int], step: int) -> list[int]:
    """As `ranked_together`, of z-scores: for criteria whose scores have a scale of their own in each layer."""
    z_scores = [standard_scores(layer.double()) for layer in layers.scores]
    return ranked_together(Layers(z_scores), keep, fewest, step)


def by_shares(shares: Callable[[Layers, float], list[float]]) -> Callable[[Layers, float, list[int], int], list[int]]:
    """Widths from the share of each layer to keep: a function of the layers and the mean share.

    The shares are kept within what a layer can keep, and all of them are moved by one number until they meet the
    budget. What is left by rounding down to steps goes to the layers that lost most by it.
    """

    def widths(layers: Layers, keep: float, fewest: list[int], step: int) -> list[int]:
        widest = [units // step * step for units in layers.units]
        wanted = shares(layers, keep / sum(layers.units))

        def moved(by: float) -> list[float]:
            return [
                min(max((share + by) * units, least), most)
                for share, units, least, most in zip(wanted, layers.units, fewest, widest, strict=True)
            ]

        low, high = -1 - max(wanted), 1 - min(wanted)  # all layers at their fewest, all at their widest
        for _ in range(64):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(moved(middle)) < keep else (low, middle)
        exact = moved(high)
        whole = [int(width // step * step) for width in exact]
        most_lost = sorted(range(len(exact)), key=lambda number: whole[number] - exact[number])
        for number in most_lost[: round((min(keep, sum(widest)) - sum(whole)) / step)]:
            whole[number] = min(whole[number] + step, widest[number])
        return whole

    return widths


TURNS = 128 * 1024 / 10_000  # CFSP sums angles over 128 x 1024 tokens and divides by 10,000; here they are means


def angular(layers: Layers, share: float) -> list[float]:
    """CFSP: shares in proportion to sigmoid(`TURNS` * (I - mean I)), I a layer's mean angle.

    The angle is arccos(cosine of what enters and what leaves) / pi. If the largest share exceeds 1, differences from
    the mean are shrunk until it is 1, and by 5 % more.
    """
    size = ((layers.influence - layers.influence.mean()) * TURNS).sigmoid()
    mean, largest = size.mean(), size.max()
    if largest / mean * share >= 1:
        size = mean + (size - mean) * mean * (1 / share - 1) / (largest - mean) / 1.05
    return (size / mean * share).tolist()


AMPLITUDE = 0.03 / 0.05  # Adapt-Pruner: 3 % of a layer more or less in each round, which removes about 5 % of all


def cosine(layers: Layers, share: float) -> list[float]:
    """Adapt-Pruner: the mean share, and `AMPLITUDE` of what goes more or less by importance, from -1 to 1.

    Importance is 1 - cosine of what enters and leaves a layer, minus its mean, divided by the largest absolute value.
    """
    centred = layers.influence - layers.influence.mean()
    importance = centred / centred.abs().max() if centred.any() else centred
    return (share + AMPLITUDE * (1 - share) * importance).tolist()


SMOOTHING = 0.1  # MoDeGPT's epsilon


def entropic(layers: Layers, share: float) -> list[float]:
    """MoDeGPT: layers lose in proportion to softmax(-s / `SMOOTHING`), s = 1 - cosine of what enters and leaves.

    It is the solution of: lose where s is small, with an entropy term that keeps losses alike.
    """
    return (1 - len(layers.scores) * (1 - share) * (-layers.influence / SMOOTHING).softmax(0)).tolist()


def pq_index(layers: Layers, share: float) -> list[float]:
    """Sparser layers lose more: shares in proportion to 1 - I(s), I(s) = 1 - n**(1/q - 1/p) ||s||_p / ||s||_q.

    s are the absolute scores of a layer's n units, p = 1/2, q = 1. I is 0 for equal scores and rises to 1 - 1/n if one
    unit has all. (The paper bounds the number of weights to keep by n (1 - I)**(p q / (q - p)), whose power is 1 here.)
    """
    dense = [
        (layer.double().abs().sqrt().sum() ** 2 / len(layer) / layer.double().abs().sum().clamp(min=1e-300)).item()
        for layer in layers.scores
    ]
    return [share * each * len(dense) / max(sum(dense), 1e-300) for each in dense]


def logarithmic(layers: Layers, share: float) -> list[float]:
    """SlimGPT: what goes grows with depth, as log(l + 1) for layer l from 0: errors of low layers add up. No data."""
    growth = [math.log(number + 1) for number in range(len(layers.scores))]
    mean = sum(growth) / len(growth)
    return [1 - (1 - share) * (each / mean if mean else 1) for each in growth]


ALLOCATIONS = {
    "uniform": Allocation(uniform, 0.0, "High-Fidelity Pruning, arXiv 2603.08083"),
    "global": Allocation(ranked_together, 0.1, "one ranking over all layers, as LLM-Pruner's, arXiv 2305.11627"),
    "standardized": Allocation(
        standardized, 0.1, "one ranking of z-scores, after FLAP, arXiv 2312.11983", standard_scores
    ),
    "angular": Allocation(by_shares(angular), 0.0, "CFSP, arXiv 2409.13199", influence="angle"),
    "cosine": Allocation(by_shares(cosine), 0.0, "Adapt-Pruner, arXiv 2502.03460", influence="cosine"),
    "entropic": Allocation(by_shares(entropic), 0.0, "MoDeGPT, arXiv 2408.09632", influence="cosine"),
    "pq_index": Allocation(by_shares(pq_index), 0.0, "PQ index, arXiv 2302.05601"),
    "logarithmic": Allocation(by_shares(logarithmic), 0.0, "SlimGPT, arXiv 2412.18110"),
    # What the search starts from, and the floor that it keeps to, see `width_search.py`.
    "searched": Allocation(
        ranked_together, 0.1, "after EvoPress, arXiv 2410.14649, and Týr-the-Pruner, arXiv 2503.09657"
    ),
}


def fewest_kept(allocation: str, widths: list[int], step: int) -> list[int]:
    """The fewest units that an allocation keeps in layers of these widths: its floor, rounded up to whole steps.

    Of a layer without units, none.
    """
    return [step * max(width > 0, math.ceil(ALLOCATIONS[allocation].floor * width / step)) for width in widths]


def allocate(
    allocation: str, scores: list[Tensor], keep: float, step: int, influence: Tensor | None = None
) -> list[Tensor]:
    """The units to keep.

    Args:
        allocation: a name in `ALLOCATIONS`.
        scores: (units,) for each layer, or (rows, units): then every row keeps as many, its own best, and units are
            counted in one row.
        keep: number of units to keep over all layers; a fraction is rounded. Outside what the allocation allows, the
            nearest allowed number counts.
        step: every layer keeps a multiple of it.
        influence: (layers,), for allocations that read it.

    Returns:
        For each layer the int64 indices to keep, ascending; (rows, kept) for scores with rows. Among equal scores the
        lower index stays.

    Raises:
        AssertionError: the allocation misses the number by more than rounding to `step` explains.
    """
    layers = Layers(scores, influence)
    fewest = fewest_kept(allocation, layers.units, step)
    widths = ALLOCATIONS[allocation].widths(layers, keep, fewest, step)
    widest = sum(units // step * step for units in layers.units)
    target = min(max(keep, sum(fewest)), widest)  # the nearest number that whole steps allow
    assert abs(sum(widths) - target) <= step * len(scores), (
        f"allocation {allocation!r} keeps {sum(widths)} units of {target:.1f}: a fault of the allocation"
    )
    return best(scores, widths)


def best(scores: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
    """The units with the highest scores, so many of each layer: see `allocate`."""
    return [
        layer.sort(dim=-1, descending=True, stable=True).indices[..., :width].sort().values
        for layer, width in zip(scores, widths, strict=True)
    ]

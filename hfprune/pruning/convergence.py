"""When scores have settled: two halves of the calibration text would keep the same units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config reads `FIRST` without paying for torch
    from torch import Tensor

    from hfprune.models.units import Scores

FIRST = 8  # sequences before the first comparison; with as many again it is made


def check_until(until: float | None, samples: int) -> None:
    """Refuse a level of agreement that could not end a pass over so few sequences.

    Raises:
        ValueError: they end at the first comparison, or before.
    """
    if until is not None and samples <= 2 * FIRST:
        raise ValueError(
            f"until = {until} with samples = {samples}: halves are first compared at {2 * FIRST} sequences. Give more "
            "samples, 256 say, which are then the most that are scored; or leave out until"
        )


def rounds(samples: int) -> Iterator[range]:
    """The sequences of each round: as many as in all rounds before it, of which it is the other half."""
    start, stop = 0, min(FIRST, samples)
    while start < samples:
        yield range(start, stop)
        start, stop = stop, min(2 * stop, samples)


def agreement(one: Scores, other: Scores, ratio: float) -> float:
    """The share of the units kept by `one` that `other` keeps too, if both remove `ratio` of every layer's units.

    Units of all parts count alike. Of two random choices it is 1 - `ratio`.
    """
    both = kept = 0.0
    for part, layers in one.items():
        for mine, others in zip(layers, other[part], strict=True):
            is_kept = _kept(mine, ratio)
            both += (is_kept * _kept(others, ratio)).sum().item()
            kept += is_kept.sum().item()
    return both / kept


def _kept(scores: Tensor, ratio: float) -> Tensor:
    """1 for the units of a layer with the highest scores, 0 for the `ratio` that goes; (units,) or (rows, units)."""
    keep = scores.shape[-1] - round(ratio * scores.shape[-1])
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return scores.new_zeros(scores.shape).scatter_(-1, best, 1)

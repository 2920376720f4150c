"""Scores of units that are chosen together: each unit's cost given the units that are gone before it.

The cheapest units go first. A score is what its unit costs then, in float32. Scores rise strictly in the order in which
units go, so that keeping the units with the highest scores keeps what the greedy choice leaves.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

ROUNDS = 64  # of `with_repair`
SMALLEST_IMPROVEMENT = 1e-9  # of `swapped`, as a share: less is rounding
MOST_SWAPPED, MOST_ROUNDS = 100, 20  # of `swapped`: OSSCAR's


def one_by_one(matrix: Tensor) -> Tensor:
    """What units add to x^T M x, where x is 1 for every unit that is gone and 0 for the others.

    Args:
        matrix: M, (units, units), symmetric.

    Returns:
        (units,) float32 scores, on the CPU.
    """
    matrix = matrix.double().cpu()
    cost = matrix.diagonal().clone()
    gone = []
    for _ in range(len(matrix)):
        unit = int(cost.argmin())
        gone.append((unit, cost[unit].item()))
        cost += 2 * matrix[unit]
        cost[unit] = torch.inf
    return _rising(gone)


def with_repair(inverse: Tensor, weights: Tensor, units: int) -> Tensor:
    """What units add to the least squared error of an output W h, the least over the weights that stay.

    Every round removes a sixty-fourth of the units, at least one. It then updates the weights that stay by Optimal
    Brain Surgeon, W_S - W_P (C_PP)^-1 C_PS, and C to the inverse of what stays, C_SS - C_SP (C_PP)^-1 C_PS.

    Args:
        inverse: C, (columns, columns) float64, the inverse of the mean of h h^T.
        weights: W, (outputs, columns) float64.
        units: number of units; the columns of each are contiguous.

    Returns:
        (units,) float32 scores, on the CPU.
    """
    size, step = len(inverse) // units, max(1, units // ROUNDS)
    names, gone = torch.arange(units), []
    while len(names):
        blocks = inverse.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        written = weights.unflatten(1, (-1, size)).permute(1, 2, 0)  # (units, size, outputs)
        cost = (written * torch.linalg.solve(blocks, written)).sum((1, 2)).cpu()
        cheapest = cost.argsort(stable=True)[:step]
        gone += zip(names[cheapest].tolist(), cost[cheapest].tolist(), strict=True)
        stays = torch.ones(len(names), dtype=torch.bool).index_fill_(0, cheapest, False)
        names = names[stays]
        kept = stays.repeat_interleave(size).to(inverse.device)
        shares = torch.linalg.solve(inverse[~kept][:, ~kept], inverse[~kept][:, kept])  # (C_PP)^-1 C_PS
        weights = weights[:, kept] - weights[:, ~kept] @ shares
        inverse = inverse[kept][:, kept] - inverse[kept][:, ~kept] @ shares
    return _rising(gone)


def swapped(gram: Tensor, wanted: Tensor, kept: Tensor) -> tuple[Tensor, int]:
    """Better columns to keep for a least-squares fit of an output: OSSCAR's local search.

    A round takes out the columns that cost the fit least, and puts back as many, those that then gain most. If the fit
    is better, the next round starts there; if not, rounds exchange half as many from then on, until none is left.

    Args:
        gram: (columns, columns) float64, the sum of h h^T, damped so that it can be inverted.
        wanted: (outputs, columns) float64, the sum of y h^T, y the output to fit.
        kept: (count,) int64, the columns to start from.

    Returns:
        (count,) int64 columns, ascending; and the number of rounds.
    """
    best, explained = kept, _explained(gram, wanted, kept)
    count, rounds = min(MOST_SWAPPED, len(kept) - 1, len(gram) - len(kept)), 0
    while count > 0 and rounds < MOST_ROUNDS:
        rounds += 1
        inverse = gram[best][:, best].inverse()
        costs = (wanted[:, best] @ inverse).square().sum(0) / inverse.diagonal()
        stays = best[costs.argsort(stable=True)[count:]]
        out = others(stays, len(gram))
        shares = torch.linalg.solve(gram[stays][:, stays], gram[stays][:, out])
        left = gram.diagonal()[out] - (gram[stays][:, out] * shares).sum(0)  # of the columns' own variance
        gains = (wanted[:, out] - wanted[:, stays] @ shares).square().sum(0) / left
        candidate = torch.cat([stays, out[gains.argsort(descending=True, stable=True)[:count]]])
        if (value := _explained(gram, wanted, candidate)) > explained * (1 + SMALLEST_IMPROVEMENT):
            best, explained = candidate, value
        else:
            count //= 2
    return best.sort().values, rounds


def others(columns: Tensor, count: int) -> Tensor:
    """The numbers below `count` that are not among `columns`: int64, ascending."""
    is_other = torch.ones(count, dtype=torch.bool, device=columns.device).index_fill_(0, columns, False)
    return is_other.nonzero()[:, 0]


def _explained(gram: Tensor, wanted: Tensor, kept: Tensor) -> float:
    """How much of the squared output a fit by these columns explains."""
    return (torch.linalg.solve(gram[kept][:, kept], wanted[:, kept].T) * wanted[:, kept].T).sum().item()


def _rising(gone: Iterable[tuple[int, float]]) -> Tensor:
    """Scores from units and their costs in the order in which they went: a cost is at least just above the last."""
    gone = list(gone)
    scores = np.empty(len(gone), dtype=np.float32)
    last = np.float32(-np.inf)
    for unit, cost in gone:
        last = scores[unit] = max(np.float32(cost), np.nextafter(last, np.float32(np.inf)))
    return torch.from_numpy(scores)

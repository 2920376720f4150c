"""From scores and a budget to the neurons that stay."""

import torch
from torch import Tensor


def uniform(scores: list[Tensor], remove: int) -> list[Tensor]:
    """Take the `remove` lowest-scored neurons out of every layer (the paper's allocation).

    Args:
        scores: (neurons,) per layer.
        remove: neurons to take out of each.

    Returns:
        Per layer the int64 indices that stay, ascending. Among equal scores the lower index stays.
    """
    kept = []
    for layer in scores:
        ranking = torch.sort(layer, descending=True, stable=True).indices
        kept.append(ranking[: len(layer) - remove].sort().values)
    return kept

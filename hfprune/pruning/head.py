"""From the final hidden states to a criterion's gradient at them, in closed form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from hfprune.models.head import Head
from hfprune.pruning.criteria import Positions

# How many logits are held at once, in float32: 32 MiB on a CPU, where more is no faster; 256 MiB on a GPU.
LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**26}
LogitGradient = Callable[[Tensor, Positions], Tensor]  # see `criteria.GradientCriterion`


def generator(*names: object) -> torch.Generator:
    """A generator on the CPU that depends on `names` alone: the same numbers on every machine."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def positions_of(tokens: Tensor, first: int, seed: int, draw: int, device: torch.device) -> Positions:
    """The positions of (batch, length) `tokens`, whose first sequence has number `first`.

    The random numbers of a sequence depend on its number, not on its batch.
    """
    uniforms = [
        torch.rand(tokens.shape[1], generator=generator(seed, draw, first + number)) for number in range(len(tokens))
    ]
    return Positions(_sent(following(tokens), device), _sent(torch.cat(uniforms), device))


def following(tokens: Tensor) -> Tensor:
    """(batch * length,) the next token of each of (batch, length) `tokens`; -1 at the end of a sequence."""
    return torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -1)], dim=1).flatten()


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, without waiting for what a GPU still has to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def hidden_gradient(
    hidden: Tensor,
    head: Head,
    logit_gradient: LogitGradient,
    positions: Positions,
    dense: Tensor | None = None,
) -> Tensor:
    """Carry a criterion's gradient from the logits to the final hidden states, one chunk of tokens at a time.

    Args:
        hidden: (batch, length, hidden) final hidden states.
        head: the model's head.
        logit_gradient: see `criteria.GradientCriterion`.
        positions: what the gradient may read beside the logits, for batch * length positions.
        dense: the intact model's final hidden states, if the criterion compares with them.

    Returns:
        dS/dhidden of the shape, dtype and device of `hidden`, S summed over all positions.
    """
    place = head.weight.device
    flat = hidden.flatten(0, 1).to(place)
    flat_dense = dense.flatten(0, 1).to(place) if dense is not None else None
    gradient = torch.empty_like(flat)
    size = max(1, LOGITS_PER_CHUNK[place.type] // head.vocabulary)
    for first in range(0, len(flat), size):
        chunk = slice(first, first + size)
        dense_logits = head.logits(flat_dense[chunk]) if flat_dense is not None else None
        here = Positions(positions.next_tokens[chunk], positions.uniforms[chunk], dense_logits)
        pulled = head.pulled_back(head.logits(flat[chunk]), lambda logits, here=here: logit_gradient(logits, here))
        gradient[chunk] = pulled @ head.weight
    return gradient.view(hidden.shape).to(hidden.device)

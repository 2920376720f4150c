"""What recovery minimises, summed over tokens, without ever holding all logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from hfprune.models.loading import logits_of

LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**27}  # in float32: 32 MiB, 512 MiB

Term = Callable[[Tensor, slice], tuple[Tensor, Tensor]]  # logits of a chunk -> its loss, a sum; d loss / d logits


def cross_entropy(labels: Tensor) -> Term:
    """-log p(label), nats; `labels` are (tokens,) int64."""

    def term(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        right = labels[chunk, None]
        log_p = log_softmax(logits, -1)
        loss = -log_p.gather(1, right).sum()
        gradient = log_p.exp_()
        return loss, gradient.scatter_add_(1, right, torch.full_like(right, -1, dtype=gradient.dtype))

    return term


def distillation(teacher: Tensor, teacher_head: Tensor) -> Term:
    """KL(teacher || student), nats; of the teacher (tokens, hidden) final states and (vocabulary, hidden) output."""

    def term(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        log_t = log_softmax(logits_of(teacher[chunk], teacher_head), -1)
        log_s = log_softmax(logits, -1)
        t = log_t.exp()
        return (t * (log_t - log_s)).sum(), log_s.exp_() - t

    return term


def chunked(hidden: Tensor, head: Tensor, term: Term) -> Tensor:
    """The sum of `term` over all tokens, a chunk of them at a time; differentiable in both tensors.

    Args:
        hidden: (tokens, hidden) final hidden states.
        head: (vocabulary, hidden) output projection.
        term: the loss, with its closed-form gradient.

    Returns:
        A scalar, float32.
    """
    return _Chunked.apply(hidden, head, term)


class _Chunked(torch.autograd.Function):
    """Gradients are computed with the loss, so that no chunk's logits are kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, term: Term) -> Tensor:
        place = hidden.device.type
        total = torch.zeros((), device=hidden.device)
        by_hidden = torch.empty_like(hidden)
        by_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        if torch.is_autocast_enabled(place):  # once, not for every chunk
            hidden, head = (each.to(torch.get_autocast_dtype(place)) for each in (hidden, head))
        size = max(1, LOGITS_PER_CHUNK[place] // head.shape[0])
        for first in range(0, len(hidden), size):
            chunk = slice(first, first + size)
            loss, gradient = term(logits_of(hidden[chunk], head), chunk)
            gradient = gradient.to(head.dtype)
            total += loss
            by_hidden[chunk] = gradient @ head
            if by_head is not None:
                by_head += gradient.T @ hidden[chunk]
        ctx.save_for_backward(by_hidden, by_head)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        by_hidden, by_head = ctx.saved_tensors
        (scale,) = upstream
        return by_hidden * scale, None if by_head is None else by_head * scale, None

"""The losses of recovery, summed over tokens, without all logits in memory at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from hfprune.models.loading import logits_of

LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**27}  # 32 MiB and 512 MiB in float32

Term = Callable[[Tensor, slice], tuple[Tensor, Tensor]]  # (logits, chunk) -> summed loss, d loss / d logits


def cross_entropy(labels: Tensor) -> Term:
    """-log p(label), nats; `labels` are (tokens,) int64."""

    def term(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        targets = labels[chunk, None]
        log_p = log_softmax(logits, -1)
        loss = -log_p.gather(1, targets).sum()
        gradient = log_p.exp_()
        return loss, gradient.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=gradient.dtype))

    return term


def distillation(teacher: Tensor, teacher_head: Tensor) -> Term:
    """KL(teacher || student), nats.

    Args:
        teacher: (tokens, hidden) final hidden states of the teacher.
        teacher_head: (vocabulary, hidden) its output projection.
    """

    def term(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        log_t = log_softmax(logits_of(teacher[chunk], teacher_head), -1)
        log_s = log_softmax(logits, -1)
        t = log_t.exp()
        return (t * (log_t - log_s)).sum(), log_s.exp_() - t

    return term


def chunked(hidden: Tensor, head: Tensor, term: Term) -> Tensor:
    """The sum of `term` over all tokens, computed in chunks; differentiable in both tensors.

    Args:
        hidden: (tokens, hidden) final hidden states.
        head: (vocabulary, hidden) output projection.
        term: the loss, with its closed-form gradient.

    Returns:
        A scalar, float32.
    """
    return _Chunked.apply(hidden, head, term)


class _Chunked(torch.autograd.Function):
    """Computes the gradients together with the loss. So no chunk's logits are kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, term: Term) -> Tensor:
        device_type = hidden.device.type
        total = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        head_gradient = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        if torch.is_autocast_enabled(device_type):  # cast once, not for every chunk
            hidden, head = (tensor.to(torch.get_autocast_dtype(device_type)) for tensor in (hidden, head))
        size = max(1, LOGITS_PER_CHUNK[device_type] // head.shape[0])
        for first in range(0, len(hidden), size):
            chunk = slice(first, first + size)
            loss, gradient = term(logits_of(hidden[chunk], head), chunk)
            gradient = gradient.to(head.dtype)
            total += loss
            hidden_gradient[chunk] = gradient @ head
            if head_gradient is not None:
                head_gradient += gradient.T @ hidden[chunk]
        ctx.save_for_backward(hidden_gradient, head_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        (scale,) = upstream
        return hidden_gradient * scale, None if head_gradient is None else head_gradient * scale, None

"""The losses of recovery, summed over tokens, without all logits in memory at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from hfprune.models.head import Head

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


def distillation(teacher: Tensor, teacher_head: Head) -> Term:
    """KL(teacher || student), nats.

    Args:
        teacher: (tokens, hidden) final hidden states of the teacher.
        teacher_head: its head.
    """

    def term(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        log_t = log_softmax(teacher_head.logits(teacher[chunk]), -1)
        log_s = log_softmax(logits, -1)
        t = log_t.exp()
        return (t * (log_t - log_s)).sum(), log_s.exp_() - t

    return term


def chunked(hidden: Tensor, head: Head, term: Term) -> Tensor:
    """The sum of `term` over all tokens, computed in chunks; differentiable in the states and the head's tensors.

    Args:
        hidden: (tokens, hidden) final hidden states.
        head: the model's head.
        term: the loss, with its closed-form gradient.

    Returns:
        A scalar, float32.
    """
    return _Chunked.apply(hidden, head.weight, head.bias, head, term)


class _Chunked(torch.autograd.Function):
    """Computes the gradients together with the loss. So no chunk's logits are kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, term: Term) -> Tensor:
        device_type = hidden.device.type
        total = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        if torch.is_autocast_enabled(device_type):  # cast once, not for every chunk
            hidden, head = (each.to(torch.get_autocast_dtype(device_type)) for each in (hidden, head))
        size = max(1, LOGITS_PER_CHUNK[device_type] // head.vocabulary)
        for first in range(0, len(hidden), size):
            chunk = slice(first, first + size)
            losses: list[Tensor] = []

            def gradient_of(logits: Tensor, chunk: slice = chunk, losses: list[Tensor] = losses) -> Tensor:
                loss, gradient = term(logits, chunk)
                losses.append(loss)
                return gradient

            gradient = head.pulled_back(head.logits(hidden[chunk]), gradient_of)
            total += losses[0]
            hidden_gradient[chunk] = gradient @ head.weight
            if weight_gradient is not None:
                weight_gradient += gradient.T @ hidden[chunk]
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        return *(None if gradient is None else gradient * scale for gradient in ctx.saved_tensors), None, None

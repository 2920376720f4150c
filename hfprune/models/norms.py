"""Norms of root mean squares in one step.

transformers computes such a norm in six steps, in float32. On a GPU they read and write more than all else in a layer,
and they keep two float32 copies of what they read for the backward pass. PyTorch's own norm does the same in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel


@contextmanager
def fused_norms(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the model's norms of root mean squares are PyTorch's, equal up to rounding.

    Only those that are the same function of a sample, and whose weights stay on one device.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if (fused := _fused(module)) is not None:
                module.forward = fused
                stack.callback(module.__dict__.pop, "forward")
        yield


@torch.no_grad()
def _fused(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """PyTorch's norm for a norm of transformers; None for any other module."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    is_norm = epsilon is not None and type(module).__name__.endswith("RMSNorm") and weight is not None
    if not is_norm or weight.is_meta or "forward" in module.__dict__:  # accelerate wraps it to fetch weights
        return None
    fused = partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=epsilon)
    sample = torch.randn((4, *weight.shape), generator=torch.Generator().manual_seed(0)).to(weight)
    rounding = 2 * torch.finfo(weight.dtype).eps
    return fused if torch.allclose(module(sample), fused(sample), rtol=rounding, atol=rounding) else None

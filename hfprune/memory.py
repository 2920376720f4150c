"""Fit scoring into the memory there is: keep a layer's activations for the backward pass, or compute them anew."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import psutil
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def graph_bytes(model: PreTrainedModel, tokens: int) -> int:
    """An upper bound on what a forward pass over so many tokens keeps for the backward pass, all layers together.

    A layer keeps up to 12 tensors of the hidden size and 5 of the MLP's width in the model's type, and 2 of the hidden
    size in float32 for its norms (counted by `torch.autograd.graph.saved_tensors_hooks` for every family).
    """
    config = model.config
    per_layer = (12 * config.hidden_size + 5 * config.intermediate_size) * model.dtype.itemsize + 8 * config.hidden_size
    return per_layer * config.num_hidden_layers * tokens


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that can still be allocated."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def is_short(model: PreTrainedModel, tokens: int, reserved: int = 0) -> bool:
    """Whether the graph of so many tokens could take more than half of the free memory, or weights are offloaded.

    `reserved` bytes of what is free count as taken.
    """
    offloaded = {"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    return bool(offloaded) or graph_bytes(model, tokens) > (free_bytes(model.device) - reserved) / 2


@contextmanager
def checkpointed(model: PreTrainedModel, recomputing: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Keep only what enters each layer; its forward pass runs once more, within `recomputing()`, in the backward pass.

    Non-reentrant checkpointing: several backward passes over one graph are possible, each computes a layer anew.
    """
    forwards = [layer.forward for layer in model.model.layers]
    again = partial(checkpoint, use_reentrant=False)  # the same dropout again
    for layer, forward in zip(model.model.layers, forwards, strict=True):
        layer.forward = partial(again, forward, context_fn=lambda: (nullcontext(), recomputing()))
    try:
        yield
    finally:
        for layer, forward in zip(model.model.layers, forwards, strict=True):
            layer.forward = forward

"""Fit work into the memory there is.

Scoring and training keep a layer's activations for the backward pass, or compute them anew; evaluation takes as many
rows at a time as fit.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

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


def forward_bytes(model: PreTrainedModel, length: int, whole: bool = False) -> int:
    """An upper bound on what a forward pass without gradients takes for each row of `length` tokens.

    At one time a layer holds up to 8 tensors of the hidden size and 3 of the MLP's width, and 2 of the hidden size in
    float32; attention by its formula ("eager") holds scores and their softmax for all heads, any other the mask twice.

    Args:
        model: a loaded model.
        length: tokens of a row.
        whole: the pass gives logits at every position, their softmax is taken, and keys and values are kept.
    """
    config, layers = model.config, model.model.layers
    width = max(layer.mlp.down_proj.in_features for layer in layers)
    size = model.dtype.itemsize
    per_token = (8 * config.hidden_size + 3 * width) * size + 8 * config.hidden_size
    if whole:
        per_token += 3 * config.vocab_size * size
        per_token += sum(2 * layer.self_attn.k_proj.out_features for layer in layers) * size
    heads = max(layer.self_attn.q_proj.out_features // layer.self_attn.head_dim for layer in layers)
    per_pair = heads * (2 * size + 4) if config._attn_implementation == "eager" else 2 * size
    return per_token * length + per_pair * length**2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what PyTorch raises where a GPU's memory or, as a RuntimeError, the CPU's is not enough."""
    full = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return full or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def empty_cache(device: torch.device) -> None:
    """Give back what PyTorch holds of a GPU's memory and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available_bytes(root: Path = Path("/")) -> int:
    """Memory of this machine that this process can still take: what the system has, within the limits of its cgroups.

    A container or a cluster's job may hold far less than the machine. Its limit less its use counts, cached files that
    the kernel would drop counted as free; every group around it limits too (cgroup v2; of v1 the memory controller).

    Args:
        root: where `proc` and `sys` stand, for tests.
    """
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                base = root / "sys/fs/cgroup" / controllers
                for folder in (base / group.lstrip("/"), *(base / group.lstrip("/")).parents):
                    if folder == base.parent:
                        break
                    free = min(free, _left_in(folder, free))
    return max(0, free)


def _left_in(group: Path, otherwise: int) -> int:
    """Bytes that a cgroup may still take; `otherwise` where it sets no limit."""
    for limit_name, use_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limit = int((group / limit_name).read_text(encoding="utf-8"))
            used = int((group / use_name).read_text(encoding="utf-8"))
            statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
            return limit - used + int(statistics.get("inactive_file", 0))
    return otherwise


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that can still be allocated."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_bytes()


def is_short(model: PreTrainedModel, tokens: int, reserved: int = 0) -> bool:
    """Whether the graph of so many tokens could take more than half of the free memory, or weights are offloaded.

    `reserved` bytes of what is free count as taken.
    """
    offloaded = {"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    return bool(offloaded) or graph_bytes(model, tokens) > (free_bytes(model.device) - reserved) / 2


@contextmanager
def checkpointed(model: PreTrainedModel, recomputing: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Keep only what enters each layer; its forward pass runs once more, within `recomputing()`, in the backward pass.

    Non-reentrant checkpointing: several backward passes over one graph are possible, each computes a layer anew. It
    runs each layer to its end: stopped early, accelerate would not take offloaded weights off the device again.
    """
    forwards = [layer.forward for layer in model.model.layers]
    again = partial(checkpoint, use_reentrant=False, early_stop=False)  # the same dropout again
    for layer, forward in zip(model.model.layers, forwards, strict=True):
        layer.forward = partial(again, forward, context_fn=lambda: (nullcontext(), recomputing()))
    try:
        yield
    finally:
        for layer, forward in zip(model.model.layers, forwards, strict=True):
            layer.forward = forward

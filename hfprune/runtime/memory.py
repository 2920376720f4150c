"""Fit work into the available memory.

Scoring and training keep each layer's activations for the backward pass, or compute them a second time. Evaluation
batches as many rows as fit.
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
    """An upper bound on the bytes that a forward pass over `tokens` tokens keeps for the backward pass.

    A layer keeps up to 12 tensors of the hidden size and 5 of the MLP's width in the model's type, and 2 of the hidden
    size in float32 for its norms (counted by `torch.autograd.graph.saved_tensors_hooks` for every family).
    """
    config = model.config
    per_layer = (12 * config.hidden_size + 5 * config.intermediate_size) * model.dtype.itemsize + 8 * config.hidden_size
    return per_layer * config.num_hidden_layers * tokens


def forward_bytes(model: PreTrainedModel, length: int, whole: bool = False) -> int:
    """An upper bound on the bytes that a forward pass without gradients takes for each row of `length` tokens.

    A layer holds at most 8 tensors of the hidden size and 3 of the MLP's width at a time, and 2 of the hidden size in
    float32. "eager" attention holds the scores and their softmax for all heads; other kinds hold the mask twice.

    Args:
        model: a loaded model.
        length: tokens of a row.
        whole: the pass computes logits and their softmax at every position, and keeps keys and values.
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
    """Whether PyTorch raised this error because a GPU's memory, or (as a RuntimeError) the CPU's, ran out."""
    full = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return full or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def empty_cache(device: torch.device) -> None:
    """Release the GPU memory that PyTorch caches but does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available_bytes(root: Path = Path("/")) -> int:
    """CPU memory that this process can still take: the machine's free memory, within the limits of its cgroups.

    A container or a cluster job may have far less memory than the machine. What it has left is its limit minus its use,
    where cached files that the kernel would drop count as free. Every group around it limits it too. Reads cgroup v2,
    and the memory controller of v1.

    Args:
        root: folder that contains `proc` and `sys`; tests use their own.
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


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether some of the model's weights stand in the CPU's memory or on disk while it computes on a GPU."""
    return bool({"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()})


def is_short(model: PreTrainedModel, tokens: int, reserved: int = 0) -> bool:
    """Whether the graph of `tokens` tokens could take more than half of the free memory, or weights are offloaded.

    `reserved` bytes of the free memory count as taken.
    """
    return is_offloaded(model) or graph_bytes(model, tokens) > (free_bytes(model.device) - reserved) / 2


@contextmanager
def checkpointed(model: PreTrainedModel, recomputing: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Keep only each layer's input. The backward pass runs the layer's forward pass again, within `recomputing()`.

    The checkpointing is non-reentrant: several backward passes over one graph are possible, and each runs the layer
    again. Each layer runs to its end: if it stopped early, accelerate would leave its offloaded weights on the device.
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

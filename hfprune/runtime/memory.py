"""How much memory there is, and whether it has run out."""

from contextlib import suppress
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel


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

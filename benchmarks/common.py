"""What the benchmarks share: a subject to measure, alternating timing, and the record of a run."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hfprune.store.artifacts import device_name
from hfprune.store.keys import versions

RESULTS = Path(__file__).parent / "results"


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each piece of work, run in turn `rounds` times after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in seconds.items()}


def record(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and write them, see `write`."""
    show(figures)
    write(name, figures)


def show(figures: dict[str, Any]) -> None:
    """Print the figures, a line each."""
    for key, value in figures.items():
        print(f"{key:28} {value:.4g}" if isinstance(value, float) else f"{key:28} {value}", flush=True)


def write(name: str, figures: dict[str, Any]) -> None:
    """Write `benchmarks/results/NAME-<cpu|gpu name>.json`: the figures, device, versions and command."""
    gpu = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    RESULTS.mkdir(exist_ok=True)
    written = {
        "name": name,
        "device": device_name(),
        "versions": versions() | {"python": platform.python_version()},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "figures": figures,
    }
    (RESULTS / f"{name}-{gpu}.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")

"""Peak memory of scoring beyond the weights at the width of Llama-2-7B, layers kept or computed anew.

    python benchmarks/memory.py

Sequences of 1024 tokens, bfloat16, random weights, at several depths; what one more layer adds gives the 32 layers of
the whole model. On a machine that holds the whole model, `--depths 32` measures it.
"""

import argparse
import multiprocessing
import threading
import time

import psutil
import torch
from common import record
from scoring import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

from hfprune.models.loading import device
from hfprune.pruning.scoring import unit_scores
from hfprune.runtime import memory

LAYERS = SHAPES["llama-2-7b"]["num_hidden_layers"]


def peak(depth: int, length: int, anew: bool, results) -> None:
    """Put into `results` the bytes that entropy scoring takes beside the weights, in a process of its own."""
    shape = SHAPES["llama-2-7b"] | {"num_hidden_layers": depth}
    with torch.device(device()):
        config = AutoConfig.for_model("llama", **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    tokens = torch.randint(0, model.config.vocab_size, (1, length))
    memory.free_bytes = lambda _device: 0 if anew else 2**60
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        unit_scores(model, tokens, ["entropy"])
        results.put(torch.cuda.max_memory_allocated() - before)
        return
    process, seen, done = psutil.Process(), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(process.memory_info().rss)
            time.sleep(0.005)

    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    unit_scores(model, tokens, ["entropy"])
    done.set()
    thread.join()
    results.put(max(seen) - before)


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    figures: dict[str, float] = {"shape": "llama-2-7b", "dtype": "bfloat16", "length": args.length}
    for name, anew in (("kept", False), ("anew", True)):
        for depth in args.depths:
            results = context.Queue()
            process = context.Process(target=peak, args=(depth, args.length, anew, results))
            process.start()
            figures[f"peak_bytes_{name}_{depth}_layers"] = results.get()
            process.join()
        first, last = args.depths[0], args.depths[-1]
        if last > first:
            low, high = (figures[f"peak_bytes_{name}_{depth}_layers"] for depth in (first, last))
            figures[f"peak_bytes_{name}_{LAYERS}_layers_extrapolated"] = high + (LAYERS - last) * (high - low) / (
                last - first
            )
    record("memory", figures)


if __name__ == "__main__":
    main()

"""Streamed weights: memory of scoring, cutting and measuring layer by layer, and speed beside a model in memory.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --shape llama-2-7b --steps score cut measure

A checkpoint of random bfloat16 weights, a file for each layer. Each step runs in a process of its own. For the speed a
small model scores the same tokens in turn with streamed weights and in memory. A limit of memory comes from outside, as
the cgroup of the shell that starts this; it is recorded.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from common import alternate, record
from safetensors.torch import save_file
from scoring import SHAPES
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

from hfprune.evaluation import fidelity
from hfprune.models.loading import device, load_model, shape_only, weight_bytes
from hfprune.models.units import save_scores
from hfprune.pruning import surgery
from hfprune.pruning.scoring import unit_scores
from hfprune.runtime.memory import available_bytes
from hfprune.store.filenames import SCORES

TOKENIZER = "tokenizer.json"  # what `write_checkpoint` writes last

SECONDS = 3600  # a step that takes longer, or whose process has died, ends the run
CUT = {
    "ratio": 0.2, "ratio_of": "all", "target_parameters": None, "round_to": 1, "structure": "mlp",
    "attention_share": None, "depth_share": None, "allocation": "uniform", "refit": "sequential", "ridge": 0.4,
    "pad": False, "dtype": "auto",
}  # fmt: skip


def write_checkpoint(folder: Path, shape: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a Llama of that shape with random weights, one layer in memory at a time."""
    torch.manual_seed(0)
    model = shape_only(AutoConfig.for_model("llama", max_position_embeddings=4096, **shape), dtype)
    model.save_pretrained(folder, state_dict={})
    groups: dict[str, list[str]] = {}
    for name in dict(model.named_parameters()):
        groups.setdefault(name.partition("layers.")[2].partition(".")[0], []).append(name)
    weight_map = {}
    for number, names in enumerate(groups.values()):
        file, weights = f"model-{number:05}.safetensors", {}
        for name in names:
            size = model.get_parameter(name).shape
            values = torch.randn(size, device=device()) * 0.02 if len(size) > 1 else torch.ones(size)
            weights[name] = values.to(dtype).cpu()
        save_file(weights, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def score(folder: Path, tokens: torch.Tensor) -> None:
    """Scores of the model in `folder`, for `cut`."""
    (folder / "scores").mkdir(exist_ok=True)
    scores = unit_scores(load_model(folder, "auto", "streamed"), tokens, ["entropy"], resume=folder / "resume")
    save_scores(folder / "scores" / SCORES, scores["entropy"])


def cut(folder: Path, tokens: torch.Tensor) -> None:
    """The model without a fifth of its parameters, refitted, reloaded."""
    surgery.sample_sequences = lambda *_arguments, **_options: tokens
    (folder / "pruned").mkdir(exist_ok=True)
    calibration = {
        "criterion": "entropy",
        "samples": len(tokens),
        "length": tokens.shape[1],
        "seed": 0,
        "text": "random",
    }
    surgery.prune(folder / "pruned", folder, folder / "scores", folder, {}, calibration, **CUT, memory="streamed")


def measure(folder: Path, tokens: torch.Tensor) -> None:
    """The cut model's distance from the dense one."""
    fidelity.sample_sequences = lambda *_arguments, **_options: tokens
    fidelity.reference(folder, folder, folder, len(tokens), tokens.shape[1], 0, "auto", "streamed")
    fidelity.measure(folder, folder / "pruned", folder, "auto", "streamed")


STEPS = {"score": score, "cut": cut, "measure": measure}


def peak(step: str, folder: Path, length: int, samples: int, gpu_bytes: int | None, results: Any) -> None:
    """Put into `results` the seconds of a step and the peaks of this process: its and its children's resident memory.

    And of the GPU's, of which no more than `gpu_bytes` can be taken.
    """
    torch.manual_seed(1)
    if gpu_bytes:
        torch.cuda.set_per_process_memory_fraction(gpu_bytes / torch.cuda.get_device_properties(0).total_memory)
    tokens = torch.randint(0, 1000, (samples, length))
    process, seen, done = psutil.Process(), [(0, 0, 0)], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            children = sum(child.memory_info().rss for child in process.children())
            memory = process.memory_info()
            seen.append((memory.rss - memory.shared, memory.rss, children))

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    STEPS[step](folder, tokens)
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    results.put((seconds, gpu, *(max(values) for values in zip(*seen, strict=True))))


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--steps", nargs="+", choices=("speed", "cost", *STEPS), default=("speed", *STEPS))
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", choices=sorted(SHAPES), default="smollm2-135m", help="the model that fits")
    parser.add_argument("--gpu-bytes", type=int, help="of a GPU's memory, take no more")
    parser.add_argument("--folder", type=Path, help="keeps the checkpoint for other runs (default: temporary)")
    args = parser.parse_args()
    figures: dict[str, Any] = {"shape": args.shape, "small": args.small, "tokens": args.samples * args.length}
    figures["free_bytes"] = available_bytes()
    with ExitStack() as stack:
        scratch = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if "speed" in args.steps:
            figures |= speeds(scratch / "small", SHAPES[args.small], args.rounds)
            print(figures, flush=True)
        if "cost" in args.steps:
            figures |= costs(scratch / "cost", SHAPES[args.small], args.rounds)
        large, steps = scratch / args.shape, [step for step in STEPS if step in args.steps]
        if steps:
            if not (large / TOKENIZER).exists():
                write_checkpoint(large, SHAPES[args.shape], torch.bfloat16)
            figures["weight_bytes"] = weight_bytes(large)
        for step in steps:
            figures |= in_its_own_process(step, large, args.length, args.samples, args.gpu_bytes)
            print(figures, flush=True)
    some = args.steps if len(args.steps) < len(STEPS) + 1 else ()
    record("-".join(["streaming", args.shape, *some]), figures)


def speeds(folder: Path, shape: dict[str, Any], rounds: int) -> dict[str, float]:
    """Tokens per second of scoring eight layers of that shape with streamed weights and in memory."""
    write_checkpoint(folder, shape | {"num_hidden_layers": min(8, shape["num_hidden_layers"])}, torch.float32)
    tokens = torch.randint(0, shape["vocab_size"], (4, 512))
    networks = {memory: load_model(folder, "auto", memory) for memory in ("resident", "streamed")}
    work = {name: partial(unit_scores, network, tokens, ["entropy"]) for name, network in networks.items()}
    seconds = alternate(work, rounds)
    figures = {f"tokens_per_second_{name}": tokens.numel() / median for name, median in seconds.items()}
    return figures | {"speed_streamed_over_resident": seconds["resident"] / seconds["streamed"]}


def costs(folder: Path, shape: dict[str, Any], rounds: int) -> dict[str, float]:
    """Seconds of scoring with streamed weights, of two sequences by layers and through four layers by sequences."""
    tokens, work = torch.randint(0, shape["vocab_size"], (8, 256)), {}
    for layers, counts in {2: (2,), 4: (1, 2, 4, 8), 8: (2,), 16: (2,)}.items():
        write_checkpoint(folder / str(layers), shape | {"num_hidden_layers": layers}, torch.float32)
        network = load_model(folder / str(layers), "auto", "streamed")
        for count in counts:
            work[f"cost_seconds_{layers}_layers_{count}_sequences"] = partial(
                unit_scores, network, tokens[:count], ["entropy"]
            )
    return alternate(work, rounds)


def in_its_own_process(step: str, *arguments: Any) -> dict[str, float]:
    """Seconds and peaks of a step, see `peak`."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=peak, args=(step, *arguments, results))
    process.start()
    names = ("seconds", "peak_gpu_bytes", "peak_bytes_without_files", "peak_bytes", "peak_bytes_of_reload")
    values = results.get(timeout=SECONDS)
    process.join()
    return {f"{step}_{name}": value for name, value in zip(names, values, strict=True)}


if __name__ == "__main__":
    main()

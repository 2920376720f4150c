"""Everything that needs a GPU, in one command: equal results, speed and memory at the size of Llama-2-7B.

    python benchmarks/gpu.py                       on a machine with a GPU, no network, no data
    python benchmarks/gpu.py --size tiny           the same parts at a tiny size, on any machine
    python benchmarks/gpu.py --only scoring widths

All weights are random: nothing is downloaded. Each part runs in a process of its own, and its figures are recorded when
it ends, so that a part that fails or takes too long loses nothing of the others. All together end after eight minutes,
and parts that have not been measured yet come first. `lm_eval` is needed for `evaluation`, and pydantic beside what
torch, transformers and peft bring.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import alternate, show, synchronize, write
from scoring import SHAPES, build, ours
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfprune.evaluation.timing import run_once
from hfprune.models.loading import count_parameters, device, flops_per_token
from hfprune.models.units import parts
from hfprune.pruning.refit import refit
from hfprune.pruning.refit_names import RIDGE
from hfprune.recovery.training import recover
from hfprune.store.artifacts import peak_memory

HERE = Path(__file__).parent
SECONDS = 480  # for all parts
WORDS = 1000  # of the tokenizer for made-up text
KERNELS = {"attention": ("sdpa", "attention", "flash"), "products": ("nvjet", "gemm", "cutlass", "mm")}  # in names

Figures = dict[str, Any]


def run(*words: str) -> Figures:
    """Run a script or a module of Python; its figures are in a record of its own, or it has none.

    Raises:
        SystemExit: it failed.
    """
    if status := subprocess.run([sys.executable, *words]).returncode:
        sys.exit(status)
    return {}


def tests(_size: str) -> Figures:
    """Scores, refit and measures on the GPU are those of the CPU."""
    file = str(HERE.parent / "tests" / "test_gpu.py")
    return run("-m", "pytest", "-q", "-c", os.devnull, "--noconftest", "-p", "no:cacheprovider", file)


def scoring(size: str) -> Figures:
    """Entropy-Taylor against the published procedure: see benchmarks/scoring.py."""
    full, tiny = "--shape llama-2-7b --sequences 8 --rounds 3", "--shape tiny --sequences 2 --rounds 1 --length 16"
    return run(str(HERE / "scoring.py"), *(tiny if size == "tiny" else full).split())


def profile(size: str) -> Figures:
    """Where a scoring pass spends the device's time: the shares of attention, of matrix products and of all else."""
    shape, samples, length = ("tiny", 2, 16) if size == "tiny" else ("llama-2-7b", 8, 1024)
    model = build(shape)
    tokens = torch.randint(0, model.config.vocab_size, (samples, length))
    ours(model, tokens)
    on_gpu = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if on_gpu else [kind.CPU]) as profiler:
        ours(model, tokens)
        synchronize()
    shares = dict.fromkeys((*KERNELS, "the rest"), 0.0)
    for event in profiler.key_averages():
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA:
            kinds = [kind for kind, words in KERNELS.items() if any(word in event.key for word in words)]
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            shares[kinds[0] if kinds else "the rest"] += microseconds
    total = sum(shares.values())
    return {"shape": shape, "seconds": total / 1e6} | {
        f"share of {kind}": each / total for kind, each in shares.items()
    }


def streaming(size: str) -> Figures:
    """Score, cut and measure layer by layer: see benchmarks/streaming.py.

    Two layers are in memory at a time, however many there are: eight of them take a quarter of the time to write.
    """
    full = "--shape llama-2-7b-8-layers --samples 4 --length 1024 --gpu-bytes 6000000000"
    tiny = "--shape tiny --small tiny --samples 2 --length 16 --rounds 1"
    return run(str(HERE / "streaming.py"), *(tiny if size == "tiny" else full).split())


def refitting(size: str) -> Figures:
    """Seconds and peak of a refit, the model in memory: a fifth of each MLP goes."""
    shape, samples, length = ("tiny", 2, 16) if size == "tiny" else ("llama-2-7b", 32, 1024)
    model = build(shape)
    tokens = torch.randint(0, model.config.vocab_size, (samples, length))
    widths = [part.units * 4 // 5 for part in parts(model, "mlp")]
    kept = {"mlp": [torch.arange(width) for width in widths]}
    weights = peak_memory()
    started = time.perf_counter()
    details = refit(model, kept, tokens, "sequential", RIDGE)
    synchronize()
    seconds = time.perf_counter() - started
    return {
        "shape": shape,
        "tokens": tokens.numel(),
        "seconds": seconds,
        "tokens_per_second": tokens.numel() / seconds,
        "flops": details["refit_flops"],
        "peak_bytes_beside_weights": peak_memory() - weights,
    }


def widths(size: str) -> Figures:
    """Prefill and decoding where MLPs keep 80 % of 11008 neurons: an odd number, multiples of 2 to 256; 8 layers."""
    shape, layers, new_tokens, rounds = ("tiny", 2, 2, 1) if size == "tiny" else ("llama-2-7b", 8, 32, 5)
    dense = SHAPES[shape]["intermediate_size"]
    steps = {"dense": dense, "odd": round(dense * 0.8) | 1} | {
        f"multiple of {step}": max(step, round(dense * 0.8 / step) * step) for step in (2, 8, 64, 128, 256)
    }
    networks = {name: build(shape, num_hidden_layers=layers, intermediate_size=width) for name, width in steps.items()}
    figures: Figures = {"shape": shape, "layers": layers, "widths": steps}
    rows: dict[tuple[str, str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, network in networks.items():
            for (task, metric), value in run_once(network, new_tokens).items():
                if number:
                    rows.setdefault((name, task, metric), []).append(value)
    prompt = torch.randint(0, 100, (4, 8 if size == "tiny" else 1024), device=device())
    with torch.no_grad():
        seconds = alternate({name: lambda net=net: net(prompt, use_cache=False) for name, net in networks.items()}, 10)
    for name in steps:
        figures[f"{name}, prefill {tuple(prompt.shape)}, seconds"] = seconds[name]
    figures |= {f"{name}, {task}, {metric}": statistics.median(each) for (name, task, metric), each in rows.items()}
    return figures


def made_up(tokens: int, generator: torch.Generator) -> str:
    """So many random words."""
    return " ".join(f"w{number}" for number in torch.randint(0, WORDS, (tokens,), generator=generator).tolist())


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each made-up word."""
    words = {f"w{number}": number for number in range(WORDS)} | {"</s>": WORDS, "[UNK]": WORDS + 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="[UNK]")


def evaluation(size: str) -> Figures:
    """Log-likelihoods of made-up questions of four choices: lm-eval's class against the one of stage `evaluate`."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from hfprune.evaluation.shared_prefix import Shared

    shape, questions = ("tiny", 4) if size == "tiny" else ("tinyllama-1.1b", 256)
    model, generator = build(shape), torch.Generator().manual_seed(0)
    requests = []
    for number in range(questions):
        context = made_up(int(torch.randint(20, 120, (), generator=generator)), generator)
        for choice in range(4):
            arguments = (context, " " + made_up(8, generator))
            requests.append(Instance("loglikelihood", {}, arguments, choice, ("made up", number, 1)))
    stock = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=16)
    shared = Shared(model, tokenizer())
    answers: dict[str, list[tuple[float, bool]]] = {}

    def answer(name: str, lm: HFLM) -> None:
        answers[name] = lm.loglikelihood(requests, disable_tqdm=True)

    seconds = alternate({"stock": lambda: answer("stock", stock), "shared": lambda: answer("shared", shared)}, 3)
    differences = [abs(one[0] - other[0]) for one, other in zip(answers["stock"], answers["shared"], strict=True)]
    return {
        "shape": shape,
        "dtype": str(model.dtype),
        "requests": len(requests),
        **{f"requests_per_second_{name}": len(requests) / each for name, each in seconds.items()},
        "speed_ratio": seconds["stock"] / seconds["shared"],
        "max_difference": max(differences),
    }


def training(size: str) -> Figures:
    """Tokens a second of LoRA training on made-up text."""
    shape, documents, length = ("tiny", 64, 32) if size == "tiny" else ("tinyllama-1.1b", 400, 1024)
    with tempfile.TemporaryDirectory() as scratch:
        folder, text, out = (Path(scratch, name) for name in ("model", "text", "out"))
        text.mkdir()
        out.mkdir()
        model = build(shape)
        per_token = flops_per_token(model, length)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        lines = [json.dumps({"text": made_up(length, generator)}) for _ in range(documents)]
        (text / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        parameters = count_parameters(model)
        del model
        details = recover(
            out, folder, text, None, {}, "lora", "cross_entropy", "weights", share=1.0, select="random", epochs=1,
            length=length, batch_tokens=16 * length, micro_batch=8, learning_rate=1e-4, weight_decay=0.0, rank=8,
            rank_by_layer=False, alpha=16, dropout=0.0, targets=["q_proj", "v_proj"], keep_adapter=False, seed=0,
            save_steps=1000, report_to="none", dtype="auto",
        )  # fmt: skip
    return {
        "shape": shape,
        "parameters": parameters,
        "tokens": details["tokens"],
        "forward_flops_per_token": per_token,
        "seconds": details["seconds_together"],
        "tokens_per_second": details["tokens"] / details["seconds_together"],
        "peak_bytes": peak_memory(),
    }


PARTS = {
    part.__name__: part for part in (widths, evaluation, training, streaming, tests, scoring, profile, refitting)
}  # in this order


def run_part(name: str, size: str, file: Path) -> None:
    """Run one part in this process; it writes its figures to `file`."""
    file.write_text(json.dumps(PARTS[name](size)), encoding="utf-8")


def end_of(words: list[str], seconds: float, environment: dict[str, str]) -> str:
    """Run a program for at most so long; how it ended. What it has started ends with it."""
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    try:
        status = process.wait(seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return f"stopped after {seconds:.0f} s"
    return "finished" if status == 0 else f"exit status {status}"


def main() -> None:
    """Run the parts, each in a process of its own, and record what each measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--seconds", type=int, default=240, help="for one part (all together: 480)")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args.part, args.size, args.figures)
        return
    figures: Figures = {"size": args.size}
    last = time.monotonic() + SECONDS
    for name in args.only:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "figures.json")
            words = [sys.executable, __file__, "--part", name, "--size", args.size, "--figures", str(file)]
            # Threads of the tokenizer do not survive a fork. What a stopped part has written goes with the folder.
            environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "TMPDIR": scratch}
            outcome = end_of(words, max(0, min(args.seconds, last - started)), environment)
            measured = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        figures |= {f"{name}, {key}": value for key, value in measured.items()}
        figures |= {f"{name}, outcome": outcome, f"{name}, seconds in all": round(time.monotonic() - started, 1)}
        show(measured)
        write("gpu", figures)
    failed = [name for name in args.only if figures[f"{name}, outcome"] != "finished"]
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()

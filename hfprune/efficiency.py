"""How fast models run and how much memory they take: timed side by side, in turn, in one run.

What can be counted rather than timed (parameters, bytes, operations) is in `models`, and part of every measurement.
"""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.artifacts import peak_memory
from hfprune.models import PREFILL, load_model

BATCHES = (1, 8)
PROMPT = 32  # tokens before the first that is decoded


def time_models(folders: dict[str, Path], dtype: str, rounds: int, new_tokens: int) -> list[dict[str, object]]:
    """Time checkpoints against each other; all of them are in memory at once.

    Args:
        folders: of the checkpoints, by name.
        dtype: to compute in, as for `load_model`.
        rounds: measured after one unmeasured; in each, every model does everything once, one after the other.
        new_tokens: to decode, one step at a time with a cache.

    Returns:
        Rows `model`, `task`, `metric`, `value`, `n`: medians over `n` rounds of `prefill_seconds` (one sequence of
        `PREFILL` tokens) and `decode_tokens_per_second` (of all sequences together, for each of `BATCHES`), and
        `peak_bytes` of a process that loads the model and does all this once: of GPU memory, or else resident.
    """
    models = {name: load_model(folder, dtype) for name, folder in folders.items()}
    found: dict[tuple[str, str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, model in models.items():
            for (task, metric), value in run_once(model, new_tokens).items():
                if number:
                    found.setdefault((name, task, metric), []).append(value)
    del models, model
    rows = [(*what, statistics.median(values), rounds) for what, values in found.items()]
    # A process of its own for each, not spawned from this one: Linux counts the spawning process's peak as the child's.
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), max_tasks_per_child=1) as pool:
        for name, folder in folders.items():
            peak = pool.submit(peak_of, folder, dtype, new_tokens).result()
            rows.append((name, "inference", "peak_bytes", peak, 1))
    return [dict(zip(("model", "task", "metric", "value", "n"), row, strict=True)) for row in rows]


def peak_of(folder: Path, dtype: str, new_tokens: int) -> int:
    """Peak bytes of this process after `run_once` of a checkpoint."""
    run_once(load_model(folder, dtype), new_tokens)
    return peak_memory()


@torch.no_grad()
def run_once(model: PreTrainedModel, new_tokens: int) -> dict[tuple[str, str], float]:
    """Seconds of one prefill, and tokens a second of decoding with each batch, by (task, metric)."""
    tokens = torch.arange(PREFILL, device=model.device)[None] % model.config.vocab_size
    started = _now()
    model(tokens, use_cache=False)
    found = {(f"prefill {PREFILL}", "prefill_seconds"): _now() - started}
    for batch in BATCHES:
        seconds = decode(model, tokens[:, :PROMPT].repeat(batch, 1), new_tokens)
        found[f"decode batch {batch}", "decode_tokens_per_second"] = batch * new_tokens / seconds
    return found


@torch.no_grad()
def decode(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> float:
    """Seconds of `new_tokens` greedy steps after `prompt` (batch, length), whose own pass is not counted."""
    output = model(prompt, use_cache=True, logits_to_keep=1)
    started = _now()
    for _ in range(new_tokens):
        following = output.logits[:, -1:].argmax(-1)
        output = model(following, past_key_values=output.past_key_values, use_cache=True)
    return _now() - started


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

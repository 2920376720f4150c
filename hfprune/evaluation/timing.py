"""Speed and peak memory of models and of scoring, timed side by side in one run.

Numbers that can be counted (parameters, bytes, operations) come from `models` and are part of every measurement.
"""

import multiprocessing
import platform
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.data.sampling import sample_sequences
from hfprune.errors import UserError
from hfprune.models.context import check_checkpoint
from hfprune.models.loading import PREFILL, device, load_model, load_tokenizer, weight_bytes
from hfprune.models.units import read_scores
from hfprune.pruning.criteria import CRITERIA
from hfprune.pruning.scoring import batch_size, cost, tokens_per_batch, unit_scores
from hfprune.runtime.memory import empty_cache, free_bytes, is_offloaded
from hfprune.runtime.progress import progress
from hfprune.store.artifacts import device_name, peak_memory
from hfprune.store.filenames import SCORES
from hfprune.store.keys import versions

BATCHES = (1, 8)
SHARE_OF_WEIGHTS = 0.25  # of the free memory, by their bytes on disk: models may compute in a wider type
PROMPT = 32  # tokens before the first decoded one


def time_models(folders: dict[str, Path], dtype: str, rounds: int, new_tokens: int) -> list[dict[str, object]]:
    """Time checkpoints against each other.

    All of them are in memory at once if they take little of it; otherwise each is loaded when it is its turn, and runs
    for one token before it is timed.

    Args:
        folders: folders of the checkpoints, by name.
        dtype: type to compute in, as for `load_model`.
        rounds: rounds to measure, after one that is not measured. In a round, the models run in turn, once each.
        new_tokens: tokens to decode, one step at a time with a cache.

    Returns:
        Rows `model`, `task`, `metric`, `value`, `n`: medians over `n` rounds of `prefill_seconds` (one sequence of
        `PREFILL` tokens) and `decode_tokens_per_second` (over all sequences, for each of `BATCHES`); and `peak_bytes`
        of a process that loads the model and runs all this once: GPU memory, or resident memory without a GPU.

    Raises:
        UserError: the GPUs, if there are any, do not hold all weights.
    """
    for folder in folders.values():
        check_checkpoint(folder, {"prefill": PREFILL, f"tokens, after a prompt of {PROMPT},": PROMPT + new_tokens})

    def load(name: str) -> PreTrainedModel:
        return on_gpu(load_model(folders[name], dtype), name)

    if are_held := sum(map(weight_bytes, folders.values())) < free_bytes(device()) * SHARE_OF_WEIGHTS:
        load = cache(load)
    measurements: dict[tuple[str, str, str], list[float]] = {}
    turns = [(number, name) for number in range(rounds + 1) for name in folders]
    for number, name in progress(turns, "time models", len(turns), "turn"):
        model = load(name)
        if not are_held:
            run_once(model, 1)
        for (task, metric), value in run_once(model, new_tokens).items():
            if number:
                measurements.setdefault((name, task, metric), []).append(value)
        del model
    del load
    rows = [(*names, statistics.median(values), rounds) for names, values in measurements.items()]
    with _fresh_process() as pool:
        for name, folder in progress(folders.items(), "peak memory", len(folders), "model"):
            peak = pool.submit(peak_of, folder, dtype, new_tokens).result()
            rows.append((name, "inference", "peak_bytes", peak, 1))
    return [dict(zip(("model", "task", "metric", "value", "n"), row, strict=True)) for row in rows]


def on_gpu(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model, if the GPUs hold all of it. Otherwise the clock would measure the transfer of weights.

    Raises:
        UserError: the GPUs do not hold all of it.
    """
    if is_offloaded(model):
        raise UserError(
            f"model {name}: not all of its weights have room on the GPUs, so its time would be that of moving them. "
            "Take more GPUs or larger ones."
        )
    return model


def _fresh_process() -> ProcessPoolExecutor:
    """A pool with a new process for each call, from a fork server: Linux counts a parent's peak as its child's."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), max_tasks_per_child=1)


def peak_of(folder: Path, dtype: str, new_tokens: int) -> int:
    """Peak bytes of this process after `run_once` of a checkpoint."""
    run_once(on_gpu(load_model(folder, dtype), folder.name), new_tokens)
    return peak_memory()


def time_scoring(
    model: Path, text: Path, criteria: Mapping[str, Path | None], samples: int, length: int, seed: int, draws: int,
    dtype: str, products: str, rounds: int,
) -> list[dict[str, object]]:  # fmt: skip
    """Time the scoring of each criterion alone. In every round the criteria run in turn.

    Args:
        model, text: folders of a checkpoint and of the calibration text.
        criteria: for each criterion's name, the folder of the scores of its light cut, or None.
        samples, length, seed, draws, dtype, products: see `scoring.score`.
        rounds: rounds to measure, after one that scores a single sequence and is not measured.

    Returns:
        Rows `criterion`; `light_cut` (the criterion to score first, or "none"); `seconds`, the median over `n` rounds
        of a pass over all sequences, without loading; `peak_bytes` of a process that loads the model and scores one
        batch: GPU memory, or resident memory without a GPU; `tokens` and `flops` of the pass; `n`.

    Raises:
        UserError: the GPUs, if there are any, do not hold all weights.
    """
    network = on_gpu(load_model(model, dtype), model.name)
    tokens = sample_sequences(load_tokenizer(model), network.config, text, samples, length, seed)
    cuts = {name: None if cut is None else read_scores(cut / SCORES)["mlp"] for name, cut in criteria.items()}
    seconds: dict[str, list[float]] = {name: [] for name in criteria}
    turns = [(number, name) for number in range(rounds + 1) for name in cuts]
    for number, name in progress(turns, "time scoring", len(turns), "turn"):
        started = _now()
        unit_scores(network, tokens if number else tokens[:1], [name], seed, draws, cuts[name], products=products)
        if number:
            seconds[name].append(_now() - started)
    costs = {name: cost(network, tokens.shape, [name], draws, cut is not None, False) for name, cut in cuts.items()}
    batches = {name: tokens[: batch_size(length, tokens_per_batch(network, [name]))] for name in criteria}
    device = network.device
    del network
    empty_cache(device)  # the process below chooses its batch by what is free
    rows = []
    with _fresh_process() as pool:
        for name, cut in progress(cuts.items(), "peak memory", len(cuts), "criterion"):
            peak = pool.submit(peak_of_scoring, model, dtype, products, batches[name], name, seed, draws, cut).result()
            values = {"seconds": statistics.median(seconds[name]), "peak_bytes": peak, **costs[name], "n": rounds}
            rows.append({"criterion": name, "light_cut": CRITERIA[name].light_cut or "none", **values})
    return rows


def peak_of_scoring(
    model: Path, dtype: str, products: str, tokens: Tensor, criterion: str, seed: int, draws: int,
    light_cut: list[Tensor] | None,
) -> int:  # fmt: skip
    """Peak bytes of this process after scoring `tokens` (sequences, length) by one criterion."""
    unit_scores(load_model(model, dtype), tokens, [criterion], seed, draws, light_cut, products=products)
    return peak_memory()


def timing_environment() -> dict[str, object]:
    """What a timing depends on besides the model: `device`, `threads` and `versions` of the libraries."""
    libraries = versions(("torch", "transformers")) | {"python": platform.python_version()}
    names = ", ".join(f"{name} {version}" for name, version in libraries.items())
    return {"device": device_name(), "threads": torch.get_num_threads(), "versions": names}


@torch.no_grad()
def run_once(model: PreTrainedModel, new_tokens: int) -> dict[tuple[str, str], float]:
    """Seconds of one prefill, and decoded tokens per second for each batch size, by (task, metric)."""
    tokens = torch.arange(PREFILL, device=model.device)[None] % model.config.vocab_size
    started = _now()
    model(tokens, use_cache=False)
    results = {(f"prefill {PREFILL}", "prefill_seconds"): _now() - started}
    for batch in BATCHES:
        seconds = decode(model, tokens[:, :PROMPT].repeat(batch, 1), new_tokens)
        results[f"decode batch {batch}", "decode_tokens_per_second"] = batch * new_tokens / seconds
    return results


@torch.no_grad()
def decode(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> float:
    """Seconds of `new_tokens` greedy steps after `prompt` (batch, length). The pass over the prompt is not counted."""
    output = model(prompt, use_cache=True, logits_to_keep=1)
    started = _now()
    for _ in range(new_tokens):
        next_tokens = output.logits[:, -1:].argmax(-1)
        output = model(next_tokens, past_key_values=output.past_key_values, use_cache=True)
    return _now() - started


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

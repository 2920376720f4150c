"""How fast models run, and how fast they are scored, and in how much memory: timed side by side, in turn, in one run.

What can be counted rather than timed (parameters, bytes, operations) is in `models`, and part of every measurement.
"""

import multiprocessing
import platform
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.data.sampling import sample_sequences
from hfprune.errors import UserError
from hfprune.models.context import check_checkpoint
from hfprune.models.loading import PREFILL, load_model, load_tokenizer
from hfprune.models.units import read_scores
from hfprune.pruning.criteria import CRITERIA
from hfprune.pruning.scoring import TOKENS_PER_BATCH, cost, unit_scores
from hfprune.runtime.memory import is_offloaded
from hfprune.store.artifacts import device_name, peak_memory
from hfprune.store.filenames import SCORES
from hfprune.store.keys import versions

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

    Raises:
        UserError: a model does not stand on GPUs with all its weights, where there are any.
    """
    for folder in folders.values():
        check_checkpoint(folder, {"prefill": PREFILL, f"tokens, after a prompt of {PROMPT},": PROMPT + new_tokens})
    models = {name: _on_gpu(load_model(folder, dtype), name) for name, folder in folders.items()}
    found: dict[tuple[str, str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, model in models.items():
            for (task, metric), value in run_once(model, new_tokens).items():
                if number:
                    found.setdefault((name, task, metric), []).append(value)
    del models, model
    rows = [(*what, statistics.median(values), rounds) for what, values in found.items()]
    with _process_of_its_own() as pool:
        for name, folder in folders.items():
            peak = pool.submit(peak_of, folder, dtype, new_tokens).result()
            rows.append((name, "inference", "peak_bytes", peak, 1))
    return [dict(zip(("model", "task", "metric", "value", "n"), row, strict=True)) for row in rows]


def _on_gpu(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model, which must not fetch weights from elsewhere while it computes: that is what a clock would measure.

    Raises:
        UserError: the GPUs do not hold all of it.
    """
    if is_offloaded(model):
        raise UserError(
            f"model {name}: not all of its weights have room on the GPUs, so its time would be that of moving them. "
            "All models that are timed stand there at once: time fewer together, or take more GPUs or larger ones."
        )
    return model


def _process_of_its_own() -> ProcessPoolExecutor:
    """For each call; not spawned from this one: Linux counts the spawning process's peak as the child's."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), max_tasks_per_child=1)


def peak_of(folder: Path, dtype: str, new_tokens: int) -> int:
    """Peak bytes of this process after `run_once` of a checkpoint."""
    run_once(_on_gpu(load_model(folder, dtype), folder.name), new_tokens)
    return peak_memory()


def time_scoring(
    model: Path, text: Path, criteria: Mapping[str, Path | None], samples: int, length: int, seed: int, draws: int,
    dtype: str, rounds: int,
) -> list[dict[str, object]]:  # fmt: skip
    """Time the scoring of each criterion alone, one after the other in every round.

    Args:
        model, text: folders of a checkpoint and of the calibration text.
        criteria: by name the folder of the scores of its light cut, or None.
        samples, length, seed, draws, dtype: see `scoring.score`.
        rounds: measured, after each criterion has scored one sequence unmeasured.

    Returns:
        Rows `criterion`, `light_cut` (the criterion that has to be scored before, "none"); `seconds`, the median over
        `n` rounds of a pass over all sequences, without loading; `peak_bytes` of a process that loads the model and
        scores one batch, of GPU memory, or else resident; `tokens` and `flops` of the pass; `n`.

    Raises:
        UserError: the model does not stand on GPUs with all its weights, where there are any.
    """
    network = _on_gpu(load_model(model, dtype), model.name)
    tokens = sample_sequences(load_tokenizer(model), network.config, text, samples, length, seed)
    cuts = {name: None if cut is None else read_scores(cut / SCORES)["mlp"] for name, cut in criteria.items()}
    seconds: dict[str, list[float]] = {name: [] for name in criteria}
    for number in range(rounds + 1):
        for name, cut in cuts.items():
            started = _now()
            unit_scores(network, tokens if number else tokens[:1], [name], seed, draws, cut)
            if number:
                seconds[name].append(_now() - started)
    counted = {name: cost(network, tokens.shape, [name], draws, cut is not None) for name, cut in cuts.items()}
    del network
    batch = tokens[: max(1, TOKENS_PER_BATCH // length)]
    rows = []
    with _process_of_its_own() as pool:
        for name, cut in cuts.items():
            peak = pool.submit(peak_of_scoring, model, dtype, batch, name, seed, draws, cut).result()
            spent = {"seconds": statistics.median(seconds[name]), "peak_bytes": peak, **counted[name], "n": rounds}
            rows.append({"criterion": name, "light_cut": CRITERIA[name].light_cut or "none", **spent})
    return rows


def peak_of_scoring(
    model: Path, dtype: str, tokens: Tensor, criterion: str, seed: int, draws: int, light_cut: list[Tensor] | None
) -> int:
    """Peak bytes of this process after scoring `tokens` (sequences, length) by one criterion."""
    unit_scores(load_model(model, dtype), tokens, [criterion], seed, draws, light_cut)
    return peak_memory()


def surroundings() -> dict[str, object]:
    """What a timing depends on beside the model: `device`, `threads`, `versions` of what computes."""
    found = versions(("torch", "transformers")) | {"python": platform.python_version()}
    named = ", ".join(f"{name} {version}" for name, version in found.items())
    return {"device": device_name(), "threads": torch.get_num_threads(), "versions": named}


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

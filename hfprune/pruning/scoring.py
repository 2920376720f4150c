"""The engine: one pass over calibration tokens gives every criterion's score of every unit of every layer."""

from __future__ import annotations

import itertools
import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.data.sampling import sample_sequences
from hfprune.errors import UserError
from hfprune.models.activations import checkpointed, graph_bytes, is_short
from hfprune.models.head import head_of
from hfprune.models.loading import (
    final_hidden,
    flops_per_token,
    load_model,
    load_tokenizer,
    weights_in_memory,
)
from hfprune.models.mixtures import ExpertNeurons, WholeExperts
from hfprune.models.norms import fused_norms
from hfprune.models.streamed import device_of, is_streamed, memory_of
from hfprune.models.units import AnyPart, Part, Scores, kinds_of, layers_of, parts, read_scores
from hfprune.pruning import layerwise
from hfprune.pruning.convergence import agreement, rounds
from hfprune.pruning.criteria import (
    CRITERIA,
    LIGHT_CUT,
    ExpertCriterion,
    GradientCriterion,
    Moments,
    StaticCriterion,
    ranks,
)
from hfprune.pruning.greedy import one_by_one
from hfprune.pruning.head import LogitGradient, generator
from hfprune.pruning.recorder import CalibrationPass, Sums, UnitRecorder, bytes_of_sums, flops_of_sums, names_of_sums
from hfprune.pruning.weight_recorder import reads_weights, sum_name
from hfprune.runtime.matmul import fast_products, product_dtype
from hfprune.runtime.memory import empty_cache, free_bytes, is_out_of_memory
from hfprune.runtime.progress import progress
from hfprune.runtime.signals import Stopped, sigterm_deferred
from hfprune.store.filenames import RESUME, SCORES, SUMS
from hfprune.store.keys import canonical, sha256

TOKENS_PER_BATCH = 1024  # on a CPU, and in a unit of which shards hold whole numbers
TOKENS_ON_GPU, TOKENS_STREAMED = 32768, 4096  # at most, on a GPU
SECONDS_BETWEEN_SAVES = 120


def score(
    folder: Path, model: Path, text: Path, criteria: Sequence[str], samples: int, length: int, seed: int, draws: int,
    dtype: str, memory: str = "auto", products: str = "auto", light_cut: Path | None = None,
    until: float | None = None, until_ratio: float | None = None,
) -> tuple[dict[str, Scores], dict[str, dict[str, Any]]]:  # fmt: skip
    """Stage `score`: the scores of every criterion in `criteria`, by one pass over the calibration text.

    Args:
        folder: the artifact's; the pass keeps its partial sums in its `.resume`, to go on after a kill.
        model: folder of the checkpoint.
        text: folder of the calibration text.
        criteria: names in `CRITERIA`, all with the same `light_cut`.
        samples: number of sequences, see `sampling.sample_sequences`; with `until` the most that are scored.
        length: tokens of each sequence.
        seed: draws the sequences, the labels of sampled criteria, and `random`.
        draws: labels per position for sampled criteria.
        dtype: of the model's arithmetic. Scores are summed in float32 and float64 whatever it is.
        memory: "resident", "streamed" or "auto", see `loading.load_model`. It does not change the scores.
        products: see `matmul.product_dtype`.
        light_cut: folder of the scores by which neurons are silenced first, for criteria that need it.
        until, until_ratio: see `scores_until`; by default all sequences are scored.

    Returns:
        The scores by criterion, on the CPU; and what each of them cost, see `costs`. With `until` also `samples_used`,
        and `convergence`: the agreement at each comparison.
    """
    network, tokens = _model_and_tokens(model, text, samples, length, seed, dtype, memory)
    arguments = (network, tokens, criteria, seed, draws, _light_cut(light_cut), folder / RESUME, products)
    if until is None:
        passes, records = [(samples, criteria)], {}
        scores = unit_scores(*arguments)
    else:
        scores, passes, records = scores_until(*arguments, until, until_ratio)
    by_criterion = costs(network, length, passes, draws, light_cut is not None, products)
    return scores, {name: by_criterion[name] | records.get(name, {}) for name in criteria}


def shard(
    folder: Path, model: Path, text: Path, criteria: Sequence[str], samples: int, length: int, seed: int, draws: int,
    dtype: str, shard: int, shards: int, memory: str = "auto", products: str = "auto",
    light_cut: Path | None = None,
) -> tuple[dict[str, Sums], dict[str, dict[str, Any]]]:  # fmt: skip
    """Stage `shard`: the sums of `score` over one share of its sequences, number `shard` of `shards`.

    Returns:
        The sums that each criterion needs, for an artifact each; and what each of them cost, see `costs`.
    """
    network, tokens = _model_and_tokens(model, text, samples, length, seed, dtype, memory)
    share = shard_range(samples, length, shard, shards)
    cut = _light_cut(light_cut)
    sums = add_up(network, tokens, criteria, seed, draws, cut, folder / RESUME, share, products=products)
    share_costs = costs(network, length, [(len(share), criteria)], draws, light_cut is not None, products)
    return {name: sums.of(name) for name in criteria}, share_costs


def cost(
    model: PreTrainedModel, shape: Sequence[int], criteria: Sequence[str], draws: int, light_cut: bool, streamed: bool
) -> dict[str, int]:
    """`tokens` and `flops` of a pass over `shape` (sequences, length) tokens.

    A backward pass to activations alone costs as much as a forward pass. With streamed weights the backward sweep
    computes each layer a second time. Gradients of weights, and products of pairs, cost more.
    """
    sequences, length = shape
    passes = _backward_passes(criteria, draws)
    tokens, times = sequences * length, 1 + light_cut + len(passes) + (streamed and bool(passes))
    further = sum(
        flops_of_sums(part, passes, criteria) for kind in kinds_of(model) for part in parts(model, kind) if part
    )
    return {"tokens": tokens, "flops": tokens * (flops_per_token(model, length) * times + further)}


def scratch_bytes(
    model: PreTrainedModel, shape: Sequence[int], criteria: Sequence[str], draws: int, light_cut: bool
) -> int:
    """Bytes on disk for the hidden states of a pass over `shape` tokens with streamed weights."""
    places = sum(layerwise.places(model.config.num_hidden_layers, len(_backward_passes(criteria, draws)), light_cut))
    return places * math.prod(shape) * model.config.hidden_size * model.dtype.itemsize


def costs(
    model: PreTrainedModel,
    length: int,
    passes: Sequence[tuple[int, Sequence[str]]],
    draws: int,
    light_cut: bool,
    products: str,
) -> dict[str, dict[str, Any]]:
    """What scoring cost, and how it computed.

    Args:
        model: that was scored.
        length: tokens of each sequence.
        passes: for each pass its number of sequences, and the criteria that it scored.
        draws, light_cut, products: of all passes.

    Returns:
        By criterion, its `cost` if it had been scored alone, and `flops_together` of all passes.
    """

    def flops_and_tokens(sequences: int, names: Sequence[str]) -> dict[str, int]:
        return cost(model, (sequences, length), names, draws, light_cut, is_streamed(model))

    common = {"flops_together": sum(flops_and_tokens(*each)["flops"] for each in passes)}
    dtype = product_dtype(products, model.dtype, device_of(model))
    common |= {"memory": memory_of(model), "products": str(dtype).removeprefix("torch.")}
    _, criteria = passes[0]
    own = {name: sum(sequences for sequences, names in passes if name in names) for name in criteria}
    return {name: flops_and_tokens(sequences, [name]) | common for name, sequences in own.items()}


def _backward_passes(criteria: Sequence[str], draws: int) -> list[tuple[list[str], LogitGradient, int]]:
    """The backward passes after one forward pass: the criteria that use each, its gradient, the number of its draw."""
    by_gradient: dict[tuple[LogitGradient, int], list[str]] = defaultdict(list)
    for name in criteria:
        if isinstance(criterion := CRITERIA[name], GradientCriterion):
            by_gradient[(criterion.logit_gradient, draws if criterion.sampled else 1)].append(name)
    return [(names, gradient, draw) for (gradient, count), names in by_gradient.items() for draw in range(count)]


def merge(
    shards: Sequence[Path],
    criterion: str,
    model: Path,
    length: int,
    seed: int,
    draws: int,
    dtype: str,
    memory: str = "auto",
) -> Scores:
    """Stage `score` from the folders of all its shards: the same scores."""
    sums = Sums()
    for folder in shards:
        sums.load(folder / SUMS)
    network = load_model(model, dtype, memory) if isinstance(CRITERIA[criterion], StaticCriterion) else None
    return finish(criterion, sums, sums.sequences * length, seed, draws, network)


def shard_range(samples: int, length: int, shard: int, shards: int) -> range:
    """The sequences of one shard. Whole batches if there are enough, so that the sums equal those of a single job."""
    unit = batch_size(length, TOKENS_PER_BATCH)
    if -(-samples // unit) < shards:
        unit = 1
    units = -(-samples // unit)
    return range(min(samples, units * shard // shards * unit), min(samples, units * (shard + 1) // shards * unit))


def unit_scores(
    model: PreTrainedModel,
    tokens: Tensor,
    criteria: Sequence[str],
    seed: int = 0,
    draws: int = 1,
    light_cut: list[Tensor] | None = None,
    resume: Path | None = None,
    products: str = "float32",
    batch: int | None = None,
) -> dict[str, Scores]:
    """The importance of every unit of every part by each criterion.

    All criteria share one forward pass. Each gradient function costs one backward pass, times `draws` if it is sampled.
    Only activations carry gradients. The score of a gradient criterion is the mean over sequences (and draws) of its
    summed products, divided by the length. S is summed over a sequence's positions.

    Args:
        model: on one device or spread over several; no parameter requires a gradient.
        tokens: (sequences, length) int64.
        criteria: names in `CRITERIA`, all with the same `light_cut`.
        seed: draws sampled labels and `random`.
        draws: labels per position for sampled criteria.
        light_cut: (neurons,) scores per layer. The lowest `LIGHT_CUT` of the MLPs' neurons are silenced and score 0.
            The intact model then runs as well, which costs one more forward pass.
        resume: folder for partial sums, which are saved every few minutes and read at the start.
        products: see `matmul.product_dtype`. bfloat16 changes the scores a little, not the sums' precision.
        batch: sequences per batch; by default see `tokens_per_batch`. It does not change the scores.

    Returns:
        The scores by criterion, on the CPU.

    Raises:
        UserError: a layer's scores are not finite, or nothing reached it, or the scores of all layers are zero.
    """
    sums = add_up(model, tokens, criteria, seed, draws, light_cut, resume, batch=batch, products=products)
    return {name: finish(name, sums, tokens.numel(), seed, draws, model) for name in criteria}


def scores_until(
    model: PreTrainedModel, tokens: Tensor, criteria: Sequence[str], seed: int, draws: int,
    light_cut: list[Tensor] | None, resume: Path | None, products: str, until: float, ratio: float,
) -> tuple[dict[str, Scores], list[tuple[int, list[str]]], dict[str, dict[str, Any]]]:  # fmt: skip
    """As `unit_scores`, of as many sequences as each criterion needs to settle.

    After a few sequences, and each time that their number has doubled, the sequences so far and the new ones rank the
    units apart. A criterion is scored no further when the share of units that both would keep reaches `until`. What it
    gets does not depend on which others are scored with it. A finished round is read again after a kill.

    Args:
        model, tokens, criteria, seed, draws, light_cut, products: see `unit_scores`.
        resume: folder for the sums of each round, and for the partial sums of the round that runs.
        until: share between 0 and 1, see `convergence.agreement`.
        ratio: share of every layer's units that both remove.

    Returns:
        The scores by criterion; the `costs` passes; by criterion its `samples_used` and `convergence`.
    """
    length, passes = tokens.shape[1], []
    sums, scores = {name: Sums() for name in criteria}, {}
    records: dict[str, dict[str, Any]] = {name: {"samples_used": 0, "convergence": []} for name in criteria}

    def finished(name: str, some: Sums) -> Scores:
        return finish(name, some, some.sequences * length, seed, draws, model)

    with sigterm_deferred() as sigterm:
        for share in rounds(len(tokens)):
            pending = [name for name in criteria if name not in scores]
            if not pending:
                break
            new = _round(model, tokens, pending, seed, draws, light_cut, resume, share, products)
            if sigterm.received:  # in the last batch, after which the round went on to its end
                raise Stopped(f"the sums over {share.stop} of {len(tokens)} sequences are kept")
            passes.append((len(share), pending))
            for name in pending:
                added, agreed = new.of(name), 0.0
                if share.start:
                    agreed = agreement(finished(name, sums[name]), finished(name, added), ratio)
                    records[name]["convergence"].append({"samples": share.stop, "agreement": round(agreed, 6)})
                    print(f"{name}: two halves of {share.stop} sequences keep {agreed:.2%} in common", flush=True)
                sums[name].merge(added)
                if agreed >= until or share.stop == len(tokens):
                    scores[name], records[name]["samples_used"] = finished(name, sums[name]), share.stop
    return scores, passes, records


def _round(
    model: PreTrainedModel, tokens: Tensor, criteria: Sequence[str], seed: int, draws: int,
    light_cut: list[Tensor] | None, resume: Path | None, share: range, products: str,
) -> Sums:  # fmt: skip
    """The sums of `add_up`, kept in `resume` until the artifact is finished, and read if they are there."""
    if resume is None:
        return add_up(model, tokens, criteria, seed, draws, light_cut, None, share, products=products)
    folder = resume / f"round-{share.start}-{sha256(canonical([*criteria, draws]))[:16]}"
    file = folder.with_suffix(".safetensors")
    if file.exists():
        sums = Sums()
        sums.load(file)
        return sums
    folder.mkdir(parents=True, exist_ok=True)
    sums = add_up(model, tokens, criteria, seed, draws, light_cut, folder, share, products=products)
    sums.save(file)
    shutil.rmtree(folder)  # partial sums, and hidden states of streamed weights
    return sums


def finish(name: str, sums: Sums, count: int, seed: int, draws: int, model: PreTrainedModel | None) -> Scores:
    """One criterion's scores from the sums over `count` tokens. Only static criteria need the model."""
    by_part = {kind: _scores(name, kind, sums, count, seed, draws, model) for kind in sums.kinds(name)}
    for kind, layers in by_part.items():
        for layer, scores in enumerate(layers):
            if not scores.isfinite().all():
                raise UserError(f"layer {layer}: scores by {name} are not finite; compute in float32 or bfloat16.")
        zero = [layer for layer, scores in enumerate(layers) if scores.numel() and not scores.any()]
        if zero and len(zero) == sum(scores.numel() > 0 for scores in layers):
            raise UserError(f"{kind}: all scores by {name} are zero, in all layers: they rank nothing.")
        for layer in zero:  # it may well write nothing
            print(f"layer {layer}, {kind}: all scores by {name} are zero: its units go first", file=sys.stderr)
    return by_part


def _scores(
    name: str, kind: str, sums: Sums, count: int, seed: int, draws: int, model: PreTrainedModel | None
) -> list[Tensor]:
    """One criterion's scores of one part, per layer; empty for a layer without it."""
    criterion = CRITERIA[name]
    if isinstance(criterion, GradientCriterion):
        times = count * (draws if criterion.sampled else 1)
        layers = [layer / times for layer in _summed(name, kind, sums)]
        if criterion.products == "pairs":
            layers = [one_by_one(layer) if layer.numel() else layer for layer in layers]
        return [layer.float() for layer in layers]
    names = names_of_sums(name, kind, sums.mixture)
    by_layer = zip(*(sums.layers(moment, kind) for moment in names), strict=True)
    of_layers = [dict(zip(names, values, strict=True)) for values in by_layer]
    if isinstance(criterion, ExpertCriterion):
        return [criterion.score(*values.values()).float() for values in of_layers]
    assert model is not None
    return [
        _static(criterion, part, count, values, generator(seed, name, kind, layer))
        if part and part.units
        else torch.zeros(0)
        for layer, (part, values) in enumerate(zip(parts(model, kind), of_layers, strict=True))
    ]


def _summed(name: str, kind: str, sums: Sums) -> list[Tensor]:
    """The sums of a gradient criterion, per layer: (units,), or (units, units) for pairs."""
    if not reads_weights(name):
        return sums.layers(name, kind)
    by_linear = itertools.takewhile(len, (sums.layers(sum_name(name, number), kind) for number in itertools.count()))
    return [sum(each.abs().sum(1) for each in linears) for linears in zip(*by_linear, strict=True)]


def _static(
    criterion: StaticCriterion, part: AnyPart, count: int, moments: dict[str, Tensor], random: torch.Generator
) -> Tensor:
    """A static criterion's scores of one part of a layer, from its moments by name, over `count` tokens."""
    if isinstance(part, WholeExperts):
        with weights_in_memory(part.experts.experts):
            none = torch.zeros(part.experts.count, dtype=torch.float64)
            return criterion.score(part, Moments(0, none, none), random).float().cpu()
    if isinstance(part, ExpertNeurons):
        with weights_in_memory(part.experts.experts):
            by_expert = zip(moments["routed"].int().tolist(), moments["total"], moments["squares"], strict=True)
            return torch.stack(
                [_of_expert(criterion, part, expert, *of_expert, random) for expert, of_expert in enumerate(by_expert)]
            )
    with weights_in_memory(*part.linears):
        by_name = {name: moment.to(part.output.weight.device) for name, moment in moments.items()}
        if "products" in by_name and not by_name["squares"].any():  # nothing to invert; `finish` refuses zeros
            return torch.zeros(part.units)
        return criterion.score(part, Moments(count, **by_name), random).float().cpu()


def _of_expert(
    criterion: StaticCriterion, part: ExpertNeurons, expert: int, count: int, total: Tensor, squares: Tensor,
    random: torch.Generator,
) -> Tensor:  # fmt: skip
    """A static criterion's scores of the neurons of one expert, which read `count` tokens."""
    neurons = part.experts.neurons_of(expert)
    device = neurons.output.weight.device
    scores = criterion.score(neurons, Moments(max(2, count), total.to(device), squares.to(device)), random)
    scores = scores.float().cpu()
    return scores if count > 1 else scores.nan_to_num()  # one token says nothing of how a neuron varies


def add_up(
    model: PreTrainedModel,
    tokens: Tensor,
    criteria: Sequence[str],
    seed: int,
    draws: int,
    light_cut: list[Tensor] | None,
    resume: Path | None,
    share: range | None = None,
    batch: int | None = None,
    products: str = "float32",
) -> Sums:
    """The sums of one pass over the sequences `share` of `tokens` (default: all). Arguments: see `unit_scores`."""
    mixture = "experts" in kinds_of(model)
    if idle := [name for name in criteria if not any(ranks(name, kind, mixture) for kind in kinds_of(model))]:
        raise UserError(f"criterion {idle[0]!r} ranks experts, and {model.config.model_type!r} models have none.")
    share = share if share is not None else range(len(tokens))
    one_pass = CalibrationPass(
        tokens[share.start : share.stop],
        share.start,
        seed,
        criteria,
        _backward_passes(criteria, draws),
        silenced(light_cut) if light_cut else None,
        batch or batch_size(tokens.shape[1], tokens_per_batch(model, criteria)),
        product_dtype(products, model.dtype, device_of(model)),
    )
    if not share:
        return Sums()
    sums = _in_batches_that_fit(model, one_pass, resume)
    for kind in kinds_of(model):
        for layer, part in enumerate(parts(model, kind)):
            linears = len(part.linears) if isinstance(part, Part) else 1
            for name in (name for criterion in criteria for name in names_of_sums(criterion, kind, mixture, linears)):
                if part is None or not part.units:
                    sums.tensors[f"{name}.{kind}.{layer}"] = torch.zeros(0, dtype=torch.float64)
                elif f"{name}.{kind}.{layer}" not in sums.tensors:
                    raise UserError(f"layer {layer}, {kind}: nothing reached it, neither activations nor gradients.")
    return sums


def _in_batches_that_fit(model: PreTrainedModel, one_pass: CalibrationPass, resume: Path | None) -> Sums:
    """The sums of a pass. A batch that does not fit in memory is halved, as often as it takes.

    What it has added to the sums by then is not known, so the pass goes on from the sums that `resume` holds.
    """
    compute = layerwise.add_up if is_streamed(model) else _add_up_resident
    size = min(one_pass.batch, len(one_pass.tokens))
    while True:
        try:
            return compute(model, replace(one_pass, batch=size), resume)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Here the error and the tensors that its frames hold are gone.
        empty_cache(device_of(model))
        print(f"out of memory: again, with {size // 2} sequences at a time", flush=True)
        size //= 2


def _add_up_resident(model: PreTrainedModel, one_pass: CalibrationPass, resume: Path | None) -> Sums:
    """The sums of a pass in which each batch runs through the whole model, forward and backward."""
    state = one_pass.state(resume)
    sums = Sums()
    if state and state.exists():
        sums.load(state)
    size, passes, length = one_pass.batch, one_pass.passes, one_pass.tokens.shape[1]
    recompute = bool(passes) and is_short(model, size * length, bytes_of_sums(model, one_pass.criteria))
    recorder = UnitRecorder(sums, length, one_pass.moments, bool(passes), one_pass.silent, recompute, one_pass.weights)
    remaining = one_pass.tokens[sums.sequences :].to(model.device)
    saved = time.monotonic()
    with ExitStack() as stack:
        for layer in range(len(layers_of(model))):
            stack.enter_context(recorder.attached(layer, model))
        head = stack.enter_context(head_of(model)).to(one_pass.products)
        stack.enter_context(fast_products(model.device, one_pass.products))
        if model.device.type == "cuda":
            stack.enter_context(fused_norms(model))
        if recompute:
            print("memory is short: the backward pass computes each layer a second time", flush=True)
            stack.enter_context(checkpointed(model, lambda: recorder.in_phase("recompute")))
        sigterm = stack.enter_context(sigterm_deferred())
        batches = remaining.split(size) if len(remaining) else ()
        for rows in progress(batches, "score", remaining.numel(), " tokens", torch.numel):
            dense = None
            if one_pass.silent:
                with recorder.in_phase("dense"), torch.no_grad():
                    dense = final_hidden(model, rows)
            with torch.set_grad_enabled(bool(passes)):
                hidden = final_hidden(model, rows)
            for number, (names, _, _) in enumerate(passes):
                recorder.criteria = names
                gradient = one_pass.gradient(number, sums.sequences, hidden.detach(), head, dense)
                hidden.backward(gradient, retain_graph=number + 1 < len(passes))
            dense = hidden = gradient = None  # frees the graph before the next forward pass builds another
            if not sums.sequences:
                sums.refuse_not_finite()  # at once, not after hours
            sums.sequences += len(rows)
            stop = sigterm.received and sums.sequences < len(one_pass.tokens)
            if state and (stop or time.monotonic() - saved >= SECONDS_BETWEEN_SAVES):
                sums.save(state)
                saved = time.monotonic()
            if stop:
                raise Stopped(f"the sums over {sums.sequences} of {len(one_pass.tokens)} sequences are kept")
    return sums


def silenced(scores: list[Tensor]) -> list[Tensor]:
    """Per layer 0 for the lowest `LIGHT_CUT` of the neurons, at least one, and 1 for the others, float32 (neurons,)."""
    masks = []
    for layer in scores:
        lowest = layer.argsort(stable=True)[..., : max(1, round(LIGHT_CUT * layer.shape[-1]))]
        masks.append(torch.ones_like(layer).scatter_(-1, lowest, 0))
    return masks


def tokens_per_batch(model: PreTrainedModel, criteria: Sequence[str]) -> int:
    """Tokens that pass the model, or a layer of a streamed one, at once: see `tokens_at_once`."""
    device = device_of(model)
    free = free_bytes(device) - bytes_of_sums(model, criteria)
    return tokens_at_once(model, device.type, is_streamed(model), free)


def tokens_at_once(model: PreTrainedModel, device_type: str, streamed: bool, free: int) -> int:
    """Tokens that pass the model, or a layer of a streamed one, at once, where so much memory is free for them.

    A CPU is no faster with more than `TOKENS_PER_BATCH`. A GPU is, so it takes as many as half of its free memory
    holds. Those of a mixture of experts, and "eager" attention, need more than is known here.

    Args:
        model: the model, or its shape on the meta device.
        device_type: "cpu" or "cuda", where it computes.
        streamed: whether the weights are streamed.
        free: bytes, without those of the weights and of the sums.
    """
    if device_type == "cpu" or model.config._attn_implementation == "eager" or "experts" in kinds_of(model):
        return TOKENS_PER_BATCH
    of_token = graph_bytes(model, 1) // (len(layers_of(model)) if streamed else 1)
    most = TOKENS_STREAMED if streamed else TOKENS_ON_GPU
    return min(most, max(TOKENS_PER_BATCH, free // 2 // of_token))


def batch_size(length: int, count: int) -> int:
    """Sequences of `length` tokens that pass together where `count` tokens do: at least one."""
    return max(1, count // length)


def _model_and_tokens(model: Path, text: Path, samples: int, length: int, seed: int, dtype: str, memory: str):
    network = load_model(model, dtype, memory)
    return network, sample_sequences(load_tokenizer(model), network.config, text, samples, length, seed)


def _light_cut(folder: Path | None) -> list[Tensor] | None:
    return None if folder is None else read_scores(folder / SCORES)["mlp"]

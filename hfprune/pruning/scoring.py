"""The engine: one pass over calibration tokens gives every criterion's score of every unit of every layer."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.linalg import vector_norm
from transformers import PreTrainedModel

from hfprune.data.sampling import sample_sequences
from hfprune.errors import UserError
from hfprune.models.activations import checkpointed, is_short
from hfprune.models.head import Head, head_of
from hfprune.models.loading import final_hidden, flops_per_token, load_model, load_tokenizer, weights_in_memory
from hfprune.models.units import PARTS, Part, Scores, parts, read_scores
from hfprune.pruning.criteria import CRITERIA, LIGHT_CUT, GradientCriterion, Moments, Positions, StaticCriterion
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.progress import progress
from hfprune.runtime.signals import Stopped, sigterm_deferred
from hfprune.store.filenames import RESUME, SCORES, SUMS

TOKENS_PER_BATCH = 1024
# How many logits are held at once, in float32: 32 MiB on a CPU, where more is no faster; 256 MiB on a GPU.
LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**26}
SECONDS_BETWEEN_SAVES = 120
PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {  # (batch, length, units) products -> (units,) their sum
    "absolute": lambda products: vector_norm(products, 1, dim=(0, 1)),
    "square": lambda products: vector_norm(products, 2, dim=(0, 1)).double().square(),
    "square_of_sum": lambda products: products.sum(1).square().sum(0),
}
LogitGradient = Callable[[Tensor, Positions], Tensor]  # see `criteria.GradientCriterion`
MOMENTS = ("total", "squares")  # what static criteria read of the activations


def score(
    folder: Path, model: Path, text: Path, criteria: Sequence[str], samples: int, length: int, seed: int, draws: int,
    dtype: str, light_cut: Path | None = None,
) -> tuple[dict[str, Scores], dict[str, dict[str, int]]]:  # fmt: skip
    """Stage `score`: the scores of every criterion in `criteria`, by one pass over the calibration text.

    Args:
        folder: the artifact's; the pass keeps its partial sums in its `.resume`, to go on after a kill.
        model: folder of the checkpoint.
        text: folder of the calibration text.
        criteria: names in `CRITERIA`, all with the same `light_cut`.
        samples: number of sequences, see `sampling.sample_sequences`.
        length: tokens of each sequence.
        seed: draws the sequences, the labels of sampled criteria, and `random`.
        draws: labels per position for sampled criteria.
        dtype: of the model's arithmetic. Scores are summed in float32 and float64 whatever it is.
        light_cut: folder of the scores by which neurons are silenced first, for criteria that need it.

    Returns:
        The scores by criterion, on the CPU; and what each of them cost, see `costs`.
    """
    network, tokens = _model_and_tokens(model, text, samples, length, seed, dtype)
    scores = unit_scores(network, tokens, criteria, seed, draws, _light_cut(light_cut), resume=folder / RESUME)
    return scores, costs(network, tokens.shape, criteria, draws, light_cut is not None)


def shard(
    folder: Path, model: Path, text: Path, criteria: Sequence[str], samples: int, length: int, seed: int, draws: int,
    dtype: str, shard: int, shards: int, light_cut: Path | None = None,
) -> tuple[dict[str, Sums], dict[str, dict[str, int]]]:  # fmt: skip
    """Stage `shard`: the sums of `score` over one share of its sequences, number `shard` of `shards`.

    Returns:
        The sums that each criterion needs, for an artifact each; and what each of them cost, see `costs`.
    """
    network, tokens = _model_and_tokens(model, text, samples, length, seed, dtype)
    share = shard_range(samples, length, shard, shards)
    sums = add_up(network, tokens, criteria, seed, draws, _light_cut(light_cut), folder / RESUME, share)
    share_costs = costs(network, (len(share), length), criteria, draws, light_cut is not None)
    return {name: sums.of(name) for name in criteria}, share_costs


def cost(
    model: PreTrainedModel, shape: Sequence[int], criteria: Sequence[str], draws: int, light_cut: bool
) -> dict[str, int]:
    """`tokens` and `flops` of a pass over `shape` (sequences, length) tokens.

    A backward pass to activations alone costs as much as a forward pass.
    """
    sequences, length = shape
    tokens, times = sequences * length, 1 + light_cut + len(_backward_passes(criteria, draws))
    return {"tokens": tokens, "flops": tokens * flops_per_token(model, length) * times}


def costs(
    model: PreTrainedModel, shape: Sequence[int], criteria: Sequence[str], draws: int, light_cut: bool
) -> dict[str, dict[str, int]]:
    """By criterion, its `cost` alone, and `flops_together` of the pass in which all of them were scored."""
    together = cost(model, shape, criteria, draws, light_cut)["flops"]
    return {name: cost(model, shape, [name], draws, light_cut) | {"flops_together": together} for name in criteria}


def _backward_passes(criteria: Sequence[str], draws: int) -> list[tuple[list[str], LogitGradient, int]]:
    """The backward passes after one forward pass: the criteria that use each, its gradient, the number of its draw."""
    by_gradient: dict[tuple[LogitGradient, int], list[str]] = defaultdict(list)
    for name in criteria:
        if isinstance(criterion := CRITERIA[name], GradientCriterion):
            by_gradient[(criterion.logit_gradient, draws if criterion.sampled else 1)].append(name)
    return [(names, gradient, draw) for (gradient, count), names in by_gradient.items() for draw in range(count)]


def merge(
    shards: Sequence[Path], criterion: str, model: Path, length: int, seed: int, draws: int, dtype: str
) -> Scores:
    """Stage `score` from the folders of all its shards: the same scores."""
    sums = Sums()
    for folder in shards:
        sums.load(folder / SUMS)
    network = load_model(model, dtype) if isinstance(CRITERIA[criterion], StaticCriterion) else None
    return finish(criterion, sums, sums.sequences * length, seed, draws, network)


def shard_range(samples: int, length: int, shard: int, shards: int) -> range:
    """The sequences of one shard. Whole batches if there are enough, so that the sums equal those of a single job."""
    unit = _batch_size(length)
    if -(-samples // unit) < shards:
        unit = 1
    units = -(-samples // unit)
    return range(min(samples, units * shard // shards * unit), min(samples, units * (shard + 1) // shards * unit))


class Sums:
    """The sums of a pass over the calibration text, in float64.

    Attributes:
        sequences: number of sequences that the sums contain.
        tensors: `<name>.<part>.<layer>` -> (units,) for names of gradient criteria, (columns,) for `MOMENTS`.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add `value`, on any device, to the sum of that name."""
        total = self.tensors.get(name)
        self.tensors[name] = value.double() if total is None else total.to(value.device) + value

    def of(self, criterion: str) -> Sums:
        """The sums that one criterion needs."""
        names = (criterion,) if isinstance(CRITERIA[criterion], GradientCriterion) else MOMENTS
        subset = Sums()
        subset.sequences = self.sequences
        subset.tensors = {name: tensor for name, tensor in self.tensors.items() if name.split(".")[0] in names}
        return subset

    def layers(self, name: str, part: str) -> list[Tensor]:
        """The sums of that name and part, on the CPU, in the order of the layers."""
        by_key = {key: tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}.{part}.")}
        return [by_key[f"{name}.{part}.{layer}"].cpu() for layer in range(len(by_key))]

    def save(self, file: Path) -> None:
        """Write all sums to `file`, whole or not at all."""
        partial = file.with_suffix(".partial")
        save_file(self.tensors, partial, metadata={"sequences": str(self.sequences)})
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Add what `save` wrote."""
        with safe_open(file, "pt") as stored:
            self.sequences += int(stored.metadata()["sequences"])
            for name in stored.keys():  # noqa: SIM118 (not a dictionary)
                self.add(name, stored.get_tensor(name))


def unit_scores(
    model: PreTrainedModel,
    tokens: Tensor,
    criteria: Sequence[str],
    seed: int = 0,
    draws: int = 1,
    light_cut: list[Tensor] | None = None,
    batch: int | None = None,
    resume: Path | None = None,
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
        batch: sequences per batch; by default `TOKENS_PER_BATCH` tokens. It does not change the scores.
        resume: folder for partial sums, which are saved every few minutes and read at the start.

    Returns:
        The scores by criterion, on the CPU.

    Raises:
        UserError: a layer's scores are not finite, or all zero, or nothing reached it.
    """
    sums = add_up(model, tokens, criteria, seed, draws, light_cut, resume, batch=batch)
    return {name: finish(name, sums, tokens.numel(), seed, draws, model) for name in criteria}


def finish(name: str, sums: Sums, count: int, seed: int, draws: int, model: PreTrainedModel | None) -> Scores:
    """One criterion's scores from the sums over `count` tokens. Only static criteria need the model."""
    criterion = CRITERIA[name]
    by_part: Scores = {}
    for kind in PARTS:
        if isinstance(criterion, GradientCriterion):
            times = count * (draws if criterion.sampled else 1)
            by_part[kind] = [(layer / times).float() for layer in sums.layers(name, kind)]
        else:
            assert model is not None
            moments = zip(parts(model, kind), *(sums.layers(moment, kind) for moment in MOMENTS), strict=True)
            by_part[kind] = [
                _static(criterion, part, count, total, squares, generator(seed, name, kind, layer))
                for layer, (part, total, squares) in enumerate(moments)
            ]
        for layer, scores in enumerate(by_part[kind]):
            if not scores.isfinite().all():
                raise UserError(f"layer {layer}: scores by {name} are not finite; compute in float32 or bfloat16.")
            if not scores.any():
                raise UserError(f"layer {layer}, {kind}: all scores by {name} are zero: nothing reached it.")
    return by_part


def _static(
    criterion: StaticCriterion, part: Part, count: int, total: Tensor, squares: Tensor, random: torch.Generator
) -> Tensor:
    with weights_in_memory(*part.linears):
        device = part.output.weight.device
        return criterion.score(part, Moments(count, total.to(device), squares.to(device)), random).float().cpu()


class UnitRecorder:
    """Reads the units' activations and gradients while the model runs, at the input of every part's output layer.

    Attributes:
        criteria: criteria whose gradient the current backward pass carries.
        phase: "dense": units pass through unchanged. "scored": units are silenced, summed and differentiated.
            "recompute": the backward pass computes a layer of a scored pass a second time; the computation must be the
            same, but nothing is summed again.
        recompute: whether the backward pass computes layers a second time. Then no activation is kept in between: the
            backward pass reads what the second computation leaves in `recomputed`.
        recomputed: by part and layer, activations (batch, length, columns).
    """

    def __init__(
        self, sums: Sums, moments: bool, differentiate: bool, silent: list[Tensor] | None, recompute: bool
    ) -> None:
        self.sums, self.moments, self.differentiate, self.silent = sums, moments, differentiate, silent
        self.recompute = recompute
        self.criteria: list[str] = []
        self.recomputed: dict[str, Tensor] = {}
        self.phase = "scored"

    def in_phase(self, phase: str) -> Phase:
        """A context with another phase."""
        return Phase(self, phase)

    def hook(self, kind: str, layer: int, part: Part) -> Callable:
        """The forward pre-hook of a part's output layer."""

        def before_output(_module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
            activation = inputs[0]  # (batch, length, columns)
            if self.phase == "dense":
                return (activation,)
            if self.silent and kind == "mlp":
                activation = activation * self.silent[layer].to(activation)
            if self.differentiate and not activation.requires_grad:  # layer 0: no layer before it needs a gradient
                activation = activation.detach().requires_grad_()
            if self.phase == "scored":
                self._add_to_sums(f"{kind}.{layer}", part, activation)
            else:
                self.recomputed[f"{kind}.{layer}"] = activation.detach()
            return (activation,)

        return before_output

    def _add_to_sums(self, location: str, part: Part, activation: Tensor) -> None:
        values = activation.detach()
        if self.moments:
            self.sums.add(f"total.{location}", values.float().sum((0, 1)))
            self.sums.add(f"squares.{location}", vector_norm(values.float(), dim=(0, 1)).double().square())

        kept = None if self.recompute else values

        def add(gradient: Tensor) -> None:
            activations = self.recomputed.pop(location) if kept is None else kept
            products = part.per_unit(gradient.float() * activations.float())
            for name in self.criteria:
                self.sums.add(f"{name}.{location}", PRODUCTS[CRITERIA[name].products](products))

        if self.differentiate:
            activation.register_hook(add)


class Phase:
    """See `UnitRecorder.in_phase`. Several backward passes enter one context, which a generator does not allow."""

    def __init__(self, recorder: UnitRecorder, phase: str) -> None:
        self.recorder, self.phase, self.previous = recorder, phase, recorder.phase

    def __enter__(self) -> None:
        self.previous, self.recorder.phase = self.recorder.phase, self.phase

    def __exit__(self, *_error: object) -> None:
        self.recorder.phase = self.previous


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
) -> Sums:
    """The sums of one pass over the sequences `share` of `tokens` (default: all). Arguments: see `unit_scores`."""
    share = share if share is not None else range(len(tokens))
    all_parts = [(kind, layer, part) for kind in PARTS for layer, part in enumerate(parts(model, kind))]
    passes = _backward_passes(criteria, draws)
    moments = any(isinstance(CRITERIA[name], StaticCriterion) for name in criteria)
    sums = Sums()
    # The file is named after what it sums: a pass over other criteria, or with other draws, must not continue it.
    times = Counter(name for names, _, _ in passes for name in names)
    summed = [f"{name}x{count}" for name, count in times.items()]
    state = resume / f"{'-'.join(['sums', *sorted(summed), *['moments'] * moments])}.safetensors" if resume else None
    if state and state.exists():
        sums.load(state)
    size = batch or _batch_size(tokens.shape[1])
    recompute = bool(passes) and is_short(model, size * tokens.shape[1])
    recorder = UnitRecorder(sums, moments, bool(passes), silenced(light_cut) if light_cut else None, recompute)
    remaining = tokens[share.start + sums.sequences : share.stop]
    saved = time.monotonic()
    with ExitStack() as stack:
        for kind, layer, part in all_parts:
            stack.callback(part.output.register_forward_pre_hook(recorder.hook(kind, layer, part)).remove)
        head = stack.enter_context(head_of(model))
        stack.enter_context(fast_products(model.device))
        if recompute:
            print("memory is short: the backward pass computes each layer a second time", flush=True)
            stack.enter_context(checkpointed(model, lambda: recorder.in_phase("recompute")))
        sigterm = stack.enter_context(sigterm_deferred())
        for rows in progress(
            remaining.split(size) if len(remaining) else (), "score", remaining.numel(), " tokens", torch.numel
        ):
            dense = None
            if light_cut:
                with recorder.in_phase("dense"), torch.no_grad():
                    dense = final_hidden(model, rows)
            with torch.set_grad_enabled(bool(passes)):
                hidden = final_hidden(model, rows)
            for number, (names, logit_gradient, draw) in enumerate(passes):
                recorder.criteria = names
                positions = positions_of(rows, share.start + sums.sequences, seed, draw, head.weight.device)
                gradient = hidden_gradient(hidden.detach(), head, logit_gradient, positions, dense)
                hidden.backward(gradient, retain_graph=number + 1 < len(passes))
            dense = hidden = gradient = None  # frees the graph before the next forward pass builds another
            if not sums.sequences:
                _refuse_not_finite(sums)  # at once, not after hours
            sums.sequences += len(rows)
            stop = sigterm.received and sums.sequences < len(share)
            if state and (stop or time.monotonic() - saved >= SECONDS_BETWEEN_SAVES):
                state.parent.mkdir(exist_ok=True)
                sums.save(state)
                saved = time.monotonic()
            if stop:
                raise Stopped(f"the sums over {sums.sequences} of {len(share)} sequences are kept")
    for name in {*times, *(MOMENTS if moments else ())}:
        for kind, layer, _ in all_parts:
            if share and f"{name}.{kind}.{layer}" not in sums.tensors:
                raise UserError(f"layer {layer}, {kind}: nothing reached it, neither activations nor gradients.")
    return sums


def _refuse_not_finite(sums: Sums) -> None:
    """Refuse sums that cannot become finite again.

    Raises:
        UserError: with the layer, the part and the criterion of the first.
    """
    by_layer = sorted(sums.tensors.items(), key=lambda item: int(item[0].rpartition(".")[2]))
    for name, tensor in by_layer:
        if not tensor.isfinite().all():
            criterion, _, layer = name.split(".")
            raise UserError(f"layer {layer}: scores by {criterion} are not finite; compute in float32 or bfloat16.")


def silenced(scores: list[Tensor]) -> list[Tensor]:
    """Per layer 0 for the lowest `LIGHT_CUT` of the neurons, at least one, and 1 for the others, float32 (neurons,)."""
    masks = []
    for layer in scores:
        mask = torch.ones_like(layer)
        mask[layer.argsort(stable=True)[: max(1, round(LIGHT_CUT * len(layer)))]] = 0
        masks.append(mask)
    return masks


def generator(*names: object) -> torch.Generator:
    """A generator on the CPU that depends on `names` alone: the same numbers on every machine."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def positions_of(tokens: Tensor, first: int, seed: int, draw: int, device: torch.device) -> Positions:
    """The positions of (batch, length) `tokens`, whose first sequence has number `first`.

    The random numbers of a sequence depend on its number, not on its batch.
    """
    ends = torch.full((len(tokens), 1), -1)
    following = torch.cat([tokens[:, 1:], ends], dim=1).flatten()
    uniforms = [
        torch.rand(tokens.shape[1], generator=generator(seed, draw, first + number)) for number in range(len(tokens))
    ]
    return Positions(following.to(device), torch.cat(uniforms).to(device))


def hidden_gradient(
    hidden: Tensor,
    head: Head,
    logit_gradient: LogitGradient,
    positions: Positions,
    dense: Tensor | None = None,
) -> Tensor:
    """Carry a criterion's gradient from the logits to the final hidden states, one chunk of tokens at a time.

    Args:
        hidden: (batch, length, hidden) final hidden states.
        head: the model's head.
        logit_gradient: see `criteria.GradientCriterion`.
        positions: what the gradient may read beside the logits, for batch * length positions.
        dense: the intact model's final hidden states, if the criterion compares with them.

    Returns:
        dS/dhidden of the shape, dtype and device of `hidden`, S summed over all positions.
    """
    place = head.weight.device
    flat = hidden.flatten(0, 1).to(place)
    flat_dense = dense.flatten(0, 1).to(place) if dense is not None else None
    gradient = torch.empty_like(flat)
    size = max(1, LOGITS_PER_CHUNK[place.type] // head.vocabulary)
    for first in range(0, len(flat), size):
        chunk = slice(first, first + size)
        dense_logits = head.logits(flat_dense[chunk]) if flat_dense is not None else None
        here = Positions(positions.next_tokens[chunk], positions.uniforms[chunk], dense_logits)
        pulled = head.pulled_back(head.logits(flat[chunk]), lambda logits, here=here: logit_gradient(logits, here))
        gradient[chunk] = pulled @ head.weight
    return gradient.view(hidden.shape).to(hidden.device)


def _batch_size(length: int) -> int:
    return max(1, TOKENS_PER_BATCH // length)


def _model_and_tokens(model: Path, text: Path, samples: int, length: int, seed: int, dtype: str):
    network = load_model(model, dtype)
    return network, sample_sequences(load_tokenizer(model), network.config, text, samples, length, seed)


def _light_cut(folder: Path | None) -> list[Tensor] | None:
    return None if folder is None else read_scores(folder / SCORES)["mlp"]

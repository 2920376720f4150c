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
from hfprune.models.loading import at_hand, final_hidden, flops_per_token, load_model, load_tokenizer, logits_of
from hfprune.models.units import PARTS, Part, Scores, parts, read_scores
from hfprune.pruning.criteria import CRITERIA, LIGHT_CUT, GradientCriterion, Moments, Positions, StaticCriterion
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.memory import checkpointed, is_short
from hfprune.runtime.progress import progress
from hfprune.runtime.signals import Stopped, noting
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
        criteria: names in `CRITERIA`, all of one `light_cut`.
        samples: sequences, see `texts.sample_sequences`.
        length: tokens of each.
        seed: draws the sequences, the labels of sampled criteria, and `random`.
        draws: labels per position for sampled criteria.
        dtype: of the model's arithmetic; scores are summed in float32 and float64 whatever it is.
        light_cut: folder of the scores by which neurons are silenced first, for criteria that ask for it.

    Returns:
        The scores by criterion, on the CPU; and what each of them cost, see `costs`.
    """
    network, tokens = _subject(model, text, samples, length, seed, dtype)
    found = unit_scores(network, tokens, criteria, seed, draws, _light_cut(light_cut), resume=folder / RESUME)
    return found, costs(network, tokens.numel(), criteria, draws, light_cut is not None)


def shard(
    folder: Path, model: Path, text: Path, criteria: Sequence[str], samples: int, length: int, seed: int, draws: int,
    dtype: str, shard: int, shards: int, light_cut: Path | None = None,
) -> tuple[dict[str, Sums], dict[str, dict[str, int]]]:  # fmt: skip
    """Stage `shard`: what `score` adds up, over share `shard` of `shards` of its sequences; other arguments alike.

    Returns:
        The sums that each criterion reads, to be saved in its own artifact; and what each of them cost, see `costs`.
    """
    network, tokens = _subject(model, text, samples, length, seed, dtype)
    share = shard_range(samples, length, shard, shards)
    sums = add_up(network, tokens, criteria, seed, draws, _light_cut(light_cut), folder / RESUME, share)
    done = costs(network, len(share) * length, criteria, draws, light_cut is not None)
    return {name: sums.of(name) for name in criteria}, done


def cost(model: PreTrainedModel, tokens: int, criteria: Sequence[str], draws: int, light_cut: bool) -> dict[str, int]:
    """`tokens` and `flops` of a pass: a backward pass, to activations alone, counts as much as a forward pass."""
    times = 1 + light_cut + len(_backward_passes(criteria, draws))
    return {"tokens": tokens, "flops": tokens * flops_per_token(model) * times}


def costs(
    model: PreTrainedModel, tokens: int, criteria: Sequence[str], draws: int, light_cut: bool
) -> dict[str, dict[str, int]]:
    """By criterion, its `cost` alone, and `flops_together` of the pass in which all of them were scored."""
    together = cost(model, tokens, criteria, draws, light_cut)["flops"]
    return {name: cost(model, tokens, [name], draws, light_cut) | {"flops_together": together} for name in criteria}


def _backward_passes(criteria: Sequence[str], draws: int) -> list[tuple[list[str], LogitGradient, int]]:
    """The backward passes over one forward pass: the criteria that read it, its gradient, the number of its draw."""
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
    """The sequences of one shard: whole batches where there are enough, so that its sums are what one job would add."""
    unit = _batch_size(length)
    if -(-samples // unit) < shards:
        unit = 1
    units = -(-samples // unit)
    return range(min(samples, units * shard // shards * unit), min(samples, units * (shard + 1) // shards * unit))


class Sums:
    """What a pass adds up, in float64.

    Attributes:
        sequences: how many sequences it has seen.
        tensors: `<name>.<part>.<layer>` -> (units,) for names of gradient criteria, (columns,) for `MOMENTS`.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add `value`, wherever it is, to the sum of that name."""
        held = self.tensors.get(name)
        self.tensors[name] = value.double() if held is None else held.to(value.device) + value

    def of(self, criterion: str) -> Sums:
        """Those that one criterion reads."""
        names = (criterion,) if isinstance(CRITERIA[criterion], GradientCriterion) else MOMENTS
        found = Sums()
        found.sequences = self.sequences
        found.tensors = {name: tensor for name, tensor in self.tensors.items() if name.split(".")[0] in names}
        return found

    def layers(self, name: str, part: str) -> list[Tensor]:
        """The sums of that name and part on the CPU, by layer."""
        found = {key: tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}.{part}.")}
        return [found[f"{name}.{part}.{layer}"].cpu() for layer in range(len(found))]

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

    One forward pass serves all; each gradient function costs one backward pass, times `draws` where it is sampled.
    Only activations carry gradients. A gradient criterion's score is the mean over sequences (and draws) of its summed
    products divided by the length; S is summed over a sequence's positions.

    Args:
        model: on its device or spread over several, no parameter requiring a gradient.
        tokens: (sequences, length) int64.
        criteria: names in `CRITERIA`, all of one `light_cut`.
        seed: of sampled labels and of `random`.
        draws: labels per position for sampled criteria.
        light_cut: (neurons,) scores per layer by which the lowest `LIGHT_CUT` of the MLPs' neurons are silenced; then
            the intact model runs too, one forward pass more. Silenced neurons score 0.
        batch: sequences at once; by default as many as make `TOKENS_PER_BATCH`. It does not change the scores.
        resume: folder for partial sums, saved every few minutes and read at the start.

    Returns:
        The scores by criterion, on the CPU.

    Raises:
        UserError: a layer's scores are not finite, or all zero, or nothing reached it.
    """
    sums = add_up(model, tokens, criteria, seed, draws, light_cut, resume, batch=batch)
    return {name: finish(name, sums, tokens.numel(), seed, draws, model) for name in criteria}


def finish(name: str, sums: Sums, count: int, seed: int, draws: int, model: PreTrainedModel | None) -> Scores:
    """One criterion's scores from the sums over `count` tokens; only static criteria need the model."""
    criterion = CRITERIA[name]
    found: Scores = {}
    for kind in PARTS:
        if isinstance(criterion, GradientCriterion):
            times = count * (draws if criterion.sampled else 1)
            found[kind] = [(layer / times).float() for layer in sums.layers(name, kind)]
        else:
            assert model is not None
            moments = zip(parts(model, kind), *(sums.layers(moment, kind) for moment in MOMENTS), strict=True)
            found[kind] = [
                _static(criterion, part, count, total, squares, generator(seed, name, kind, layer))
                for layer, (part, total, squares) in enumerate(moments)
            ]
        for layer, scores in enumerate(found[kind]):
            if not scores.isfinite().all():
                raise UserError(f"layer {layer}: scores by {name} are not finite; compute in float32 or bfloat16.")
            if not scores.any():
                raise UserError(f"layer {layer}, {kind}: all scores by {name} are zero: nothing reached it.")
    return found


def _static(
    criterion: StaticCriterion, part: Part, count: int, total: Tensor, squares: Tensor, drawn: torch.Generator
) -> Tensor:
    with at_hand(*part.linears):
        place = part.output.weight.device
        return criterion.score(part, Moments(count, total.to(place), squares.to(place)), drawn).float().cpu()


class Watch:
    """What happens at the units, the inputs of every part's output layer, while the model runs.

    Attributes:
        criteria: those whose gradient the running backward pass carries.
        phase: `dense`, the units are left alone; `scored`, they are silenced, summed and differentiated; `again`, a
            layer of a scored pass is computed anew, which must be the same computation but is not summed again.
        anew: whether layers are computed anew. Then no activation is kept between the passes: the backward pass reads
            those that the second computation of its layer leaves in `recomputed`.
        recomputed: by part and layer, activations (batch, length, columns).
    """

    def __init__(self, sums: Sums, moments: bool, differentiate: bool, silent: list[Tensor] | None, anew: bool) -> None:
        self.sums, self.moments, self.differentiate, self.silent, self.anew = sums, moments, differentiate, silent, anew
        self.criteria: list[str] = []
        self.recomputed: dict[str, Tensor] = {}
        self.phase = "scored"

    def during(self, phase: str) -> During:
        """A context in which the phase is another."""
        return During(self, phase)

    def hook(self, kind: str, layer: int, part: Part) -> Callable:
        """The forward pre-hook of a part's output layer."""

        def before_output(_module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
            activation = inputs[0]  # (batch, length, columns)
            if self.phase == "dense":
                return (activation,)
            if self.silent and kind == "mlp":
                activation = activation * self.silent[layer].to(activation)
            if self.differentiate and not activation.requires_grad:  # layer 0: nothing before it needs a gradient
                activation = activation.detach().requires_grad_()
            if self.phase == "scored":
                self._sum(f"{kind}.{layer}", part, activation)
            else:
                self.recomputed[f"{kind}.{layer}"] = activation.detach()
            return (activation,)

        return before_output

    def _sum(self, where: str, part: Part, activation: Tensor) -> None:
        values = activation.detach()
        if self.moments:
            self.sums.add(f"total.{where}", values.float().sum((0, 1)))
            self.sums.add(f"squares.{where}", vector_norm(values.float(), dim=(0, 1)).double().square())

        kept = None if self.anew else values

        def add(gradient: Tensor) -> None:
            met = self.recomputed.pop(where) if kept is None else kept
            products = part.per_unit(gradient.float() * met.float())
            for name in self.criteria:
                self.sums.add(f"{name}.{where}", PRODUCTS[CRITERIA[name].products](products))

        if self.differentiate:
            activation.register_hook(add)


class During:
    """See `Watch.during`. Several backward passes enter the same one, which a generator's context does not allow."""

    def __init__(self, watch: Watch, phase: str) -> None:
        self.watch, self.phase, self.before = watch, phase, watch.phase

    def __enter__(self) -> None:
        self.before, self.watch.phase = self.watch.phase, self.phase

    def __exit__(self, *_error: object) -> None:
        self.watch.phase = self.before


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
    """One pass over the sequences `share` of `tokens`, all by default; other arguments as for `unit_scores`."""
    share = share if share is not None else range(len(tokens))
    everywhere = [(kind, layer, part) for kind in PARTS for layer, part in enumerate(parts(model, kind))]
    passes = _backward_passes(criteria, draws)
    moments = any(isinstance(CRITERIA[name], StaticCriterion) for name in criteria)
    sums = Sums()
    # The file's name says what it sums: a pass over other criteria, or with other draws, does not go on with it.
    times = Counter(name for names, _, _ in passes for name in names)
    summed = [f"{name}x{count}" for name, count in times.items()]
    state = resume / f"{'-'.join(['sums', *sorted(summed), *['moments'] * moments])}.safetensors" if resume else None
    if state and state.exists():
        sums.load(state)
    size = batch or _batch_size(tokens.shape[1])
    anew = bool(passes) and is_short(model, size * tokens.shape[1])
    watch = Watch(sums, moments, bool(passes), silenced(light_cut) if light_cut else None, anew)
    output = model.get_output_embeddings()
    left = tokens[share.start + sums.sequences : share.stop]
    saved = time.monotonic()
    with ExitStack() as stack:
        for kind, layer, part in everywhere:
            stack.callback(part.output.register_forward_pre_hook(watch.hook(kind, layer, part)).remove)
        stack.enter_context(at_hand(output))
        stack.enter_context(fast_products(model.device))
        if anew:
            print("memory is short: each layer is computed once more in the backward pass", flush=True)
            stack.enter_context(checkpointed(model, lambda: watch.during("again")))
        head = output.weight
        sigterm = stack.enter_context(noting())
        for rows in progress(left.split(size) if len(left) else (), "score", left.numel(), " tokens", torch.numel):
            dense = None
            if light_cut:
                with watch.during("dense"), torch.no_grad():
                    dense = final_hidden(model, rows)
            with torch.set_grad_enabled(bool(passes)):
                hidden = final_hidden(model, rows)
            for number, (names, logit_gradient, draw) in enumerate(passes):
                watch.criteria = names
                positions = positions_of(rows, share.start + sums.sequences, seed, draw, head.device)
                gradient = hidden_gradient(hidden.detach(), head, logit_gradient, positions, dense)
                hidden.backward(gradient, retain_graph=number + 1 < len(passes))
            dense = hidden = gradient = None  # the graph goes before the next forward pass builds another
            if not sums.sequences:
                _refuse_not_finite(sums)  # now, not after hours
            sums.sequences += len(rows)
            leave = sigterm.stop and sums.sequences < len(share)
            if state and (leave or time.monotonic() - saved >= SECONDS_BETWEEN_SAVES):
                state.parent.mkdir(exist_ok=True)
                sums.save(state)
                saved = time.monotonic()
            if leave:
                raise Stopped(f"the sums over {sums.sequences} of {len(share)} sequences are kept")
    for name in {*times, *(MOMENTS if moments else ())}:
        for kind, layer, _ in everywhere:
            if share and f"{name}.{kind}.{layer}" not in sums.tensors:
                raise UserError(f"layer {layer}, {kind}: nothing reached it, neither activations nor gradients.")
    return sums


def _refuse_not_finite(sums: Sums) -> None:
    """Refuse sums that no further token makes finite.

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
    """A generator on the CPU whose numbers depend on `names` alone, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def positions_of(tokens: Tensor, first: int, seed: int, draw: int, device: torch.device) -> Positions:
    """The positions of (batch, length) `tokens`, of which the first sequence is number `first`.

    A sequence's random numbers depend on its own number, not on the batch that it is in.
    """
    ends = torch.full((len(tokens), 1), -1)
    following = torch.cat([tokens[:, 1:], ends], dim=1).flatten()
    uniforms = [
        torch.rand(tokens.shape[1], generator=generator(seed, draw, first + number)) for number in range(len(tokens))
    ]
    return Positions(following.to(device), torch.cat(uniforms).to(device))


def hidden_gradient(
    hidden: Tensor,
    head: Tensor,
    logit_gradient: LogitGradient,
    positions: Positions,
    dense: Tensor | None = None,
) -> Tensor:
    """Carry a criterion's gradient from the logits to the final hidden states, a chunk of tokens at a time.

    Args:
        hidden: (batch, length, hidden) final hidden states.
        head: (vocabulary, hidden) output projection.
        logit_gradient: see `criteria.GradientCriterion`.
        positions: what it may read beside the logits, batch * length of them.
        dense: the intact model's final hidden states, where the criterion compares with it.

    Returns:
        dS/dhidden of the shape, dtype and device of `hidden`, S summed over all positions.
    """
    flat = hidden.flatten(0, 1).to(head.device)
    flat_dense = dense.flatten(0, 1).to(head.device) if dense is not None else None
    gradient = torch.empty_like(flat)
    size = max(1, LOGITS_PER_CHUNK[head.device.type] // head.shape[0])
    for first in range(0, len(flat), size):
        chunk = slice(first, first + size)
        dense_logits = logits_of(flat_dense[chunk], head) if flat_dense is not None else None
        here = Positions(positions.next_tokens[chunk], positions.uniforms[chunk], dense_logits)
        gradient[chunk] = logit_gradient(logits_of(flat[chunk], head), here).to(head.dtype) @ head
    return gradient.view(hidden.shape).to(hidden.device)


def _batch_size(length: int) -> int:
    return max(1, TOKENS_PER_BATCH // length)


def _subject(model: Path, text: Path, samples: int, length: int, seed: int, dtype: str):
    network = load_model(model, dtype)
    return network, sample_sequences(load_tokenizer(model), network.config.vocab_size, text, samples, length, seed)


def _light_cut(folder: Path | None) -> list[Tensor] | None:
    return None if folder is None else read_scores(folder / SCORES)["mlp"]

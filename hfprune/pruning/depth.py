"""The search for the sublayers or layers to remove: a greedy one by what their removal costs, measured.

What one removal costs alone says little of what several cost together. So after each removal, and its refit where the
method has one, what every further removal would leave is measured anew: the KL divergence from the dense model's
predictions, or the loss on the text. A search ends when the largest budget is met; steps that it left follow as it
last measured them. Every budget reads as much of the same order as it needs.

Each removal takes one walk over the layers, in which all candidates ride along, see `candidates.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.data.sampling import sample_sequences
from hfprune.models.families import layout_of
from hfprune.models.fewer_layers import refuse_moved_layers
from hfprune.models.loading import flops_of_layers, flops_per_token, load_model, load_tokenizer
from hfprune.models.mixtures import experts_in
from hfprune.models.run_part import run_part
from hfprune.models.streamed import device_of, is_streamed, memory_of
from hfprune.models.units import IN_TURN, MIXED, PARTS, TWO_STAGES, Sublayer, layers_of, part_of
from hfprune.models.walk import Arguments, layers_in_turn, run_layer
from hfprune.pruning.budget import Shape, attention_of_two_stages, refuse_method, shape_of
from hfprune.pruning.candidates import Walk, dense_states, divergences, flops_of_parts, flops_of_walk, losses
from hfprune.pruning.influence import layer_influence, part_influence
from hfprune.pruning.order import (
    SEARCHES,
    Step,
    kept_without,
    next_steps,
    read_order,
    save_order,
    size_of,
    steps_of,
    those_that_go,
)
from hfprune.pruning.refit import flops_of_refit
from hfprune.pruning.refit import refit as refit_kept
from hfprune.pruning.refit_names import RIDGE
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.signals import Stopped, sigterm_deferred
from hfprune.store.filenames import ORDER, RESUME

SEARCH_TOKENS = 1024  # on which a search measures: the first sequences of the calibration


def write_order(
    folder: Path, model: Path, text: Path, criterion: str, structure: str, refit: str, ridge: float, samples: int,
    length: int, seed: int, dtype: str, memory: str = "auto", share: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """Stage `order`: write the order in which sublayers or layers go into `folder`.

    Args:
        folder: the artifact's; a search keeps the order so far in its `.resume`, to go on after a kill.
        model: folder of the checkpoint.
        text: folder of the calibration text.
        criterion, structure, refit, ridge, share: see `order`.
        samples, length, seed: how the sequences are drawn, see `sampling.sample_sequences`.
        dtype: of the model's arithmetic.
        memory: "resident", "streamed" or "auto", see `loading.load_model`.

    Returns:
        `tokens` and `flops`, and the `memory` used.
    """
    network = load_model(model, dtype, memory, spread=False)
    tokens = sample_sequences(load_tokenizer(model), network.config, text, samples, length, seed)
    steps, measures, cost = order(network, tokens, criterion, structure, refit, ridge, share, folder, folder / RESUME)
    save_order(folder / ORDER, steps, measures)
    return cost | {"memory": memory_of(network)}


def order(
    model: PreTrainedModel,
    tokens: Tensor,
    criterion: str,
    structure: str,
    refit: str = "none",
    ridge: float = RIDGE,
    share: float = 1.0,
    folder: Path | None = None,
    resume: Path | None = None,
) -> tuple[list[Step], list[float], dict[str, Any]]:
    """The order in which sublayers or layers go, all but the last of each kind.

    Args:
        model: the intact model, in memory or streamed. It is the same afterwards.
        tokens: (sequences, length) int64 calibration tokens.
        criterion: a name in `order.CRITERIA`.
        structure: a name in `units.DEPTH`; or 2SSP's, of which the attentions go that it removes beside neurons.
        refit, ridge: what makes up for the removals during a search, see `refit.refit`.
        share: of all parameters; a search ends when that is gone.
        folder: for hidden states that do not fit into memory; by default the system's temporary folder.
        resume: folder in which a search keeps the order so far, to go on after a kill.

    Returns:
        The steps; for each its influence, or the KL or the loss of the model after it, in nats per token, of those
        that a search left in place of the last that it removed; and `tokens` and `flops` for the record.

    Raises:
        UserError: layers cannot go without a change of others; or see `refit.refit`.
    """
    structure, share = _whole_steps(shape_of(model), structure, share)
    refuse_method(shape_of(model), structure, criterion, refit)
    if structure == "layers":
        refuse_moved_layers(model.config)
    if criterion in SEARCHES:
        search = Search(model, tokens, criterion, structure, refit, ridge, share, folder)
        steps, measures = search.run(resume)
        return steps, measures, {"tokens": search.searched.numel(), "flops": search.flops}
    steps, measures = by_influence(model, tokens, structure, folder)
    flops = tokens.numel() * flops_per_token(model, tokens.shape[1])
    return steps, measures, {"tokens": tokens.numel(), "flops": flops}


def _whole_steps(shape: Shape, structure: str, share: float) -> tuple[str, float]:
    """What goes whole, and its share of all parameters, where a share of all parameters goes in all."""
    if structure == TWO_STAGES:
        return MIXED[structure], attention_of_two_stages(shape, share * shape.total) / shape.total
    return structure, share


def by_influence(
    model: PreTrainedModel, tokens: Tensor, structure: str, folder: Path | None = None
) -> tuple[list[Step], list[float]]:
    """The steps by their influence, the lowest first, and that influence."""
    shape = shape_of(model)
    with fast_products(device_of(model)):
        if structure == "layers":
            by_part = dict.fromkeys(shape.whole, layer_influence(model, tokens, "cosine", folder))
        else:
            by_part = part_influence(model, tokens, folder)
    influence = {step: by_part[step[0][0]][step[0][1]].item() for step in steps_of(shape, structure)}
    chosen = those_that_go(shape, sorted(influence, key=influence.__getitem__))
    return chosen, [influence[step] for step in chosen]


class Search:
    """A greedy search.

    Args:
        model, tokens, criterion, structure, refit, ridge, share, folder: see `order`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        criterion: str,
        structure: str,
        refit: str = "none",
        ridge: float = RIDGE,
        share: float = 1.0,
        folder: Path | None = None,
    ) -> None:
        self.model, self.tokens, self.shape = model, tokens, shape_of(model)
        self.measures_kl, self.structure = criterion == "greedy_kl", structure
        self.refit, self.ridge, self.share = refit, ridge, share
        self.steps = steps_of(self.shape, structure)
        self.searched = tokens[: sequences(tokens.shape[1])]
        self.counts = flops_of_steps(model, self.shape, structure, tokens.shape[1])
        self.folder, self.flops = folder, 0
        self.before: dict[nn.Parameter, Tensor] = {}  # weights that refits change, of a model in memory
        if refit != "none" and not is_streamed(model):
            for number in range(len(self.shape.layers)):
                self.before |= {weight: weight.detach().cpu().clone() for weight in refitted_in(model, number)}

    @torch.no_grad()
    def run(self, resume: Path | None = None) -> tuple[list[Step], list[float]]:
        """The order and the KL, or the loss, after each step."""
        chosen, costs = self._before(resume)
        dense = None
        if self.measures_kl:
            dense = dense_states(self.model, self.searched)
            self.flops += self.searched.numel() * flops_per_token(self.model, self.searched.shape[1])
        last = costs[-1] if costs else 0.0
        started, done = time.monotonic(), 0
        with ExitStack() as stack:
            sigterm = stack.enter_context(sigterm_deferred())
            while candidates := self._next(chosen):
                what = f"removal {len(chosen) + 1} of {len(chosen) + len(self._removals(chosen))}"
                measured = self._measure(chosen, candidates, dense, what)
                ranked = self._ranked(measured, last)
                best, last = ranked[0], measured[ranked[0]]
                chosen.append(best)
                costs.append(last)
                done += len(candidates) ** 2
                seconds = (time.monotonic() - started) / done * sum(count**2 for count in self._removals(chosen))
                whole = "" if self.structure == "layers" else f"{best[0][0]} of "
                print(
                    f"{whole}layer {best[0][1]} goes: "
                    f"{'KL' if self.measures_kl else 'loss'} {last:.4g}; about {seconds / 60:.0f} min left",
                    file=sys.stderr,
                    flush=True,
                )
                if not self._next(chosen):
                    have_to_stay = [step for step in self.steps if step not in chosen and step not in ranked]
                    left = those_that_go(self.shape, [*chosen, *ranked[1:], *have_to_stay])[len(chosen) :]
                    return chosen + left, costs + [measured[step] for step in left]
                if resume:
                    save_order(resume / "partial", chosen, costs)
                    (resume / "partial").replace(resume / ORDER)
                if sigterm.received:
                    raise Stopped(f"{len(chosen)} removals are kept")
        return chosen, costs

    def _before(self, resume: Path | None) -> tuple[list[Step], list[float]]:
        """What a search that was killed has found."""
        if resume is None:
            return [], []
        resume.mkdir(parents=True, exist_ok=True)
        if not (resume / ORDER).exists():
            return [], []
        return read_order(resume / ORDER)

    def _next(self, gone: Sequence[Step]) -> list[Step]:
        """The candidates for the next removal, in the order of the model."""
        return next_steps(self.shape, self.steps, gone, self.share)

    def _ranked(self, measured: dict[Step, float], last: float) -> list[Step]:
        """The candidates, the best first: by KL for each parameter freed, or by loss.

        Args:
            measured: the KL or the loss without each of them, in nats per token.
            last: the same without none of them.
        """
        if self.measures_kl:
            return sorted(measured, key=lambda step: (measured[step] - last) / size_of(self.shape, step))
        return sorted(measured, key=measured.__getitem__)

    def _removals(self, chosen: Sequence[Step]) -> list[int]:
        """How many candidates each removal to come has, if the last of the model go first."""
        gone, counts = list(chosen), []
        while candidates := self._next(gone):
            counts.append(len(candidates))
            gone.append(candidates[-1])
        return counts

    def _measure(
        self, gone: Sequence[Step], candidates: Sequence[Step], dense: Tensor | None, what: str
    ) -> dict[Step, float]:
        """The KL, or the loss, of the model without the steps `gone` and each candidate, in nats per token.

        Args:
            gone: steps that went before; a refit makes up for them.
            candidates: in the order of the model.
            dense: (tokens, hidden) final hidden states of the dense model, for the KL.
            what: name of the work, for its progress.
        """
        absent = {sublayer for step in gone for sublayer in step}

        def passed(number: int, states: Tensor, candidate: int | None) -> Tensor:
            without = absent if candidate is None else absent | {*candidates[candidate]}
            return self._passed(number, states, without, walk.arguments[number])

        walk = Walk(self.model, self.searched, [step[0][1] for step in candidates], passed)
        self.flops += flops_without(self.model, self.counts, self.searched.numel(), gone, candidates)

        def finish(number: int) -> None:
            walk.advance(number)
            for weight in refitted_in(self.model, number) if self.before else ():  # a model in memory keeps changes
                weight.copy_(self.before[weight])

        if gone and self.refit != "none":
            kept = kept_without(self.shape, gone)
            details = refit_kept(self.model, kept, self.tokens, self.refit, self.ridge, self.folder, finish, what)
            self.flops += details["refit_flops"]
        else:
            for number in layers_in_turn(self.model, what):
                finish(number)
        if dense is None:
            found = losses(self.model, self.searched, walk.riders)
        else:
            found = divergences(self.model, dense, walk.riders)
        return dict(zip(candidates, found, strict=True))

    def _passed(self, number: int, states: Tensor, absent: set[Sublayer], arguments: Arguments) -> Tensor:
        """(sequences, length, hidden) behind a layer without the sublayers that are absent."""
        layout, layer, entered = layout_of(self.model), layers_of(self.model)[number], states
        if self.structure == "layers":
            is_gone = any(layer_gone == number for _, layer_gone in absent)
            return states if is_gone else run_layer(layer, states, arguments)
        for name in IN_TURN:
            if (name, number) not in absent:
                read = entered if layout.parallel else states
                states = states + run_part(layout, self.model.config, layer, name, arguments, read).written
        return states


def refitted_in(model: PreTrainedModel, number: int) -> list[nn.Parameter]:
    """The weights of a layer that a refit changes."""
    if layout_of(model).mixture:
        experts = experts_in(model, number)
        return [experts.experts.down_proj] if experts else []
    return [part_of(model, name, number).output.weight for name in PARTS]


def flops_of_steps(
    model: PreTrainedModel, shape: Shape, structure: str, length: int
) -> tuple[list[int], dict[Step, int]]:
    """Floating-point operations for one token, in sequences of this length, of each layer and of each step."""
    each, steps = flops_of_layers(model, length), steps_of(shape, structure)
    if structure == "layers":
        return each, {step: each[step[0][1]] for step in steps}
    of_parts = flops_of_parts(model, length)
    return each, {step: of_parts[step[0]] for step in steps}


def flops_without(
    model: PreTrainedModel,
    counts: tuple[list[int], dict[Step, int]],
    tokens: int,
    gone: Sequence[Step],
    candidates: Sequence[Step],
) -> int:
    """Floating-point operations of a walk over so many tokens and of the logits behind it; see `flops_of_steps`."""
    each, of_steps = list(counts[0]), counts[1]
    for step in gone:
        each[step[0][1]] -= of_steps[step]
    less = sum(of_steps[step] for step in candidates)
    return flops_of_walk(model, tokens, each, [step[0][1] for step in candidates]) - tokens * less


def sequences(length: int) -> int:
    """Number of sequences that a search measures on, if there are as many."""
    return max(1, SEARCH_TOKENS // length)


def cost(
    model: PreTrainedModel, tokens: tuple[int, int], criterion: str, structure: str, refit: str, share: float = 1.0
) -> int:
    """Floating-point operations of a search, if the last sublayers or layers go first.

    Args:
        model: the dense model; its shapes are enough.
        tokens: (sequences, length) of the calibration.
        criterion, structure, refit, share: see `order`.
    """
    shape = shape_of(model)
    structure, share = _whole_steps(shape, structure, share)
    steps, gone = steps_of(shape, structure), []
    walked = min(tokens[0], sequences(tokens[1])) * tokens[1]
    counts = flops_of_steps(model, shape, structure, tokens[1])
    flops = walked * flops_per_token(model, tokens[1]) if criterion == "greedy_kl" else 0  # of the dense model
    while candidates := next_steps(shape, steps, gone, share):
        flops += flops_without(model, counts, walked, gone, candidates)
        if gone and refit != "none":
            flops += flops_of_refit(model, kept_without(shape, gone), tokens, refit)
        gone.append(candidates[-1])
    return flops

"""Scoring layer by layer: all calibration tokens pass one layer before the next, so each layer is read twice.

The forward sweep keeps what enters each layer. The head gives the gradients of all criteria there. The backward sweep
takes the layers in reverse: it computes a layer again from what entered it, and carries one gradient for each backward
pass. What is summed, and how, is the same as for a model in memory: see `recorder`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.models.head import head_of
from hfprune.models.streamed import device_of, in_memory, in_turn
from hfprune.models.units import layers_of
from hfprune.models.walk import enter, entrance, exit_norm, run_layer
from hfprune.pruning.recorder import CalibrationPass, Sums, UnitRecorder
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.progress import bar
from hfprune.runtime.scratch import Scratch
from hfprune.runtime.signals import Stopped, sigterm_deferred


class Step(NamedTuple):
    """A step of the sweeps, over all tokens. Its partial sums are kept when it ends."""

    kind: Literal["forward", "head", "backward"]
    layer: int


def steps_of(layers: int, backward: bool) -> list[Step]:
    """The steps of a pass over so many layers; without a backward sweep only the forward one."""
    steps = [Step("forward", layer) for layer in range(layers)]
    if backward:
        steps += [Step("head", layers), *(Step("backward", layer) for layer in reversed(range(layers)))]
    return steps


class Streams:
    """The hidden states and gradients of all tokens between two layers; "at layer n" means what enters layer n.

    For a backward sweep the states that enter each layer are kept. What only passes from one layer to the next has two
    places, so that a step that was cut off can run again from what the last one left.

    Attributes:
        scratch: the file that holds all of them.
    """

    def __init__(self, file: Path, layers: int, one_pass: CalibrationPass, hidden: int, dtype: torch.dtype) -> None:
        counts = places(layers, len(one_pass.passes), bool(one_pass.silent))
        self.scratch = Scratch(file, (sum(counts), *one_pass.tokens.shape, hidden), dtype)
        self._states, self._dense, gradients = self.scratch.tensor.split(counts)
        self._gradients = gradients.unflatten(0, (-1, 2)) if one_pass.passes else gradients

    def states(self, layer: int) -> Tensor:
        """(sequences, length, hidden) of the model that is scored."""
        return self._states[layer if len(self._states) > 2 else layer % 2]

    def dense(self, layer: int) -> Tensor:
        """(sequences, length, hidden) of the intact model, if neurons are silenced in the one that is scored."""
        return self._dense[layer % 2]

    def gradient(self, number: int, layer: int) -> Tensor:
        """(sequences, length, hidden) of backward pass `number`."""
        return self._gradients[number, layer % 2]


def places(layers: int, backward: int, light_cut: bool) -> list[int]:
    """How often `Streams` holds all tokens: states, states of the intact model, gradients of the backward passes."""
    return [layers + 1 if backward else 2, 2 * light_cut, 2 * backward]


class LayerwisePass:
    """One pass over the calibration tokens, layer by layer."""

    def __init__(self, model: PreTrainedModel, one_pass: CalibrationPass, sums: Sums, streams: Streams) -> None:
        self.model, self.one_pass, self.streams = model, one_pass, streams
        self.device, self.layers = device_of(model), layers_of(model)
        length = one_pass.tokens.shape[1]
        self.forward_recorder = UnitRecorder(sums, length, one_pass.moments, False, one_pass.silent, False)
        self.backward_recorder = UnitRecorder(sums, length, (), True, one_pass.silent, False, one_pass.weights)
        with in_memory(*entrance(model)):
            _, self.arguments = enter(model, one_pass.tokens[:1])

    def batches(self) -> Iterator[slice]:
        """The sequences that pass a layer together."""
        count = len(self.one_pass.tokens)
        return (slice(first, min(first + self.one_pass.batch, count)) for first in range(0, count, self.one_pass.batch))

    def enter(self) -> None:
        """Write what enters the first layer."""
        with in_memory(*entrance(self.model)):
            for rows in self.batches():
                entered, _ = enter(self.model, self.one_pass.tokens[rows])
                self.streams.states(0)[rows] = entered
                if self.one_pass.silent:
                    self.streams.dense(0)[rows] = entered

    def modules(self, step: Step) -> tuple[torch.nn.Module, ...]:
        """The modules whose weights a step needs."""
        if step.kind == "head":
            return exit_norm(self.model), self.model.get_output_embeddings()
        return (self.layers[step.layer],)

    def run(self, step: Step) -> Iterator[slice]:
        """Run a step on all tokens; yields the sequences of each batch when it is done."""
        one_step = {"forward": self._forward, "head": self._head, "backward": self._backward}[step.kind]
        recorder = self.forward_recorder if step.kind == "forward" else self.backward_recorder
        with ExitStack() as stack:
            if step.kind != "head":
                stack.enter_context(recorder.attached(step.layer, self.model))
            for rows in self.batches():
                with fast_products(self.device, self.one_pass.products):
                    one_step(step.layer, rows)
                yield rows

    @torch.no_grad()
    def _forward(self, number: int, rows: slice) -> None:
        layer, arguments, streams = self.layers[number], self.arguments[number], self.streams
        streams.states(number + 1)[rows] = run_layer(layer, streams.states(number)[rows].to(self.device), arguments)
        if self.one_pass.silent:
            with self.forward_recorder.in_phase("dense"):
                dense = streams.dense(number)[rows].to(self.device)
                streams.dense(number + 1)[rows] = run_layer(layer, dense, arguments)

    def _head(self, number: int, rows: slice) -> None:
        norm, streams = exit_norm(self.model), self.streams
        entering = streams.states(number)[rows].to(self.device, copy=True).requires_grad_()
        hidden, dense = norm(entering), None
        if self.one_pass.silent:
            with torch.no_grad():
                dense = norm(streams.dense(number)[rows].to(self.device))
        with head_of(self.model) as whole_head:
            head = whole_head.to(self.one_pass.products)
            for backward in range(len(self.one_pass.passes)):
                gradient = self.one_pass.gradient(backward, rows.start, hidden.detach(), head, dense)
                (streams.gradient(backward, number)[rows],) = torch.autograd.grad(
                    hidden, entering, gradient, retain_graph=True
                )

    def _backward(self, number: int, rows: slice) -> None:
        layer, streams = self.layers[number], self.streams
        entering = streams.states(number)[rows].to(self.device, copy=True).requires_grad_(number > 0)
        with torch.enable_grad():
            leaving = run_layer(layer, entering, self.arguments[number])
        last = len(self.one_pass.passes) - 1
        for backward, (names, _, _) in enumerate(self.one_pass.passes):
            self.backward_recorder.criteria = names
            gradient = streams.gradient(backward, number + 1)[rows].to(self.device)
            leaving.backward(gradient, retain_graph=backward < last)
            if number:
                streams.gradient(backward, number)[rows] = entering.grad
                entering.grad = None


def add_up(model: PreTrainedModel, one_pass: CalibrationPass, resume: Path | None) -> Sums:
    """The sums of a pass layer by layer.

    Args:
        model: one whose weights are streamed, or in memory.
        one_pass: what to compute.
        resume: folder for the hidden states and the sums after each step, from which a pass goes on after a kill.
            Without it they are in a temporary folder.

    Raises:
        UserError: the disk is too small for the hidden states.
    """
    with ExitStack() as stack:
        folder = resume or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        name, sums, layers = one_pass.state(folder).stem, Sums(), len(layers_of(model))
        state = folder / f"steps-{name}.safetensors"  # of another kind than the sums over some sequences
        streams = Streams(folder / f"streams-{name}", layers, one_pass, model.config.hidden_size, model.dtype)
        if state.exists() and not streams.scratch.is_new:
            sums.load(state)
        steps = steps_of(layers, bool(one_pass.passes))
        sweep = LayerwisePass(model, one_pass, sums, streams)
        if not sums.steps:
            sweep.enter()
        remaining = steps[sums.steps :]
        sigterm = stack.enter_context(sigterm_deferred())
        shown = stack.enter_context(bar("score", len(remaining) * one_pass.tokens.numel(), " tokens", unit_scale=True))
        for number in in_turn([sweep.modules(step) for step in remaining]):
            for rows in sweep.run(remaining[number]):
                shown.update(one_pass.tokens[rows].numel())
                if sigterm.received:
                    raise Stopped(f"{sums.steps} of {len(steps)} steps from layer to layer are kept")
            sums.refuse_not_finite()  # at once, not after hours
            sums.steps += 1
            if resume:
                streams.scratch.flush()
                sums.save(state)
    sums.sequences, sums.steps = len(one_pass.tokens), 0
    return sums

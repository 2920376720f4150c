"""What a pass over the calibration text adds up in the experts of a layer: one pass sees all of them.

The experts run one after another, each on its own tokens, so that the activations of its neurons can be read. With
f_e(x) the output of expert e and w_e its weight at a token, the layer's experts write y = sum_e w_e f_e(x) over the
chosen ones.

- A *neuron* of an expert has products h . dS/dh as one of a dense MLP has, at the tokens that the expert reads.
- An *expert* has the products (y - y') . dS/dy. Here y' is what the experts would write without it: the router chooses
  among the others, so that another expert takes its place. That one runs as well, for one more expert at each token. So
  the change of y is exact, and the change of S is of first order in it. Where weights are shares of all experts, which
  are not divided by their sum, an expert's going also changes y at tokens that are not sent to it. (What is left out:
  in groups, or with a correction of shares as in ERNIE, such tokens may also choose others.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import cosine_similarity
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hfprune.models.families import layout_of, setting
from hfprune.models.loading import weights_in_memory
from hfprune.models.mixtures import Experts
from hfprune.models.run_part import factor
from hfprune.models.units import layers_of
from hfprune.pruning.criteria import CRITERIA, ranks

if TYPE_CHECKING:
    from hfprune.pruning.recorder import UnitRecorder

# Activations of an expert at its tokens, with the expert's number and the tokens' -> the activations to go on with.
Observe = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Detours:
    """What the experts of a layer write at each token, and what they would write without each of the chosen ones.

    Attributes:
        experts: of the layer.
        tokens: (outputs,) int64, the token of each output.
        outputs: (outputs, hidden), what one expert writes at one token, before its weight: first of all chosen experts,
            (tokens * chosen), then of those that would stand in.
        chosen, weights: (tokens, chosen), as the model computes.
        places, other_weights: (tokens, chosen, others), without each of the chosen ones: the numbers of outputs, and
            their weights.
        shares: (tokens, experts), the softmax of the router's logits if the weights are such shares, or else None.
    """

    experts: Experts
    tokens: Tensor
    outputs: Tensor
    chosen: Tensor
    weights: Tensor
    places: Tensor
    other_weights: Tensor
    shares: Tensor | None

    def products(self, gradient: Tensor) -> Tensor:
        """(y - y') . dS/dy for every expert: (tokens, hidden) dS/dy -> (tokens, experts) float32."""
        along = (self.outputs.float() * gradient.float()[self.tokens]).sum(1)
        count, chosen = self.chosen.shape
        whole = (along[: count * chosen].view(count, chosen) * self.weights.float()).sum(1)
        others = (along[self.places] * self.other_weights).sum(2)
        if self.shares is None:
            products = whole.new_zeros(count, self.experts.count)
        else:  # without expert e, all other shares grow by 1 / (1 - share of e)
            products = -whole[:, None] * self.shares / (1 - self.shares)
        return products.scatter(1, self.chosen, whole[:, None] - others)


class ExpertRecorder:
    """Reads the experts of one layer for a `UnitRecorder` while the model runs."""

    def __init__(self, recorder: UnitRecorder, layer: int, experts: Experts) -> None:
        self.recorder, self.layer, self.experts = recorder, layer, experts
        self.logits: Tensor | None = None  # of the router, for the tokens that pass
        self.before: Tensor | None = None  # (tokens, hidden), the hidden states that the experts' output is added to
        self.factor = 1.0  # of that output
        self.gradients: dict[str, Tensor] = {}  # dS/dy, until what was written can be read

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """A context in which the experts run one after another, and are read."""
        module = self.experts.experts
        intact, own = module.forward, module.__dict__.get("forward")
        hooks = [self.experts.router.register_forward_hook(self._remember)]
        if "turned" in self.recorder.moments:
            hooks.append(self._remember_states(model))
        module.forward = lambda *inputs: self._forward(intact, *inputs)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if own is None:
                del module.forward
            else:
                module.forward = own

    def _remember(self, _module: nn.Module, _inputs: tuple, output: tuple[Tensor, ...]) -> None:
        self.logits = output[0].detach()

    def _remember_states(self, model: PreTrainedModel) -> RemovableHandle:
        """Keep the hidden states that pass the norm in front of the experts."""
        layout, config = layout_of(model), model.config
        carried = layout.carried and setting(config, layout.carried)
        self.factor = factor(layout, config)

        def remember(_module: nn.Module, inputs: tuple[Tensor], normed: Tensor) -> None:
            before = inputs[0] if carried is None else normed * carried
            self.before = before.detach().flatten(0, 1)

        assert layout.mlp.norm is not None  # of no known mixture
        return layers_of(model)[self.layer].get_submodule(layout.mlp.norm).register_forward_hook(remember)

    def _forward(self, intact: Callable, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What the experts write: (tokens, hidden), and the (tokens, chosen) experts and weights of each token."""
        recorder, count = self.recorder, chosen.shape[1]
        if recorder.phase == "dense":
            return intact(states, chosen, weights)
        tokens = torch.arange(len(states), device=states.device).repeat_interleave(count)
        with weights_in_memory(self.experts.experts):
            outputs = self._run(states, tokens, chosen.flatten(), self._observe)
            written = (outputs.unflatten(0, (-1, count)) * weights[..., None]).sum(1).to(states.dtype)
            if recorder.phase == "scored" and recorder.moments:
                self._add_moments(chosen, weights.detach(), outputs.detach(), written.detach())
            if recorder.differentiate:
                self._differentiate(states.detach(), tokens, outputs, written, chosen, weights.detach())
        return written

    def _run(self, states: Tensor, tokens: Tensor, experts: Tensor, observe: Observe | None = None) -> Tensor:
        """(outputs, hidden): what expert `experts[i]` writes at token `tokens[i]`, before its weight."""
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=self.experts.count).tolist()
        outputs = []
        for expert, places in enumerate(order.split(counts)):
            if len(places):
                activations = self.experts.activations(expert, states[tokens[places]])
                if observe:
                    activations = observe(expert, tokens[places], activations)
                outputs.append(self.experts.output(expert, activations))
        return torch.cat(outputs)[order.argsort()]

    def _observe(self, expert: int, tokens: Tensor, activations: Tensor) -> Tensor:
        """Read the neurons of an expert."""
        recorder, location, count = self.recorder, f"mlp.{self.layer}", self.experts.count
        if recorder.silent:
            activations = activations * recorder.mask(self.layer, activations)[expert]
        values = activations.detach()
        if recorder.phase == "recompute":
            recorder.recomputed[f"{location}.{expert}"] = values
            return activations
        if "total" in recorder.moments:
            recorder.sums.add_row(f"total.{location}", expert, count, values.float().sum(0))
            squares = vector_norm(values.float(), dim=0).double().square()
            recorder.sums.add_row(f"squares.{location}", expert, count, squares)
        kept = None if recorder.recompute else values

        def add(gradient: Tensor) -> None:
            read = recorder.recomputed.pop(f"{location}.{expert}") if kept is None else kept
            products = gradient.float() * read.float()
            by_sequence = products.new_zeros(int(tokens[-1]) // recorder.length + 1, products.shape[1])
            for name in (name for name in recorder.criteria if ranks(name, "mlp", mixture=True)):
                form = CRITERIA[name].products
                if form == "square_of_sum":
                    summed = by_sequence.index_add(0, tokens // recorder.length, products)
                    value = recorder.products(name, summed[:, None])
                else:
                    value = recorder.products(name, products[None])
                recorder.sums.add_row(f"{name}.{location}", expert, count, value)

        if activations.requires_grad:
            activations.register_hook(add)
        return activations

    def _add_moments(self, chosen: Tensor, weights: Tensor, outputs: Tensor, written: Tensor) -> None:
        """Add the sums over the tokens of each expert that `criteria.ExpertCriterion` lists."""
        sums, experts = self.recorder.sums, chosen.flatten()
        routed = torch.bincount(experts, minlength=self.experts.count)
        sums.add(f"routed.experts.{self.layer}", routed)
        if "total" in self.recorder.moments:
            sums.add(f"routed.mlp.{self.layer}", routed)
        none = torch.zeros(self.experts.count, dtype=torch.float64, device=outputs.device)
        norms = weights.flatten().double() * vector_norm(outputs.float(), dim=1).double()
        if "written" in self.recorder.moments:
            sums.add(f"written.experts.{self.layer}", none.index_add(0, experts, norms))
        if "turned" in self.recorder.moments:
            after = self.before + self.factor * written
            turn = (1 - cosine_similarity(self.before.float(), after.float(), dim=1)).clamp(min=0).double()
            turned = norms * turn.repeat_interleave(chosen.shape[1])
            sums.add(f"turned.experts.{self.layer}", none.index_add(0, experts, turned))

    def _differentiate(
        self, states: Tensor, tokens: Tensor, outputs: Tensor, written: Tensor, chosen: Tensor, weights: Tensor
    ) -> None:
        """Add the products of the experts in the backward pass."""
        recorder, location = self.recorder, f"experts.{self.layer}"
        detours = None
        if recorder.phase == "recompute" or not recorder.recompute:
            detours = self._detours(states, tokens, outputs.detach(), chosen, weights)
        if recorder.phase == "recompute":
            recorder.recomputed[location] = detours
            return

        def add() -> None:
            read = recorder.recomputed.pop(location) if detours is None else detours
            products = recorder.by_sequence(read.products(self.gradients.pop(location)))
            for name in (name for name in recorder.criteria if ranks(name, "experts", mixture=True)):
                recorder.sums.add(f"{name}.{location}", recorder.products(name, products))

        if outputs.requires_grad:  # only once their gradient is there, their layer has run a second time
            written.register_hook(lambda gradient: self.gradients.update({location: gradient}))
            outputs.register_hook(lambda _gradient: add())

    @torch.no_grad()
    def _detours(self, states: Tensor, tokens: Tensor, outputs: Tensor, chosen: Tensor, weights: Tensor) -> Detours:
        """See `Detours`."""
        other_weights, others = self.experts.without_each(self.logits, chosen)
        count = self.experts.count
        places = torch.full((len(states), count), -1, device=states.device)
        places.scatter_(1, chosen, torch.arange(chosen.numel(), device=states.device).view_as(chosen))
        needed = torch.zeros_like(places, dtype=torch.bool).scatter_(1, others.flatten(1), True) & (places < 0)
        more_tokens, more_experts = needed.nonzero(as_tuple=True)
        places[more_tokens, more_experts] = len(outputs) + torch.arange(len(more_tokens), device=states.device)
        if len(more_tokens):
            outputs = torch.cat([outputs, self._run(states, more_tokens, more_experts)])
        shared = self.experts.description.scores == "softmax" and not self.experts.normalised
        return Detours(
            self.experts, torch.cat([tokens, more_tokens]), outputs, chosen, weights,
            places.gather(1, others.flatten(1)).view_as(others), other_weights,
            self.logits.float().softmax(1) if shared else None,
        )  # fmt: skip

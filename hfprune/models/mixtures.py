"""The experts of a layer, taken apart: how the router chooses, what each expert computes, and fewer of them.

transformers holds a matrix of all experts as one parameter with three dimensions, and the router as a bare matrix. So
neither has a linear layer to hook into or to cut. What differs between families says `layout.Mixture`, and the rest the
module of the experts itself: `is_transposed`, `is_concatenated` (all gates before all ups, or pairs) and `has_bias`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from hfprune.models.families import chosen_of, groups_of, is_normalised, layout_of, setting
from hfprune.models.layout import Mixture
from hfprune.models.units import Part, layers_of

COUNTS = ("num_experts",)  # attributes of modules that state how many experts there are
WIDTHS = ("intermediate_dim", "intermediate_size")  # and how wide each is


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    Attributes:
        block, router, experts: its modules, see `layout.Mixture`.
        description: of the family.
        config: of the model.
    """

    block: nn.Module
    router: nn.Module
    experts: nn.Module
    description: Mixture
    config: Any

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.router.weight)

    @property
    def width(self) -> int:
        """Number of neurons of an expert."""
        return self.experts.down_proj.shape[1 if self.experts.is_transposed else 2]

    @property
    def chosen(self) -> int:
        """Number of experts that a token is sent to."""
        return chosen_of(self.config)

    @property
    def groups(self) -> int:
        """Number of groups of experts."""
        return groups_of(self.config, self.description)

    @property
    def normalised(self) -> bool:
        """Whether the weights of the chosen experts are divided by their sum."""
        return is_normalised(self.config, self.description)

    @property
    def correction(self) -> Tensor | None:
        """What is added to the scores for the choice alone, (experts,); None if nothing is."""
        owner, name = self._correction
        return getattr(owner, name).flatten() if name else None

    @property
    def _correction(self) -> tuple[nn.Module, str]:
        """The module and the attribute of the correction; the name is empty if there is none."""
        path = (self.description.correction or "").removeprefix(f"{self.description.block}.")
        owner, _, name = path.rpartition(".")
        return self.block.get_submodule(owner), name

    @property
    def neuron_parameters(self) -> int:
        """Parameters of one neuron of one expert."""
        weights = self.experts.gate_up_proj[0].numel() + self.experts.down_proj[0].numel()
        return weights // self.width + 2 * self.description.biased

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert, with its row of the router."""
        parameters = [*self.experts.parameters(recurse=False), *self.router.parameters()]
        return sum(parameter.numel() for parameter in parameters) // self.count

    @property
    def active_parameters(self) -> int:
        """Weights that a token meets: the router, and the matrices of the experts that it is sent to."""
        return self.router.weight.numel() + self.chosen * 3 * self.width * self.router.weight.shape[1]

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that a token is not sent to."""
        parameters = sum(parameter.numel() for parameter in self.experts.parameters())
        return parameters // self.count * (self.count - self.chosen)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The choice of the router, as the family's class makes it.

        Args:
            logits: (..., experts) float32; -inf for an expert that is gone.

        Returns:
            (..., chosen) float32 weights, and int64 experts.
        """
        description, config = self.description, self.config
        scores = logits.sigmoid() if description.scores == "sigmoid" else logits.softmax(-1)
        choice = scores if self.correction is None else scores + self.correction
        choice = choice.masked_fill(logits.isneginf(), -torch.inf)
        if self.groups > 1:
            by_group = choice.unflatten(-1, (self.groups, -1))
            best = by_group.topk(description.groups, dim=-1).values.sum(-1).topk(setting(config, "topk_group")).indices
            closed = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, False)
            choice = by_group.masked_fill(closed[..., None], -torch.inf).flatten(-2)
        experts = choice.topk(min(self.chosen, self.count - 1)).indices
        weights = scores.gather(-1, experts)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return weights * setting(config, description.scale, 1.0) if description.scale else weights, experts

    def without_each(self, logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """For each chosen expert, what the router would choose if that one were gone.

        Args:
            logits: (tokens, experts) of the router.
            chosen: (tokens, chosen) int64.

        Returns:
            (tokens, chosen, chosen) weights and experts. (With all experts but one chosen, one fewer.)
        """
        repeated = logits.float()[:, None].expand(-1, chosen.shape[1], -1)
        return self.route(repeated.scatter(2, chosen[..., None], -torch.inf))

    def activations(self, expert: int, states: Tensor) -> Tensor:
        """(tokens, hidden) that an expert reads -> (tokens, neurons), what its neurons write through down."""
        experts = self.experts
        read = experts.gate_up_proj[expert]
        biases = experts.gate_up_proj_bias[expert] if experts.has_bias else None
        return experts._apply_gate(linear(states, read.T if experts.is_transposed else read, biases))

    def output(self, expert: int, activations: Tensor) -> Tensor:
        """(tokens, neurons) -> (tokens, hidden), what an expert writes, before its weight."""
        experts = self.experts
        write = experts.down_proj[expert]
        biases = experts.down_proj_bias[expert] if experts.has_bias else None
        return linear(activations, write.T if experts.is_transposed else write, biases)

    def neurons_of(self, expert: int) -> Part:
        """An expert as a part of a dense model. Its linear layers are views of the weights."""
        experts = self.experts
        read, write = experts.gate_up_proj[expert], experts.down_proj[expert]
        if experts.is_transposed:
            read, write = read.T, write.T
        rows = _linear(read, experts.gate_up_proj_bias[expert] if experts.has_bias else None)
        sections = (1, 1) if experts.is_concatenated else (1,)  # else a gate and its up stand together
        return Part(
            name="mlp", inputs=(rows,), output=_linear(write, None), units=self.width, columns=1, sections=(sections,),
            per_head=(), block=experts,
        )  # fmt: skip

    def keep_experts(self, experts: Tensor) -> None:
        """Remove all other experts, in place.

        Args:
            experts: (count,) int64, ascending; equally many of every group.
        """
        owner, name = self._correction
        for module in (self.experts, self.router):
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(parameter[experts], requires_grad=False))
        if name:
            values = getattr(owner, name)[..., experts]
            is_parameter = name in owner._parameters
            setattr(owner, name, nn.Parameter(values, requires_grad=False) if is_parameter else values)
        self._state(COUNTS, len(experts))

    def keep_neurons(self, neurons: Tensor) -> None:
        """Remove all other neurons of every expert, in place.

        Args:
            neurons: (experts, count) int64, ascending in each.
        """
        experts, ordinary = self.experts, not self.experts.is_transposed
        every = torch.arange(self.count, device=neurons.device)[:, None]
        if experts.is_concatenated:
            rows = torch.cat([neurons, neurons + self.width], 1)
        else:
            rows = torch.stack([2 * neurons, 2 * neurons + 1], 2).flatten(1)

        def keep(name: str, places: Tensor, first: bool) -> None:
            """Keep places of the second dimension of a parameter, or of the third."""
            values = getattr(experts, name)
            kept = values[every, places] if first else values.transpose(1, 2)[every, places].transpose(1, 2)
            setattr(experts, name, nn.Parameter(kept.contiguous(), requires_grad=False))

        keep("gate_up_proj", rows, ordinary)
        if experts.has_bias:
            keep("gate_up_proj_bias", rows, True)
        keep("down_proj", neurons, not ordinary)
        self._state(WIDTHS, neurons.shape[1])

    def _state(self, names: tuple[str, ...], value: int) -> None:
        """Set the numbers that modules keep of their size."""
        for module in (self.block, self.router, self.experts):
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, value)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these weights, (out, in)."""
    made = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made


def experts_in(model: PreTrainedModel, number: int) -> Experts | None:
    """The experts of layer `number`; None if its MLP is dense."""
    description, layer = layout_of(model).mixture, layers_of(model)[number]
    if description is None or f"{description.experts}.down_proj" not in dict(layer.named_parameters()):
        return None
    paths = (description.block, description.router, description.experts)
    return Experts(*map(layer.get_submodule, paths), description, model.config)


def all_experts(model: PreTrainedModel) -> Iterator[Experts]:
    """The experts of every layer that has some, first to last."""
    for number in range(len(layers_of(model))):
        if experts := experts_in(model, number):
            yield experts


@dataclass(frozen=True)
class WholeExperts:
    """The experts of a layer as units. Every group keeps the same number: one of each group is what can go at a time.

    Attributes:
        experts: of the layer.
    """

    experts: Experts

    @property
    def rows(self) -> int:
        """Number of groups."""
        return self.experts.groups

    @property
    def units(self) -> int:
        """Number of experts in a group."""
        return self.experts.count // self.rows

    @property
    def parameters(self) -> int:
        """Parameters of one expert from each group."""
        return self.rows * self.experts.expert_parameters

    def keep(self, units: Tensor) -> None:
        """Remove the other experts: (count,) int64, ascending."""
        self.experts.keep_experts(units)

    def matrices(self) -> list[Tensor]:
        """The weights by expert: matrices (experts, weights)."""
        module = self.experts.experts
        return [module.gate_up_proj.flatten(1), module.down_proj.flatten(1)]


@dataclass(frozen=True)
class ExpertNeurons:
    """The neurons inside the experts of a layer. Every expert keeps the same number: one of each can go at a time.

    Attributes:
        experts: of the layer.
    """

    experts: Experts

    @property
    def rows(self) -> int:
        """Number of experts."""
        return self.experts.count

    @property
    def units(self) -> int:
        """Number of neurons of an expert."""
        return self.experts.width

    @property
    def parameters(self) -> int:
        """Parameters of one neuron from each expert."""
        return self.rows * self.experts.neuron_parameters

    def keep(self, units: Tensor) -> None:
        """Remove the other neurons: (experts, count) int64, ascending in each."""
        self.experts.keep_neurons(units)

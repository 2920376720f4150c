"""Walking a model layer by layer: all tokens pass one layer before the next.

A walk needs the weights of one layer at a time, so it works for models in memory and for those that are `streamed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.models.families import layout_of
from hfprune.models.streamed import device_of, in_memory, in_turn
from hfprune.models.units import layers_of
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.progress import progress

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a layer, beside the hidden states


@dataclass(frozen=True)
class Repeated:
    """An argument of a layer that has rows for every sequence of a batch, which are the same for all.

    Attributes:
        rows: (rows of one sequence, ...).
    """

    rows: Tensor

    def times(self, sequences: int) -> Tensor:
        """(sequences * rows, ...), the argument for a batch."""
        return self.rows.repeat(sequences, *[1] * (self.rows.ndim - 1))


def entrance(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The modules around the layers that `enter` needs."""
    beside = model.base_model.get_submodule(layout_of(model).layers.rpartition(".")[0])
    return tuple(module for module in beside.children() if module is not layers_of(model))


def exit_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the output projection."""
    return model.base_model.get_submodule(layout_of(model).final_norm)


@torch.no_grad()
def enter(model: PreTrainedModel, tokens: Tensor, **inputs: Any) -> tuple[Tensor, list[Arguments]]:
    """What enters the first layer, and the arguments of every layer: positions, the mask of the layer's kind.

    They are those that the model's own forward pass gives to its layers, which here return their input at once. The
    arguments for one sequence fit all sequences of its length: none has padding.

    Args:
        model: with the weights of its `entrance` in memory.
        tokens: (batch, length) int64.
        inputs: what the model is given beside the tokens, such as positions and masks of its own.

    Returns:
        (batch, length, hidden), and the arguments of each layer.
    """
    entered: list[Tensor] = []
    arguments: list[Arguments] = []
    in_tuple, repeated = layout_of(model).layers_return_tuples, layout_of(model).repeated

    def record(hidden: Tensor, *positional: Any, **keywords: Any) -> Tensor | tuple[Tensor, None]:
        entered.append(hidden)
        if repeated:
            rows = keywords[repeated]
            keywords[repeated] = Repeated(rows[: len(rows) // len(hidden)])
        arguments.append((positional, keywords))
        return (hidden, None) if in_tuple else hidden

    layers = layers_of(model)
    forwards = [layer.forward for layer in layers]
    for layer in layers:
        layer.forward = record
    try:
        model.base_model(input_ids=tokens.to(device_of(model)), use_cache=False, **inputs)
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
    return entered[0], arguments


def run_layer(layer: nn.Module, states: Tensor, arguments: Arguments) -> Tensor:
    """(batch, length, hidden) that enter a layer -> those that leave it."""
    positional, keywords = arguments
    keywords = {
        name: value.times(len(states)) if isinstance(value, Repeated) else value for name, value in keywords.items()
    }
    left = layer(states, *positional, **keywords)
    return left[0] if isinstance(left, tuple) else left


def layers_in_turn(model: PreTrainedModel, what: str) -> Iterator[int]:
    """Iterate over the numbers of the layers, with the weights of each in memory meanwhile.

    Args:
        model: streamed or in memory.
        what: name of the work, for its progress.
    """
    layers = layers_of(model)
    return progress(in_turn([(layer,) for layer in layers]), what, len(layers), "layer")


@torch.no_grad()
def final_states(model: PreTrainedModel, tokens: Tensor, batch: int, what: str) -> Iterator[Tensor]:
    """Pass all tokens through one layer after another.

    Args:
        model: streamed or in memory.
        tokens: (sequences, length) int64.
        batch: sequences that pass a layer at once.
        what: name of the work, for its progress.

    Yields:
        (1, length, hidden) final hidden states of each sequence.
    """
    device, layers, norm = device_of(model), layers_of(model), exit_norm(model)
    with in_memory(*entrance(model)):
        _, arguments = enter(model, tokens[:1])
        stream = [enter(model, rows)[0].cpu() for rows in tokens.split(batch)]
    for number in layers_in_turn(model, what):
        for i, states in enumerate(stream):
            with fast_products(device):
                stream[i] = run_layer(layers[number], states.to(device), arguments[number]).cpu()
    with in_memory(norm):
        for states in stream:
            yield from norm(states.to(device)).split(1)

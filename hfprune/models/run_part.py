"""Run one part of a layer at a time.

    stream, arguments = layer_inputs(model, tokens, 4096)
    for layer, own in zip(layers_of(model), arguments):
        for name in ("attention", "mlp"):  # with `layout.parallel`, the MLP reads what attention read
            passed = run_part(layout_of(model), model.config, layer, name, own, states)
            states = states + passed.written

The arithmetic of a layer (where the norms stand, what multiplies what a part writes) is that of the family's layout.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.models.families import layout_of, setting
from hfprune.models.layout import Layout
from hfprune.models.units import layers_of
from hfprune.models.walk import enter

Stream = list[Tensor]  # batches of hidden states that enter one layer, (batch, length, hidden) each, of all tokens
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a layer's attention, beside the hidden states


@dataclass(frozen=True)
class Passed:
    """What one part of a layer computes.

    Attributes:
        activations: (batch, length, columns), the input of the part's output layer.
        output: (batch, length, hidden), the output of that layer.
        written: (batch, length, hidden), what the part adds to the hidden states; see `written`.
    """

    activations: Tensor
    output: Tensor
    written: Tensor


def layer_inputs(model: PreTrainedModel, tokens: Tensor, size: int) -> tuple[Stream, list[Arguments]]:
    """The hidden states that enter the first layer, and the arguments of every layer's attention.

    The arguments (positions, the mask of the layer's kind) are those that the model itself passes. One sequence's
    forward pass gives them, and they fit all sequences: all have the same length and no padding.

    Args:
        model: on its device.
        tokens: (sequences, length) int64.
        size: tokens of a batch, at least one sequence.
    """
    arguments: list[Arguments] = []
    path = layout_of(model).attention.module

    def record(_block: nn.Module, positional: tuple, keywords: dict[str, Any]) -> None:
        arguments.append((positional[1:], {name: value for name, value in keywords.items() if name != "hidden_states"}))

    layers = layers_of(model)
    hooks = [layer.get_submodule(path).register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        model.base_model(input_ids=tokens[:1].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [enter(model, batch)[0] for batch in tokens.split(max(1, size // tokens.shape[1]))], arguments


def run_part(layout: Layout, config: Any, layer: nn.Module, name: str, arguments: Arguments, states: Tensor) -> Passed:
    """Run one part of a layer.

    Args:
        layout, config: of the model.
        layer: a decoder layer.
        name: the part's name.
        arguments: of its attention, see `layer_inputs`.
        states: (batch, length, hidden), the hidden states that the part reads.
    """
    block, seen = layout.block(name), []
    output = layer.get_submodule(block.output)
    hook = output.register_forward_hook(lambda _module, inputs, made: seen.append((inputs[0], made)))
    normed = states if block.norm is None else layer.get_submodule(block.norm)(states)
    try:
        if block.module is None:
            (rows,) = block.rows
            output(layer.get_submodule(block.activation)(layer.get_submodule(rows.path)(normed)))
        elif name == "attention":
            positional, keywords = arguments
            layer.get_submodule(block.module)(normed, *positional, **keywords)
        else:
            layer.get_submodule(block.module)(normed)
    finally:
        hook.remove()
    ((activations, made),) = seen
    return Passed(activations, made, written(layout, config, layer, name, made))


def written(layout: Layout, config: Any, layer: nn.Module, name: str, output: Tensor) -> Tensor:
    """What a part adds to the hidden states, from the output (..., hidden) of its output layer."""
    block = layout.block(name)
    normed = output if block.after is None else layer.get_submodule(block.after)(output)
    return normed * factor(layout, config)


def factor(layout: Layout, config: Any) -> float:
    """The number by which what a part writes is multiplied before it is added to the hidden states."""
    return setting(config, layout.multiplier) if layout.multiplier else 1.0

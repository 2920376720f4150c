"""Run one part of a layer at a time.

    states, arguments = enter(model, tokens)
    for layer, own in zip(layers_of(model), arguments):
        for name in ("attention", "mlp"):  # with `layout.parallel`, the MLP reads what attention read
            passed = run_part(layout_of(model), model.config, layer, name, own, states)
            states = states + passed.written

The arithmetic of a layer (where the norms stand, what multiplies what a part writes) is that of the family's layout.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hfprune.models.families import setting
from hfprune.models.layout import Layout
from hfprune.models.walk import Arguments, run_layer


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


class _Reached(Exception):  # noqa: N818 (no error)
    """The output layer of attention has run; the rest of the layer needs not."""


def run_part(layout: Layout, config: Any, layer: nn.Module, name: str, arguments: Arguments, states: Tensor) -> Passed:
    """Run one part of a layer.

    Args:
        layout, config: of the model.
        layer: a decoder layer.
        name: the part's name.
        arguments: of the layer, see `walk.enter`.
        states: (batch, length, hidden), the hidden states that the part reads.
    """
    block, seen = layout.block(name), []
    output = layer.get_submodule(block.output_among(dict(layer.named_modules())))

    def record(_module: nn.Module, inputs: tuple[Tensor], made: Tensor) -> None:
        seen.append((inputs[0], made))
        if name == "attention":
            raise _Reached

    hook = output.register_forward_hook(record)
    try:
        if name == "attention":  # the layer knows best what its attention takes
            with suppress(_Reached):
                run_layer(layer, states, arguments)
        else:
            normed = states if block.norm is None else layer.get_submodule(block.norm)(states)
            if block.module is None:
                (rows,) = block.rows
                output(layer.get_submodule(block.activation)(layer.get_submodule(rows.path)(normed)))
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

"""Sums over weights times their gradients, for criteria of LLM-Pruner's form.

For a weight w with the gradient g_s of S on sequence s, LLM-Pruner scores a unit by its weights in all linear layers:

- `elements` (element 1): sum over weights of |sum_s w g_s|,
- `element_squares` (element 2): sum over weights of sum_s (w g_s)**2,
- `vectors`: sum over the unit's rows (of an output layer: columns) of |sum_s sum of w g_s over the row|.

No parameter requires a gradient: with x the input and y the output of a layer y = W x, the gradient of a sequence is
the product of dS/dy and x. It is multiplied by W, arranged by unit, and reduced as far as the sum over sequences
allows. So `elements` keeps a float64 number for each weight, the others much less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hfprune.models.loading import weights_in_memory
from hfprune.models.units import Part, matrix
from hfprune.pruning.criteria import CRITERIA
from hfprune.runtime.matmul import fast_products

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from hfprune.pruning.recorder import UnitRecorder

# (units, vectors, length) weights times gradients of one sequence -> (units, numbers to sum over sequences). A vector
# is a row of a layer that the unit reads through, or a column of the one that it writes through.
WEIGHT_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "elements": lambda salience: salience.flatten(1),
    "element_squares": lambda salience: salience.square().sum((1, 2))[:, None],
    "vectors": lambda salience: salience.sum(2),
}


def reads_weights(criterion: str) -> bool:
    """Whether a criterion is a sum over weights times their gradients."""
    return getattr(CRITERIA[criterion], "products", None) in WEIGHT_FORMS


def sum_name(criterion: str, number: int) -> str:
    """Under which name the sums for linear layer `number` of a part stand."""
    return f"{criterion}-{number}"


def sizes(part: Part, criterion: str) -> list[int]:
    """How many numbers are summed for each linear layer of a part."""
    form = WEIGHT_FORMS[CRITERIA[criterion].products]
    written, width = matrix(part.output).shape
    vectors, lengths = zip(*(matrix(linear).shape for linear in part.inputs), (width, written), strict=True)
    shapes = [(part.units, count // part.units, length) for count, length in zip(vectors, lengths, strict=True)]
    return [form(torch.empty(shape, device="meta")).numel() for shape in shapes]


class WeightRecorder:
    """Adds to the sums of a `UnitRecorder` while its model runs backward."""

    def __init__(self, recorder: UnitRecorder) -> None:
        self.recorder = recorder
        self.gradients: dict[str, Tensor] = {}  # dS/dy of an output layer, until its input can be read

    def hooks(self, kind: str, layer: int, part: Part) -> list[RemovableHandle]:
        """Attach to all linear layers of a part."""
        return [
            linear.register_forward_hook(self._hook(kind, layer, part, number))
            for number, linear in enumerate(part.linears)
        ]

    def _hook(self, kind: str, layer: int, part: Part, number: int) -> Callable:
        """The forward hook of linear layer `number` of a part."""
        linear, recorder, key = part.linears[number], self.recorder, f"{kind}.{layer}.{number}"
        is_output = linear is part.output

        def after(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if recorder.phase == "dense":
                return output
            if not output.requires_grad:  # layer 0: no layer before it needs a gradient
                output = output.detach().requires_grad_()
            if recorder.phase == "recompute":
                recorder.recomputed[key] = inputs[0].detach()
                return output
            kept = None if recorder.recompute else inputs[0].detach()

            def add(gradient: Tensor) -> None:
                x = recorder.recomputed.pop(key) if kept is None else kept
                if names := [name for name in recorder.criteria if reads_weights(name)]:
                    self._add(names, f"{kind}.{layer}", part, number, x, gradient)

            if is_output:  # only once its input's gradient is there, its layer has run a second time
                output.register_hook(lambda gradient: self.gradients.update({key: gradient}))
                inputs[0].register_hook(lambda _gradient: add(self.gradients.pop(key)))
            else:
                output.register_hook(add)
            return output

        return after

    def _add(self, names: list[str], location: str, part: Part, number: int, x: Tensor, gradient: Tensor) -> None:
        """Add one batch: (batch, length, in) inputs and (batch, length, out) gradients of a linear layer."""
        linear, of_sequences = part.linears[number], self.recorder.by_sequence
        with weights_in_memory(linear), fast_products(x.device):  # float32, whatever the model's gradients are
            for inputs, gradients in zip(of_sequences(x).float(), of_sequences(gradient).float(), strict=True):
                salience = matrix(linear) * (gradients.T @ inputs)
                is_output = linear is part.output
                by_unit = salience.T.unflatten(0, (part.units, -1)) if is_output else part.by_unit(salience, number)
                for name in names:
                    form = WEIGHT_FORMS[CRITERIA[name].products]
                    self.recorder.sums.add(f"{sum_name(name, number)}.{location}", form(by_unit).contiguous())

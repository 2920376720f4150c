"""What a pass over the calibration text adds up: activations and gradients at the input of every output layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.linalg import vector_norm
from transformers import PreTrainedModel

from hfprune.errors import UserError
from hfprune.models.head import Head
from hfprune.models.units import PARTS, Part, part_of
from hfprune.pruning.criteria import CRITERIA, GradientCriterion
from hfprune.pruning.head import LogitGradient, hidden_gradient, positions_of

PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {  # (batch, length, units) products -> (units,) their sum
    "absolute": lambda products: vector_norm(products, 1, dim=(0, 1)),
    "square": lambda products: vector_norm(products, 2, dim=(0, 1)).double().square(),
    "square_of_sum": lambda products: products.sum(1).square().sum(0),
}
MOMENTS = ("total", "squares")  # what static criteria read of the activations


class Sums:
    """The sums of a pass over the calibration text, in float64.

    Attributes:
        sequences: number of sequences that the sums contain.
        steps: number of steps of a pass layer by layer that the sums contain.
        tensors: `<name>.<part>.<layer>` -> (units,) for names of gradient criteria, (columns,) for `MOMENTS`.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.steps = 0
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
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file(self.tensors, partial, metadata={"sequences": str(self.sequences), "steps": str(self.steps)})
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Add what `save` wrote."""
        with safe_open(file, "pt") as stored:
            self.sequences += int(stored.metadata()["sequences"])
            self.steps += int(stored.metadata()["steps"])
            for name in stored.keys():  # noqa: SIM118 (not a dictionary)
                self.add(name, stored.get_tensor(name))

    def refuse_not_finite(self) -> None:
        """Refuse sums that cannot become finite again.

        Raises:
            UserError: with the layer, the part and the criterion of the first.
        """
        by_layer = sorted(self.tensors.items(), key=lambda item: int(item[0].rpartition(".")[2]))
        for name, tensor in by_layer:
            if not tensor.isfinite().all():
                criterion, _, layer = name.split(".")
                raise UserError(f"layer {layer}: scores by {criterion} are not finite; compute in float32 or bfloat16.")


@dataclass(frozen=True)
class CalibrationPass:
    """What one pass over calibration tokens computes.

    Attributes:
        tokens: (sequences, length) int64.
        first: number of the first sequence in the whole sample.
        seed: draws sampled labels.
        passes: for each backward pass the criteria that it serves, its gradient, and the number of its draw.
        moments: whether static criteria are scored.
        silent: per layer, 0 for the neurons that are silenced and 1 for the others, (neurons,); None if all are intact.
        batch: sequences that run through the model, or a layer, at once.
    """

    tokens: Tensor
    first: int
    seed: int
    passes: list[tuple[list[str], LogitGradient, int]]
    moments: bool
    silent: list[Tensor] | None
    batch: int

    @property
    def names(self) -> list[str]:
        """The names of its sums: of gradient criteria, and `MOMENTS`."""
        return [*{name: None for names, _, _ in self.passes for name in names}, *(MOMENTS if self.moments else ())]

    def state(self, folder: Path | None) -> Path | None:
        """The file of partial sums in `folder`.

        It is named after what it sums: a pass over other criteria, or with other draws, must not continue it.
        """
        draws = Counter(name for names, _, _ in self.passes for name in names)
        summed = sorted(f"{name}x{count}" for name, count in draws.items())
        return folder and folder / f"{'-'.join(['sums', *summed, *['moments'] * self.moments])}.safetensors"

    def gradient(self, number: int, first: int, hidden: Tensor, head: Head, dense: Tensor | None) -> Tensor:
        """The gradient of backward pass `number` at final hidden states, see `head.hidden_gradient`.

        `hidden` are those of the sequences from `first` on, counted in `tokens`.
        """
        _, logit_gradient, draw = self.passes[number]
        rows = self.tokens[first : first + len(hidden)]
        positions = positions_of(rows, self.first + first, self.seed, draw, head.weight.device)
        return hidden_gradient(hidden, head, logit_gradient, positions, dense)


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
        length: tokens of a sequence.
    """

    def __init__(
        self, sums: Sums, length: int, moments: bool, differentiate: bool, silent: list[Tensor] | None, recompute: bool
    ) -> None:
        self.length = length
        self.sums, self.moments, self.differentiate, self.silent = sums, moments, differentiate, silent
        self.recompute = recompute
        self.criteria: list[str] = []
        self.recomputed: dict[str, Tensor] = {}
        self.phase = "scored"

    def in_phase(self, phase: str) -> Phase:
        """A context with another phase."""
        return Phase(self, phase)

    @contextmanager
    def attached(self, layer: int, model: PreTrainedModel) -> Iterator[None]:
        """A context in which the activations of the model's layer number `layer` are read."""
        by_kind = {kind: part_of(model, kind, layer) for kind in PARTS}
        hooks = [part.output.register_forward_pre_hook(self._hook(kind, layer, part)) for kind, part in by_kind.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, kind: str, layer: int, part: Part) -> Callable:
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
                self.recomputed[f"{kind}.{layer}"] = self._by_sequence(activation.detach())
            return (activation,)

        return before_output

    def _add_to_sums(self, location: str, part: Part, activation: Tensor) -> None:
        values = self._by_sequence(activation.detach())
        if self.moments:
            self.sums.add(f"total.{location}", values.float().sum((0, 1)))
            self.sums.add(f"squares.{location}", vector_norm(values.float(), dim=(0, 1)).double().square())

        kept = None if self.recompute else values

        def add(gradient: Tensor) -> None:
            activations = self.recomputed.pop(location) if kept is None else kept
            products = part.per_unit(self._by_sequence(gradient).float() * activations.float())
            for name in self.criteria:
                self.sums.add(f"{name}.{location}", PRODUCTS[CRITERIA[name].products](products))

        if self.differentiate:
            activation.register_hook(add)

    def _by_sequence(self, values: Tensor) -> Tensor:
        """(batch, length, columns); OPT's MLP sees the tokens of all sequences in a row."""
        return values if values.ndim == 3 else values.unflatten(0, (-1, self.length))


class Phase:
    """See `UnitRecorder.in_phase`. Several backward passes enter one context, which a generator does not allow."""

    def __init__(self, recorder: UnitRecorder, phase: str) -> None:
        self.recorder, self.phase, self.previous = recorder, phase, recorder.phase

    def __enter__(self) -> None:
        self.previous, self.recorder.phase = self.recorder.phase, self.phase

    def __exit__(self, *_error: object) -> None:
        self.recorder.phase = self.previous

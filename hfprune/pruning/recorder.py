"""What a pass over the calibration text adds up: activations and gradients at the input of every output layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.linalg import vector_norm
from transformers import PreTrainedModel

from hfprune.errors import UserError
from hfprune.models.head import Head
from hfprune.models.mixtures import ExpertNeurons, WholeExperts
from hfprune.models.units import UNITS, AnyPart, Part, kinds_of, part_of, parts
from hfprune.pruning.criteria import CRITERIA, GradientCriterion, StaticCriterion, ranks
from hfprune.pruning.expert_recorder import ExpertRecorder
from hfprune.pruning.head import LogitGradient, hidden_gradient, positions_of
from hfprune.pruning.weight_recorder import WeightRecorder, reads_weights, sizes, sum_name
from hfprune.runtime.matmul import fast_products

PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {  # (batch, length, units) products -> (units,) their sum
    "absolute": lambda products: vector_norm(products, 1, dim=(0, 1), dtype=torch.float32),
    "square": lambda products: vector_norm(products, 2, dim=(0, 1), dtype=torch.float32).double().square(),
    "square_of_sum": lambda products: products.sum(1, dtype=torch.float32).square().sum(0),
    "pairs": lambda products: (flat := products.flatten(0, 1).float()).T @ flat,  # (units, units)
}
SUM_NAME = re.compile(r"(\w+)(-\d+)?\.")  # of a criterion or a moment, and the number of a linear layer


def names_of_sums(criterion: str, kind: str, mixture: bool, linears: int = 1) -> tuple[str, ...]:
    """The names of the sums that a criterion needs of a part of that name; none if it does not rank it.

    Args:
        criterion: a name in `CRITERIA`.
        kind: the part's name.
        mixture: whether the model is a mixture of experts.
        linears: number of linear layers of the part.
    """
    if not ranks(criterion, kind, mixture):
        return ()
    entry = CRITERIA[criterion]
    if isinstance(entry, GradientCriterion):
        weights = tuple(sum_name(criterion, number) for number in range(linears))
        return weights if reads_weights(criterion) else (criterion,)
    if kind == "experts":
        return ("routed",) if isinstance(entry, StaticCriterion) else entry.moments
    return (*entry.moments, "routed") if kind == "mlp" and mixture else entry.moments


def moments_of(criteria: Sequence[str]) -> tuple[str, ...]:
    """The names of the moments that criteria without a gradient among these read."""
    without = [criterion for name in criteria if not isinstance(criterion := CRITERIA[name], GradientCriterion)]
    return tuple(dict.fromkeys(name for criterion in without for name in criterion.moments))


def flops_of_sums(
    part: AnyPart, passes: Sequence[tuple[list[str], LogitGradient, int]], criteria: Sequence[str]
) -> int:
    """Operations per token for the matrix products that the sums of a part need."""
    if not isinstance(part, Part):  # for gradients, one more expert computes what would stand in for one that is gone
        is_extra = isinstance(part, WholeExperts) and bool(passes)
        return 2 * part.experts.neuron_parameters * part.experts.width * is_extra
    columns = part.width
    flops = 2 * columns**2 if "products" in moments_of(criteria) else 0
    for names, _, _ in passes:
        flops += 2 * sum(linear.weight.numel() for linear in part.linears) * any(map(reads_weights, names))
        flops += 2 * part.units**2 * sum(CRITERIA[name].products == "pairs" for name in names)
    return flops


def bytes_of_sums(model: PreTrainedModel, criteria: Sequence[str]) -> int:
    """Size of the sums of a pass for these criteria."""
    numbers = 0
    for part in (part for kind in kinds_of(model) for part in parts(model, kind) if part):
        if not isinstance(part, Part):
            kind = "experts" if isinstance(part, WholeExperts) else "mlp"
            names = {name for criterion in criteria for name in names_of_sums(criterion, kind, True)}
            numbers += len(names) * part.rows * part.units
            continue
        lengths = {"products": part.width**2, "norms": part.units}
        numbers += sum(lengths.get(name, part.width) for name in moments_of(criteria))
        for name in criteria:
            if reads_weights(name):
                numbers += sum(sizes(part, name))
            elif isinstance(criterion := CRITERIA[name], GradientCriterion):
                numbers += part.units ** (2 if criterion.products == "pairs" else 1)
    return 8 * numbers


class Sums:
    """The sums of a pass over the calibration text, in float64.

    Attributes:
        sequences: number of sequences that the sums contain.
        steps: number of steps of a pass layer by layer that the sums contain.
        tensors: `<name>.<part>.<layer>`, for names see `names_of_sums` -> float64 sums, of a shape that depends on
            the criterion: (units,) for most gradient criteria, (columns,) for most moments.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.steps = 0
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add `value`, on any device, to the sum of that name."""
        total = self.tensors.get(name)
        self.tensors[name] = value.double() if total is None else total.to(value.device) + value

    def add_row(self, name: str, row: int, rows: int, value: Tensor) -> None:
        """Add `value` to one row of the sum of that name, which has so many rows."""
        if name not in self.tensors:
            self.tensors[name] = value.new_zeros((rows, *value.shape), dtype=torch.float64)
        self.tensors[name][row] += value

    def merge(self, other: Sums) -> None:
        """Add the sums over other sequences."""
        self.sequences += other.sequences
        for name, value in other.tensors.items():
            self.add(name, value)

    def of(self, criterion: str) -> Sums:
        """The sums that one criterion needs."""
        entry = CRITERIA[criterion]
        names = (criterion,) if isinstance(entry, GradientCriterion) else entry.moments
        subset = Sums()
        subset.sequences = self.sequences
        names = (*names, "routed")  # of a mixture's tokens, for all criteria
        subset.tensors = {key: tensor for key, tensor in self.tensors.items() if SUM_NAME.match(key)[1] in names}
        return subset

    @property
    def mixture(self) -> bool:
        """Whether they are of a mixture of experts."""
        return any(".experts." in name for name in self.tensors)

    def kinds(self, criterion: str) -> list[str]:
        """The names of the parts that a criterion ranks and whose sums are here."""
        names = {kind: names_of_sums(criterion, kind, self.mixture) for kind in UNITS}
        return [kind for kind in UNITS if names[kind] and f"{names[kind][0]}.{kind}.0" in self.tensors]

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
        criteria: what the sums are for.
        passes: for each backward pass the criteria that it serves, its gradient, and the number of its draw.
        silent: per layer, 0 for the neurons that are silenced and 1 for the others, (neurons,); None if all are intact.
        batch: sequences that run through the model, or a layer, at once.
        products: type of the inputs of the backward pass's matrix products, see `matmul.product_dtype`.
    """

    tokens: Tensor
    first: int
    seed: int
    criteria: Sequence[str]
    passes: list[tuple[list[str], LogitGradient, int]]
    silent: list[Tensor] | None
    batch: int
    products: torch.dtype

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the moments that criteria without a gradient read."""
        return moments_of(self.criteria)

    @property
    def weights(self) -> bool:
        """Whether a criterion sums over weights times their gradients."""
        return any(reads_weights(name) for names, _, _ in self.passes for name in names)

    def state(self, folder: Path | None) -> Path | None:
        """The file of partial sums in `folder`.

        It is named after what it sums: a pass over other criteria, or with other draws, must not continue it.
        """
        draws = Counter(name for names, _, _ in self.passes for name in names)
        summed = sorted(f"{name}x{count}" for name, count in draws.items())
        return folder and folder / f"{'-'.join(['sums', *summed, *self.moments])}.safetensors"

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
        weights: what sums over weights times their gradients, for criteria that read those.
    """

    def __init__(
        self,
        sums: Sums,
        length: int,
        moments: tuple[str, ...],
        differentiate: bool,
        silent: list[Tensor] | None,
        recompute: bool,
        weights: bool = False,
    ) -> None:
        self.length = length
        self.sums, self.moments, self.differentiate = sums, moments, differentiate
        self.silent = silent and list(silent)
        self.recompute = recompute
        self.criteria: list[str] = []
        self.recomputed: dict[str, Tensor] = {}
        self.phase = "scored"
        self.weights = WeightRecorder(self) if weights else None

    def in_phase(self, phase: str) -> Phase:
        """A context with another phase."""
        return Phase(self, phase)

    @contextmanager
    def attached(self, layer: int, model: PreTrainedModel) -> Iterator[None]:
        """A context in which the activations of the model's layer number `layer` are read."""
        by_kind = {kind: part_of(model, kind, layer) for kind in kinds_of(model)}
        dense = {kind: part for kind, part in by_kind.items() if isinstance(part, Part)}
        with ExitStack() as stack:
            if isinstance(neurons := by_kind["mlp"], ExpertNeurons):
                stack.enter_context(ExpertRecorder(self, layer, neurons.experts).attached(model))
            hooks = [
                part.output.register_forward_pre_hook(self._hook(kind, layer, part)) for kind, part in dense.items()
            ]
            if self.weights:
                hooks += [hook for kind, part in dense.items() for hook in self.weights.hooks(kind, layer, part)]
            for hook in hooks:
                stack.callback(hook.remove)
            yield

    def _hook(self, kind: str, layer: int, part: Part) -> Callable:
        """The forward pre-hook of a part's output layer."""

        def before_output(_module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
            activation = inputs[0]  # (batch, length, columns)
            if self.phase == "dense":
                return (activation,)
            if self.silent and kind == "mlp":
                activation = activation * self.mask(layer, activation)
            if self.differentiate and not activation.requires_grad:  # layer 0: no layer before it needs a gradient
                activation = activation.detach().requires_grad_()
            if self.phase == "scored":
                self._add_to_sums(f"{kind}.{layer}", part, activation)
            else:
                self.recomputed[f"{kind}.{layer}"] = self.by_sequence(activation.detach())
            return (activation,)

        return before_output

    def _add_to_sums(self, location: str, part: Part, activation: Tensor) -> None:
        values = self.by_sequence(activation.detach())
        if "total" in self.moments:
            self.sums.add(f"total.{location}", values.sum((0, 1), dtype=torch.float32))
            norms = vector_norm(values, dim=(0, 1), dtype=torch.float32)
            self.sums.add(f"squares.{location}", norms.double().square())
        if "products" in self.moments:
            flat = values.flatten(0, 1).float()
            self.sums.add(f"products.{location}", flat.T @ flat)
        if "norms" in self.moments:
            squares = vector_norm(values, dim=1, dtype=torch.float32).square()  # (sequences, columns)
            self.sums.add(f"norms.{location}", part.per_unit(squares).sqrt().double().sum(0))

        kept = None if self.recompute else values

        def add(gradient: Tensor) -> None:
            activations = self.recomputed.pop(location) if kept is None else kept
            products = part.per_unit(times(self.by_sequence(gradient), activations))
            for name in self.criteria:
                if not reads_weights(name):
                    self.sums.add(f"{name}.{location}", self.products(name, products))

        if self.differentiate:
            activation.register_hook(add)

    @staticmethod
    def products(criterion: str, products: Tensor) -> Tensor:
        """(batch, length, units) products, summed as a gradient criterion has it: in float32 and float64."""
        with fast_products(products.device):  # whatever the model's gradients are
            return PRODUCTS[CRITERIA[criterion].products](products)

    def mask(self, layer: int, like: Tensor) -> Tensor:
        """0 for the silenced neurons of a layer and 1 for the others, in the type and on the device of `like`."""
        self.silent[layer] = self.silent[layer].to(like)  # once: each copy to a GPU would wait for all it has to do
        return self.silent[layer]

    def by_sequence(self, values: Tensor) -> Tensor:
        """(batch, length, columns); OPT's MLP sees the tokens of all sequences in a row."""
        return values if values.ndim == 3 else values.unflatten(0, (-1, self.length))


def times(gradient: Tensor, activations: Tensor) -> Tensor:
    """Their elementwise product: in bfloat16 if both are, or else in float32, since float16 could overflow.

    A gradient in bfloat16 is rounded as much itself, and copies in float32 would be most of what scoring reads and
    writes on a GPU beside the model.
    """
    return gradient * activations if gradient.dtype == torch.bfloat16 else gradient.float() * activations


class Phase:
    """See `UnitRecorder.in_phase`. Several backward passes enter one context, which a generator does not allow."""

    def __init__(self, recorder: UnitRecorder, phase: str) -> None:
        self.recorder, self.phase, self.previous = recorder, phase, recorder.phase

    def __enter__(self) -> None:
        self.previous, self.recorder.phase = self.recorder.phase, self.phase

    def __exit__(self, *_error: object) -> None:
        self.recorder.phase = self.previous

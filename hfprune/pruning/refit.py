"""Refit output layers so that the remaining units replace what the removed units wrote.

An MLP or an attention block writes W h into the residual stream, where h are the activations that enter its output
layer (Llama's down_proj, o_proj) at a token. Let S be the columns that stay, P the columns that go, and r the target of
the repair at a token. With sums over all calibration tokens,

    G = sum h[S] h[S]^T,    C = sum r h[S]^T,    lambda = ridge * mean(diag G),

the correction D that minimises sum ||r - D h[S]||^2 + lambda ||D||^2 is C (G + lambda I)^-1. It is added to W[:, S].

- `least_squares`: h comes from the intact model, and r = W[:, P] h[P] is what the cut loses in this layer.
- `sequential`: h comes from the model whose lower layers are cut and refitted already, r = W[:, P] h[P] + a (y - y').
  Here y is the residual stream of the dense model after this part, and y' that of the cut model if this part lost
  nothing, so their difference is the error of the layers below. a is `DRIFT`: repairing all of that error would fit
  noise. The output layers of all parts are refitted, also of parts that keep all their units.
- `bias`: h comes from the intact model. The output layer's bias repairs the mean of r (FLAP, arXiv 2312.11983).

Some families norm what a block writes, or multiply it by m, before it is added. The repair is of the output W h all the
same, and right to first order: an RMS norm divides a token's error by the RMS of its output, so tokens are weighted by
1 / RMS(W h)^2, and the drift is carried back through norm and m (`Space`).

Parts are refitted from the first layer to the last, attention before the MLP, each with all tokens. Beside the weights,
memory holds the hidden states of the calibration tokens at one layer (with `sequential` also the dense model's, and the
activations of one part), and G and C of one part.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.errors import UserError
from hfprune.models.families import layout_of
from hfprune.models.layout import Layout
from hfprune.models.loading import flops_per_token
from hfprune.models.run_part import Passed, factor, layer_inputs, run_part, written
from hfprune.models.units import PARTS, UNITS, Kept, Part, layers_of, matrix, parts
from hfprune.runtime.progress import progress

TOKENS_PER_BATCH = 4096
DRIFT = 0.5
SMALLEST_GAIN = 1e-2  # of a norm, as a share of its largest, that drift is carried back through


@torch.no_grad()
def refit(model: PreTrainedModel, kept: Kept, tokens: Tensor, method: str, ridge: float) -> dict[str, Any]:
    """Refit every output layer in place for a cut to `kept`, and set the columns of the removed units to 0.

    Args:
        model: the intact model, on its device.
        kept: for each part, the int64 indices of the units to keep, per layer.
        tokens: (sequences, length) int64 calibration tokens.
        method: "bias", "least_squares" or "sequential".
        ridge: at least 0; not used by `bias`.

    Returns:
        Details for the record: `refit_tokens` and `refit_flops` of the passes and solved systems. Except for `bias`,
        also `ridge` and `starved_layers`, the layers that keep more columns than there are tokens.

    Raises:
        UserError: `bias` where an output layer has none; a layer's system cannot be solved.
    """
    for name in kept:
        if method == "bias" and any(part.output.bias is None for part in parts(model, name)):
            where = {"mlp": "the MLPs", "attention": "the attention blocks"}[name]
            raise UserError(
                f"refit 'bias': {where} of this {model.config.model_type} model have no bias in the output layer, and "
                "a plain checkpoint cannot hold one. Use 'least_squares' or 'sequential'."
            )
    sequential, starved = method == "sequential", set()
    flops = tokens.numel() * flops_per_token(model, tokens.shape[1]) * (1 + sequential)
    layout, config = layout_of(model), model.config
    stream, arguments = layer_inputs(model, tokens, TOKENS_PER_BATCH)
    dense = list(stream)
    layers, all_parts = layers_of(model), {name: parts(model, name) for name in PARTS}
    for number, layer in enumerate(progress(layers, "refit", len(layers), "layer")):
        entered, dense_entered = list(stream), list(dense)
        for name in ("attention", "mlp"):
            reads_entry = layout.parallel and name == "mlp"
            part = all_parts[name][number]
            units = kept[name][number] if name in kept else torch.arange(part.units)
            repair, activations_seen = Repair(part, units, name, number, Space(layout, config, layer, name)), []
            for i, states in enumerate(stream):
                how = (layout, config, layer, name, arguments[number])
                passed = run_part(*how, entered[i] if reads_entry else states)
                if sequential:
                    dense[i] = dense[i] + run_part(*how, dense_entered[i] if reads_entry else dense[i]).written
                    repair.add(passed, DRIFT * (dense[i].float() - (states + passed.written).float()))
                    activations_seen.append(passed.activations)
                else:
                    stream[i] = states + passed.written
                    if repair.lossy:
                        repair.add(passed, mean=method == "bias")
            if repair.lossy and method == "bias":
                repair.shift()
            elif repair.lossy or sequential:
                repair.solve(ridge)
                flops += repair.flops
                if len(repair.kept) > tokens.numel():
                    starved.add(number)
            if sequential:  # the layers above must see this part as it is now
                stream = [
                    states + written(layout, config, layer, name, part.output(activations))
                    for states, activations in zip(stream, activations_seen, strict=True)
                ]
    details = {"refit_tokens": tokens.numel(), "refit_flops": flops}
    if method == "bias":
        return details
    if starved:
        print(
            f"refit {method!r}: only {tokens.numel()} calibration tokens, fewer than the columns that stay in layers "
            f"{', '.join(map(str, sorted(starved)))}. `ridge` decides what the tokens do not determine. Use more "
            "samples.",
            file=sys.stderr,
        )
    return details | {"ridge": ridge, "starved_layers": sorted(starved)}


class Space:
    """Where the error of a block's output is measured: after the norm and the factor that follow it, to first order.

    A norm of root mean squares writes g * z / s, with s = RMS(z) and gains g. A small change dz writes
    g * (dz - the part of dz along z) / s.
    """

    def __init__(self, layout: Layout, config: Any, layer: nn.Module, name: str) -> None:
        self.factor, after = factor(layout, config), layout.block(name).after
        self.norm = layer.get_submodule(after) if after else None

    def weights(self, output: Tensor) -> Tensor | None:
        """(tokens, hidden) float32 outputs -> (tokens, 1), 1 / RMS of each; None without a norm."""
        if self.norm is None:
            return None
        return output.square().mean(1, keepdim=True).clamp(min=torch.finfo(output.dtype).tiny).rsqrt()

    def back(self, drift: Tensor, output: Tensor) -> Tensor:
        """The change of the output that the hidden states see as `drift`, to first order.

        Args:
            drift: (tokens, hidden) float32, wanted behind norm and factor.
            output: (tokens, hidden) float32, of the output layer.

        Returns:
            (tokens, hidden) float32.
        """
        if self.factor != 1:
            drift = drift / self.factor
        if self.norm is None:
            return drift
        gains = self.norm(torch.ones_like(output[:1], dtype=self.norm.weight.dtype)).float()  # of a token of RMS 1
        small = gains.abs() < SMALLEST_GAIN * gains.abs().max()  # where the norm hides what the output does
        change = torch.where(small, 0, drift / gains.masked_fill(small, 1)) / self.weights(output)
        along = (change * output).sum(1, keepdim=True) / output.square().sum(1, keepdim=True).clamp(min=1e-30)
        return change - along * output


class Repair:
    """The refit of one part of a layer: sums over calibration tokens, and the solution.

    Attributes:
        part: the part, with all its units still in place.
        kept, removed: int64 columns of its output layer.
        name: the part's name.
        layer: the layer's number.
        space: where errors are measured; None: in the output itself.
        tokens: how many tokens the sums contain.
    """

    def __init__(self, part: Part, units: Tensor, name: str, layer: int, space: Space | None = None) -> None:
        self.part, self.name, self.layer, self.space = part, name, layer, space
        is_removed = torch.ones(part.units, dtype=torch.bool).index_fill_(0, units.cpu(), False)
        device = part.output.weight.device
        self.kept, self.removed = (
            part.columns_of(mask.nonzero()[:, 0]).to(device) for mask in (~is_removed, is_removed)
        )
        self.removed_weights = matrix(part.output)[:, self.removed].float()
        self.gram: Tensor | float = 0.0  # G
        self.cross: Tensor | float = 0.0  # C
        self.lost: Tensor | float = 0.0  # sum of W[:, P] h[P], each token times its squared weight
        self.weight: Tensor | float = 0.0  # sum of the squared weights
        self.tokens = 0

    @property
    def lossy(self) -> bool:
        """Whether any unit is removed."""
        return len(self.removed) > 0

    @property
    def flops(self) -> int:
        """Floating-point operations for G, C and the solution by Cholesky's method."""
        kept, hidden = len(self.kept), matrix(self.part.output).shape[0]
        return 2 * self.tokens * kept * (kept + hidden) + kept**3 // 3 + 2 * kept**2 * hidden

    def add(self, passed: Passed, drift: Tensor | None = None, mean: bool = False) -> None:
        """Add a batch to the sums. Products are float32, sums float64.

        Args:
            passed: the part's pass over (batch, length) tokens, with all its units.
            drift: (batch, length, hidden) float32, the target beside what the cut loses here, in the hidden states.
            mean: only sum the target, which is all that `shift` needs.
        """
        flat, output = passed.activations.flatten(0, -2).float(), passed.output.flatten(0, -2).float()
        target = flat[:, self.removed] @ self.removed_weights.T
        if drift is not None:
            target += self.space.back(drift.flatten(0, 1), output)
        kept = flat[:, self.kept]
        self.tokens += len(flat)
        weights = self.space.weights(output)
        if mean:
            self.lost += (target if weights is None else target * weights.square()).sum(0).double()
            self.weight += len(flat) if weights is None else weights.square().sum().double()
            return
        if weights is not None:
            target, kept = target * weights, kept * weights
        self.gram += (kept.T @ kept).double()
        self.cross += (target.T @ kept).double()

    def shift(self) -> None:
        """Repair the mean of the loss, with the bias."""
        bias = self.part.output.bias
        bias += (self.lost / self.weight).to(bias.dtype)
        self._silence()

    def solve(self, ridge: float) -> None:
        """Repair the loss, with the weights that stay. Solved in float64.

        Raises:
            UserError: G + lambda I is not positive definite, or not finite.
        """
        self.gram.diagonal().add_(ridge * self.gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(self.gram)
        if failed or not factor.isfinite().all():
            raise UserError(
                f"layer {self.layer}, {self.name}: cannot be refitted with ridge {ridge}: the activations of its "
                f"{UNITS[self.name]} are linearly dependent or not finite. Set a larger `ridge`, take more samples, or "
                "compute in float32."
            )
        weight = matrix(self.part.output)
        correction = torch.cholesky_solve(self.cross.T, factor).T
        weight[:, self.kept] = (weight[:, self.kept] + correction).to(weight.dtype)
        self._silence()

    def _silence(self) -> None:
        matrix(self.part.output)[:, self.removed] = 0

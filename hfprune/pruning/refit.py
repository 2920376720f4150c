"""Refit output layers so that the remaining units replace what the removed units wrote.

An MLP or an attention block writes W h into the residual stream, where h are the activations that enter its output
layer (down_proj, o_proj) at a token. Let S be the columns that stay, P the columns that go, and r the target of the
repair at a token. With sums over all calibration tokens,

    G = sum h[S] h[S]^T,    C = sum r h[S]^T,    lambda = ridge * mean(diag G),

the correction D that minimises sum ||r - D h[S]||^2 + lambda ||D||^2 is C (G + lambda I)^-1. It is added to W[:, S].

- `least_squares`: h comes from the intact model, and r = W[:, P] h[P] is what the cut loses in this layer.
- `sequential`: h comes from the model whose lower layers are cut and refitted already, r = W[:, P] h[P] + a (y - y').
  Here y is the residual stream of the dense model after this part, and y' that of the cut model if this part lost
  nothing, so their difference is the error of the layers below. a is `DRIFT`: repairing all of that error would fit
  noise. The output layers of all parts are refitted, also of parts that keep all their units.
- `bias`: h comes from the intact model. The output layer's bias repairs the mean of r (FLAP, arXiv 2312.11983).

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
from hfprune.models.loading import flops_per_token
from hfprune.models.units import UNITS, Kept, Part, part_of, parts
from hfprune.runtime.progress import progress

TOKENS_PER_BATCH = 4096
DRIFT = 0.5

Stream = list[Tensor]  # batches of hidden states that enter one layer, (batch, length, hidden) each, of all tokens


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
    stream, arguments = layer_inputs(model, tokens)
    dense = list(stream)
    layers = list(zip(model.model.layers, arguments, strict=True))
    for number, (layer, keywords) in enumerate(progress(layers, "refit", len(layers), "layer")):
        for name in ("attention", "mlp"):
            part = part_of(layer, name)
            units = kept[name][number] if name in kept else torch.arange(part.units)
            repair, activations_seen = Repair(part, units, name, number), []
            for i, states in enumerate(stream):
                written, activations = run_part(layer, name, keywords, states)
                if sequential:
                    dense[i] = dense[i] + run_part(layer, name, keywords, dense[i])[0]
                    repair.add(activations, DRIFT * (dense[i].float() - (states + written).float()))
                    activations_seen.append(activations)
                else:
                    stream[i] = states + written
                    if repair.lossy:
                        repair.add(activations, mean=method == "bias")
            if repair.lossy and method == "bias":
                repair.shift()
            elif repair.lossy or sequential:
                repair.solve(ridge)
                flops += repair.flops
                if len(repair.kept) > tokens.numel():
                    starved.add(number)
            if sequential:  # the layers above must see this part as it is now
                stream = [
                    states + part.output(activations)
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


class Repair:
    """The refit of one part of a layer: sums over calibration tokens, and the solution.

    Attributes:
        part: the part, with all its units still in place.
        kept, removed: int64 columns of its output layer.
        name: the part's name.
        layer: the layer's number.
        tokens: how many tokens the sums contain.
    """

    def __init__(self, part: Part, units: Tensor, name: str, layer: int) -> None:
        self.part, self.name, self.layer = part, name, layer
        is_removed = torch.ones(part.units, dtype=torch.bool).index_fill_(0, units.cpu(), False)
        device = part.output.weight.device
        self.kept, self.removed = (
            part.columns_of(mask.nonzero()[:, 0]).to(device) for mask in (~is_removed, is_removed)
        )
        self.removed_weights = part.output.weight[:, self.removed].float()
        self.gram: Tensor | float = 0.0  # G
        self.cross: Tensor | float = 0.0  # C
        self.lost: Tensor | float = 0.0  # sum of W[:, P] h[P]
        self.tokens = 0

    @property
    def lossy(self) -> bool:
        """Whether any unit is removed."""
        return len(self.removed) > 0

    @property
    def flops(self) -> int:
        """Floating-point operations for G, C and the solution by Cholesky's method."""
        kept, hidden = len(self.kept), self.part.output.out_features
        return 2 * self.tokens * kept * (kept + hidden) + kept**3 // 3 + 2 * kept**2 * hidden

    def add(self, activations: Tensor, drift: Tensor | None = None, mean: bool = False) -> None:
        """Add a batch to the sums. Products are float32, sums float64.

        Args:
            activations: (batch, length, columns), the input of the output layer.
            drift: (batch, length, hidden) float32, added to the target beside what the cut loses here.
            mean: only sum the target, which is all that `shift` needs.
        """
        flat = activations.flatten(0, 1).float()
        target = flat[:, self.removed] @ self.removed_weights.T
        self.lost += target.sum(0).double()
        self.tokens += len(flat)
        if mean:
            return
        if drift is not None:
            target += drift.flatten(0, 1)
        kept = flat[:, self.kept]
        self.gram += (kept.T @ kept).double()
        self.cross += (target.T @ kept).double()

    def shift(self) -> None:
        """Repair the mean of the loss, with the bias."""
        bias = self.part.output.bias
        bias += (self.lost / self.tokens).to(bias.dtype)
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
        weight = self.part.output.weight
        correction = torch.cholesky_solve(self.cross.T, factor).T
        weight[:, self.kept] = (weight[:, self.kept] + correction).to(weight.dtype)
        self._silence()

    def _silence(self) -> None:
        self.part.output.weight[:, self.removed] = 0


def layer_inputs(model: PreTrainedModel, tokens: Tensor) -> tuple[Stream, list[dict[str, Any]]]:
    """The hidden states that enter the first layer, and the keyword arguments of every layer.

    The arguments (positions, the mask of the layer's kind) are those that the model itself passes. One sequence's
    forward pass gives them, and they fit all sequences: all have the same length and no padding.
    """
    arguments: list[dict[str, Any]] = []

    def record(_layer: nn.Module, _positional: tuple, keywords: dict[str, Any]) -> None:
        arguments.append(keywords)

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in model.model.layers]
    try:
        model.model(input_ids=tokens[:1].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    batches = tokens.to(model.device).split(max(1, TOKENS_PER_BATCH // tokens.shape[1]))
    return [model.get_input_embeddings()(batch) for batch in batches], arguments


def run_part(layer: nn.Module, name: str, keywords: dict[str, Any], states: Tensor) -> tuple[Tensor, Tensor]:
    """Run one part of a layer, with the norm before it.

    Args:
        layer: a decoder layer that computes a = x + attention(norm(x)) and then a + mlp(norm(a)).
        name: the part's name.
        keywords: the layer's keyword arguments, see `layer_inputs`.
        states: (batch, length, hidden), the input of the part.

    Returns:
        (batch, length, hidden) what the part adds to the residual stream, and (batch, length, columns) the input of its
        output layer.
    """
    output_inputs: list[Tensor] = []
    output = part_of(layer, name).output
    hook = output.register_forward_pre_hook(lambda _module, inputs: output_inputs.append(inputs[0]))
    try:
        if name == "attention":
            written, _ = layer.self_attn(hidden_states=layer.input_layernorm(states), **keywords)
        else:
            written = layer.mlp(layer.post_attention_layernorm(states))
    finally:
        hook.remove()
    return written, output_inputs[0]

"""Let the units that stay carry what those that go carried: new weights, or a bias, for output layers.

An MLP, or attention, writes W h into the residual stream, h the activations at a token that meet its output layer
(down_proj, o_proj). Let S be the columns that stay, P those that go, and r what is to be made up for at a token. With
sums over all calibration tokens,

    G = sum h[S] h[S]^T,    C = sum r h[S]^T,    lambda = ridge * mean(diag G),

the correction D that minimises sum ||r - D h[S]||^2 + lambda ||D||^2 is C (G + lambda I)^-1, and is added to W[:, S].

- `least_squares`: h of the intact model, r = W[:, P] h[P], what is lost here.
- `sequential`: h of the model in which everything below is cut and refitted already, and r = W[:, P] h[P] + a (y - y'):
  y is the residual stream of the dense model behind this part, y' that of the cut model if nothing were lost here, so
  that their difference is what went wrong below. a = `DRIFT`: making up for all of it would fit noise. The output
  layers of all parts are refitted, also of those that keep all their units.
- `bias`: h of the intact model; only the mean of r is made up for, by the output layer's bias (FLAP, arXiv 2312.11983).

The parts are refitted from the first layer to the last, attention before the MLP, each with all tokens. Beside the
weights, memory holds the calibration tokens' hidden states at one layer (`sequential`: also the dense model's, and the
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

Stream = list[Tensor]  # hidden states of all calibration tokens at one layer's entrance, (batch, length, hidden) each


@torch.no_grad()
def refit(model: PreTrainedModel, kept: Kept, tokens: Tensor, method: str, ridge: float) -> dict[str, Any]:
    """Refit every output layer in place for a cut to `kept`, and silence the units that go: their columns become 0.

    Args:
        model: the intact model, on its device.
        kept: by part the int64 indices of the units that stay, per layer.
        tokens: (sequences, length) int64 calibration tokens.
        method: "bias", "least_squares" or "sequential".
        ridge: at least 0; `bias` does not read it.

    Returns:
        Details for the record: `refit_tokens`, `refit_flops` of the passes and the systems solved; except for `bias`,
        also `ridge` and `starved_layers`, the layers with fewer tokens than columns that stay.

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
    stream, arguments = entrance(model, tokens)
    dense = list(stream)
    layers = list(zip(model.model.layers, arguments, strict=True))
    for number, (layer, keywords) in enumerate(progress(layers, "refit", len(layers), "layer")):
        for name in ("attention", "mlp"):
            part = part_of(layer, name)
            stay = kept[name][number] if name in kept else torch.arange(part.units)
            repair, seen = Repair(part, stay, name, number), []
            for i, states in enumerate(stream):
                written, activations = through(layer, name, keywords, states)
                if sequential:
                    dense[i] = dense[i] + through(layer, name, keywords, dense[i])[0]
                    repair.see(activations, DRIFT * (dense[i].float() - (states + written).float()))
                    seen.append(activations)
                else:
                    stream[i] = states + written
                    if repair.lossy:
                        repair.see(activations, mean=method == "bias")
            if repair.lossy and method == "bias":
                repair.shift()
            elif repair.lossy or sequential:
                repair.solve(ridge)
                flops += repair.flops
                if len(repair.stays) > tokens.numel():
                    starved.add(number)
            if sequential:  # what is above is to see this part as it is now
                stream = [states + part.output(activations) for states, activations in zip(stream, seen, strict=True)]
    details = {"refit_tokens": tokens.numel(), "refit_flops": flops}
    if method == "bias":
        return details
    if starved:
        print(
            f"refit {method!r}: only {tokens.numel()} calibration tokens for the more columns that stay in layers "
            f"{', '.join(map(str, sorted(starved)))}: what the tokens do not determine, `ridge` does. Take more "
            "samples.",
            file=sys.stderr,
        )
    return details | {"ridge": ridge, "starved_layers": sorted(starved)}


class Repair:
    """What one part of a layer loses, what was seen of it, and its mending.

    Attributes:
        part: as it still is, all its units in place.
        stays, goes: the columns of its output layer, int64.
        name: of the part.
        layer: its number.
    """

    def __init__(self, part: Part, stay: Tensor, name: str, layer: int) -> None:
        self.part, self.name, self.layer = part, name, layer
        gone = torch.ones(part.units, dtype=torch.bool).index_fill_(0, stay.cpu(), False)
        place = part.output.weight.device
        self.stays, self.goes = (part.columns_of(units.nonzero()[:, 0]).to(place) for units in (~gone, gone))
        self.removed = part.output.weight[:, self.goes].float()
        self.gram: Tensor | float = 0.0  # G
        self.cross: Tensor | float = 0.0  # C
        self.lost: Tensor | float = 0.0  # sum of W[:, P] h[P]
        self.count = 0

    @property
    def lossy(self) -> bool:
        """Whether anything goes."""
        return len(self.goes) > 0

    @property
    def flops(self) -> int:
        """Of G, C and the solution by Cholesky's method."""
        stays, hidden = len(self.stays), self.part.output.out_features
        return 2 * self.count * stays * (stays + hidden) + stays**3 // 3 + 2 * stays**2 * hidden

    def see(self, activations: Tensor, more: Tensor | None = None, mean: bool = False) -> None:
        """Add a batch to the sums: products float32, sums float64.

        Args:
            activations: (batch, length, columns), what meets the output layer.
            more: (batch, length, hidden) float32, what is to be made up for beside what is lost here.
            mean: add r alone, which is all that `shift` reads.
        """
        flat = activations.flatten(0, 1).float()
        r = flat[:, self.goes] @ self.removed.T
        self.lost += r.sum(0).double()
        self.count += len(flat)
        if mean:
            return
        if more is not None:
            r += more.flatten(0, 1)
        stays = flat[:, self.stays]
        self.gram += (stays.T @ stays).double()
        self.cross += (r.T @ stays).double()

    def shift(self) -> None:
        """Make up for the mean of what is lost, by the bias."""
        bias = self.part.output.bias
        bias += (self.lost / self.count).to(bias.dtype)
        self._silence()

    def solve(self, ridge: float) -> None:
        """Make up for what is lost, by the weights that stay; solved in float64.

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
        found = torch.cholesky_solve(self.cross.T, factor).T
        weight[:, self.stays] = (weight[:, self.stays] + found).to(weight.dtype)
        self._silence()

    def _silence(self) -> None:
        self.part.output.weight[:, self.goes] = 0


def entrance(model: PreTrainedModel, tokens: Tensor) -> tuple[Stream, list[dict[str, Any]]]:
    """The calibration tokens' hidden states at the first layer's entrance, and the keyword arguments of every layer.

    The arguments (positions, the mask of the layer's kind) are those that the model itself passes. They are taken from
    one sequence's forward pass and fit all: every sequence has the same length, and no padding.
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


def through(layer: nn.Module, name: str, keywords: dict[str, Any], states: Tensor) -> tuple[Tensor, Tensor]:
    """Send hidden states through one part of a layer, with the norm before it.

    Args:
        layer: a decoder layer, in which x becomes a = x + attention(norm(x)), and that a + mlp(norm(a)).
        name: of the part.
        keywords: the layer's keyword arguments, see `entrance`.
        states: (batch, length, hidden), what meets the part.

    Returns:
        (batch, length, hidden) what the part adds to them, and (batch, length, columns) what met its output layer.
    """
    seen: list[Tensor] = []
    output = part_of(layer, name).output
    hook = output.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        if name == "attention":
            written, _ = layer.self_attn(hidden_states=layer.input_layernorm(states), **keywords)
        else:
            written = layer.mlp(layer.post_attention_layernorm(states))
    finally:
        hook.remove()
    return written, seen[0]

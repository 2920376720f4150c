"""Let the neurons that stay carry what those that go carried: new weights, or a bias, for every `down_proj`.

A layer's MLP writes W h, h its neurons' activations at a token. Let S be the neurons that stay, P those that go, and
r = W[:, P] h[P] what is lost at a token once P is silent. With sums over all calibration tokens,

    G = sum h[S] h[S]^T,    C = sum r h[S]^T,    lambda = ridge * mean(diag G),

the correction D that minimises sum ||r - D h[S]||^2 + lambda ||D||^2 is C (G + lambda I)^-1, and is added to W[:, S].

- `least_squares`: h of the intact model.
- `sequential`: h of the model whose layers below are cut and refitted already.
- `bias`: h of the intact model; only the mean of r is made up for, by down_proj's bias (FLAP, arXiv 2312.11983).

The layers are refitted first to last, each with all tokens. Beside the weights, memory holds the calibration tokens'
hidden states at one layer, and one layer's G and C.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.errors import UserError
from hfprune.models import mlps
from hfprune.progress import progress

TOKENS_PER_BATCH = 4096

Stream = list[Tensor]  # hidden states of all calibration tokens at one layer's entrance, (batch, length, hidden) each
Pairs = Iterator[tuple[Tensor, Tensor]]  # h[S] (batch, length, kept neurons) and r (batch, length, hidden), float32


@torch.no_grad()
def refit(model: PreTrainedModel, kept: list[Tensor], tokens: Tensor, method: str, ridge: float) -> dict[str, Any]:
    """Refit every `down_proj` in place for a cut to `kept`, and silence the neurons that go: their columns become 0.

    Args:
        model: the intact model, on its device.
        kept: per layer the int64 indices of the neurons that stay.
        tokens: (sequences, length) int64 calibration tokens.
        method: "bias", "least_squares" or "sequential".
        ridge: at least 0; `bias` does not read it.

    Returns:
        Details for the record: `refit_tokens`; except for `bias`, also `ridge` and `starved_layers`, the layers with
        fewer tokens than neurons that stay.

    Raises:
        UserError: `bias` where a `down_proj` has none; a layer's system cannot be solved.
    """
    if method == "bias" and any(mlp.down_proj.bias is None for mlp in mlps(model)):
        raise UserError(
            f"refit 'bias': the MLPs of this {model.config.model_type} model have no bias in down_proj, and its plain "
            "checkpoint cannot hold one. Use 'least_squares' or 'sequential'."
        )
    starved = [layer for layer, stay in enumerate(kept) if len(stay) > tokens.numel()]
    if starved and method != "bias":
        print(
            f"refit {method!r}: only {tokens.numel()} calibration tokens for the more neurons that stay in layers "
            f"{', '.join(map(str, starved))}: what the tokens do not determine, `ridge` does. Take more samples.",
            file=sys.stderr,
        )
    stream, arguments = entrance(model, tokens)
    layers = list(zip(model.model.layers, arguments, kept, strict=True))
    for number, (layer, keywords, stay) in enumerate(progress(layers, "refit", len(layers), "layer")):
        down = layer.mlp.down_proj
        stays = torch.zeros(down.in_features, dtype=torch.bool, device=down.weight.device)
        stays[stay] = True
        pairs = losses(layer, keywords, stays, stream, advance=method != "sequential")
        if method == "bias":
            down.bias += (sum(lost.sum((0, 1)) for _, lost in pairs) / tokens.numel()).to(down.bias.dtype)
        else:
            found = correction(pairs, ridge, number)
            down.weight[:, stays] = (down.weight[:, stays] + found).to(down.weight.dtype)
        down.weight[:, ~stays] = 0
        if method == "sequential":  # the layers above are to see this one as it is now
            for i, (behind, _) in enumerate(through(layer, keywords, stream)):
                stream[i] = behind
    details = {"refit_tokens": tokens.numel()}
    return details if method == "bias" else details | {"ridge": ridge, "starved_layers": starved}


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


def through(layer: nn.Module, keywords: dict[str, Any], stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """Send a stream through a layer: of each batch the hidden states behind the layer, and what meets its `down_proj`.

    Args:
        layer: a decoder layer.
        keywords: its keyword arguments, see `entrance`.
        stream: the batches, (batch, length, hidden) each.

    Yields:
        (batch, length, hidden) and (batch, length, neurons), in the model's dtype.
    """
    seen: list[Tensor] = []
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        for states in stream:
            yield layer(states, **keywords), seen.pop()
    finally:
        hook.remove()


def losses(layer: nn.Module, keywords: dict[str, Any], stays: Tensor, stream: Stream, advance: bool) -> Pairs:
    """h[S] and r = W[:, P] h[P] of every batch; with `advance`, `stream` stands behind the layer afterwards."""
    removed = layer.mlp.down_proj.weight[:, ~stays].float()
    for i, (behind, activations) in enumerate(through(layer, keywords, stream)):
        if advance:
            stream[i] = behind
        activations = activations.float()
        yield activations[..., stays], activations[..., ~stays] @ removed.T


def correction(pairs: Pairs, ridge: float, layer: int) -> Tensor:
    """The D (hidden, kept neurons), float64, that minimises sum ||r - D h||^2 + lambda ||D||^2 over all tokens.

    Products are float32, a batch at a time, sums and the solution float64.

    Args:
        pairs: h and r of every batch.
        ridge: lambda as a share of the mean of G's diagonal.
        layer: whose it is, for the message.

    Raises:
        UserError: G + lambda I is not positive definite, or not finite.
    """
    gram = cross = 0.0
    for activations, lost in pairs:
        activations, lost = activations.flatten(0, 1), lost.flatten(0, 1)
        gram += (activations.T @ activations).double()
        cross += (lost.T @ activations).double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed or not factor.isfinite().all():
        raise UserError(
            f"layer {layer}: cannot be refitted with ridge {ridge}: its neurons' activations are linearly dependent "
            "or not finite. Set a larger `ridge`, take more samples, or compute in float32."
        )
    return torch.cholesky_solve(cross.T, factor).T

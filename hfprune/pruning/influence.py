"""How far each layer turns the residual stream: what some allocations read beside scores."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.models.loading import final_hidden
from hfprune.models.walk import layers_of

TOKENS_PER_BATCH = 4096


@torch.no_grad()
def layer_influence(model: PreTrainedModel, tokens: Tensor, measure: str) -> Tensor:
    """The mean over all tokens of the change of direction between what enters and what leaves a layer.

    Args:
        model: the intact model.
        tokens: (sequences, length) int64 calibration tokens.
        measure: "angle": arccos(cosine) / pi; "cosine": 1 - cosine, also called Block Influence.

    Returns:
        (layers,) float64, on the CPU.
    """
    layers = layers_of(model)
    totals = torch.zeros(len(layers), dtype=torch.float64)

    def hook(number: int) -> Any:
        def after(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            cosine = torch.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
            change = cosine.clamp(-1, 1).arccos() / torch.pi if measure == "angle" else 1 - cosine
            totals[number] += change.double().sum().cpu()

        return after

    hooks = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        for batch in tokens.split(max(1, TOKENS_PER_BATCH // tokens.shape[1])):
            final_hidden(model, batch)
    finally:
        for each in hooks:
            each.remove()
    return totals / tokens.numel()

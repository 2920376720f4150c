"""How far each layer turns the residual stream: what some allocations read beside scores."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.models.streamed import device_of
from hfprune.models.units import layers_of
from hfprune.models.walk import layers_in_turn, run_layer
from hfprune.pruning.refit import Streams


@torch.no_grad()
def layer_influence(model: PreTrainedModel, tokens: Tensor, measure: str, folder: Path | None = None) -> Tensor:
    """The mean over all tokens of the change of direction between what enters and what leaves a layer.

    Args:
        model: the intact model, in memory or streamed.
        tokens: (sequences, length) int64 calibration tokens.
        measure: "angle": arccos(cosine) / pi; "cosine": 1 - cosine, also called Block Influence.
        folder: for hidden states that do not fit into memory; by default the system's temporary folder.

    Returns:
        (layers,) float64, on the CPU.

    Raises:
        UserError: the disk is too small.
    """
    layers, device = layers_of(model), device_of(model)
    totals = torch.zeros(len(layers), dtype=torch.float64)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        streams = Streams(model, tokens, sequential=False, parallel=False, folder=Path(room))
        for number in layers_in_turn(model, "measure layers"):
            for stored in streams.states:
                enters = stored.to(device)
                leaves = run_layer(layers[number], enters, streams.arguments[number])
                cosine = torch.cosine_similarity(enters.float(), leaves.float(), dim=-1).clamp(-1, 1)
                change = cosine.arccos() / torch.pi if measure == "angle" else 1 - cosine
                totals[number] += change.double().sum().cpu()
                stored.copy_(leaves)
    return totals / tokens.numel()

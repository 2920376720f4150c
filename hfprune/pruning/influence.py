"""How far each layer, and each part of one, turns the residual stream: some allocations and orders read it."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.models.families import layout_of
from hfprune.models.run_part import run_part
from hfprune.models.streamed import device_of
from hfprune.models.units import IN_TURN, layers_of
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


@torch.no_grad()
def part_influence(model: PreTrainedModel, tokens: Tensor, folder: Path | None = None) -> dict[str, Tensor]:
    """The influence of each part: what it reads, and the sum of that and what it writes, as what enters and leaves it.

    Arguments and errors: see `layer_influence`. The measure is "cosine".

    Returns:
        By part, (layers,) float64, on the CPU.
    """
    layout, layers, device = layout_of(model), layers_of(model), device_of(model)
    totals = {name: torch.zeros(len(layers), dtype=torch.float64) for name in IN_TURN}
    with tempfile.TemporaryDirectory(dir=folder) as room:
        streams = Streams(model, tokens, sequential=False, parallel=layout.parallel, folder=Path(room))
        for number in layers_in_turn(model, "measure sublayers"):
            streams.enter_layer()
            for name, total in totals.items():
                read, _ = streams.read_by(name)
                for stored, entering in zip(streams.states, read, strict=True):
                    states = entering.to(device)
                    passed = run_part(layout, model.config, layers[number], name, streams.arguments[number], states)
                    cosine = torch.cosine_similarity(states.float(), (states + passed.written).float(), dim=-1)
                    total[number] += (1 - cosine.clamp(-1, 1)).double().sum().cpu()
                    stored.copy_(stored.to(device) + passed.written)
    return {name: total / tokens.numel() for name, total in totals.items()}

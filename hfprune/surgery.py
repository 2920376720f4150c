"""Cut a model to the neurons that stay."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune import checkpoint
from hfprune.allocation import uniform
from hfprune.errors import UserError
from hfprune.layout import PRUNING, SCORES, layer_name
from hfprune.models import count_parameters, load_model, mlps, set_linear


def prune(
    folder: Path,
    model: Path,
    scores: Path,
    source: Mapping[str, Any],
    calibration: Mapping[str, Any],
    ratio: float,
    dtype: str,
    pad: bool,
) -> dict[str, Any]:
    """Stage `prune`: write the pruned checkpoint and its `pruning.json` into `folder`.

    The checkpoint has been reloaded in a fresh process, see `checkpoint.prove`, or there is none.

    Args:
        folder: where to write.
        model: folder of the dense checkpoint.
        scores: folder of its scores.
        source: where the dense model came from, and its licence, for `pruning.json`.
        calibration: how the scores were made, for `pruning.json`.
        ratio: share of all parameters to remove, tied embeddings counted once.
        dtype: of the checkpoint written.
        pad: make layers of several widths as wide as the widest with zeros, see `checkpoint.pad`.

    Raises:
        UserError: the MLPs do not hold that much, or the checkpoint does not reload as it was saved.
    """
    network = load_model(model, dtype)
    by_name = load_file(scores / SCORES)
    ranked = [by_name[layer_name(i)] for i in range(len(by_name))]
    dense = count_parameters(network)
    kept = uniform(ranked, neurons_to_remove(network, ratio))
    cut(network, kept)
    padding = checkpoint.pad(network) if pad else 0
    left = count_parameters(network)
    expected = checkpoint.write(network, folder, model)
    del network  # one copy in memory at a time: the reload is the next
    reload = checkpoint.prove(folder, expected)
    done = {
        "structure": "mlp",
        "allocation": "uniform",
        "refit": "none",
        "ratio_achieved": 1 - left / dense,
        "parameters": left,
        "parameters_dense": dense,
    }
    report = {
        **done,
        "ratio": ratio,
        "criterion": calibration["criterion"],
        "calibration": dict(calibration),
        "padding": padding,
        "source": dict(source),
        "reload": reload,
        "kept": [layer.tolist() for layer in kept],
    }
    (folder / PRUNING).write_text(json.dumps(report) + "\n", encoding="utf-8")
    return done


def neurons_to_remove(model: PreTrainedModel, ratio: float) -> int:
    """How many neurons each layer loses so that the model loses the share `ratio` of all its parameters.

    Rounded to the nearest neuron, so the share achieved is within half a neuron per layer of the share asked.

    Raises:
        UserError: the MLPs do not hold that much.
    """
    layers = mlps(model)
    per_neuron = sum(neuron_parameters(mlp) for mlp in layers)
    total = count_parameters(model)
    width = min(mlp.down_proj.in_features for mlp in layers)
    remove = round(ratio * total / per_neuron)
    if remove >= width:
        largest = (width - 1) * per_neuron / total
        raise UserError(
            f"ratio {ratio}: removing {ratio:.0%} of all {total:,} parameters takes {remove} neurons of every layer, "
            f"which has {width}. The largest ratio that this model's MLPs allow is {largest:.3f}."
        )
    return remove


def neuron_parameters(mlp: nn.Module) -> int:
    """Parameters that one neuron holds: rows of gate and up with their biases, and a column of down."""
    biases = sum(linear.bias is not None for linear in (mlp.gate_proj, mlp.up_proj))
    return mlp.gate_proj.in_features + mlp.up_proj.in_features + mlp.down_proj.out_features + biases


@torch.no_grad()
def cut(model: PreTrainedModel, kept: list[Tensor]) -> None:
    """Remove, in place, every neuron that is not in `kept`; config and class then say the widths left.

    Args:
        model: a model of a supported family.
        kept: per layer the int64 indices that stay.
    """
    for mlp, indices in zip(mlps(model), kept, strict=True):
        indices = indices.to(mlp.down_proj.weight.device)
        for linear in (mlp.gate_proj, mlp.up_proj):
            set_linear(linear, linear.weight[indices], None if linear.bias is None else linear.bias[indices])
        set_linear(mlp.down_proj, mlp.down_proj.weight[:, indices], mlp.down_proj.bias)
        mlp.intermediate_size = len(indices)
    checkpoint.declare_widths(model)

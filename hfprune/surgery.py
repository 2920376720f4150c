"""Cut a model to the neurons that stay, and save it as the plain checkpoint that it still is."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.allocation import uniform
from hfprune.errors import UserError
from hfprune.layout import PRUNING, SCORES, layer_name
from hfprune.models import count_parameters, load_model, mlps

# What a checkpoint's folder holds beside weights and config.json: carried over as it is.
COMPANIONS = ("generation_config.json", "chat_template*", "*token*", "vocab.*", "merges.txt", "*.model", "LICENSE*")


def prune(folder: Path, model: Path, scores: Path, calibration: dict[str, Any], ratio: float, dtype: str):
    """Stage `prune`: write the pruned checkpoint and its `pruning.json` into `folder`.

    Args:
        folder: where to write.
        model: folder of the dense checkpoint.
        scores: folder of its scores.
        calibration: how the scores were made, for `pruning.json`.
        ratio: share of all parameters to remove, tied embeddings counted once.
        dtype: of the checkpoint written.
    """
    network = load_model(model, dtype)
    by_name = load_file(scores / SCORES)
    ranked = [by_name[layer_name(i)] for i in range(len(by_name))]
    dense = count_parameters(network)
    kept = uniform(ranked, neurons_to_remove(network, ratio))
    cut(network, kept)
    network.save_pretrained(folder)
    for pattern in COMPANIONS:
        for file in model.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    left = count_parameters(network)
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
        "calibration": calibration,
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
    """Remove, in place, every neuron that is not in `kept`, and set the config's `intermediate_size`.

    Args:
        model: a model of a supported family.
        kept: per layer the int64 indices that stay, all of one length.
    """
    for mlp, indices in zip(mlps(model), kept, strict=True):
        indices = indices.to(mlp.down_proj.weight.device)
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = nn.Parameter(linear.weight[indices], requires_grad=False)
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[indices], requires_grad=False)
            linear.out_features = len(indices)
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, indices].contiguous(), requires_grad=False)
        mlp.down_proj.in_features = len(indices)
        mlp.intermediate_size = len(indices)
    model.config.intermediate_size = len(kept[0])

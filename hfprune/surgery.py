"""Cut a model to a budget and to the neurons that stay, and save it as the plain checkpoint that it still is."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.allocation import allocate, fewest_kept
from hfprune.errors import UserError
from hfprune.layout import PRUNING, SCORES, layer_name
from hfprune.models import count_parameters, load_model, load_tokenizer, mlps
from hfprune.refit import refit as refit_kept
from hfprune.texts import sample_sequences

# What a checkpoint's folder holds beside weights and config.json: carried over as it is.
COMPANIONS = ("generation_config.json", "chat_template*", "*token*", "vocab.*", "merges.txt", "*.model", "LICENSE*")


def prune(
    folder: Path, model: Path, scores: Path, text: Path | None, calibration: dict[str, Any], ratio: float | None,
    ratio_of: str, target_parameters: int | None, round_to: int, allocation: str, refit: str, ridge: float, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Stage `prune`: write the pruned checkpoint and its `pruning.json` into `folder`.

    Args:
        folder: where to write.
        model: folder of the dense checkpoint.
        scores: folder of its scores.
        text: folder of the text that the scores were made on; only a refit reads it.
        calibration: how the scores were made, for `pruning.json`; a refit takes the same sequences.
        ratio, ratio_of, target_parameters: the budget, see `neurons_to_keep`.
        round_to: every layer keeps a multiple of so many neurons.
        allocation: a name in `allocation.ALLOCATIONS`.
        refit: "none", or a method of `refit.refit`.
        ridge: of the refit.
        dtype: of the checkpoint written.
    """
    network = load_model(model, dtype)
    by_name = load_file(scores / SCORES)
    ranked = [by_name[layer_name(i)] for i in range(len(by_name))]
    dense = count_parameters(network)
    keep = neurons_to_keep(network, ratio, ratio_of, target_parameters, allocation, round_to)
    kept = allocate(allocation, ranked, keep, round_to)
    refitted = {}
    if refit != "none":
        sampling = {name: calibration[name] for name in ("samples", "length", "seed")}
        tokens = sample_sequences(load_tokenizer(model), network.config.vocab_size, text, **sampling)
        refitted = refit_kept(network, kept, tokens, refit, ridge)
    cut(network, kept)
    network.save_pretrained(folder)
    for pattern in COMPANIONS:
        for file in model.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    left = count_parameters(network)
    per_neuron = neuron_parameters(mlps(network)[0])
    done = {
        "structure": "mlp",
        "allocation": allocation,
        "refit": refit,
        **refitted,
        # Both shares are of all parameters, however the budget was given.
        "ratio": ratio if ratio and ratio_of == "all" else (sum(map(len, ranked)) - keep) * per_neuron / dense,
        "ratio_achieved": 1 - left / dense,
        "parameters": left,
        "parameters_dense": dense,
        "neurons": sum(map(len, kept)),
        "neurons_dense": sum(map(len, ranked)),
    }
    report = {
        **done,
        "round_to": round_to,
        "criterion": calibration["criterion"],
        "calibration": calibration,
        "kept": [layer.tolist() for layer in kept],
    }
    (folder / PRUNING).write_text(json.dumps(report) + "\n", encoding="utf-8")
    return done


def neurons_to_keep(
    model: PreTrainedModel,
    ratio: float | None = None,
    ratio_of: str = "all",
    target_parameters: int | None = None,
    allocation: str = "uniform",
    round_to: int = 1,
) -> float:
    """How many MLP neurons, in all layers together and not yet rounded, meet the budget.

    Args:
        model: the dense model.
        ratio: the share to remove of what `ratio_of` says, or None: then `target_parameters` is given.
        ratio_of: "all": of all parameters, tied embeddings counted once; "mlp": of the MLPs' neurons, all of one size.
        target_parameters: how many of all parameters to leave.
        allocation: how the budget will be shared; with `round_to` it decides how many neurons have to stay.
        round_to: the step of the widths.

    Raises:
        UserError: there is nothing to remove, or the MLPs do not hold that much.
    """
    widths = [mlp.down_proj.in_features for mlp in mlps(model)]
    neurons, total, per_neuron = sum(widths), count_parameters(model), neuron_parameters(mlps(model)[0])
    fewest = fewest_kept(allocation, widths, round_to)
    if too_wide := [(width, least) for width, least in zip(widths, fewest, strict=True) if least > width]:
        raise UserError(f"round_to {round_to}: a layer has only {too_wide[0][0]} neurons; set a smaller `round_to`.")
    if target_parameters is not None:
        asked, remove = f"target_parameters {target_parameters}", (total - target_parameters) / per_neuron
        if remove <= 0:
            raise UserError(f"{asked}: the model has {total:,} parameters; the target has to be smaller.")
        least = total - (neurons - sum(fewest)) * per_neuron
        possible = f"smallest target_parameters that this model's MLPs allow is {least}"
    else:
        per_share = total / per_neuron if ratio_of == "all" else neurons  # neurons that the share 1 is worth
        asked, remove = f"ratio {ratio} of {ratio_of} parameters", ratio * per_share
        largest = math.floor((neurons - sum(fewest)) / per_share * 10_000) / 10_000
        possible = f"largest ratio that this model's MLPs allow is {largest}"
    if neurons - remove < sum(fewest) - 0.5:  # half a neuron: what is allowed is a printed, rounded number
        raise UserError(
            f"{asked}: takes {remove:,.0f} of the {neurons:,} neurons in all MLPs, of which allocation {allocation!r} "
            f"with round_to {round_to} leaves at least {sum(fewest):,}. The {possible}."
        )
    return neurons - remove


def neuron_parameters(mlp: nn.Module) -> int:
    """Parameters that one neuron holds: rows of gate and up with their biases, and a column of down."""
    biases = sum(linear.bias is not None for linear in (mlp.gate_proj, mlp.up_proj))
    return mlp.gate_proj.in_features + mlp.up_proj.in_features + mlp.down_proj.out_features + biases


@torch.no_grad()
def cut(model: PreTrainedModel, kept: list[Tensor]) -> None:
    """Remove, in place, every neuron that is not in `kept`; the config's `intermediate_size` becomes the widest.

    Args:
        model: a model of a supported family.
        kept: per layer the int64 indices that stay.
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
    model.config.intermediate_size = max(map(len, kept))

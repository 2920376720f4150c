"""Cut a model to the neurons that stay, and save it as the plain checkpoint that it still is."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.allocation import allocate
from hfprune.budget import neuron_parameters, neurons_to_keep
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
        ratio, ratio_of, target_parameters: the budget, see `budget.neurons_to_keep`.
        round_to: every layer keeps a multiple of so many neurons.
        allocation: a name in `allocation.ALLOCATIONS`.
        refit: "none", or a method of `refit.refit`.
        ridge: of the refit.
        dtype: of the checkpoint written.

    Raises:
        UserError: the budget cannot be met, or the model cannot be refitted.
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

"""Cut a model to the neurons that stay."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hfprune import checkpoint
from hfprune.allocation import allocate
from hfprune.budget import neuron_parameters, neurons_to_keep
from hfprune.layout import PRUNING, SCORES, layer_name
from hfprune.models import count_parameters, load_model, load_tokenizer, mlps, set_linear
from hfprune.products import fast_products
from hfprune.refit import refit as refit_kept
from hfprune.texts import sample_sequences


def prune(
    folder: Path, model: Path, scores: Path, text: Path | None, source: Mapping[str, Any],
    calibration: Mapping[str, Any], ratio: float | None, ratio_of: str, target_parameters: int | None, round_to: int,
    allocation: str, refit: str, ridge: float, pad: bool, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Stage `prune`: write the pruned checkpoint and its `pruning.json` into `folder`.

    The checkpoint has been reloaded in a fresh process, see `checkpoint.prove`, or there is none.

    Args:
        folder: where to write.
        model: folder of the dense checkpoint.
        scores: folder of its scores.
        text: folder of the text that the scores were made on; only a refit reads it.
        source: where the dense model came from, and its licence, for `pruning.json`.
        calibration: how the scores were made, for `pruning.json`; a refit takes the same sequences.
        ratio, ratio_of, target_parameters: the budget, see `budget.neurons_to_keep`.
        round_to: every layer keeps a multiple of so many neurons.
        allocation: a name in `allocation.ALLOCATIONS`.
        refit: "none", or a method of `refit.refit`.
        ridge: of the refit.
        pad: make layers of several widths as wide as the widest with zeros, see `checkpoint.pad`.
        dtype: of the checkpoint written.

    Raises:
        UserError: the budget cannot be met, the model cannot be refitted, or the checkpoint does not reload as it was
            saved.
    """
    network = load_model(model, dtype, spread=False)
    by_name = load_file(scores / SCORES)
    ranked = [by_name[layer_name(i)] for i in range(len(by_name))]
    dense = count_parameters(network)
    keep = neurons_to_keep(network, ratio, ratio_of, target_parameters, allocation, round_to)
    kept = allocate(allocation, ranked, keep, round_to)
    refitted = {}
    if refit != "none":
        sampling = {name: calibration[name] for name in ("samples", "length", "seed")}
        tokens = sample_sequences(load_tokenizer(model), network.config.vocab_size, text, **sampling)
        with fast_products(network.device):
            refitted = refit_kept(network, kept, tokens, refit, ridge)
    cut(network, kept)
    padding = checkpoint.pad(network) if pad else 0
    left = count_parameters(network)
    per_neuron = neuron_parameters(mlps(network)[0])
    expected = checkpoint.write(network, folder, model)
    del network  # one copy in memory at a time: the reload is the next
    reload = checkpoint.prove(folder, expected)
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
        "calibration": dict(calibration),
        "padding": padding,
        "source": dict(source),
        "reload": reload,
        "kept": [layer.tolist() for layer in kept],
    }
    (folder / PRUNING).write_text(json.dumps(report) + "\n", encoding="utf-8")
    return done


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

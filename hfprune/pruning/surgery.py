"""Cut a model to the units to keep."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.data.sampling import sample_sequences
from hfprune.models import checkpoint
from hfprune.models.history import BEFORE, dense_parameters, dense_units, steps
from hfprune.models.loading import count_parameters, load_model, load_tokenizer, set_linear
from hfprune.models.modeling_per_layer import count_heads
from hfprune.models.units import Kept, Part, Scores, matrix, parts, read_scores
from hfprune.pruning.allocation import allocate
from hfprune.pruning.budget import Budget, shape_of, units_to_keep
from hfprune.pruning.refit import refit as refit_kept
from hfprune.runtime.matmul import fast_products
from hfprune.store.filenames import PRUNING, SCORES


def prune(
    folder: Path, model: Path, scores: Path, text: Path | None, source: Mapping[str, Any],
    calibration: Mapping[str, Any], ratio: float | None, ratio_of: str, target_parameters: int | None, round_to: int,
    structure: str, attention_share: float | None, allocation: str, refit: str, ridge: float, pad: bool, dtype: str,
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
        ratio, ratio_of, target_parameters, attention_share: the budget, see `budget.units_to_keep`.
        round_to: every MLP keeps a multiple of so many neurons.
        structure: a name in `structures.STRUCTURES`.
        allocation: a name in `allocation.ALLOCATIONS`.
        refit: "none", or a method of `refit.refit`.
        ridge: of the refit.
        pad: make layers of several widths as wide as the widest with zeros, see `checkpoint.pad`.
        dtype: of the checkpoint written.

    Raises:
        UserError: the budget cannot be met, the model cannot be refitted, or the checkpoint does not reload as it was
            saved.
    """
    before = steps(model)
    network = load_model(model, dtype, spread=False)
    ranked = read_scores(scores / SCORES)
    shape = shape_of(network)
    budget = units_to_keep(
        shape, ratio, ratio_of, target_parameters, structure, attention_share, allocation, round_to, ranked
    )
    kept = best_units(budget, ranked, allocation, round_to)
    units_before, units_after = ({name: sum(map(len, units[name])) for name in kept} for units in (ranked, kept))
    refit_details = {}
    if refit != "none":
        sampling = {name: calibration[name] for name in ("samples", "length", "seed")}
        tokens = sample_sequences(load_tokenizer(model), network.config, text, **sampling)
        with fast_products(network.device):
            refit_details = refit_kept(network, kept, tokens, refit, ridge)
    cut(network, kept)
    padding = checkpoint.pad(network) if pad else 0
    parameters, dense = count_parameters(network), dense_parameters(before, shape.total)
    expected = checkpoint.write(network, folder, model)
    del network  # the reload needs the memory: one copy at a time
    reload = checkpoint.prove(folder, expected)
    details = {
        "structure": structure,
        "allocation": allocation,
        "refit": refit,
        **refit_details,
        # Shares are of all parameters, however the budget was given: what was asked, of the model that is cut here,
        # the parent; what was achieved, of the dense model that it all began with, and of the parent.
        "ratio": ratio if ratio and ratio_of == "all" else budget.share,
        "ratio_achieved": 1 - parameters / dense,
        "ratio_achieved_parent": 1 - parameters / shape.total,
        "parameters": parameters,
        "parameters_parent": shape.total,
        "parameters_dense": dense,
        "units": units_after,
        "units_parent": units_before,
        "units_dense": dense_units(before, units_before),
    }
    report = {
        **details,
        "attention_share": attention_share,
        "round_to": round_to,
        "criterion": calibration["criterion"],
        "calibration": dict(calibration),
        "padding": padding,
        "source": dict(source),
        "reload": reload,
        "kept": {name: [layer.tolist() for layer in layers] for name, layers in kept.items()},
        BEFORE: before,
    }
    (folder / PRUNING).write_text(json.dumps(report) + "\n", encoding="utf-8")
    return details


def best_units(budget: Budget, scores: Scores, allocation: str, round_to: int) -> Kept:
    """The units to keep: by part that is cut, ascending int64 indices per layer.

    Args:
        budget: how many of each part, see `budget.units_to_keep`.
        scores: by part, (units,) per layer.
        allocation: a name in `allocation.ALLOCATIONS`.
        round_to: every MLP keeps a multiple of so many neurons.
    """
    return {
        name: allocate(allocation, scores[name], keep, round_to if name == "mlp" else 1)
        for name, keep in budget.keep.items()
    }


@torch.no_grad()
def cut(model: PreTrainedModel, kept: Kept) -> None:
    """Remove, in place, every unit that is not in `kept`. The config and class then state the new widths.

    Args:
        model: a model of a supported family.
        kept: for each part, the int64 indices to keep, per layer. Other parts stay whole.
    """
    for name, layers in kept.items():
        for part, units in zip(parts(model, name), layers, strict=True):
            cut_part(part, units.to(part.output.weight.device))
            if name == "attention":
                count_heads(part.block, len(units), part.units)
    checkpoint.declare_widths(model)


def cut_part(part: Part, units: Tensor) -> None:
    """Remove the rows and columns of the units that are not in `units`, (count,) int64."""
    for number, linear in enumerate(part.inputs):
        rows = part.rows_of(units, number)
        set_linear(linear, matrix(linear)[rows], None if linear.bias is None else linear.bias[rows])
    for norm in part.per_head:
        norm.weight = nn.Parameter(norm.weight.unflatten(0, (part.units, -1))[units].flatten(0, 1), False)
    set_linear(part.output, matrix(part.output)[:, part.columns_of(units)], part.output.bias)

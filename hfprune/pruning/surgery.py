"""Cut a model to the units to keep."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.data.sampling import sample_sequences
from hfprune.models import checkpoint
from hfprune.models.families import layout_of
from hfprune.models.fewer_layers import keep_layers
from hfprune.models.history import BEFORE, dense_parameters, dense_units, steps
from hfprune.models.loading import (
    count_parameters,
    flops_per_token,
    load_model,
    load_tokenizer,
    shape_only,
)
from hfprune.models.narrowing import cut_part
from hfprune.models.streamed import device_of, in_turn, memory_of
from hfprune.models.units import (
    DEPTH,
    MIXED,
    PARTS,
    Kept,
    Scores,
    layers_of,
    layers_that_stay,
    part_of,
    read_scores,
)
from hfprune.pruning.allocation import ALLOCATIONS, allocate, best
from hfprune.pruning.budget import (
    Budget,
    Shape,
    parameters_for,
    refuse_method,
    refuse_saving,
    shape_of,
    units_to_keep,
)
from hfprune.pruning.influence import layer_influence
from hfprune.pruning.order import best_steps, kept_without, read_order
from hfprune.pruning.refit import refit as refit_kept
from hfprune.pruning.saving import Latency, Memory, Widths, saving_of
from hfprune.pruning.searched import read_widths
from hfprune.runtime.matmul import fast_products
from hfprune.store.filenames import ORDER, PRUNING, SCORES, WIDTHS

NOTICED = 5e-4  # difference of a share from the one asked for that is told


def prune(
    folder: Path, model: Path, scores: Path, text: Path | None, source: Mapping[str, Any],
    calibration: Mapping[str, Any], ratio: float | None, ratio_of: str, target_parameters: int | None,
    round_to: int | None, structure: str, attention_share: float | None, allocation: str, refit: str, ridge: float,
    pad: bool, dtype: str, memory: str = "auto", depth_share: float | None = None, order: Path | None = None,
    experts_share: float | None = None, context: int | None = None, latencies: Path | None = None,
    widths: Path | None = None, rounds: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Stage `prune`: write the pruned checkpoint and its `pruning.json` into `folder`.

    The checkpoint has been reloaded in a fresh process, see `checkpoint.prove`, or there is none.

    Args:
        folder: where to write.
        model: folder of the dense checkpoint.
        scores: folder of its scores, or of the order in which its sublayers or layers go.
        text: folder of the text that the scores were made on; only a refit and some allocations read it.
        source: where the dense model came from, and its licence, for `pruning.json`.
        calibration: how the scores were made, for `pruning.json`; a refit takes the same sequences.
        ratio, ratio_of, target_parameters, attention_share, depth_share, experts_share: the budget, see
            `budget.units_to_keep`.
        round_to: every MLP keeps a multiple of so many neurons; None for `budget.default_step`.
        structure: a name in `structures.STRUCTURES`.
        allocation: a name in `allocation.ALLOCATIONS`.
        refit: "none", or a method of `refit.refit`.
        ridge: of the refit.
        pad: make layers of several widths as wide as the widest with zeros, see `checkpoint.pad`.
        dtype: of the checkpoint written.
        memory: "resident", "streamed" or "auto", see `loading.load_model`.
        order: with `units.MIXED`, folder of the order in which sublayers or layers go; None else.
        context, latencies: for a ratio of memory or latency, see `saving.saving_of`.
        widths, rounds: with allocation `searched`, folder of the widths that a search found, and its most rounds.

    Raises:
        UserError: the budget cannot be met, the model cannot be refitted, or the checkpoint does not reload as it was
            saved.
    """
    before = steps(model)
    network = load_model(model, dtype, memory, spread=False)
    ranked = None if structure in DEPTH else read_scores(scores / SCORES)
    shape = shape_of(network)
    refuse_method(shape, structure, calibration["criterion"], refit)
    searched = read_widths(widths / WIDTHS) if widths else None
    in_order = read_order((order or scores) / ORDER)[0] if order or not ranked else None
    if saving := saving_of(shape, ratio_of, structure, network.config, context, latencies):
        refuse_saving(shape, saving, ratio, structure, allocation, round_to)
    else:
        budget = units_to_keep(
            shape, ratio, ratio_of, target_parameters, structure, attention_share, allocation, round_to, ranked,
            depth_share, in_order, experts_share,
        )  # fmt: skip
    measure, tokens, influence, further = ALLOCATIONS[allocation].influence, None, None, {}
    if measure or refit != "none":
        sampling = {name: calibration[name] for name in ("samples", "length", "seed")}
        tokens = sample_sequences(load_tokenizer(model), network.config, text, **sampling)
    if measure:
        with fast_products(device_of(network)):
            influence = layer_influence(network, tokens, measure, folder)
        flops = tokens.numel() * flops_per_token(network, tokens.shape[1])
        further = {"influence": influence.tolist(), "allocation_flops": flops}
    if saving:
        budget, kept = units_within(shape, saving, ratio, structure, allocation, round_to, ranked, influence)
        kept = of_widths(ranked, searched) if searched else kept
        further["saved"] = {"share": 1 - saving.share(widths_of(kept, budget)), **saving.record}
    elif searched:
        kept = of_widths(ranked, searched)
    elif structure in MIXED:
        kept = without_and_narrower(shape, budget, ranked, allocation, influence)
    elif ranked:
        kept = best_units(budget, ranked, allocation, influence)
    else:
        kept = kept_without(shape, best_steps(shape, in_order, budget.share * shape.total))
    units_before = {
        name: sum(shape.whole[name]) if name in shape.whole else sum(layer.numel() for layer in ranked[name])
        for name in kept
    }
    units_after = {name: sum(layer.numel() for layer in layers) for name, layers in kept.items()}
    network.config.tie_word_embeddings = checkpoint.is_tied(network)
    final = shape_only(network.config, network.dtype)
    cut(final, kept)
    padding = checkpoint.pad(final) if pad else 0
    parameters, dense = count_parameters(final), dense_parameters(before, shape.total)
    _tell_achieved(budget, 1 - parameters / shape.total, structure, ratio, further.get("saved"), padding)
    writer = checkpoint.LayerWriter(folder, network, final, model)
    refit_details = _cut_and_write(network, final, kept, writer, tokens if refit != "none" else None, refit, ridge)
    expected, memory = writer.finish(), memory_of(network)
    del network, writer  # the reload needs the memory: one copy at a time
    reload = checkpoint.prove(folder, expected)
    details = {
        "memory": memory,
        "structure": structure,
        "allocation": allocation,
        **further,
        **({"rounds": rounds} if searched else {}),
        "refit": refit,
        **refit_details,
        # Shares are of all parameters, however the budget was given: what was asked, of the model that is cut here,
        # the parent; what was achieved, of the dense model that it all began with, and of the parent. Of memory and
        # latency it is the share asked of these, which is the same for all scores.
        "ratio": ratio if saving or (ratio and ratio_of == "all") else budget.share,
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
        "depth_share": depth_share,
        "experts_share": experts_share,
        "round_to": budget.round_to,
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


def _tell_achieved(
    budget: Budget, achieved: float, structure: str, ratio: float | None, saved: Mapping[str, Any] | None, padding: int
) -> None:
    """Tell the share that was removed, if it is not the one asked for: zeros or steps keep it from that, or it is of
    others.
    """
    if saved:
        share = f"{saved['share']:.4f} of {saved['of']}"
        print(f"removed {achieved:.4f} of all parameters, which saves {share}, asked {ratio}", file=sys.stderr)
    elif abs(achieved - budget.share) > NOTICED:
        widths = f"whole units and widths in multiples of {budget.round_to}"
        steps = f"whole {structure} in this order" if structure in DEPTH else widths
        reason = f"the nearest that {steps} give"
        if padding:
            reason = f"`pad` stores all layers as wide as the widest, with {padding} parameters of zeros"
        print(f"removed {achieved:.4f} of all parameters, asked {budget.share:.4f}: {reason}", file=sys.stderr)


def _cut_and_write(
    model: PreTrainedModel, final: PreTrainedModel, kept: Kept, writer: checkpoint.LayerWriter, tokens: Tensor | None,
    refit: str, ridge: float,
) -> dict[str, Any]:  # fmt: skip
    """Refit, cut and write one layer after another. Returns the refit's details.

    Args:
        model: streamed or in memory.
        final: its shape after the cut.
        kept: the units that stay.
        writer: takes the layers.
        tokens: (sequences, length) calibration tokens for a refit.
        refit, ridge: see `prune`.
    """
    layers, pad = layers_of(model), not layout_of(model).mixture  # whose layers all have one width
    places = {number: place for place, number in enumerate(layers_that_stay(kept))}

    def finish(number: int) -> None:
        if number not in places:
            return
        for name, units in kept.items():
            cut_part(part_of(model, name, number), units[number])
        for name in PARTS if pad else ():
            checkpoint.pad_part(part_of(model, name, number), part_of(final, name, places[number]).units)
        writer.add(number, places[number])

    if tokens is not None:
        return refit_kept(model, kept, tokens, refit, ridge, writer.folder, finish)
    for index in in_turn([(layers[number],) for number in places]):
        finish([*places][index])
    return {}


def best_units(budget: Budget, scores: Scores, allocation: str, influence: Tensor | None = None) -> Kept:
    """The units to keep: by part that is cut, ascending int64 indices per layer.

    Args:
        budget: how many of each part, see `budget.units_to_keep`.
        scores: by part, (units,) per layer.
        allocation: a name in `allocation.ALLOCATIONS`.
        influence: (layers,), for allocations that read it, see `influence.py`.
    """
    kept: Kept = {}
    for name, keep in budget.keep.items():
        layers, groups = scores[name], budget.groups if name == "experts" else 1
        if "experts" in kept:  # of neurons, those inside the experts that stay
            layers = [layer[experts] for layer, experts in zip(layers, kept["experts"], strict=True)]
        if groups > 1:
            layers = [layer.reshape(groups, len(layer) // groups) for layer in layers]
        units = allocate(allocation, layers, keep, budget.round_to if name == "mlp" else 1, influence)
        if groups > 1:  # the number of an expert in its layer, from that in its group
            first = torch.arange(groups)[:, None]
            units = [(each + first * layer.shape[1]).flatten() for each, layer in zip(units, layers, strict=True)]
        kept[name] = units
    return kept


def of_widths(scores: Scores, widths: Widths) -> Kept:
    """The units with the best scores, so many of each layer.

    Args:
        scores: by part, (units,) per layer.
        widths: by part that is cut, of each layer.
    """
    return {name: best(scores[name], layers) for name, layers in widths.items()}


def widths_of(kept: Kept, budget: Budget) -> Widths:
    """How many units each layer keeps, counted as in `budget.Shape.units`: in one expert, or one group of experts."""
    groups = {"experts": budget.groups}
    return {name: [layer.shape[-1] // groups.get(name, 1) for layer in layers] for name, layers in kept.items()}


def units_within(
    shape: Shape, saving: Memory | Latency, ratio: float, structure: str, allocation: str, round_to: int | None,
    scores: Scores, influence: Tensor | None = None,
) -> tuple[Budget, Kept]:  # fmt: skip
    """The units to keep, as many as save a share of memory or latency, and the budget in units that gives them.

    Args:
        shape, structure, allocation, round_to: see `budget.units_to_keep`.
        saving: what the share is of.
        ratio: the share to save.
        scores, influence: see `best_units`.

    Raises:
        UserError: so much cannot be saved.
    """

    def cut_to(parameters: int) -> tuple[Budget, Kept]:
        budget = units_to_keep(
            shape, target_parameters=parameters, structure=structure, allocation=allocation, round_to=round_to,
            scores=scores,
        )  # fmt: skip
        return budget, best_units(budget, scores, allocation, influence)

    def widths(parameters: int) -> Widths:
        budget, kept = cut_to(parameters)
        return widths_of(kept, budget)

    return cut_to(parameters_for(shape, saving, ratio, structure, allocation, round_to, widths))


def without_and_narrower(
    shape: Shape, budget: Budget, scores: Scores, allocation: str, influence: Tensor | None = None
) -> Kept:
    """The units to keep where some sublayers or layers go, and neurons of the MLPs that stay; see `best_units`."""
    kept = kept_without(shape, budget.gone)
    staying = [number for number, units in enumerate(kept["mlp"]) if len(units)]
    of_these = None if influence is None else influence[staying]
    narrower = best_units(budget, {"mlp": [scores["mlp"][number] for number in staying]}, allocation, of_these)["mlp"]
    for number, units in zip(staying, narrower, strict=True):
        kept["mlp"][number] = units
    return kept


@torch.no_grad()
def cut(model: PreTrainedModel, kept: Kept) -> None:
    """Remove, in place, every unit that is not in `kept`. The config and class then state the new widths.

    Args:
        model: a model of a supported family.
        kept: for each part, the int64 indices to keep, per layer. Other parts stay whole. A layer of which nothing
            stays is gone.

    Raises:
        UserError: layers go, and the family's class would compute another layer differently in its new place.
    """
    stay = layers_that_stay(kept)
    for name, layers in kept.items():
        for number in stay:
            cut_part(part_of(model, name, number), layers[number])
    keep_layers(model, stay)
    checkpoint.declare_widths(model)

"""What a budget is in units: how many have to stay of each part, or why it cannot be met."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from hfprune.errors import UserError
from hfprune.models.units import PARTS, STRUCTURES, UNITS, Scores, parts
from hfprune.pruning.allocation import fewest_kept

if TYPE_CHECKING:  # a workflow refuses budgets without paying for torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """What of a model counts for a budget.

    Attributes:
        total: all parameters, tied embeddings once.
        units: by part, how many units each layer has.
        parameters: by part, those of one unit.
    """

    total: int
    units: dict[str, list[int]]
    parameters: dict[str, int]


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a model."""
    from hfprune.models.loading import count_parameters

    found = {name: parts(model, name) for name in PARTS}
    return Shape(
        count_parameters(model),
        {name: [part.units for part in layers] for name, layers in found.items()},
        {name: layers[0].parameters for name, layers in found.items()},
    )


def shape_on_disk(folder: Path) -> Shape:
    """The shape of the checkpoint in `folder`, from its config and the headers of its safetensors files alone."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as stored:
            shapes |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    if config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if name.endswith((".weight", ".bias"))}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers = [f"model.layers.{number}." for number in range(config["num_hidden_layers"])]
    units = {
        "mlp": [shapes[f"{layer}mlp.up_proj.weight"][0] for layer in layers],
        "attention": [shapes[f"{layer}self_attn.k_proj.weight"][0] // head for layer in layers],
    }
    belongs = {"mlp": ("mlp.",), "attention": tuple(f"self_attn.{each}_proj" for each in "qkvo")}
    whole = {"mlp.down_proj.bias", "self_attn.o_proj.bias"}  # which no unit has a part of
    parameters = {}
    for name, first in units.items():
        own = [key.removeprefix(layers[0]) for key in sizes if key.startswith(layers[0])]
        size = sum(sizes[layers[0] + key] for key in own if key.startswith(belongs[name]) and key not in whole)
        parameters[name] = size // first[0]
    return Shape(sum(sizes.values()), units, parameters)


@dataclass(frozen=True)
class Room:
    """What one part of all layers holds.

    Attributes:
        units: of each layer.
        fewest: that the allocation leaves in each layer.
        parameters: of one unit.
        step: the fewest units, in all layers together, that the allocation can remove.
    """

    units: list[int]
    fewest: list[int]
    parameters: int
    step: int

    @property
    def most(self) -> int:
        """Parameters that can be removed."""
        return (sum(self.units) - sum(self.fewest)) * self.parameters


@dataclass(frozen=True)
class Budget:
    """A budget in units.

    Attributes:
        share: of all parameters, to remove.
        keep: by part that is cut, how many units stay in all layers together, not yet rounded.
    """

    share: float
    keep: dict[str, float]


def units_to_keep(
    shape: Shape,
    ratio: float | None = None,
    ratio_of: str = "all",
    target_parameters: int | None = None,
    structure: str = "mlp",
    attention_share: float | None = None,
    allocation: str = "uniform",
    round_to: int = 1,
    scores: Scores | None = None,
) -> Budget:
    """How many units have to stay.

    Args:
        shape: of the dense model.
        ratio: the share to remove of what `ratio_of` says, or None: then `target_parameters` is given.
        ratio_of: "all": of all parameters, tied embeddings counted once; "mlp": of the MLPs' neurons, all of one size.
        target_parameters: how many of all parameters to leave.
        structure: a name in `structures.STRUCTURES`.
        attention_share: with "mlp+attention", the share of what goes that attention gives. None: what it would give
            in one ranking of all units of the model by their score per parameter.
        allocation: how the budget will be shared among layers; with `round_to` it decides how many units have to stay.
        round_to: the step of the MLPs' widths.
        scores: read where both parts are cut and `attention_share` is None; without them, then, all that goes is
            left to the neurons, as far as they hold it: enough to see whether the budget can be met.

    Raises:
        UserError: nothing would be removed, or the structure does not hold that much.
    """
    rooms = {name: room(shape, name, allocation, round_to) for name in STRUCTURES[structure]}
    total, most = shape.total, sum(each.most for each in rooms.values())
    if target_parameters is not None:
        asked, remove = f"target_parameters {target_parameters}", float(total - target_parameters)
        if remove <= 0:
            raise UserError(f"{asked}: the model has {total:,} parameters; the target has to be smaller.")
        possible = f"smallest target_parameters that allows is {total - most}"
    else:
        of = total if ratio_of == "all" else sum(rooms["mlp"].units) * rooms["mlp"].parameters
        asked, remove = f"ratio {ratio} of {ratio_of} parameters", ratio * of
        possible = f"largest ratio that allows is {math.floor(most / of * 10_000) / 10_000}"
    if remove > most + min(each.parameters for each in rooms.values()) / 2:  # half of the smallest unit: rounding
        least = " and ".join(
            f"{sum(each.fewest):,} of {sum(each.units):,} {UNITS[name]}" for name, each in rooms.items()
        )
        raise UserError(
            f"{asked}: takes {remove:,.0f} parameters. Structure {structure!r} with allocation {allocation!r} and "
            f"round_to {round_to} leaves at least {least}, and can remove {most:,} parameters. The {possible}."
        )
    smallest = min(each.step * each.parameters for each in rooms.values())
    if remove <= smallest / 2:
        raise UserError(
            f"{asked}: takes {remove:,.0f} parameters, less than half of the {smallest:,} that structure {structure!r} "
            f"with allocation {allocation!r} and round_to {round_to} removes at least ({smallest / total:.4g} of all "
            "parameters): nothing would go."
        )
    given = _split(rooms, remove, attention_share, scores) if len(rooms) > 1 else {structure: remove}
    keep = {name: sum(each.units) - given[name] / each.parameters for name, each in rooms.items()}
    return Budget(remove / total, keep)


def room(shape: Shape, name: str, allocation: str, round_to: int) -> Room:
    """What a part holds.

    Raises:
        UserError: a layer is narrower than what has to stay of it.
    """
    units, step = shape.units[name], round_to if name == "mlp" else 1
    fewest = fewest_kept(allocation, units, step)
    if too_wide := [width for width, least in zip(units, fewest, strict=True) if least > width]:
        raise UserError(f"round_to {round_to}: a layer has only {too_wide[0]} neurons; set a smaller `round_to`.")
    return Room(units, fewest, shape.parameters[name], step * (len(units) if allocation == "uniform" else 1))


def _split(
    rooms: Mapping[str, Room], remove: float, attention_share: float | None, scores: Scores | None
) -> dict[str, float]:
    """How many parameters each part gives: whole groups, and what is left by neurons.

    Raises:
        UserError: a part does not hold the share that is set for it.
    """
    mlp, attention = rooms["mlp"], rooms["attention"]
    if attention_share is None:
        groups = _lowest_together(rooms, remove, scores) if scores else 0
    else:
        groups = attention_share * remove / attention.parameters
        for name, asked in (("attention", attention_share * remove), ("mlp", (1 - attention_share) * remove)):
            if asked > rooms[name].most:
                fitting = 1 - mlp.most / remove if name == "mlp" else attention.most / remove
                raise UserError(
                    f"attention_share {attention_share}: takes {asked:,.0f} parameters of {name}, of which "
                    f"{rooms[name].most:,} can be removed. The {'smallest' if name == 'mlp' else 'largest'} "
                    f"attention_share that allows is {fitting:.4f}."
                )
    # Groups are large: no more of them than asked for, if neurons can give the rest.
    needed = math.ceil((remove - mlp.most) / attention.parameters / attention.step) * attention.step
    allowed = math.floor(remove / attention.parameters / attention.step) * attention.step
    whole = max(needed, 0, min(allowed, round(groups / attention.step) * attention.step))
    whole = min(whole, sum(attention.units) - sum(attention.fewest))
    given = whole * attention.parameters
    return {"attention": given, "mlp": max(0.0, remove - given)}


def _lowest_together(rooms: Mapping[str, Room], remove: float, scores: Scores) -> int:
    """How many groups are among the units that go when those of the lowest score per parameter go, whatever they are.

    The `fewest` best units of every layer stay in any case.
    """
    import torch

    names, values, sizes = [], [], []
    for name, each in rooms.items():
        for layer, least in zip(scores[name], each.fewest, strict=True):
            free = layer.double().sort(descending=True).values[least:]
            values.append(free / each.parameters)
            sizes.append(torch.full_like(free, each.parameters))
            names.append(torch.full_like(free, name == "attention"))
    order = torch.cat(values).argsort(stable=True)
    together = torch.cat(sizes)[order].cumsum(0)
    gone = order[together <= remove]
    return int(torch.cat(names)[gone].sum())


def check(folder: Path, cuts: list[dict[str, Any]]) -> None:
    """Refuse, before anything is scored, cuts whose budget the checkpoint in `folder` cannot meet.

    Args:
        folder: of the dense checkpoint.
        cuts: the arguments of `units_to_keep` beside the shape and the scores.

    Raises:
        UserError: one line for each that cannot be made.
    """
    try:
        shape = shape_on_disk(folder)
    except KeyError:  # tensors under names that transformers maps to its own: stage `prune` will see
        return
    faults = []
    for cut in cuts:
        try:
            units_to_keep(shape, **cut)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))

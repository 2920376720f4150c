"""The steps that made a checkpoint, from the `pruning.json` and `recovery.json` beside its weights."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hfprune.errors import UserError
from hfprune.store.filenames import PRUNING, RECOVERY

BEFORE = "before"  # key in both files: the earlier steps that the other file does not have, oldest first
KEYS = {  # a file of that name without these keys is not one of hfprune's
    PRUNING: {
        "criterion",
        "ratio",
        "ratio_achieved",
        "parameters",
        "parameters_dense",
        "units_dense",
        "kept",
        "source",
    },
    RECOVERY: {"method", "loss", "steps", "source"},
}


def read_step(file: Path) -> dict[str, Any] | None:
    """The content of a `pruning.json` or `recovery.json`; None if there is none, or hfprune did not write it.

    Raises:
        UserError: the file is cut short or not JSON.
    """
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file}: cut short, or not JSON ({error}). It tells what was cut before: get it again. Or remove it, if "
            "this checkpoint is to count as a dense one."
        ) from None
    if not isinstance(content, dict) or not content.keys() >= KEYS[file.name]:
        return None
    for step in content.get(BEFORE, []):
        if not step.keys() >= KEYS[PRUNING if is_cut(step) else RECOVERY]:
            raise UserError(f"{file}: `{BEFORE}`: neither a cut nor a training as hfprune writes them. Get it again.")
    return content


def steps(folder: Path) -> list[dict[str, Any]]:
    """All prunings and trainings from the dense model to the checkpoint in `folder`, oldest first.

    A step is the content of its `pruning.json` or `recovery.json`, without the key `before`.

    Raises:
        UserError: see `read_step`.
    """
    history: list[dict[str, Any]] = []
    for name in (PRUNING, RECOVERY):  # the training came after the cut: an earlier one is in `before` of the cut
        if (step := read_step(folder / name)) is not None:
            history += [*step.pop(BEFORE, []), step]
    return history


def kept_shapes(part: str, layers: list[list]) -> dict[int, tuple[int, ...]]:
    """By layer, the shape of what `kept` of a `pruning.json` says of a part: (units,), or (experts, neurons of each).

    A dense layer in a mixture of experts, which has no such units, is left out.
    """
    inside = any(layer and isinstance(layer[0], list) for layer in layers)
    shapes = {
        number: (len(layer), len(layer[0])) if inside and layer else (len(layer),)
        for number, layer in enumerate(layers)
    }
    return {number: shape for number, shape in shapes.items() if shape[0] or not (inside or part == "experts")}


def is_cut(step: dict[str, Any]) -> bool:
    """Whether a step pruned the model; if not, it trained it."""
    return "kept" in step


def since_the_last_cut(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trainings at the end of `steps`."""
    last = max((index for index, step in enumerate(history) if is_cut(step)), default=-1)
    return history[last + 1 :]


def dense_parameters(history: list[dict[str, Any]], current: int) -> int:
    """The parameters of the dense model at the start of `steps`; `current`, those of the model, if nothing was cut."""
    return next((step["parameters_dense"] for step in history if is_cut(step)), current)


def dense_units(history: list[dict[str, Any]], current: dict[str, int]) -> dict[str, int]:
    """The units of the dense model by part; for a part that was never cut, `current`, those of the model."""
    cuts = [step["units_dense"] for step in history if is_cut(step)]
    return {part: next((units[part] for units in cuts if part in units), count) for part, count in current.items()}


def earlier_cuts(folder: Path) -> dict[str, Any]:
    """Details for the manifest of a downloaded checkpoint that was pruned before; empty if it was not.

    Returns:
        `parameters_dense`, of its dense model, and `ratio_achieved`, the share of them that has been removed.

    Raises:
        UserError: its `pruning.json` is another checkpoint's; or see `read_step`.
    """
    cuts = [step for step in steps(folder) if is_cut(step)]
    if not cuts:
        return {}
    parameters = sum(map(_count_parameters, folder.glob("*.safetensors")))
    if parameters != cuts[-1]["parameters"]:
        raise UserError(
            f"{folder / PRUNING}: another checkpoint's: it counts {cuts[-1]['parameters']:,} parameters, the weights "
            f"beside it hold {parameters:,}. Put the right one there, or remove it, if this is to count as a dense "
            "model."
        )
    dense = dense_parameters(cuts, parameters)
    return {"parameters_dense": dense, "ratio_achieved": 1 - parameters / dense}


def _count_parameters(file: Path) -> int:
    """Parameters in a safetensors file, from its header."""
    with safe_open(file, framework="numpy") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118

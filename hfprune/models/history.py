"""What was done to a checkpoint before it came here: the `pruning.json` and `recovery.json` beside its weights."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hfprune.errors import UserError
from hfprune.store.filenames import PRUNING, RECOVERY

BEFORE = "before"  # in both files: the steps before this one that the other file does not tell, oldest first
# By these a file of that name is known as one of ours.
KEYS = {
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
    """The content of a `pruning.json` or `recovery.json`; None where there is none, or it is not one of ours.

    Raises:
        UserError: it is cut short, or not JSON.
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
    """Every cut and every training that made the checkpoint in `folder` out of a dense one, oldest first.

    Each is the content of its `pruning.json` or `recovery.json` without what came before.

    Raises:
        UserError: see `read_step`.
    """
    found: list[dict[str, Any]] = []
    for name in (PRUNING, RECOVERY):  # a training after the cut: one before it stands in `before` of the cut
        if (step := read_step(folder / name)) is not None:
            found += [*step.pop(BEFORE, []), step]
    return found


def is_cut(step: dict[str, Any]) -> bool:
    """Whether a step is a cut; else it is a training."""
    return "kept" in step


def since_the_last_cut(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trainings at the end of `steps`."""
    last = max((place for place, step in enumerate(done) if is_cut(step)), default=-1)
    return done[last + 1 :]


def dense_parameters(done: list[dict[str, Any]], now: int) -> int:
    """How many parameters the dense model had that `steps` began with; `now`, the model's own, if nothing was cut."""
    return next((step["parameters_dense"] for step in done if is_cut(step)), now)


def dense_units(done: list[dict[str, Any]], now: dict[str, int]) -> dict[str, int]:
    """By part, how many units that dense model had; `now`, the model's own, of a part that was not cut before."""
    cuts = [step["units_dense"] for step in done if is_cut(step)]
    return {part: next((units[part] for units in cuts if part in units), count) for part, count in now.items()}


def earlier_cuts(folder: Path) -> dict[str, Any]:
    """What a manifest says of a checkpoint that was cut before it was downloaded; nothing of one that was not.

    Returns:
        `parameters_dense`, of the model that it was cut from, and `ratio_achieved`, the share that is gone of those.

    Raises:
        UserError: its `pruning.json` is another checkpoint's; or see `read_step`.
    """
    cuts = [step for step in steps(folder) if is_cut(step)]
    if not cuts:
        return {}
    left = sum(map(_count, folder.glob("*.safetensors")))
    if left != cuts[-1]["parameters"]:
        raise UserError(
            f"{folder / PRUNING}: another checkpoint's: it counts {cuts[-1]['parameters']:,} parameters, the weights "
            f"beside it hold {left:,}. Put the right one there, or remove it, if this is to count as a dense model."
        )
    dense = dense_parameters(cuts, left)
    return {"parameters_dense": dense, "ratio_achieved": 1 - left / dense}


def _count(file: Path) -> int:
    """Parameters in a file of weights, by its header."""
    with safe_open(file, framework="numpy") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118

"""Widths that are searched: what may be searched, on which text, and the file of what was found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hfprune.pruning.refit_names import SOLVED
from hfprune.pruning.saving import Widths

SEARCHED = "searched"  # the allocation whose widths a search finds
STRUCTURES = ("mlp", "attention", "mlp+attention")  # those that it goes with
ROUNDS = 3  # the default, see docs/pruning.md
FEWEST_SAMPLES = 4
ONE_IN = 4  # sequences is held out: a search measures on it, and its refits do not see it
MOST_TOKENS = 8192  # to measure on


def held_out(samples: int, length: int) -> int:
    """How many calibration sequences, the last ones, a search measures on."""
    return min(samples // ONE_IN, max(1, MOST_TOKENS // length))


def check_searched(allocation: str, structure: str, refit: str) -> None:
    """Refuse a search of what has no widths to exchange, or no refit to measure them with.

    Raises:
        ValueError: it is so.
    """
    if allocation != SEARCHED:
        return
    if structure not in STRUCTURES:
        raise ValueError(f"allocation {SEARCHED} goes with structure {', '.join(STRUCTURES)}, not {structure}")
    if refit not in SOLVED:
        raise ValueError(
            f"allocation {SEARCHED} measures refitted widths, so it goes with refit {', '.join(SOLVED)}, not {refit}"
        )


def too_few(samples: int) -> str | None:
    """Why so many calibration sequences are too few for a search, for a message; None if they are enough."""
    if samples >= FEWEST_SAMPLES:
        return None
    return (
        f"allocation {SEARCHED} measures on one in {ONE_IN} sequences and refits on the others; expected at least "
        f"{FEWEST_SAMPLES} samples, better 32 or more"
    )


def save_widths(file: Path, rounds: Sequence[tuple[Widths, float]]) -> None:
    """Write the widths that each round of a search came to, and their KL; first those that it started from."""
    lines = [{"kl": divergence, "widths": widths} for widths, divergence in rounds]
    file.write_text(json.dumps({"widths": rounds[-1][0], "rounds": lines}) + "\n", encoding="utf-8")


def read_widths(file: Path) -> Widths:
    """The widths that a search found, from a file written by `save_widths`."""
    return json.loads(file.read_text(encoding="utf-8"))["widths"]

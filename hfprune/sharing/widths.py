"""What the widths of a checkpoint cost where it runs: quantised types hold rows in blocks."""

import math
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open

from hfprune.sharing import quantizer

OUTPUTS = ("mlp.down_proj.weight", "self_attn.o_proj.weight")  # matrices whose rows are as long as a layer is wide
BLOCK, LARGE_BLOCK = 32, 256  # columns: of Q8_0, and of K-quants
HALF, Q8_0, Q4_K, Q5_0 = 2, 34 / 32, 144 / 256, 22 / 32  # bytes of a value


def width_warning(folder: Path, kinds: Collection[str]) -> str:
    """A sentence on what the widths of the checkpoint in `folder` cost; empty if they cost nothing.

    Args:
        folder: the checkpoint.
        kinds: types of the GGUF files to write.
    """
    shapes = _output_shapes(folder)
    odd = [(rows, columns) for rows, columns in shapes if columns % BLOCK]
    if odd:
        more = sum(rows * (columns * HALF - math.ceil(columns / BLOCK) * BLOCK * Q8_0) for rows, columns in odd)
        return (
            f"{len(odd)} of {len(shapes)} matrices (down_proj, o_proj) have rows that are no multiple of {BLOCK}: Q8_0 "
            f"and K-quants leave them in float16, in Q8_0 {more / 1e6:,.1f} MB more, and every type computes slower. "
            "Prune with `round_to` 64 or 256."
        )
    small = [(rows, columns) for rows, columns in shapes if columns % LARGE_BLOCK]
    if small and not set(kinds).isdisjoint(quantizer.TYPES):
        more = sum(rows * columns * (Q5_0 - Q4_K) for rows, columns in small)
        return (
            f"{len(small)} of {len(shapes)} matrices (down_proj, o_proj) have rows that are no multiple of "
            f"{LARGE_BLOCK}: K-quants take a larger type for them, for Q4_K Q5_0, {more / 1e6:,.1f} MB more. "
            "Prune with `round_to` 256."
        )
    return ""


def _output_shapes(folder: Path) -> list[tuple[int, int]]:
    """Rows and columns of every matrix in `OUTPUTS`."""
    shapes = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as stored:
            shapes += [tuple(stored.get_slice(name).get_shape()) for name in stored.keys() if name.endswith(OUTPUTS)]  # noqa: SIM118
    return shapes

"""How many tokens of a row a model knows places for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfprune.errors import UserError


def context_length(config: Mapping[str, Any]) -> int | None:
    """The longest sequence that a model is made for, in tokens; None where its config does not say.

    It is `max_position_embeddings`, which some kinds of RoPE scaling raise: linear, dynamic and yarn by their factor,
    yarn from `original_max_position_embeddings` where that is given. Of llama3 and longrope the config's number is
    that of the scaled model.

    Args:
        config: the keys of a config.json.
    """
    most = config.get("max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if most and factor and kind in ("linear", "dynamic", "yarn"):
        original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
        return max(most, int((original or most) * factor))
    return most


def check_lengths(config: Mapping[str, Any], lengths: Mapping[str, int]) -> None:
    """Refuse sequences that are longer than the model's context.

    Args:
        config: the keys of a config.json.
        lengths: tokens, by what messages call them.

    Raises:
        UserError: one line for each that is too long.
    """
    most = context_length(config)
    faults = [
        f"{name} = {length}: the model knows {most} positions (max_position_embeddings and RoPE scaling in its "
        f"config.json). Write {most} or less."
        for name, length in lengths.items()
        if most and length > most
    ]
    if faults:
        raise UserError("\n".join(faults))


def check_checkpoint(folder: Path, lengths: Mapping[str, int]) -> None:
    """`check_lengths` of the checkpoint in a folder."""
    check_lengths(json.loads((folder / "config.json").read_text(encoding="utf-8")), lengths)

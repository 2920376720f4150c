"""The context length of a model, and its check."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfprune.errors import UserError


def context_length(config: Mapping[str, Any]) -> int | None:
    """The longest sequence that a model supports, in tokens; None if its config does not say.

    It is `max_position_embeddings`; of MPT `max_seq_len`. RoPE scaling of type linear, dynamic or yarn multiplies it by
    a factor; yarn starts from `original_max_position_embeddings` if the config has it. For llama3 and longrope the
    number is the scaled one.

    Args:
        config: the keys of a config.json.
    """
    limit = config.get("max_position_embeddings", config.get("max_seq_len"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if limit and factor and kind in ("linear", "dynamic", "yarn"):
        original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
        return max(limit, int((original or limit) * factor))
    return limit


def check_lengths(config: Mapping[str, Any], lengths: Mapping[str, int]) -> None:
    """Refuse sequences that are longer than the model's context.

    Args:
        config: the keys of a config.json.
        lengths: tokens, by the name in messages.

    Raises:
        UserError: one line for every length that is too large.
    """
    limit = context_length(config)
    faults = [
        f"{name} = {length}: the model knows {limit} positions (max_position_embeddings or max_seq_len, and RoPE "
        f"scaling, in its config.json). Write {limit} or less."
        for name, length in lengths.items()
        if limit and length > limit
    ]
    if faults:
        raise UserError("\n".join(faults))


def check_checkpoint(folder: Path, lengths: Mapping[str, int]) -> None:
    """`check_lengths` for the checkpoint in a folder."""
    check_lengths(json.loads((folder / "config.json").read_text(encoding="utf-8")), lengths)

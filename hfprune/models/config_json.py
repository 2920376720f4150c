"""What the JSON files of a checkpoint may say: every key once, and numbers that a model can be built from.

transformers takes many values as they are, and warns at most: with an unknown kind of RoPE scaling or an epsilon of NaN
a model fails later, or computes something else.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfprune.errors import UserError

POSITIVE = (
    "rms_norm_eps", "rope_theta", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
POSITIVE_IN_ROPE = (
    "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "low_freq_factor",
    "high_freq_factor", "attention_factor",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16", "float64")
ROPE = ("rope_parameters", "rope_scaling")  # transformers 5, and before
OLDER = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}  # beside the scaling, before
OLDER_OF = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
STRICT = ("olmo", "olmo2", "phi3")  # whose older classes take a scaling of its `type` and factors, and nothing else
FACTORS = ("factor", "short_factor", "long_factor")


def read_json(file: Path) -> Any:
    """The JSON value in one of a checkpoint's files.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not UTF-8, or an object in it has a key twice: which value is meant is not known.
    """
    return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_keys_once)


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"key {repeated[0]!r} stands there twice")
    return dict(pairs)


def state_rope_for_older_readers(folder: Path) -> None:
    """Write RoPE into a folder's config.json a second time, under the keys that transformers 4 reads.

    transformers 5 writes `rope_parameters` alone. Readers that know only the older keys then take a base of 10,000 and
    no scaling, and compute another model without a word. transformers 5 reads both alike.
    """
    file = folder / "config.json"
    values = read_json(file)
    for part in (values, values.get("text_config") or {}):
        part.update(_older_rope(part))
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _older_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 calls the `rope_parameters` of a config."""
    rope = values.get("rope_parameters") or {}
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)  # of layers of two types: those that see the whole context
    family = values.get("model_type")
    found = {name: rope[key] for key, name in OLDER_OF.get(family, OLDER).items() if key in rope}
    if local and local["rope_theta"] != rope["rope_theta"]:
        found["rope_local_base_freq"] = local["rope_theta"]  # as Gemma 3 calls it
    kind = rope.get("rope_type", "default")
    if kind != "default":
        strict = {"type": kind} | {key: rope[key] for key in FACTORS if key in rope}
        found["rope_scaling"] = strict if family in STRICT else {key: rope[key] for key in rope if key not in OLDER}
    return found


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Refuse values of a config.json that no model can be built from, or only a broken one.

    Args:
        values: by key, as they stand in the file.
        where: the file's name in messages.

    Raises:
        UserError: there is such a value.
    """
    architectures = values.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise UserError(
            f'{where}: architectures = {architectures!r}: expected a list of names, such as ["LlamaForCausalLM"].'
        )
    for key in ("dtype", "torch_dtype"):  # transformers 5, and before
        if values.get(key) not in (None, "auto", *DTYPES):
            raise UserError(f"{where}: {key} = {values[key]!r}: expected one of {', '.join(DTYPES)}.")
    _check_positive(values, POSITIVE, where, "")
    for section in ROPE:
        rope = values.get(section)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{where}: {section} = {rope!r}: expected an object, or null for plain RoPE.")
        for key in ("rope_type", "type"):  # the second in older files
            if rope.get(key) is not None and rope[key] not in _kinds_of_rope():
                raise UserError(
                    f"{where}: {section}.{key} = {rope[key]!r}: expected one of {', '.join(_kinds_of_rope())}."
                )
        _check_positive(rope, POSITIVE_IN_ROPE, where, f"{section}.")


def _check_positive(values: Mapping[str, Any], keys: tuple[str, ...], where: str, prefix: str) -> None:
    for key in keys:
        value = values.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(
                f"{where}: {prefix}{key} = {value!r}: expected a number above 0. Take the value of the model's authors."
            )


def _kinds_of_rope() -> list[str]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ["default", *ROPE_INIT_FUNCTIONS]

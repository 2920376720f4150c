"""The supported families, each one short declaration (see `layout.py`), and the layout of a model.

To add a family, write its line in `FAMILIES`: its `model_type` in transformers, and its layout or a function from the
config to it. tests/test_families.py then tests it, and `hfprune families` shows it. A model of another family is
supported too where its modules match a layout here, and the numbers prove it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfprune.models.layout import Block, Layout, Rows

if TYPE_CHECKING:  # a workflow reads layouts without paying for torch
    from transformers import PreTrainedModel

SEPARATE = (Rows("self_attn.q_proj"), Rows("self_attn.k_proj"), Rows("self_attn.v_proj"))
LLAMA = Layout(
    attention=Block(SEPARATE, "self_attn.o_proj", "self_attn", "input_layernorm", size="heads"),
    mlp=Block(
        (Rows("mlp.gate_proj"), Rows("mlp.up_proj")),
        "mlp.down_proj",
        "mlp",
        "post_attention_layernorm",
        size="intermediate_size",
    ),
)


def setting(config: Any, key: str, otherwise: Any = None) -> Any:
    """A value of a config, which is one of transformers or the keys of a config.json."""
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return otherwise if value is None else value


def _with(layout: Layout, attention: Mapping[str, Any] | None = None, mlp: Mapping[str, Any] | None = None, **others):
    """The layout with other values of its blocks, and of its own."""
    blocks = {"attention": replace(layout.attention, **attention or {}), "mlp": replace(layout.mlp, **mlp or {})}
    return replace(layout, **blocks, **others)


BY_KIND = replace(LLAMA, masks_by_kind=True)

FAMILIES: dict[str, Layout | Callable[[Any], Layout]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": BY_KIND,
    "qwen3": BY_KIND,
}


def layout_for(config: Any) -> Layout:
    """The layout of a model of a known family.

    Args:
        config: one of transformers, or the keys of a config.json.

    Raises:
        KeyError: the family is not known.
    """
    family = FAMILIES[setting(config, "model_type")]
    return family if isinstance(family, Layout) else family(config)


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model of a known family."""
    return layout_for(model.config)


def heads_of(config: Any) -> int:
    """The number of query heads that a config states."""
    return setting(config, "num_attention_heads") or config["n_head"]


def queries_of(config: Any, layout: Layout) -> int:
    """Query heads to a key-value head. It stays the same when heads are cut."""
    heads = heads_of(config)
    return layout.queries or heads // setting(config, "num_key_value_heads", heads)


def head_size(config: Any) -> int:
    """Columns of one head."""
    return setting(config, "head_dim") or hidden_size(config) // heads_of(config)


def hidden_size(config: Any) -> int:
    """The size of the hidden states."""
    return setting(config, "hidden_size") or config["n_embd"]

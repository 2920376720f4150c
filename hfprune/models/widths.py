"""How wide each layer of a checkpoint is, by its config.

A config states widths that differ between layers in the form of transformers: `per_layer_config` holds, for single
layers, other values of some of the config's keys. Checkpoints of before have two lists instead, `intermediate_sizes`
and `key_value_heads`; reading turns them into that form.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from hfprune.errors import UserError
from hfprune.models.families import FAMILIES, head_size, heads_of, layout_for, queries_of
from hfprune.models.layout import Layout
from hfprune.models.modeling_per_layer import KEY_VALUE_HEADS, NEURONS

LISTS = ("intermediate_sizes", "key_value_heads")
FLAG = "allow_global_per_layer_attribute_access"  # else transformers' own classes may not read what layers override
WARNS_OF_GLOBALS = "transformers.integrations.heterogeneity.configuration_utils"
logging.getLogger(WARNS_OF_GLOBALS).setLevel(logging.ERROR)  # they are read on purpose, before each layer's own


@dataclass(frozen=True)
class Widths:
    """Units of each layer, first to last, of a family with Llama's keys.

    Attributes:
        neurons: of the MLPs.
        groups: key-value heads of the attentions.
        per_group: query heads that read one key-value head, in all layers.
        head_dim: dimension of a head.
    """

    neurons: list[int]
    groups: list[int]
    per_group: int
    head_dim: int

    @property
    def alike(self) -> bool:
        """Whether all layers have the same widths."""
        return len(set(self.neurons)) == len(set(self.groups)) == 1


def widths_of(config: PreTrainedConfig) -> Widths:
    """The widths that a config states, whether they differ between layers or not."""
    layers = list(config.per_layer_config)
    return Widths(
        [layer.intermediate_size for layer in layers],
        [layer.num_key_value_heads for layer in layers],
        config.num_attention_heads // config.num_key_value_heads,
        head_size(config),
    )


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of the checkpoint in `folder`. Reads no other file, and runs no code of the folder."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, LISTS[0]):
        layout = layout_for(config) if config.model_type in FAMILIES else FAMILIES["llama"].layout
        neurons, groups = (vars(config).pop(name, None) for name in LISTS)
        state_widths(config, layout, neurons, groups)
    return config


def state_widths(config: PreTrainedConfig, layout: Layout, neurons: list[int], groups: list[int] | None) -> None:
    """State the widths of single layers in a config, in place.

    Args:
        config: of a model whose layers have the family's module names.
        layout: of the model.
        neurons: of each layer's MLP.
        groups: key-value groups of each layer's attention; None if they are those of the config.
    """
    layers = [{layout.mlp.size if layout.mlp.is_free else NEURONS[0]: width} for width in neurons]
    if groups is not None:
        key, queries = next(key for key in KEY_VALUE_HEADS if getattr(config, key, None)), queries_of(config, layout)
        whole = heads_of(config) // queries  # Falcon 7B has one group of all heads, and its config states none
        for layer, count in zip(layers, groups, strict=True):
            layer[key] = count * getattr(config, key) // whole
            if count:  # a config of Falcon's divides by its number of heads
                layer["num_attention_heads"] = count * queries
        if layout.attention.size == "heads":
            config.head_dim = head_size(config)  # else readers would derive it from each layer's number of heads
    setattr(config, FLAG, True)
    config.per_layer_config = dict(enumerate(layers))


def forget_widths(config: PreTrainedConfig) -> None:
    """Remove the widths of single layers from a config, in place."""
    config.per_layer_config = None
    vars(config).pop(FLAG, None)


def check_overrides(config: PreTrainedConfig, where: str) -> None:
    """Refuse a config that states more of single layers than widths.

    Args:
        config: the model's.
        where: its name in messages.

    Raises:
        UserError: it does.
    """
    widths = {*NEURONS, *KEY_VALUE_HEADS}
    overrides = config.to_dict()["per_layer_config"] if config.is_heterogeneous else {}
    for number, layer in overrides.items():
        if others := sorted(layer.keys() - widths):
            raise UserError(
                f"{where}: per_layer_config.{number}.{others[0]}: only widths may differ between layers: the number of "
                "neurons, of attention heads and of key-value heads."
            )

"""Llama, Mistral, Qwen2 and Qwen3 with MLPs and attention of a width of their own in every layer.

The stock classes of transformers, but for those: `config.intermediate_sizes` lists the MLPs' widths, and
`config.key_value_heads` the key-value heads, first layer to last; every layer has as many query heads to a key-value
head as `num_attention_heads` and `num_key_value_heads` say. A checkpoint of such a model carries this file, so that it
needs nothing but transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Part of hfprune, Apache-2.0.
"""

from copy import deepcopy

from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM


class PerLayerWidths:
    """Gives each layer an MLP and an attention of its own width, made by the stock classes."""

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            own, attention = deepcopy(config), layer.self_attn
            own.head_dim = attention.head_dim
            own.intermediate_size = config.intermediate_sizes[number]
            own.num_key_value_heads = config.key_value_heads[number]
            own.num_attention_heads = own.num_key_value_heads * attention.num_key_value_groups
            layer.mlp = type(layer.mlp)(own)
            layer.self_attn = type(attention)(own, number)
            layer.self_attn.config = config  # which says what computes attention, also when that is changed later
        self.post_init()  # again: these modules are new


class PerLayerLlamaForCausalLM(PerLayerWidths, LlamaForCausalLM):
    """Llama."""


class PerLayerMistralForCausalLM(PerLayerWidths, MistralForCausalLM):
    """Mistral."""


class PerLayerQwen2ForCausalLM(PerLayerWidths, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class PerLayerQwen3ForCausalLM(PerLayerWidths, Qwen3ForCausalLM):
    """Qwen3."""


# By `model_type`.
CLASSES = {
    "llama": PerLayerLlamaForCausalLM,
    "mistral": PerLayerMistralForCausalLM,
    "qwen2": PerLayerQwen2ForCausalLM,
    "qwen3": PerLayerQwen3ForCausalLM,
}
for each in CLASSES.values():  # save_pretrained then copies this file, and names the class in config.json's auto_map
    each.register_for_auto_class("AutoModelForCausalLM")

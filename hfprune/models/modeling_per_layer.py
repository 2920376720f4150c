"""Llama, Mistral, Qwen2 and Qwen3 whose MLPs and attention may have a different width in every layer.

The classes are the stock ones of transformers, except for the widths. `config.intermediate_sizes` lists the MLPs'
widths and `config.key_value_heads` the numbers of key-value heads, first layer to last. The number of query heads per
key-value head is the same in all layers: `num_attention_heads` / `num_key_value_heads`. A checkpoint of such a model
includes this file, so that it needs only transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Part of hfprune, Apache-2.0.
"""

from copy import deepcopy

from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM


class PerLayerWidths:
    """Gives every layer an MLP and an attention of its own width, both of the stock classes."""

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
            layer.self_attn.config = config  # the shared one: it names the attention function, which may change later
        self.post_init()  # again, for the new modules


class PerLayerLlamaForCausalLM(PerLayerWidths, LlamaForCausalLM):
    """Llama."""


class PerLayerMistralForCausalLM(PerLayerWidths, MistralForCausalLM):
    """Mistral."""


class PerLayerQwen2ForCausalLM(PerLayerWidths, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class PerLayerQwen3ForCausalLM(PerLayerWidths, Qwen3ForCausalLM):
    """Qwen3."""


CLASSES = {  # by `model_type`
    "llama": PerLayerLlamaForCausalLM,
    "mistral": PerLayerMistralForCausalLM,
    "qwen2": PerLayerQwen2ForCausalLM,
    "qwen3": PerLayerQwen3ForCausalLM,
}
for model_class in CLASSES.values():  # save_pretrained then copies this file and sets auto_map in config.json
    model_class.register_for_auto_class("AutoModelForCausalLM")

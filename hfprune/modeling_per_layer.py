"""Llama, Mistral, Qwen2 and Qwen3 with MLPs of a width of their own in every layer.

The stock classes of transformers, but for the MLPs: `config.intermediate_sizes` lists their widths, first layer to
last. A checkpoint of such a model carries this file, so that it needs nothing but transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Part of hfprune, Apache-2.0.
"""

from copy import deepcopy

from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM


class PerLayerWidths:
    """Gives each layer an MLP of its own width, made by the stock MLP's class."""

    def __init__(self, config):
        super().__init__(config)
        for layer, width in zip(self.model.layers, config.intermediate_sizes, strict=True):
            own = deepcopy(config)
            own.intermediate_size = width
            layer.mlp = type(layer.mlp)(own)
        self.post_init()  # again: the MLPs are new


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

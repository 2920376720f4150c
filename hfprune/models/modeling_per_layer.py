"""Language models of transformers whose MLPs and attention may have a different width in every layer.

The classes are the stock ones, except for the widths: `PerLayerLlamaForCausalLM` is a `LlamaForCausalLM`, and
`PerLayerLlamaModel` a `LlamaModel`. `config.per_layer_config` gives the widths of layers that differ from the config,
under the config's own keys, such as `intermediate_size` and `num_key_value_heads`. Where one is 0, that part of the
layer is gone. The number of query heads per key-value head is the same in all layers. A checkpoint of such a model
includes this file, so that it needs only transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Part of hfprune, Apache-2.0.
"""

import warnings
from copy import copy
from inspect import signature

import transformers
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

# Paths below a decoder layer, of all families: what is there of them is made narrower.
ROWS = {
    "mlp": (
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.gate_up_proj",
        "mlp.c_fc",
        "mlp.fc1",
        "mlp.dense_h_to_4h",
        "ffn.up_proj",
        "fc1",
        "feed_forward.w1",
        "feed_forward.w3",
    ),
    "attention": (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.qkv_proj",
        "attention.query_key_value",
        "self_attention.query_key_value",
        "attn.c_attn",
        "attn.Wqkv",
    ),
}
COLUMNS = {
    "mlp": (
        "mlp.down_proj",
        "mlp.c_proj",
        "mlp.fc2",
        "mlp.dense_4h_to_h",
        "ffn.down_proj",
        "fc2",
        "feed_forward.w2",
    ),
    "attention": (
        "self_attn.o_proj",
        "self_attn.dense",
        "self_attn.out_proj",
        "attention.dense",
        "self_attention.dense",
        "attn.c_proj",
        "attn.out_proj",
    ),
}
# Keys of configs. A config has the first of its keys of key-value heads, or only that of heads.
NEURONS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
KEY_VALUE_HEADS = ("num_kv_heads", "num_key_value_heads", "num_attention_heads")
HEADS = ("self_attn.q_norm", "self_attn.k_norm")  # norms that may have a row for every head
COUNTS = ("num_heads", "num_key_value_heads", "num_kv_heads", "split_size")  # attributes of attention, as heads go


class PerLayerWidths:
    """Gives every layer an MLP and an attention of its own width."""

    def __init__(self, config):
        super().__init__(config)
        layers = next(module for module in self.base_model.modules() if isinstance(module, nn.ModuleList))
        differing = config.per_layer_attributes or ()
        neurons, groups = (next(filter(differing.__contains__, keys), None) for keys in (NEURONS, KEY_VALUE_HEADS))
        for layer, own in zip(layers, config.per_layer_config, strict=True):
            if neurons:
                resize(layer, "mlp", getattr(own, neurons))
            if groups:
                resize(layer, "attention", getattr(own, groups), getattr(config, groups))
        self.post_init()  # again, for the new modules


def resize(layer, part, units, before=None):
    """Make the linear layers of a part anew for `units` units, where they have `before`; None: one a column."""
    modules = dict(layer.named_modules())
    for path in (*COLUMNS[part], *ROWS[part]):
        if path in modules:
            linear, (parent, _, name) = modules[path], path.rpartition(".")
            before = before or linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]
            setattr(modules[parent], name, resized(linear, path in ROWS[part], units, before))
            if not units and path in COLUMNS[part]:
                write_nothing(getattr(modules[parent], name))
    if part == "attention":
        for path in HEADS:
            if path in modules and modules[path].weight.ndim == 2:
                weight = modules[path].weight
                modules[path].weight = nn.Parameter(weight[: len(weight) * units // before].detach().clone())
        attention = next(modules[path.rpartition(".")[0]] for path in COLUMNS[part] if path in modules)
        count_heads(attention, units, before)


def resized(linear, rows, units, before):
    """A new linear layer with units / before times the rows, or the columns, of this one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        if isinstance(linear, Conv1D):
            size = [linear.nf, linear.nx]
            size[not rows] = size[not rows] * units // before
            return Conv1D(*size)
        size = {"out_features": linear.out_features, "in_features": linear.in_features}
        key = "out_features" if rows else "in_features"
        return type(linear)(**size | {key: size[key] * units // before}, bias=linear.bias is not None)


def count_heads(attention, units, before):
    """Set the numbers that a stock attention module keeps of its heads, for units / before times as many."""
    if not units:
        become(attention, NoHeads)
    for name in COUNTS:
        if hasattr(attention, name):
            setattr(attention, name, getattr(attention, name) * units // before)
    if hasattr(attention, "qkv_proj"):  # Phi-3's reads the number of heads of its config
        attention.config = copy(attention.config)
        attention.config.num_attention_heads = attention.config.num_attention_heads * units // before


def write_nothing(output):
    """Let the output layer of a part without units write zeros, in place."""
    output.bias = None
    become(output, NoColumns)


def become(module, kind):
    """Let a module compute as `kind` says, in place."""
    module.__class__ = type(f"{kind.__name__}{type(module).__name__}", (kind, type(module)), {})


class NoColumns:
    """The output layer of a part without units."""

    def forward(self, activations):
        """(..., 0) -> zeros, (..., hidden)."""
        size = self.nf if isinstance(self, Conv1D) else self.out_features
        return activations.new_zeros(*activations.shape[:-1], size)


class NoHeads:
    """Attention without heads. It tells the cache how many tokens there are: generation reads that from any layer."""

    def forward(self, hidden_states, *args, **kwargs):
        """As the stock attention's: zeros of the shape of the hidden states, and no weights.

        That of BLOOM takes what enters the layer next, and adds it.
        """
        batch, length, _ = hidden_states.shape
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None:
            counted = hidden_states.new_zeros(batch, 1, length, 1)
            cache.update(counted, counted, self.layer_idx)
        names = {path.rpartition(".")[2] for path in COLUMNS["attention"]}
        output = next(module for name, module in self.named_children() if name in names)
        written = output(hidden_states.new_zeros(batch, length, 0))
        adds = "residual" in signature(super().forward).parameters
        return written + args[0] if adds else written, None


CLASSES = {}


def per_layer(stock):
    """The class with widths per layer of a stock class, with or without an output projection."""
    if stock not in CLASSES:
        name = f"PerLayer{stock.__name__}"
        CLASSES[stock] = type(name, (PerLayerWidths, stock), {"__module__": __name__, "__doc__": stock.__name__})
        auto_class = "AutoModelForCausalLM" if issubclass(stock, GenerationMixin) else "AutoModel"
        CLASSES[stock].register_for_auto_class(auto_class)  # save_pretrained then copies this file
    return CLASSES[stock]


def __getattr__(name):
    """The class with this name, which is made when it is asked for."""
    if not name.startswith("PerLayer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return per_layer(getattr(transformers, name.removeprefix("PerLayer")))

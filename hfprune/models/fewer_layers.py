"""A model with fewer layers: those that stay, and a config that says of each what it said before.

Configs say what differs between layers by lists with a value for each, by the numbers of the layers of a kind, or by
how many of the first, or from which to which, are of one.
"""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hfprune.errors import UserError
from hfprune.models.loading import shape_only
from hfprune.models.units import layers_of
from hfprune.models.widths import forget_widths

LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types", "attn_type_list")  # keys with a value for each layer
NUMBERS = ("mlp_only_layers", "full_attn_idxs")  # with the numbers of the layers of a kind
FIRST = ("first_k_dense_replace", "num_dense_layers")  # with how many of the first layers have no experts
EVERY = "decoder_sparse_step"  # the others have no experts: layers whose number, from 1, is no multiple of it
FROM, TO = "moe_layer_start_index", "moe_layer_end_index"  # with the numbers of the first and last layer with experts


def keep_layers(model: PreTrainedModel, numbers: Sequence[int]) -> None:
    """Remove all layers of `model` but these, in place, and what its config says of them. Widths are to be declared."""
    layers, config = layers_of(model), model.config
    if len(numbers) == len(layers):
        return
    forget_widths(config)
    stay = [layers[number] for number in numbers]
    _state(config, numbers)
    del layers[:]
    layers.extend(stay)
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = place


def _state(config: PreTrainedConfig, numbers: Sequence[int]) -> None:
    """State in a config, in place, what it says of these layers, as of all there are."""
    if (every := getattr(config, EVERY, None) or 1) > 1:  # layers are counted anew, so that it names them one by one
        sparse = range(every - 1, config.num_hidden_layers, every)
        dense = {*range(config.num_hidden_layers)} - {*sparse} | {*config.mlp_only_layers}
        config.mlp_only_layers, config.decoder_sparse_step = sorted(dense), 1
    for name in LISTS:
        if values := getattr(config, name, None):
            setattr(config, name, [values[number] for number in numbers])
    for name in NUMBERS:
        if (of_a_kind := getattr(config, name, None)) is not None:
            setattr(config, name, [place for place, number in enumerate(numbers) if number in of_a_kind])
    for name in FIRST:
        if first := getattr(config, name, None):
            setattr(config, name, sum(number < first for number in numbers))
    if (first := getattr(config, FROM, None)) is not None:
        last = getattr(config, TO)
        setattr(config, FROM, sum(number < first for number in numbers))
        setattr(config, TO, sum(number <= last for number in numbers) - 1)
    config.num_hidden_layers = len(numbers)


def refuse_moved_layers(config: PreTrainedConfig) -> None:
    """Refuse a model whose class computes a layer differently where other layers before it are gone.

    It is built with a layer less, and each layer compared with the one that it would come from.

    Args:
        config: of the dense model.

    Raises:
        UserError: it is such a model.
    """
    config = copy.deepcopy(config)
    forget_widths(config)  # they do not depend on the number of a layer
    fewer = shape_only(config, torch.float32)
    keep_layers(fewer, list(range(1, len(layers_of(fewer)))))
    rebuilt = shape_only(fewer.config, torch.float32)
    for moved, built in zip(layers_of(fewer), layers_of(rebuilt), strict=True):
        for (path, one), other in zip(moved.named_modules(), built.modules(), strict=True):
            for name, value in vars(one).items():
                if isinstance(value, bool | int | float | str | None) and value != getattr(other, name):
                    raise UserError(
                        f"layers of this {config.model_type} model cannot go: {path}.{name} depends on the number of "
                        "the layer, and the layers behind would compute something else. Cut sublayers, mlp or "
                        "attention."
                    )

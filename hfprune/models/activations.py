"""What a model's passes take in memory, and how to fit them into what there is.

Scoring and training keep each layer's activations for the backward pass, or compute them a second time. Evaluation
batches as many rows as fit.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch.nn import Linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hfprune.models.families import head_size
from hfprune.models.units import Part, layers_of, parts
from hfprune.runtime import memory

CHUNK = 64  # tokens that linear attention takes at a time
LONG_SEQUENCE, LEAST_BESIDE_WEIGHTS = 4096, 3 * 2**30  # tokens; bytes, which scoring 1024 tokens of a 7B model needs


def graph_bytes(model: PreTrainedModel, tokens: int) -> int:
    """An upper bound on the bytes that a forward pass over `tokens` tokens keeps for the backward pass.

    A layer keeps up to 12 tensors of the hidden size and 5 of the MLP's width in the model's type, and 2 of the hidden
    size in float32 for its norms (counted by `torch.autograd.graph.saved_tensors_hooks` for every family). Linear
    attention, as transformers itself computes it, also keeps the states of its heads, in float32 and in chunks of 64.
    """
    config, hidden, layers = model.config, model.config.hidden_size, layers_of(model)
    width = widest_mlp(model)
    per_layer = (12 * hidden + 5 * width) * model.dtype.itemsize + 8 * hidden
    per_token = per_layer * len(layers)
    if heads := getattr(config, "linear_num_value_heads", 0):
        states = 4 * heads * (8 * CHUNK + 12 * (config.linear_key_head_dim + config.linear_value_head_dim))
        per_token += states * sum(not part.attends for part in parts(model, "attention"))
    return per_token * tokens


def bytes_beside_weights(model: PreTrainedModel) -> int:
    """How much of a device's memory stays free of a resident model's weights: what scoring one long sequence takes.

    That is the input of every layer and the graph of one, see `checkpointed`.
    """
    inputs = LONG_SEQUENCE * model.config.hidden_size * len(layers_of(model)) * model.dtype.itemsize
    return max(LEAST_BESIDE_WEIGHTS, inputs + graph_bytes(model, LONG_SEQUENCE) // len(layers_of(model)))


def widest_mlp(model: PreTrainedModel) -> int:
    """The most columns that the MLP of a layer computes for a token.

    In a mixture of experts: those of all linear layers, and for each chosen expert its neurons, what it reads and what
    it writes.
    """
    widths = []
    for part in parts(model, "mlp"):
        if part is None:
            widths.append(model.config.intermediate_size)
        elif isinstance(part, Part):
            widths.append(part.units)
        else:
            shared = sum(module.out_features for module in part.experts.block.modules() if isinstance(module, Linear))
            widths.append(shared + part.experts.chosen * (part.units + model.config.hidden_size))
    return max(widths)


def forward_bytes(model: PreTrainedModel, length: int, whole: bool = False) -> int:
    """An upper bound on the bytes that a forward pass without gradients takes for each row of `length` tokens.

    A layer holds at most 8 tensors of the hidden size and 3 of the MLP's width at a time, and 2 of the hidden size in
    float32. "eager" attention holds the scores and their softmax for all heads; other kinds hold the mask twice.

    Args:
        model: a loaded model.
        length: tokens of a row.
        whole: the pass computes logits and their softmax at every position, and keeps keys and values.
    """
    config, attention = model.config, parts(model, "attention")
    width = widest_mlp(model)
    size, head = model.dtype.itemsize, head_size(config)
    per_token = (8 * config.hidden_size + 3 * width) * size + 8 * config.hidden_size
    if whole:
        per_token += 3 * config.vocab_size * size
        per_token += sum(2 * part.units * head for part in attention) * size
    heads = max(part.width // head for part in attention)
    per_pair = heads * (2 * size + 4) if config._attn_implementation == "eager" else 2 * size
    return per_token * length + per_pair * length**2


def is_short(model: PreTrainedModel, tokens: int, reserved: int = 0) -> bool:
    """Whether the graph of `tokens` tokens could take more than half of the free memory, or weights are offloaded.

    `reserved` bytes of the free memory count as taken.
    """
    free = memory.free_bytes(model.device)
    return memory.is_offloaded(model) or graph_bytes(model, tokens) > (free - reserved) / 2


@contextmanager
def checkpointed(model: PreTrainedModel, recomputing: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Keep only each layer's input. The backward pass runs the layer's forward pass again, within `recomputing()`.

    The checkpointing is non-reentrant: several backward passes over one graph are possible, and each runs the layer
    again. Each layer runs to its end: if it stopped early, accelerate would leave its offloaded weights on the device.
    """
    forwards = [layer.forward for layer in layers_of(model)]
    again = partial(checkpoint, use_reentrant=False, early_stop=False)  # the same dropout again
    for layer, forward in zip(layers_of(model), forwards, strict=True):
        layer.forward = partial(again, forward, context_fn=lambda: (nullcontext(), recomputing()))
    try:
        yield
    finally:
        for layer, forward in zip(layers_of(model), forwards, strict=True):
            layer.forward = forward

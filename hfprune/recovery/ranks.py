"""Ranks of adapters by the importance of layers, as in CFSP (arXiv 2409.13199)."""

from collections.abc import Sequence
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.data.packing import Example
from hfprune.pruning.influence import layer_influence

SEQUENCES = 32  # of the training text, on which layers are measured


def measured_tokens(examples: Sequence[Example], length: int) -> Tensor:
    """The first `SEQUENCES` x `length` tokens of the examples, one after the other.

    Returns:
        (sequences, length) int64; one shorter sequence if there are fewer than `length` tokens.
    """
    first = islice(chain.from_iterable(example.ids for example in examples), SEQUENCES * length)
    tokens = torch.from_numpy(np.fromiter(first, np.int64))
    length = min(length, len(tokens))
    sequences = min(SEQUENCES, len(tokens) // length)
    return tokens[: sequences * length].view(sequences, length)


def ranks_by_layer(model: PreTrainedModel, tokens: Tensor, rank: int) -> list[int]:
    """A rank for each layer in proportion to its importance; their mean is `rank`.

    The importance is the mean angle between what enters and what leaves a layer.

    Args:
        model: the model to be trained, in memory.
        tokens: (sequences, length) int64.
        rank: the rank that every layer would have otherwise.
    """
    return in_proportion(layer_influence(model, tokens, "angle").tolist(), rank)


def in_proportion(shares: Sequence[float], rank: int) -> list[int]:
    """Whole numbers, at least 1, in proportion to `shares`, by the method of Webster; their mean is `rank`."""
    ranks = [1] * len(shares)
    for _ in range((rank - 1) * len(shares)):
        neediest = max(range(len(shares)), key=lambda layer: shares[layer] / (ranks[layer] + 0.5))
        ranks[neediest] += 1
    return ranks

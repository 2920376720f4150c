"""Measures of several models' predictions for the same tokens, a chunk of logits at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hfprune.models.head import Head
from hfprune.pruning.head import LOGITS_PER_CHUNK

Measure = Callable[[Tensor], Tensor]  # of log p, (tokens, vocabulary), the predictions for some tokens -> its sum


def sums(
    head: Head, measure: Callable[[slice], Measure], tokens: int, models: Sequence[Callable[[slice], Tensor]]
) -> Tensor:
    """A measure of predictions, summed over all tokens, of each model: (models,) float64 on the CPU.

    Args:
        head: of all models.
        measure: gives the measure for a chunk of the tokens.
        tokens: how many there are.
        models: of each model, a chunk -> (tokens, hidden) final hidden states behind the last norm.
    """
    totals = torch.zeros(len(models), dtype=torch.float64)
    size = max(1, LOGITS_PER_CHUNK[head.weight.device.type] // head.vocabulary)
    for first in range(0, tokens, size):
        chunk = slice(first, first + size)
        of_chunk = measure(chunk)
        for number, states in enumerate(models):
            totals[number] += of_chunk(head.logits(states(chunk)).log_softmax(-1)).double().cpu()
    return totals


def divergence(dense: Tensor, head: Head) -> Callable[[slice], Measure]:
    """KL(dense || model) in nats; `dense` are (tokens, hidden) final hidden states of the dense model."""

    def of_chunk(chunk: slice) -> Measure:
        log_p = head.logits(dense[chunk].to(head.weight.device)).log_softmax(-1)
        p = log_p.exp()
        return lambda log_q: (p * (log_p - log_q)).sum()

    return of_chunk

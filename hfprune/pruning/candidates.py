"""One walk over the layers in which many changes of a model are measured.

Each candidate changes one layer. It leaves the current model's hidden states there, so only the layers behind are
computed again for it. The walk reads each layer's weights once, so they may be streamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.models.head import Head, head_of
from hfprune.models.streamed import device_of, in_memory
from hfprune.models.units import IN_TURN, Sublayer, layers_of, part_of
from hfprune.models.walk import enter, entrance, exit_norm, final_states
from hfprune.pruning.head import LOGITS_PER_CHUNK, following
from hfprune.pruning.predictions import Measure, divergence, sums
from hfprune.pruning.refit import sequences_together
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.memory import free_bytes

SEQUENCES_PER_BATCH = 8  # of the dense model
# (sequences, length, hidden) that enter a layer -> those that leave it, where the candidate changes it; None: as it is.
Pass = Callable[[int, Tensor, "int | None"], Tensor]


class Walk:
    """One walk: the current model, and what becomes of it with each candidate.

    Args:
        model: streamed or in memory.
        tokens: (sequences, length) int64.
        layers: of each candidate the number of the layer that it changes, ascending.
        passed: passes a layer, given its number, what enters it, and the number of a candidate or None.

    Attributes:
        arguments: of each layer, see `walk.enter`.
        states: (sequences, length, hidden) of the current model, behind the layers that are passed.
        riders: (candidates, sequences, length, hidden), the same of the candidates.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, layers: Sequence[int], passed: Pass) -> None:
        self.layers, self.device, self._passed = layers, device_of(model), passed
        with in_memory(*entrance(model)):
            _, self.arguments = enter(model, tokens[:1])
            self.states = enter(model, tokens)[0]
        shape = (len(layers), *self.states.shape)
        fits = math.prod(shape) * model.dtype.itemsize < free_bytes(self.device) / 2
        self.riders = torch.empty(shape, dtype=model.dtype, device=self.device if fits else "cpu")
        self._riding = 0  # how many of the candidates' layers are behind

    def advance(self, number: int) -> None:
        """Pass a layer, whose weights are in memory."""
        riding = self.riders[: self._riding].flatten(0, 1)
        with fast_products(self.device):
            for rows in batches(riding) if self._riding else ():
                rows.copy_(self._passed(number, rows.to(self.device), None))
            while self._riding < len(self.layers) and self.layers[self._riding] == number:
                self.riders[self._riding].copy_(self._passed(number, self.states, self._riding))
                self._riding += 1
            self.states = self._passed(number, self.states, None)


def batches(states: Tensor) -> Sequence[Tensor]:
    """(sequences, length, hidden) in parts that pass a layer together."""
    return states.split(sequences_together(states.shape[1]))


def dense_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(tokens, hidden) final hidden states on the CPU, for `divergences`."""
    return torch.cat([states[0].cpu() for states in final_states(model, tokens, SEQUENCES_PER_BATCH, "dense model")])


def divergences(model: PreTrainedModel, dense: Tensor, changed: Iterable[Tensor]) -> list[float]:
    """The mean KL(dense || changed) over all tokens, in nats, of each changed model.

    Args:
        model: whose last norm and output projection both have.
        dense: (tokens, hidden) final hidden states of the dense model.
        changed: of each changed model (sequences, length, hidden) behind the last layer.
    """
    return _means(model, partial(divergence, dense), len(dense), len(dense), changed)


def losses(model: PreTrainedModel, tokens: Tensor, changed: Iterable[Tensor]) -> list[float]:
    """The mean -log p(next token) over the tokens that have a next one, of each changed model: the log of perplexity.

    Args:
        model, changed: as in `divergences`.
        tokens: (sequences, length) int64.
    """
    labels = following(tokens)
    known = labels >= 0

    def loss(head: Head) -> Callable[[slice], Measure]:
        place = head.weight.device

        def of_chunk(chunk: slice) -> Measure:
            rows = known[chunk].nonzero()[:, 0]
            columns = labels[chunk][rows].to(place)
            return lambda log_q: -log_q[rows.to(place), columns].sum()

        return of_chunk

    return _means(model, loss, tokens.numel(), int(known.sum()), changed)


def _means(
    model: PreTrainedModel, measure: Callable[[Head], Callable[[slice], Measure]], tokens: int, count: int,
    changed: Iterable[Tensor],
) -> list[float]:  # fmt: skip
    """A measure of predictions, of each changed model: its sum over all tokens, divided by `count`."""
    norm, device = exit_norm(model), device_of(model)
    with in_memory(norm), head_of(model) as head:
        place = head.weight.device
        models = [lambda chunk, each=each: norm(each.flatten(0, 1)[chunk].to(device)).to(place) for each in changed]
        return (sums(head, measure(head), tokens, models) / count).tolist()


def flops_of_parts(model: PreTrainedModel, length: int) -> dict[Sublayer, int]:
    """Floating-point operations of every part for one token, in sequences of this length."""
    flops: dict[Sublayer, int] = {}
    for number in range(len(layers_of(model))):
        for name in IN_TURN:
            part = part_of(model, name, number)
            products = sum(2 * linear.weight.numel() for linear in part.linears)
            flops[name, number] = products + (4 * part.width * length if part.attends else 0)
    return flops


def flops_of_walk(model: PreTrainedModel, tokens: int, each: Sequence[int], layers: Sequence[int]) -> int:
    """Floating-point operations of a walk and of the logits behind it, as if candidates changed no operations.

    Args:
        model: its shapes are enough.
        tokens: number of tokens.
        each: operations of each layer for one token, see `loading.flops_of_layers`.
        layers: of each candidate, the layer that it changes.
    """
    behind = [sum(each[number:]) for number in range(len(each))]
    logits = 2 * model.get_output_embeddings().weight.numel() * (1 + len(layers))
    return tokens * (behind[0] + sum(behind[number] for number in layers) + logits)


def bytes_of_walk(model: PreTrainedModel, tokens: int, candidates: int, kind: str) -> int:
    """Bytes of the candidates' hidden states, and of a chunk of logits on a device of this kind."""
    riders = candidates * tokens * model.config.hidden_size * model.dtype.itemsize
    return riders + 3 * 4 * min(tokens * model.config.vocab_size, LOGITS_PER_CHUNK[kind])

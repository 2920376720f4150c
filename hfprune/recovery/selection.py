"""Which documents a training sees, if it sees only a share of the text.

Documents count by their tokens. So every rule gives a training the same number of tokens, up to one document.
"""

import math
import random
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from hfprune.data.packing import Packed
from hfprune.models.head import Head, head_of
from hfprune.models.loading import flops_per_token
from hfprune.recovery.losses import Term, chunked, cross_entropy, distillation
from hfprune.runtime.progress import progress

CLUSTERS = 8
ROUNDS = 20  # of k-means


def budget_of(tokens: int, share: float) -> int:
    """The fewest tokens that are a share of so many."""
    return math.ceil(share * tokens)


def select(
    rule: str, network: PreTrainedModel, teacher: PreTrainedModel | None, rows: Packed, budget: int, seed: int
) -> list[int]:
    """The numbers of the documents to train on, ascending.

    Args:
        rule: "random": drawn. "gradient_norm": those with the largest gradient, see `measure`. "degradation": those
            with the largest KL(dense || cut) per token, after PASER (arXiv 2502.12594): see `by_cluster`.
        network: the model to be trained.
        teacher: the dense model, for "degradation" and for a training with it.
        rows: the documents, packed for one epoch.
        budget: their tokens together reach this; without the last one chosen they would not.
        seed: of the draw and of the clusters.
    """
    lengths = [len(example.ids) for example in rows.examples]
    if rule == "random":
        order = list(range(len(lengths)))
        random.Random(f"select {seed}").shuffle(order)
        return sorted(until(order, lengths, budget))
    values, states = measure(network, teacher, rows, by_gradient=rule == "gradient_norm")
    if rule == "degradation":
        return sorted(by_cluster(values, clusters(states, seed), lengths, budget))
    return sorted(until(_largest_first(values), lengths, budget))


@torch.no_grad()
def measure(
    network: PreTrainedModel, teacher: PreTrainedModel | None, rows: Packed, by_gradient: bool
) -> tuple[Tensor, Tensor]:
    """A value for each document, and where it lies in the model.

    Args:
        network: the model to be trained.
        teacher: the dense model, if the loss is the distance from it.
        rows: the documents, packed for one epoch.
        by_gradient: whether the value is the root mean square, over the tokens to learn, of the gradient of a token's
            loss with respect to its final hidden state. Otherwise it is the mean loss, in nats per token.

    Returns:
        (documents,) float64 values, and (documents, hidden) float32 mean final hidden states, of the teacher if there
        is one; both on the CPU.
    """
    values = torch.zeros(len(rows.examples), dtype=torch.float64)
    states = torch.zeros(len(rows.examples), network.config.hidden_size)
    device = network.get_input_embeddings().weight.device
    for item in progress(range(len(rows)), "select", len(rows), " rows"):
        row = {name: tensor.to(device) for name, tensor in rows[item].items()}
        inputs = {"input_ids": row["input_ids"][None], "position_ids": row["position_ids"][None], "use_cache": False}
        hidden = network.base_model(**inputs).last_hidden_state[0]
        dense = teacher.base_model(**inputs).last_hidden_state[0] if teacher else hidden
        for document, start, first_label, stop in rows.places(item):
            predicting = slice(first_label - 1, stop - 1)
            term = cross_entropy(row["input_ids"][first_label:stop])
            with ExitStack() as stack:
                if teacher:
                    term = distillation(dense[predicting], stack.enter_context(head_of(teacher)))
                head = stack.enter_context(head_of(network))
                value = (_gradient if by_gradient else chunked)(hidden[predicting], head, term).item()
            value /= stop - first_label
            values[document] = math.sqrt(value) if by_gradient else value
            states[document] = dense[start:stop].float().mean(0).cpu()
    return values, states


@torch.enable_grad()
def _gradient(hidden: Tensor, head: Head, term: Term) -> Tensor:
    """The squared norm of the gradient of `losses.chunked` with respect to the states."""
    hidden = hidden.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(chunked(hidden, head, term), hidden)
    return gradient.float().square().sum()


def clusters(states: Tensor, seed: int) -> Tensor:
    """The cluster of each document, (documents,) int64, by k-means of the directions of their mean hidden states.

    Args:
        states: (documents, hidden) float32.
        seed: draws the documents at which the `CLUSTERS` centres begin.
    """
    points = normalize(states)
    first = random.Random(f"clusters {seed}").sample(range(len(points)), min(CLUSTERS, len(points)))
    centres = points[first]
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, centres).argmin(1)
        for cluster in nearest.unique():
            centres[cluster] = points[nearest == cluster].mean(0)
    return nearest


def by_cluster(values: Tensor, cluster: Tensor, lengths: Sequence[int], budget: int) -> list[int]:
    """Documents in order of their values within clusters, whose tokens are in proportion to their mean values.

    A cluster that is used up takes no further part, so the others share the rest.

    Args:
        values: (documents,) float64.
        cluster: (documents,) int64.
        lengths: tokens of each document.
        budget: see `select`.
    """
    means = {int(number): max(values[cluster == number].mean().item(), 1e-12) for number in cluster.unique()}
    taken = dict.fromkeys(means, 0)  # tokens of the documents before this one
    turns = []
    for document in _largest_first(values):
        own = int(cluster[document])
        turns.append((taken[own] / means[own], document))
        taken[own] += lengths[document]
    return until((document for _, document in sorted(turns)), lengths, budget)


def until(order: Iterable[int], lengths: Sequence[int], budget: int) -> list[int]:
    """The first documents of an order whose tokens together reach a budget."""
    chosen = []
    for document in order:
        if budget <= 0:
            break
        chosen.append(document)
        budget -= lengths[document]
    return chosen


def _largest_first(values: Tensor) -> list[int]:
    return values.argsort(descending=True, stable=True).tolist()


def flops_of_measure(network: PreTrainedModel, teacher: PreTrainedModel | None, length: int) -> int:
    """Floating-point operations of `measure` for each token: forward passes, and a product with the head's weights."""
    passes = sum(flops_per_token(model, length) for model in (network, teacher) if model is not None)
    return passes + 2 * network.get_output_embeddings().weight.numel()

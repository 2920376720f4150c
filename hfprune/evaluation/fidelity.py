"""Fidelity: how far a model's predictions are from the dense model's, token by token, on held-out text.

The dense model runs once. `reference` keeps its final hidden states and output projection, which give its logits
exactly and are about a hundred times smaller. Every other model is compared with that reference.
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from hfprune.data.sampling import sample_sequences
from hfprune.models import walk
from hfprune.models.head import Head, head_of
from hfprune.models.loading import (
    PREFILL,
    count_parameters,
    final_hidden,
    flops_per_token,
    load_model,
    load_tokenizer,
    weight_bytes,
)
from hfprune.models.streamed import is_streamed, memory_of
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.progress import progress
from hfprune.store.filenames import PROFILE, REFERENCE, RESULTS, SAMPLES

LOGITS_PER_CHUNK = 2**24
TOKENS_PER_BATCH = 1024  # that pass a layer at once, where the weights are streamed
LIKELIEST = 15  # size of the token sets to compare, as in the paper's table 7
POSITION_BINS = 8  # equal parts of a document
ENTROPY_BINS = 10  # deciles of the dense model's entropy over all positions of the text


def reference(
    folder: Path, model: Path, text: Path, samples: int, length: int, seed: int, dtype: str, memory: str = "auto"
):
    """Stage `reference`: write the dense model's predictions on the held-out text into `folder`.

    `reference.safetensors` holds `tokens` (samples, length); `hidden` (samples, length, hidden size), the final hidden
    states; `head` (vocabulary, hidden size), the output projection; and `entropy` (samples, length), nats, the entropy
    of the dense model's predictions, by which `measure` bins positions. `Head.from_tensors` reads the head.
    """
    network = load_model(model, dtype, memory)
    tokens = sample_sequences(load_tokenizer(model), network.config, text, samples, length, seed)
    hidden = torch.cat(list(hidden_states(network, tokens, "reference")))
    with head_of(network) as head:
        entropies = torch.stack([_entropies(document, head).cpu() for document in hidden])
        kept = {name: tensor.cpu().clone() for name, tensor in head.tensors().items()}
    save_file({"tokens": tokens, "hidden": hidden.cpu(), "entropy": entropies} | kept, folder / REFERENCE)
    return {"tokens": tokens.numel(), "memory": memory_of(network)}


def measure(folder: Path, model: Path, reference: Path, dtype: str, memory: str = "auto") -> dict[str, Any]:
    """Stage `measure`: compare `model` with the dense model on the reference's text, and write into `folder`.

    - `results.json`: for each measure of `token_measures` and for the perplexity, the mean over documents, its standard
      error and the number of documents;
    - `samples.jsonl`: a line for each document with its `doc_id`, the measures' means over its positions, and `loss`;
    - `profile.csv`: means over all documents within bins, see `Profile`.

    The dense model compared with itself gives kl = js = entropy_change = 0, and 1 for the other measures.

    Returns:
        The model's `parameters`, `flops_per_token` of a forward pass over `PREFILL` tokens, `bytes` of its weights on
        disk, and the `memory` used.
    """
    network = load_model(model, dtype, memory)
    documents: list[dict[str, float]] = []
    with head_of(network) as head:
        place = head.weight.device
        dense = {name: tensor.to(place) for name, tensor in load_file(reference / REFERENCE).items()}
        dense_head = Head.from_tensors(dense)
        profile = Profile(dense["entropy"])
        for i, hidden in enumerate(hidden_states(network, dense["tokens"], "measure")):
            on_device = hidden[0].to(place)
            measures = position_measures(on_device, head, dense["hidden"][i], dense_head, dense["tokens"][i])
            documents.append({name: values.mean().item() for name, values in measures.items()})
            profile.add(measures, dense["entropy"][i])
    profile.write(folder / PROFILE)
    (folder / RESULTS).write_text(json.dumps(summary(documents), indent=1) + "\n", encoding="utf-8")
    lines = [json.dumps({"doc_id": i, **measures}) + "\n" for i, measures in enumerate(documents)]
    (folder / SAMPLES).write_text("".join(lines), encoding="utf-8")
    return {
        "parameters": count_parameters(network),
        "flops_per_token": flops_per_token(network, PREFILL),
        "bytes": weight_bytes(model),
        "memory": memory_of(network),
    }


class Profile:
    """Means within bins: where in a document a model fails, and how sure the dense model was there.

    The bins follow from the reference, so all models have the same bins: `POSITION_BINS` equal parts of the document,
    and `ENTROPY_BINS` quantiles of the entropy of the dense model's prediction, over all positions of the text.
    """

    def __init__(self, entropy: Tensor) -> None:
        """
        Args:
            entropy: (samples, length) entropies of the dense model's predictions, nats.
        """
        length = entropy.shape[1]
        bins = min(POSITION_BINS, length)
        first = [round(i * length / bins) for i in range(bins + 1)]
        deciles = np.quantile(entropy.double().cpu().numpy(), np.linspace(0, 1, ENTROPY_BINS + 1))
        self.edges = {
            "position": torch.tensor(first, dtype=torch.float64),
            "entropy": torch.from_numpy(deciles),
        }
        self.sums: dict[tuple[str, str], Tensor] = {}  # (bins, 2): count of positions, sum of the measure

    def add(self, measures: dict[str, Tensor], entropy: Tensor) -> None:
        """Add one document.

        Args:
            measures: the document's measures, see `position_measures`.
            entropy: (length,) entropies of the dense model's predictions, nats.
        """
        coordinates = {"position": torch.arange(len(entropy), dtype=torch.float64), "entropy": entropy.double().cpu()}
        for by, edges in self.edges.items():
            bins = torch.bucketize(coordinates[by], edges[1:-1], right=True)
            for name, values in measures.items():
                value_bins, values = bins[: len(values)], values.cpu()
                sums = [value_bins.bincount(weights, len(edges) - 1) for weights in (torch.ones_like(values), values)]
                self.sums[by, name] = self.sums.get((by, name), 0) + torch.stack(sums, -1)

    def write(self, path: Path) -> None:
        """Write columns by, bin, low, high, metric, n, value: a bin's bounds (tokens or nats), count and mean."""
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["by", "bin", "low", "high", "metric", "n", "value"])
            for (by, name), sums in self.sums.items():
                bounds = self.edges[by].tolist()
                for i, (count, total) in enumerate(sums.tolist()):
                    if count:
                        rows.writerow([by, i, bounds[i], bounds[i + 1], name, int(count), total / count])


@torch.no_grad()
def hidden_states(model: PreTrainedModel, tokens: Tensor, what: str):
    """Yield the final hidden states (1, length, hidden size) of each sequence of `tokens` (sequences, length)."""
    if is_streamed(model):
        yield from walk.final_states(model, tokens, max(1, TOKENS_PER_BATCH // tokens.shape[1]), what)
        return
    for sequence in progress(tokens.split(1), what, len(tokens), "document"):
        with fast_products(model.device):
            hidden = final_hidden(model, sequence)
        yield hidden


@torch.no_grad()
def _entropies(hidden: Tensor, head: Head) -> Tensor:
    """(length,) entropies, nats, of the predictions from (length, hidden size) final states, computed in chunks."""
    size = max(1, LOGITS_PER_CHUNK // head.vocabulary)
    return torch.cat([entropy(head.logits(chunk).log_softmax(-1)) for chunk in hidden.split(size)])


@torch.no_grad()
def position_measures(
    hidden: Tensor, head: Head, dense_hidden: Tensor, dense_head: Head, tokens: Tensor
) -> dict[str, Tensor]:
    """The measures of `token_measures` at every position of a document, computed in chunks of tokens.

    Args:
        hidden, dense_hidden: (length, hidden size) final hidden states of the model and of the dense model.
        head, dense_head: their heads.
        tokens: (length,) the document.

    Returns:
        float64 tensors by name: the measures, (length,), and `loss`, (length - 1,), -log q of the next token, nats.
    """
    size = max(1, LOGITS_PER_CHUNK // head.vocabulary)
    positions = torch.arange(len(tokens), device=tokens.device)
    parts: dict[str, list[Tensor]] = {}
    for chunk in positions.split(size):
        log_q = head.logits(hidden[chunk]).log_softmax(-1)
        log_p = dense_head.logits(dense_hidden[chunk]).log_softmax(-1)
        measures = token_measures(log_p, log_q)
        known = chunk[chunk < len(tokens) - 1]  # the last position has no next token
        measures["loss"] = -log_q[: len(known)].gather(-1, tokens[known + 1, None])[:, 0]
        for name, values in measures.items():
            parts.setdefault(name, []).append(values.double())
    return {name: torch.cat(values) for name, values in parts.items()}


def token_measures(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Compare output distributions at each position.

    Args:
        log_p: (tokens, vocabulary) log-probabilities of the dense model.
        log_q: (tokens, vocabulary) log-probabilities of the model to compare.

    Returns:
        (tokens,) tensors. `kl`: KL(dense || model), nats. `js`: Jensen-Shannon distance, the square root of the
        divergence with logarithms to base 2, from 0 to 1 (as scipy's `jensenshannon` with base 2).
        `top1_agreement`: 1 where both models have the same likeliest token, else 0. `top15_jaccard`: the Jaccard index
        of the two sets of the 15 likeliest tokens, |A and B| / |A or B|. `acceptance`: the share of its draft tokens
        that the dense model accepts in speculative decoding, sum min(p, q) = 1 - the total variation distance.
        `entropy_change`: entropy of the model's prediction minus that of the dense model's, nats.
    """
    p, q, ratio = log_p.exp(), log_q.exp(), log_q - log_p
    # log(mean / p) = softplus(log(q / p)) - log 2 is exactly 0 where p = q; a difference of logarithms would not be.
    to_mean = (p * (math.log(2) - softplus(ratio))).sum(-1) + (q * (math.log(2) - softplus(-ratio))).sum(-1)
    divergence = to_mean / (2 * math.log(2))
    return {
        "kl": -(p * ratio).sum(-1),
        "js": divergence.clamp(min=0).sqrt(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float(),
        "top15_jaccard": _jaccard(log_p, log_q),
        "acceptance": 1 - (p - q).abs().sum(-1) / 2,  # exactly 1 where p = q
        "entropy_change": entropy(log_q) - entropy(log_p),
    }


def entropy(log_p: Tensor) -> Tensor:
    """(tokens,) entropies, nats, of distributions with (tokens, vocabulary) log-probabilities."""
    return -(log_p.exp() * log_p).sum(-1)


def _jaccard(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(tokens,) Jaccard indices of the sets of the `LIKELIEST` tokens, |A and B| / |A or B|."""
    size = min(LIKELIEST, log_p.shape[-1])
    top_p, top_q = (log_probabilities.topk(size, sorted=False).indices for log_probabilities in (log_p, log_q))
    shared = (top_p[:, :, None] == top_q[:, None, :]).sum((1, 2)).double()
    return shared / (2 * size - shared)


def summary(documents: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean over documents, standard error and number of documents for each measure; `perplexity` replaces the loss.

    The standard error of the perplexity is that of the mean loss times the perplexity (delta method). With a single
    document it is None.
    """
    count = len(documents)
    results = {}
    for name in documents[0]:
        column = torch.tensor([document[name] for document in documents], dtype=torch.float64)
        mean = column.mean().item()
        error = column.std().item() / math.sqrt(count) if count > 1 else None
        if name == "loss":
            name, mean, error = "perplexity", math.exp(mean), error and error * math.exp(mean)
        results[name] = {"value": mean, "stderr": error, "n": count}
    return results

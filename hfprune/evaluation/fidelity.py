"""How far a model's predictions are from the dense model's, token by token, on held-out text.

The dense model runs once: its final hidden states and output projection are kept (`reference`), which is exact and
some hundred times smaller than its logits. Every other model is then compared with that.
"""

import csv
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from hfprune.data.sampling import sample_sequences
from hfprune.models.loading import (
    PREFILL,
    count_parameters,
    final_hidden,
    flops_per_token,
    load_model,
    load_tokenizer,
    logits_of,
    weight_bytes,
    weights_in_memory,
)
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.progress import progress
from hfprune.store.filenames import PROFILE, REFERENCE, RESULTS, SAMPLES

LOGITS_PER_CHUNK = 2**24
LIKELIEST = 15  # tokens whose sets are compared, as in the paper's table 7
POSITION_BINS = 8  # equal stretches of a document
ENTROPY_BINS = 10  # deciles of the dense model's entropy over all positions of the text


def reference(folder: Path, model: Path, text: Path, samples: int, length: int, seed: int, dtype: str):
    """Stage `reference`: write what the dense model says of the held-out text into `folder`.

    `reference.safetensors` holds `tokens` (samples, length), `hidden` (samples, length, hidden size), the final
    hidden states, and `head` (vocabulary, hidden size), the output projection; the logits are hidden @ head.T.
    `entropy` (samples, length), nats, is that of the dense model's predictions, by which `measure` bins positions.
    """
    network = load_model(model, dtype)
    tokens = sample_sequences(load_tokenizer(model), network.config, text, samples, length, seed)
    hidden = torch.cat(list(hidden_states(network, tokens, "reference")))
    with weights_in_memory(output := network.get_output_embeddings()):
        entropies = torch.stack([_entropies(one, output.weight).cpu() for one in hidden])
        head = output.weight.cpu().clone()
    save_file({"tokens": tokens, "hidden": hidden.cpu(), "head": head, "entropy": entropies}, folder / REFERENCE)
    return {"tokens": tokens.numel()}


def measure(folder: Path, model: Path, reference: Path, dtype: str) -> dict[str, int]:
    """Stage `measure`: compare `model` with the dense model on the reference's text, and write into `folder`.

    - `results.json`: each measure of `token_measures`, and the perplexity, to its mean over documents, its standard
      error over documents and their number;
    - `samples.jsonl`: a line for each document, its `doc_id`, the measures' means over its positions, and `loss`;
    - `profile.csv`: means of all documents within bins, see `Profile`.

    The dense model compared with itself gives kl = js = entropy_change = 0 and top1_agreement = top15_jaccard = 1.

    Returns:
        Of the model: `parameters`, `flops_per_token` of a forward pass over `PREFILL` tokens, `bytes` of its weights
        on disk.
    """
    network = load_model(model, dtype)
    documents: list[dict[str, float]] = []
    with weights_in_memory(output := network.get_output_embeddings()):
        head = output.weight
        dense = {name: tensor.to(head.device) for name, tensor in load_file(reference / REFERENCE).items()}
        profile = Profile(dense["entropy"])
        for i, hidden in enumerate(hidden_states(network, dense["tokens"], "measure")):
            one = (hidden[0].to(head.device), head, dense["hidden"][i], dense["head"], dense["tokens"][i])
            found = position_measures(*one)
            documents.append({name: values.mean().item() for name, values in found.items()})
            profile.add(found, dense["entropy"][i])
    profile.write(folder / PROFILE)
    (folder / RESULTS).write_text(json.dumps(summary(documents), indent=1) + "\n", encoding="utf-8")
    lines = [json.dumps({"doc_id": i, **found}) + "\n" for i, found in enumerate(documents)]
    (folder / SAMPLES).write_text("".join(lines), encoding="utf-8")
    return {
        "parameters": count_parameters(network),
        "flops_per_token": flops_per_token(network, PREFILL),
        "bytes": weight_bytes(model),
    }


class Profile:
    """Where in a document, and how sure the dense model was, when another model fails: means within bins.

    The bins are the reference's, so every model has the same: `POSITION_BINS` equal stretches of the document, and
    `ENTROPY_BINS` with as many positions of the text each, by the entropy of the dense model's prediction.
    """

    def __init__(self, entropy: Tensor) -> None:
        """
        Args:
            entropy: (samples, length) the dense model's, nats.
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

    def add(self, found: dict[str, Tensor], entropy: Tensor) -> None:
        """Count one document in.

        Args:
            found: see `position_measures`.
            entropy: (length,) the dense model's.
        """
        places = {"position": torch.arange(len(entropy), dtype=torch.float64), "entropy": entropy.double().cpu()}
        for by, edges in self.edges.items():
            number = torch.bucketize(places[by], edges[1:-1], right=True)
            for name, values in found.items():
                chosen, values = number[: len(values)], values.cpu()
                counted = [chosen.bincount(weights, len(edges) - 1) for weights in (torch.ones_like(values), values)]
                self.sums[by, name] = self.sums.get((by, name), 0) + torch.stack(counted, -1)

    def write(self, path: Path) -> None:
        """Write columns by, bin, low, high, metric, n, value: a bin's bounds (tokens, or nats) and what is in it."""
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
    for sequence in progress(tokens.split(1), what, len(tokens), "document"):
        with fast_products(model.device):
            hidden = final_hidden(model, sequence)
        yield hidden


@torch.no_grad()
def _entropies(hidden: Tensor, head: Tensor) -> Tensor:
    """(length,) entropies, nats, of the predictions from (length, hidden size) final states, a chunk at a time."""
    size = max(1, LOGITS_PER_CHUNK // head.shape[0])
    return torch.cat([entropy(logits_of(chunk, head).log_softmax(-1)) for chunk in hidden.split(size)])


@torch.no_grad()
def position_measures(
    hidden: Tensor, head: Tensor, dense_hidden: Tensor, dense_head: Tensor, tokens: Tensor
) -> dict[str, Tensor]:
    """The measures of `token_measures` at every position of a document, a chunk of tokens at a time.

    Args:
        hidden, dense_hidden: (length, hidden size) final hidden states of the model and of the dense one.
        head, dense_head: (vocabulary, hidden size) their output projections.
        tokens: (length,) the document.

    Returns:
        float64, (length,) each; and `loss`, (length - 1,), -log q of the next token, nats.
    """
    size = max(1, LOGITS_PER_CHUNK // head.shape[0])
    positions = torch.arange(len(tokens), device=tokens.device)
    parts: dict[str, list[Tensor]] = {}
    for chunk in positions.split(size):
        log_q = logits_of(hidden[chunk], head).log_softmax(-1)
        log_p = logits_of(dense_hidden[chunk], dense_head).log_softmax(-1)
        found = token_measures(log_p, log_q)
        known = chunk[chunk < len(tokens) - 1]  # the last position's next token is not known
        found["loss"] = -log_q[: len(known)].gather(-1, tokens[known + 1, None])[:, 0]
        for name, values in found.items():
            parts.setdefault(name, []).append(values.double())
    return {name: torch.cat(values) for name, values in parts.items()}


def token_measures(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Compare output distributions at each position.

    Args:
        log_p: (tokens, vocabulary) log-probabilities of the dense model.
        log_q: those of the model compared with it.

    Returns:
        (tokens,) tensors. `kl`: KL(dense || model), nats. `js`: Jensen-Shannon distance, the square root of the
        divergence with logarithms to base 2, from 0 to 1 (as scipy's `jensenshannon` with base 2).
        `top1_agreement`: 1 where both hold the same token most likely, else 0. `top15_jaccard`: of the two sets of the
        15 likeliest tokens, the size of what they share over that of their union. `entropy_change`: the entropy of the
        model's prediction minus that of the dense one's, nats.
    """
    p, q, ratio = log_p.exp(), log_q.exp(), log_q - log_p
    # log(mean / p) = softplus(log(q / p)) - log 2: exactly 0 where p = q, which a difference of logarithms is not.
    to_mean = (p * (math.log(2) - softplus(ratio))).sum(-1) + (q * (math.log(2) - softplus(-ratio))).sum(-1)
    divergence = to_mean / (2 * math.log(2))
    return {
        "kl": -(p * ratio).sum(-1),
        "js": divergence.clamp(min=0).sqrt(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float(),
        "top15_jaccard": _jaccard(log_p, log_q),
        "entropy_change": entropy(log_q) - entropy(log_p),
    }


def entropy(log_p: Tensor) -> Tensor:
    """(tokens,) entropies, nats, of distributions given by (tokens, vocabulary) log-probabilities."""
    return -(log_p.exp() * log_p).sum(-1)


def _jaccard(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(tokens,) overlaps of the sets of the `LIKELIEST` tokens, |A and B| / |A or B|."""
    size = min(LIKELIEST, log_p.shape[-1])
    one, other = (each.topk(size, sorted=False).indices for each in (log_p, log_q))
    shared = (one[:, :, None] == other[:, None, :]).sum((1, 2)).double()
    return shared / (2 * size - shared)


def summary(documents: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, standard error and number over documents of each measure; `perplexity` in place of the loss.

    The standard error of the perplexity is that of the mean loss times the perplexity (delta method); with one
    document there is none (null).
    """
    values = {name: torch.tensor([each[name] for each in documents], dtype=torch.float64) for name in documents[0]}
    count = len(documents)
    found = {}
    for name, column in values.items():
        mean = column.mean().item()
        error = column.std().item() / math.sqrt(count) if count > 1 else None
        if name == "loss":
            name, mean, error = "perplexity", math.exp(mean), error and error * math.exp(mean)
        found[name] = {"value": mean, "stderr": error, "n": count}
    return found

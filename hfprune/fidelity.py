"""How far a model's predictions are from the dense model's, token by token, on held-out text.

The dense model runs once: its final hidden states and output projection are kept (`reference`), which is exact and
some hundred times smaller than its logits. Every other model is then compared with that.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from hfprune.layout import REFERENCE, RESULTS
from hfprune.models import (
    at_hand,
    count_parameters,
    final_hidden,
    flops_per_token,
    load_model,
    load_tokenizer,
    logits_of,
    weight_bytes,
)
from hfprune.products import fast_products
from hfprune.progress import progress
from hfprune.texts import sample_sequences

LOGITS_PER_CHUNK = 2**24


def reference(folder: Path, model: Path, text: Path, samples: int, length: int, seed: int, dtype: str):
    """Stage `reference`: write what the dense model says of the held-out text into `folder`.

    `reference.safetensors` holds `tokens` (samples, length), `hidden` (samples, length, hidden size), the final
    hidden states, and `head` (vocabulary, hidden size), the output projection; the logits are hidden @ head.T.
    """
    network = load_model(model, dtype)
    tokens = sample_sequences(load_tokenizer(model), network.config.vocab_size, text, samples, length, seed)
    hidden = torch.cat(list(hidden_states(network, tokens, "reference")))
    with at_hand(output := network.get_output_embeddings()):
        head = output.weight.cpu().clone()
    save_file({"tokens": tokens, "hidden": hidden.cpu(), "head": head}, folder / REFERENCE)
    return {"tokens": tokens.numel()}


def measure(folder: Path, model: Path, reference: Path, dtype: str) -> dict[str, int]:
    """Stage `measure`: compare `model` with the dense model; write `results.json` into `folder`.

    The file maps each measure of `token_measures` to its mean over documents, its standard error over documents
    and their number. The dense model compared with itself gives kl = js = 0 and top1_agreement = 1.

    Returns:
        Of the model: `parameters`, `flops_per_token` of a forward pass, `bytes` of the weights on disk.
    """
    network = load_model(model, dtype)
    documents: list[dict[str, float]] = []
    with at_hand(output := network.get_output_embeddings()):
        head = output.weight
        dense = {name: tensor.to(head.device) for name, tensor in load_file(reference / REFERENCE).items()}
        for i, hidden in enumerate(hidden_states(network, dense["tokens"], "measure")):
            one = (hidden[0].to(head.device), head, dense["hidden"][i], dense["head"], dense["tokens"][i])
            documents.append(document_measures(*one))
    (folder / RESULTS).write_text(json.dumps(summary(documents), indent=1) + "\n", encoding="utf-8")
    return {
        "parameters": count_parameters(network),
        "flops_per_token": flops_per_token(network),
        "bytes": weight_bytes(model),
    }


@torch.no_grad()
def hidden_states(model: PreTrainedModel, tokens: Tensor, what: str):
    """Yield the final hidden states (1, length, hidden size) of each sequence of `tokens` (sequences, length)."""
    for sequence in progress(tokens.split(1), what, len(tokens), "document"):
        with fast_products(model.device):
            hidden = final_hidden(model, sequence)
        yield hidden


@torch.no_grad()
def document_measures(
    hidden: Tensor, head: Tensor, dense_hidden: Tensor, dense_head: Tensor, tokens: Tensor
) -> dict[str, float]:
    """Means over one document's positions of the measures of `token_measures`, a chunk of tokens at a time.

    Args:
        hidden, dense_hidden: (length, hidden size) final hidden states of the model and of the dense one.
        head, dense_head: (vocabulary, hidden size) their output projections.
        tokens: (length,) the document. The next token's loss is a mean over its length - 1 predictions.
    """
    size = max(1, LOGITS_PER_CHUNK // head.shape[0])
    positions = torch.arange(len(tokens), device=tokens.device)
    sums: dict[str, float] = {}
    for chunk in positions.split(size):
        log_q = logits_of(hidden[chunk], head).log_softmax(-1)
        log_p = logits_of(dense_hidden[chunk], dense_head).log_softmax(-1)
        found = token_measures(log_p, log_q)
        known = chunk[chunk < len(tokens) - 1]  # the last position's next token is not known
        found["loss"] = -log_q[: len(known)].gather(-1, tokens[known + 1, None])
        for name, values in found.items():
            sums[name] = sums.get(name, 0.0) + values.double().sum().item()
    return {name: total / (len(tokens) - (name == "loss")) for name, total in sums.items()}


def token_measures(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Compare output distributions at each position.

    Args:
        log_p: (tokens, vocabulary) log-probabilities of the dense model.
        log_q: those of the model compared with it.

    Returns:
        (tokens,) tensors. `kl`: KL(dense || model), nats. `js`: Jensen-Shannon distance, the square root of the
        divergence with logarithms to base 2, from 0 to 1 (as scipy's `jensenshannon` with base 2).
        `top1_agreement`: 1 where both hold the same token most likely, else 0.
    """
    p, q, ratio = log_p.exp(), log_q.exp(), log_q - log_p
    # log(mean / p) = softplus(log(q / p)) - log 2: exactly 0 where p = q, which a difference of logarithms is not.
    to_mean = (p * (math.log(2) - softplus(ratio))).sum(-1) + (q * (math.log(2) - softplus(-ratio))).sum(-1)
    divergence = to_mean / (2 * math.log(2))
    return {
        "kl": -(p * ratio).sum(-1),
        "js": divergence.clamp(min=0).sqrt(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float(),
    }


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

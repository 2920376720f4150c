"""The engine: one pass over calibration tokens gives a score to every neuron of every layer."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.criteria import CRITERIA
from hfprune.errors import UserError
from hfprune.layout import SCORES, layer_name
from hfprune.models import load_model, load_tokenizer, logits_of, mlps
from hfprune.progress import progress
from hfprune.texts import sample_sequences

TOKENS_PER_BATCH = 1024
LOGITS_PER_CHUNK = 2**24  # 64 MiB of float32: bounds what the output projection needs beside the model


def score(folder: Path, model: Path, text: Path, criterion: str, samples: int, length: int, seed: int, dtype: str):
    """Stage `score`: write `scores.safetensors` into `folder`, one float32 tensor (neurons,) per layer.

    Args:
        folder: where to write.
        model: folder of the checkpoint.
        text: folder of the calibration text.
        criterion: a name in `CRITERIA`.
        samples, length, seed: see `texts.sample_sequences`.
        dtype: of the model's arithmetic; scores are summed in float32 and float64 whatever it is.
    """
    network = load_model(model, dtype)
    tokens = sample_sequences(load_tokenizer(model), network.config.vocab_size, text, samples, length, seed)
    scores = neuron_scores(network, tokens, CRITERIA[criterion].logit_gradient)
    save_file({layer_name(i): layer.float().cpu() for i, layer in enumerate(scores)}, folder / SCORES)
    return {"tokens": tokens.numel()}


def neuron_scores(
    model: PreTrainedModel, tokens: Tensor, logit_gradient: Callable[[Tensor], Tensor], batch: int | None = None
) -> list[Tensor]:
    """First-order Taylor importance of every MLP neuron, the mean over sequences of sum_t |h_t * dS/dh_t| / length.

    The absolute value stands per token, before any sum, as in the published code of arXiv 2603.08083. S is the mean
    over a sequence's positions of the criterion's function. Only activations carry gradients.

    Args:
        model: on its device, no parameter requiring a gradient.
        tokens: (sequences, length) int64.
        logit_gradient: the criterion, see `criteria.Criterion`.
        batch: sequences at once; by default as many as make `TOKENS_PER_BATCH`. It does not change the scores.

    Returns:
        One float64 tensor (neurons,) per layer.

    Raises:
        UserError: a layer's scores are not finite, or all zero.
    """
    downs = [mlp.down_proj for mlp in mlps(model)]
    totals = [torch.zeros(down.in_features, dtype=torch.float64, device=model.device) for down in downs]

    def watch(total: Tensor) -> Callable:
        def before_down_proj(_module, inputs: tuple[Tensor]) -> None:
            activation = inputs[0]  # (batch, length, neurons)

            def add(gradient: Tensor) -> None:
                total.add_((activation.detach().float() * gradient.float()).abs_().sum((0, 1)))

            activation.register_hook(add)

        return before_down_proj

    hooks = [down.register_forward_pre_hook(watch(total)) for down, total in zip(downs, totals, strict=True)]
    head = model.get_output_embeddings().weight
    batches = tokens.split(batch or max(1, TOKENS_PER_BATCH // tokens.shape[1]))
    try:
        for part in progress(batches, "score", len(batches), "batch"):
            embedded = model.get_input_embeddings()(part.to(model.device)).requires_grad_()
            hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            hidden.backward(hidden_gradient(hidden.detach(), head, logit_gradient))
    finally:
        for hook in hooks:
            hook.remove()

    for index, total in enumerate(totals):
        if not total.isfinite().all():
            raise UserError(f"layer {index}: scores are not finite; compute in a wider `dtype` (float32 or bfloat16).")
        if not total.any():
            raise UserError(f"layer {index}: all scores are zero: no gradient reached it.")
    return [total / tokens.numel() for total in totals]


def hidden_gradient(hidden: Tensor, head: Tensor, logit_gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """Carry a criterion's gradient from the logits to the final hidden states, a chunk of tokens at a time.

    Args:
        hidden: (batch, length, hidden) final hidden states.
        head: (vocabulary, hidden) output projection.
        logit_gradient: see `criteria.Criterion`.

    Returns:
        dS/dhidden of the shape and dtype of `hidden`, S summed over all positions.
    """
    flat = hidden.flatten(0, 1)
    gradient = torch.empty_like(flat)
    size = max(1, LOGITS_PER_CHUNK // head.shape[0])
    for chunk, out in zip(flat.split(size), gradient.split(size), strict=True):
        out.copy_(logit_gradient(logits_of(chunk, head)).to(head.dtype) @ head)
    return gradient.view_as(hidden)

"""What a training needs to know before its first step: which documents it sees, and the ranks of its adapters."""

import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from hfprune.data.packing import Example, Packed
from hfprune.models.loading import flops_per_token
from hfprune.recovery.ranks import measured_tokens, ranks_by_layer
from hfprune.recovery.selection import flops_of_measure, select


def prepare(
    network: PreTrainedModel, teacher: PreTrainedModel | None, examples: Sequence[Example], length: int,
    rule: str | None, budget: int, rank: int | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Choose documents and ranks.

    Args:
        network: the model to be trained, as it is before.
        teacher: the dense model, see `selection.select`.
        examples: all documents.
        length: tokens of a row.
        rule, budget, seed: see `selection.select`. Without a rule all documents are taken.
        rank: the mean rank of ranks by layer; None: they are all the same.

    Returns:
        `documents`, the numbers of those chosen; `ranks`, one for each layer, or None; `flops`; `seconds`.
    """
    started, flops = time.monotonic(), 0
    documents, ranks = list(range(len(examples))), None
    if rule:
        rows = Packed(examples, length, epochs=1, seed=seed)
        documents = select(rule, network, teacher, rows, budget, seed)
        if rule != "random":
            flops += len(rows) * length * flops_of_measure(network, teacher, length)
    if rank:
        tokens = measured_tokens([examples[document] for document in documents], length)
        ranks = ranks_by_layer(network, tokens, rank)
        flops += tokens.numel() * flops_per_token(network, tokens.shape[1])
    seconds = round(time.monotonic() - started, 3)
    return {"documents": documents, "ranks": ranks, "flops": flops, "seconds": seconds}

"""The cost of a job. Each stage computes its own, from the shapes of the models and the sizes of the texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a command's help must not pay for torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cost:
    """The cost of a job: floating-point operations, peak bytes of the device's memory, bytes in the store.

    `scratch_bytes` are those of files that it only has while it runs.
    """

    flops: int
    memory_bytes: int
    disk_bytes: int
    scratch_bytes: int = 0


def streamed_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that are in memory at once where they are streamed: of a layer and what is read next.

    Experts are read one by one and then put together: for a moment their gates and ups are there twice.
    """
    from hfprune.models.mixtures import all_experts
    from hfprune.models.units import layers_of

    layer = max(weight_bytes(layer) for layer in layers_of(model))
    twice = max((experts.experts.gate_up_proj.nbytes for experts in all_experts(model)), default=0)
    return layer + max(layer + twice, weight_bytes(model.get_output_embeddings()))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(weight.nbytes for weight in model.parameters())


def refit_cost(model: PreTrainedModel, refit: str, tokens: int, carries: bool) -> tuple[int, int]:
    """Bytes of memory for the sums and solutions of a refit, and values of the hidden states that it keeps.

    Args:
        model: the dense model.
        refit: the method.
        tokens: number of calibration tokens.
        carries: whether whole sublayers go, see `refit.Streams`.
    """
    from hfprune.models.units import parts
    from hfprune.pruning.refit import TOKENS_PER_BATCH
    from hfprune.pruning.refit_names import SEQUENTIAL

    sequential, trains, matrices = refit in SEQUENTIAL, refit == "trained", 8 if refit == "local_search" else 3
    mlps, hidden = list(filter(None, parts(model, "mlp"))), model.config.hidden_size
    width, together = max(part.units for part in mlps), max(getattr(part, "rows", 1) for part in mlps)  # experts
    streams = tokens * hidden * (1 + sequential + carries + trains) + tokens * width * sequential
    return together * matrices * 8 * width**2 + 4 * 5 * TOKENS_PER_BATCH * width, streams

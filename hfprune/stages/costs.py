"""The cost of a job. Each stage computes its own, from the shapes of the models and the sizes of the texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a command's help must not pay for torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cost:
    """The cost of a job: floating-point operations, peak bytes of the device's memory, bytes in the store."""

    flops: int
    memory_bytes: int
    disk_bytes: int


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters."""
    return sum(weight.nbytes for weight in model.parameters())

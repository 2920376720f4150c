"""What makes a neuron important: the functions whose change, when a neuron goes, is to be small.

A neuron is one input column of an MLP's `down_proj`, with activation h. A gradient criterion names a scalar
function S of the logits, and its score of a neuron is the first-order Taylor expansion of S in h,
summed over the calibration tokens t: |h_t * dS/dh_t|. Here stands only dS/dlogits, in closed form; `scoring.py`
does the rest.

To add a criterion: write its function and its line in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config reads the names of the criteria without paying for torch
    from torch import Tensor


@dataclass(frozen=True)
class Criterion:
    """A criterion: its gradient at the logits, what it is called in a figure, and where it comes from.

    Attributes:
        logit_gradient: (tokens, vocabulary) float32 logits -> dS/dlogits of the same shape, for S summed over tokens.
        title: its name in tables and figures.
        source: the paper that proposes it.
    """

    logit_gradient: Callable[[Tensor], Tensor]
    title: str
    source: str


def entropy_gradient(logits: Tensor) -> Tensor:
    """Gradient of the entropy H = -sum_j p_j log p_j of the output distribution p = softmax(z): -p (log p + H).

    Source: High-Fidelity Pruning, arXiv 2603.08083, the criterion of its section on entropy-Taylor importance. It
    needs neither a label nor a teacher.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1, keepdim=True)
    return -p * (log_p + entropy)


CRITERIA: dict[str, Criterion] = {
    "entropy": Criterion(entropy_gradient, "Entropy-Taylor", "arXiv 2603.08083"),
}

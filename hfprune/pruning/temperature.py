"""The temperature with which a cut model predicts most nearly what the dense model does.

A refitted model that lost much is too sure: its predictions have more entropy than the dense model's, but by less than
their KL, by which those of a model that knew how much it does not know would have more. So its logits are divided by
one number, as in temperature scaling (arXiv 1706.04599), but towards the dense model's predictions and not towards
labels. The number goes into the gain of the last norm, so the checkpoint keeps its form.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hfprune.models.head import Head, head_of
from hfprune.models.streamed import device_of, in_memory
from hfprune.models.walk import exit_norm
from hfprune.pruning.predictions import divergence, sums

STEP = 0.05
FACTORS = [round(0.6 + STEP * number, 2) for number in range(11)]  # of the logits: 1 / temperature, from 0.6 to 1.1


@torch.no_grad()
def set_temperature(model: PreTrainedModel, states: Tensor, dense: Tensor) -> float:
    """Divide the model's logits by the temperature of least KL(dense || model), by the gain of its last norm, in place.

    Args:
        model: in memory or streamed. The norm's weights are in memory from then on.
        states: (..., hidden), what leaves the model's last layer at calibration tokens.
        dense: the same of the dense model.

    Returns:
        The temperature; 1 where the norm has no gain, and nothing changes.
    """
    norm = exit_norm(model)
    with in_memory(norm), head_of(model) as head:
        normed = [norm(each.to(device_of(model))).flatten(0, -2).to(head.weight.device) for each in (states, dense)]
        factor = best_factor(*normed, head)
        scaled = _scaled(norm, factor, normed[1][:8])
    for name, values in scaled.items():
        setattr(norm, name, nn.Parameter(values, requires_grad=False))
    return 1 / factor if scaled else 1.0


def best_factor(states: Tensor, dense: Tensor, head: Head) -> float:
    """The factor of the cut model's normed final states with the least KL from the dense model's predictions.

    The lowest point of the parabola through the best of `FACTORS` and its neighbours.

    Args:
        states, dense: (tokens, hidden), of the cut and the dense model.
        head: of both.
    """
    models = [lambda chunk, factor=factor: factor * states[chunk] for factor in FACTORS]
    losses = sums(head, divergence(dense, head), len(states), models)
    best = min(max(int(losses.argmin()), 1), len(FACTORS) - 2)
    below, here, above = losses[best - 1 : best + 2].tolist()
    bend = below - 2 * here + above
    step = (below - above) / (2 * bend) if bend > 0 else 0.0
    return FACTORS[best] + STEP * min(max(step, -1.0), 1.0)


def temperature_flops(model: PreTrainedModel, tokens: int) -> int:
    """Operations to find it from so many tokens: a product with the head for each factor, and one for the dense."""
    return 2 * tokens * (len(FACTORS) + 1) * model.get_output_embeddings().weight.numel()


def _scaled(norm: nn.Module, factor: float, sample: Tensor) -> dict[str, Tensor]:
    """The norm's parameters with which it gives `factor` times as much; none if it has no gain.

    Args:
        norm: with its weights in memory.
        factor: not 0.
        sample: (tokens, hidden), any, to find out which parameters do so: Gemma's gain is 1 + weight.
    """
    own, wanted = dict(norm.named_parameters()), factor * norm(sample).float()
    tolerance = 4 * torch.finfo(sample.dtype).eps
    for one in (0.0, 1.0):
        ones = {name: one if name.endswith("weight") else 0.0 for name in own}
        changed = {
            name: (factor * (values.float() + ones[name]) - ones[name]).to(values.dtype) for name, values in own.items()
        }
        if torch.allclose(functional_call(norm, changed, sample).float(), wanted, rtol=tolerance, atol=tolerance):
            return changed
    return {}

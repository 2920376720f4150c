"""Train an MLP that lost neurons to write what the whole MLP wrote: no loss of the model, no other layer.

A refit in closed form changes the output layer alone: the neurons that stay keep what they compute, and only write
more. Here their rows change too. With f the MLP as it is cut and refitted, and t what it should write at a token, Adam
lowers the sum over tokens of ||t - f||^2 / ||t||^2. Its rate is a share of each matrix's root mean square, so that it
suits weights of any size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hfprune.models.loading import set_linear
from hfprune.models.narrowing import cut_part
from hfprune.models.units import Part, matrix

MOST_EPOCHS = 3
TOKENS = 131_072  # that all epochs see together, if the text is no longer
TOKENS_PER_STEP = 512
RATE = 0.015  # Adam's, as a share of a matrix's root mean square
MOMENTS = (0.9, 0.95)
WARM_UP = 8  # steps to reach the rate, which a cosine then takes to 0
SMALLEST = 1e-3  # of the median, ||t||^2 to divide by: some tokens have nothing to write


def epochs(tokens: int) -> int:
    """How often so many tokens are seen."""
    return min(MOST_EPOCHS, max(1, TOKENS // tokens))


def training_flops(part: Part, units: int, tokens: int) -> int:
    """Operations to train `units` of a part on so many tokens: 6 for each weight and token, in each epoch."""
    return 6 * epochs(tokens) * tokens * sum(linear.weight.numel() for linear in part.linears) * units // part.units


def train_part(
    part: Part,
    kept: Tensor,
    write: Callable[[Tensor], Tensor],
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
) -> None:
    """Train the weights of an MLP's linear layers in place, without their biases.

    Weights of a shorter type are trained by float32 copies. The order of the tokens is the same in every run.

    Args:
        part: with all its units.
        kept: int64, the units to train. The others are silent meanwhile, and stay what they were.
        write: (1, tokens, hidden) hidden states -> the same shape, the output of the part's output layer.
        states: batches of hidden states that the MLP reads, (batch, length, hidden) each, on any device.
        targets: what `write` should return of each, in the same shapes.
    """
    with _only(part, kept):
        _train([linear.weight for linear in part.linears], write, states, targets)


def _train(
    weights: Sequence[Tensor],
    write: Callable[[Tensor], Tensor],
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
) -> None:
    """Adam, see `train_part`."""
    masters = [weight.detach().float() for weight in weights]
    rates = [RATE * master.square().mean().sqrt().item() for master in masters]
    optimiser = torch.optim.Adam([{"params": [master]} for master in masters], betas=MOMENTS)
    device = weights[0].device
    order = torch.Generator().manual_seed(0)
    rounds = epochs(sum(batch[..., 0].numel() for batch in states))
    steps = rounds * sum(math.ceil(batch[..., 0].numel() / TOKENS_PER_STEP) for batch in states)
    step = 0
    for weight in weights:
        weight.requires_grad_(True)
    for _ in range(rounds):
        for number in torch.randperm(len(states), generator=order).tolist():
            entering, wanted = (each[number].to(device).flatten(0, 1) for each in (states, targets))
            for rows in torch.randperm(len(entering), generator=order).split(TOKENS_PER_STEP):
                with torch.enable_grad():
                    error = _relative_error(write(entering[rows][None])[0].float(), wanted[rows].float())
                    gradients = torch.autograd.grad(error, weights)
                share = min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
                for group, rate, gradient in zip(optimiser.param_groups, rates, gradients, strict=True):
                    group["lr"], group["params"][0].grad = share * rate, gradient.float()
                optimiser.step()
                for weight, master in zip(weights, masters, strict=True):
                    weight.data.copy_(master)
                step += 1
    for weight in weights:
        weight.requires_grad_(False)


@contextmanager
def _only(part: Part, kept: Tensor) -> Iterator[None]:
    """A context in which the part has the `kept` units alone. What becomes of them is then written into the whole."""
    whole = [(matrix(linear), linear.bias) for linear in part.linears]
    cut_part(part, kept)
    yield
    *inputs, output = [matrix(linear) for linear in part.linears]
    for linear, (weight, bias) in zip(part.linears, whole, strict=True):
        set_linear(linear, weight, bias)
    for number, trained in enumerate(inputs):
        matrix(part.inputs[number])[part.rows_of(kept, number)] = trained
    matrix(part.output)[:, part.columns_of(kept)] = output


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The sum over tokens of the squared error, as a share of the target's square; both (tokens, hidden) float32."""
    sizes = target.square().sum(-1)
    smallest = SMALLEST * sizes.median().clamp(min=torch.finfo(sizes.dtype).tiny)
    return ((target - output).square().sum(-1) / sizes.clamp(min=smallest)).sum()

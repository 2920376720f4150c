"""Train an MLP that lost neurons to write what the whole MLP wrote: no loss of the model, no other layer.

A refit in closed form changes the output layer alone: the neurons that stay keep what they compute, and only write
more. Here their rows change too. With f the MLP as it is cut and refitted, and t what it should write at a token, Adam
lowers the sum over tokens of ||t - f||^2 / ||t||^2. Its rate is a share of each matrix's root mean square, so that it
suits weights of any size.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hfprune.models.units import Part

EPOCHS = 3
TOKENS_PER_STEP = 512
RATE = 0.015  # Adam's, as a share of a matrix's root mean square
MOMENTS = (0.9, 0.95)
WARM_UP = 8  # steps to reach the rate, which a cosine then takes to 0
SMALLEST = 1e-3  # of the median, ||t||^2 to divide by: some tokens have nothing to write


def training_flops(part: Part, tokens: int) -> int:
    """Operations to train a part on so many tokens: 6 for each weight and token, in each epoch."""
    return 6 * EPOCHS * tokens * sum(linear.weight.numel() for linear in part.linears)


def train_part(
    part: Part,
    removed: Tensor,
    write: Callable[[Tensor], Tensor],
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
) -> None:
    """Train the weights of an MLP's linear layers in place, without their biases.

    Weights of a shorter type are trained by float32 copies. The order of the tokens is the same in every run.

    Args:
        part: with all its units, the `removed` ones silent.
        removed: int64 columns of its output layer. They stay 0, and the rows of their neurons what they were.
        write: (1, tokens, hidden) hidden states -> the same shape, the output of the part's output layer.
        states: batches of hidden states that the MLP reads, (batch, length, hidden) each, on any device.
        targets: what `write` should return of each, in the same shapes.
    """
    weights = [linear.weight for linear in part.linears]
    masters = [weight.detach().float() for weight in weights]
    rates = [RATE * master.square().mean().sqrt().item() for master in masters]
    optimiser = torch.optim.Adam([{"params": [master]} for master in masters], betas=MOMENTS)
    device = removed.device
    stays = torch.ones(part.width, device=device).index_fill_(0, removed, 0)
    silencer = part.output.register_forward_pre_hook(lambda _layer, inputs: (inputs[0] * stays.to(inputs[0].dtype),))
    order = torch.Generator().manual_seed(0)
    steps = EPOCHS * sum(math.ceil(batch[..., 0].numel() / TOKENS_PER_STEP) for batch in states)
    step = 0
    for weight in weights:
        weight.requires_grad_(True)
    for _ in range(EPOCHS):
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
    silencer.remove()


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The sum over tokens of the squared error, as a share of the target's square; both (tokens, hidden) float32."""
    sizes = target.square().sum(-1)
    smallest = SMALLEST * sizes.median().clamp(min=torch.finfo(sizes.dtype).tiny)
    return ((target - output).square().sum(-1) / sizes.clamp(min=smallest)).sum()

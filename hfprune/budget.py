"""What a budget is in neurons: how many have to stay, or why it cannot be met."""

import math

from torch import nn
from transformers import PreTrainedModel

from hfprune.allocation import fewest_kept
from hfprune.errors import UserError
from hfprune.models import count_parameters, mlps


def neurons_to_keep(
    model: PreTrainedModel,
    ratio: float | None = None,
    ratio_of: str = "all",
    target_parameters: int | None = None,
    allocation: str = "uniform",
    round_to: int = 1,
) -> float:
    """How many MLP neurons, in all layers together and not yet rounded, meet the budget.

    Args:
        model: the dense model.
        ratio: the share to remove of what `ratio_of` says, or None: then `target_parameters` is given.
        ratio_of: "all": of all parameters, tied embeddings counted once; "mlp": of the MLPs' neurons, all of one size.
        target_parameters: how many of all parameters to leave.
        allocation: how the budget will be shared; with `round_to` it decides how many neurons have to stay.
        round_to: the step of the widths.

    Raises:
        UserError: there is nothing to remove, or the MLPs do not hold that much.
    """
    widths = [mlp.down_proj.in_features for mlp in mlps(model)]
    neurons, total, per_neuron = sum(widths), count_parameters(model), neuron_parameters(mlps(model)[0])
    fewest = fewest_kept(allocation, widths, round_to)
    if too_wide := [(width, least) for width, least in zip(widths, fewest, strict=True) if least > width]:
        raise UserError(f"round_to {round_to}: a layer has only {too_wide[0][0]} neurons; set a smaller `round_to`.")
    if target_parameters is not None:
        asked, remove = f"target_parameters {target_parameters}", (total - target_parameters) / per_neuron
        if remove <= 0:
            raise UserError(f"{asked}: the model has {total:,} parameters; the target has to be smaller.")
        least = total - (neurons - sum(fewest)) * per_neuron
        possible = f"smallest target_parameters that this model's MLPs allow is {least}"
    else:
        per_share = total / per_neuron if ratio_of == "all" else neurons  # neurons that the share 1 is worth
        asked, remove = f"ratio {ratio} of {ratio_of} parameters", ratio * per_share
        largest = math.floor((neurons - sum(fewest)) / per_share * 10_000) / 10_000
        possible = f"largest ratio that this model's MLPs allow is {largest}"
    if neurons - remove < sum(fewest) - 0.5:  # half a neuron: what is allowed is a printed, rounded number
        raise UserError(
            f"{asked}: takes {remove:,.0f} of the {neurons:,} neurons in all MLPs, of which allocation {allocation!r} "
            f"with round_to {round_to} leaves at least {sum(fewest):,}. The {possible}."
        )
    return neurons - remove


def neuron_parameters(mlp: nn.Module) -> int:
    """Parameters that one neuron holds: rows of gate and up with their biases, and a column of down."""
    biases = sum(linear.bias is not None for linear in (mlp.gate_proj, mlp.up_proj))
    return mlp.gate_proj.in_features + mlp.up_proj.in_features + mlp.down_proj.out_features + biases

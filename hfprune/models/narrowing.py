"""Narrow one part of a layer to some of its units, in place."""

from torch import Tensor, nn

from hfprune.models.loading import set_linear
from hfprune.models.modeling_per_layer import count_heads, write_nothing
from hfprune.models.units import AnyPart, Part, matrix


def cut_part(part: AnyPart, units: Tensor) -> None:
    """Remove the units of a part that are not in `units`, int64; of a layer without the part, nothing."""
    if part is None or not part.units:  # it is gone already
        return
    if not isinstance(part, Part):
        part.keep(units.to(part.experts.router.weight.device))
        return
    units = units.to(part.output.weight.device)
    for number, linear in enumerate(part.inputs):
        rows = part.rows_of(units, number)
        set_linear(linear, matrix(linear)[rows], None if linear.bias is None else linear.bias[rows])
    for norm in part.per_head:
        norm.weight = nn.Parameter(norm.weight.unflatten(0, (part.units, -1))[units].flatten(0, 1), False)
    set_linear(part.output, matrix(part.output)[:, part.columns_of(units)], part.output.bias)
    if not len(units):
        write_nothing(part.output)
    if part.name == "attention":
        count_heads(part.block, len(units), part.units)

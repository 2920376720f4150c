"""The layout of a model of a family that is not declared: a declared one that its modules match.

Names alone do not say where a norm stands in the arithmetic, or what multiplies what. So the model also runs once, on a
few tokens, a part at a time as the layout says, and has to give its own logits.
"""

import sys

import torch
from torch import nn
from transformers import PreTrainedModel

from hfprune.errors import UserError
from hfprune.models.families import FAMILIES, head_size
from hfprune.models.layout import Layout

TOKENS = 8
TOLERANCE = 0.02  # of the largest logit: half precision rounds, another arithmetic differs more
MATCHED = "layout_matched"  # attribute of a model


def matched(model: PreTrainedModel) -> Layout:
    """The layout that a model matches. It is looked for once, and told to the user.

    Raises:
        UserError: there is none.
    """
    if MATCHED not in model.__dict__:
        model.__dict__[MATCHED] = _search(model)
    return model.__dict__[MATCHED]


def _search(model: PreTrainedModel) -> Layout:
    kind, has_values = model.config.model_type, not any(parameter.is_meta for parameter in model.parameters())
    first_of: dict[Layout, str] = {}  # several families share a layout
    for name, family in FAMILIES.items():
        if isinstance(family.layout, Layout) and not family.layout.mixture:
            first_of.setdefault(family.layout, name)
    alike = [(name, layout) for layout, name in first_of.items() if _names_match(model, layout)]
    for name, layout in alike:
        if not has_values:
            return layout
        if _numbers_match(model, layout):
            print(
                f"model_type {kind!r} is no family that hfprune knows: its modules are named, and compute, as those of "
                f"{name!r}, so it is treated as one.",
                file=sys.stderr,
            )
            return layout
    reason = f"they compute something else than those of {alike[0][0]!r}" if alike else "no family's modules match them"
    raise UserError(
        f"model_type {kind!r} is not supported: {reason}. Supported families: {', '.join(FAMILIES)}, and any whose "
        "layers are like one of theirs."
    )


def _names_match(model: PreTrainedModel, layout: Layout) -> bool:
    """Whether every layer has the layout's modules, and no other parameters but norms of single heads."""
    try:
        layers = model.base_model.get_submodule(layout.layers)
        model.base_model.get_submodule(layout.final_norm)
        size = head_size(model.config)
    except (AttributeError, KeyError, TypeError, RuntimeError):  # the last: a config whose values differ by layer
        return False
    blocks = (layout.attention, layout.mlp)
    linears = {block.output for block in blocks} | {rows.path for block in blocks for rows in block.rows}
    known = {*linears, *layout.norms}
    for layer in layers:
        owners = {name.rpartition(".")[0]: weight for name, weight in layer.named_parameters()}
        others = [path for path, weight in owners.items() if path not in known and weight.numel() not in (1, size)]
        modules = dict(layer.named_modules())
        if others or not known <= modules.keys() or not all(isinstance(modules[path], nn.Linear) for path in linears):
            return False
    return True


@torch.no_grad()
def _numbers_match(model: PreTrainedModel, layout: Layout) -> bool:
    """Whether the model, run a part at a time as the layout says, gives its own logits."""
    from hfprune.models.head import head_of
    from hfprune.models.run_part import run_part
    from hfprune.models.walk import enter

    model.__dict__[MATCHED] = layout  # which the functions below read
    try:
        tokens = torch.linspace(0, model.config.vocab_size - 1, TOKENS).long()[None]
        states, arguments = enter(model, tokens)
        for layer, own in zip(model.base_model.get_submodule(layout.layers), arguments, strict=True):
            entered = states
            for name in ("attention", "mlp"):
                reads = entered if layout.parallel else states
                states = states + run_part(layout, model.config, layer, name, own, reads).written
        with head_of(model) as head:
            found = head.logits(model.base_model.get_submodule(layout.final_norm)(states))
        expected = model(tokens.to(model.device)).logits.float()
        return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False  # its modules take other arguments
    finally:
        del model.__dict__[MATCHED]

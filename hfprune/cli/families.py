"""`hfprune families`: which models can be pruned, and what of them. docs/families.md has the same table."""

from hfprune.cli.commands import Command
from hfprune.models.families import FAMILIES, REFUSED, layout_for
from hfprune.models.layout import Block, Mixture

ANY = {"num_attention_heads": 4}  # a config's keys that every layout needs
OWN_CLASS = "yes, in a class of hfprune's"
DEPTH = {"sublayers": OWN_CLASS, "layers": "yes"}


class Families(Command):
    """Show which families of models can be pruned, and what of their layers."""

    words = ("families",)
    examples = ("hfprune families",)

    def run(self) -> None:
        """Print the table."""
        print(table())


def table() -> str:
    """A row for each family, or for each kind of layout in one, in Markdown."""
    rows = [("`model_type`", "models", "mlp", "attention", "experts", "sublayers", "layers"), ("---",) * 7]
    for name, family in FAMILIES.items():
        for models, keys in {family.models: {}, **family.variants}.items():
            layout = layout_for({"model_type": name, **ANY, **keys})
            mixture = layout.mixture
            cells = (_cell(mixture or layout.mlp), _cell(layout.attention), "yes" if mixture else "")
            refused = {each: layout.depth_refused(each) for each in DEPTH}
            cells += tuple(f"no: {refused[each]}" if refused[each] else can for each, can in DEPTH.items())
            rows.append((f"`{name}`", models, *cells))
    rows += [(f"`{name}`", "", f"no: {reason}", *["no"] * 4) for name, reason in REFUSED.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(block: Block | Mixture) -> str:
    """What can be done with a part."""
    if block.refused:
        return f"no: {block.refused}"
    return "yes" if isinstance(block.size, str) else OWN_CLASS


COMMANDS = (Families,)

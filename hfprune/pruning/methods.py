"""Methods: named recipes for a cut, those of papers and our own among them.

A recipe says how units are scored, what of a layer is cut, how the layers share the budget and what makes up for the
units that go. Presets are recipes with a name, a citation and what differs from the original: a file each in the folder
`presets`. To add one, write its file.
"""

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hfprune.errors import UserError
from hfprune.models.units import (
    DEPTH,
    DEPTH_SHARE,
    MIXED,
    STRUCTURES,
    WITH_EXPERTS,
    check_depth_share,
    check_experts_share,
)
from hfprune.pruning import order
from hfprune.pruning.allocation import ALLOCATIONS
from hfprune.pruning.criteria import CRITERIA, GradientCriterion, passes, rankers
from hfprune.pruning.refit_names import IN_EXPERTS, REFITS, RIDGE, SEQUENTIAL, SOLVED
from hfprune.pruning.saving import SAVINGS
from hfprune.pruning.searched import ONE_IN, ROUNDS, SEARCHED, check_searched

CriterionName = Literal[tuple(CRITERIA | order.CRITERIA)]
AllocationName = Literal[tuple(ALLOCATIONS)]
StructureName = Literal[tuple(STRUCTURES)]
RefitName = Literal[REFITS]
FOLDER = Path(__file__).parent / "presets"
DENSE = "dense"  # how results name the model before any cut


class MethodRecipe(BaseModel):
    """What a method does at any budget."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    criterion: CriterionName = Field(description="how units are ranked")
    structure: StructureName = Field("mlp", description="what of a layer is cut")
    allocation: AllocationName = Field("uniform", description="how the layers share a budget")
    refit: RefitName = Field("none", description="what makes up for the units that go")
    attention_share: float | None = Field(
        None, ge=0, le=1, description="of what mlp+attention removes; null: what one ranking of all units gives"
    )
    depth_share: float | None = Field(None, gt=0, lt=1, description=DEPTH_SHARE)
    experts_share: float | None = Field(
        None, gt=0, lt=1, description="of what mlp+experts removes, the share of whole ones; null: what scores give"
    )
    ridge: float = Field(
        RIDGE, ge=0, allow_inf_nan=False, description="how strongly refits keep to the old weights, see docs/pruning.md"
    )

    rounds: int = Field(
        ROUNDS, ge=1, description="with allocation searched, how often all widths are measured a step further"
    )

    @model_validator(mode="after")
    def _share(self) -> "MethodRecipe":
        if self.attention_share is not None and self.structure != "mlp+attention":
            raise ValueError(f"'attention_share' goes with structure mlp+attention, not {self.structure}")
        check_depth_share(self.depth_share, self.structure)
        check_experts_share(self.experts_share, self.structure)
        return self

    @model_validator(mode="after")
    def _criterion(self) -> "MethodRecipe":
        """Experts have criteria of their own, and so have whole sublayers and layers."""
        of_experts = "experts" in STRUCTURES[self.structure]
        usable = order.CRITERIA if self.structure in DEPTH else rankers(STRUCTURES[self.structure], of_experts)
        if self.criterion not in usable:
            raise ValueError(
                f"criterion {self.criterion} does not rank the units of structure {self.structure}; these do: "
                f"{', '.join(usable)}"
            )
        refits = ("none", *IN_EXPERTS.get(self.structure, ()))
        if of_experts and (self.allocation != "uniform" or self.refit not in refits):
            raise ValueError(
                f"structure {self.structure} goes with allocation uniform and refit {' or '.join(refits)}, not "
                f"{self.allocation} and {self.refit}"
            )
        check_searched(self.allocation, self.structure, self.refit)
        return self

    def read(self) -> dict[str, Any]:
        """The parts that decide what comes out: equal for two recipes that make the same models."""
        unread = {"ridge"} if self.refit not in SOLVED else set()
        unread |= {"rounds"} if self.allocation != SEARCHED else set()
        return self.model_dump(exclude=unread, exclude_none=True)

    @property
    def order_criterion(self) -> str:
        """What orders whole sublayers and layers: next to neurons it is always measured."""
        return order.BESIDE_NEURONS.get(self.structure, self.criterion)

    @property
    def needs(self) -> list[str]:
        """What running it takes, for people."""
        if self.structure in DEPTH:
            return [*self._needs_of_order, "GPU: helps, not required"]
        forward, backward = 0, 0
        for light_cut, names in passes([self.criterion]):
            forward += 2 if light_cut else 1
            gradients = {CRITERIA[name].logit_gradient for name in names if _is_gradient(name)}
            backward += len(gradients)
        order_first = self._needs_of_order[:1] if self.structure in MIXED else []
        scoring = [f"{forward} forward pass{'es' if forward > 1 else ''}"]
        scoring += [f"{backward} backward pass{'es' if backward > 1 else ''}"] if backward else []
        needs = [*order_first, f"scoring: {' and '.join(scoring)} over the calibration text"]
        if self.refit != "none":
            several = "4 forward passes" if "experts" in STRUCTURES[self.structure] else "2 forward passes"
            times = several if self.refit in SEQUENTIAL else "1 forward pass"
            needs.append(f"refit: {times} over the same text, a layer at a time")
        if self.refit == "trained":
            needs.append("training of every cut MLP by itself, on the same text: at most 9 forward passes' worth")
        if self.allocation == SEARCHED:
            needs.append(
                f"search: in each of {self.rounds} rounds at most, a forward pass for every width a step narrower and "
                f"wider, from its layer on, over one in {ONE_IN} calibration sequences; all weights in memory"
            )
        if ALLOCATIONS[self.allocation].influence:
            needs.append("allocation: 1 forward pass over the same text")
        stock = self.structure in ("mlp", "experts", WITH_EXPERTS) and self.allocation == "uniform"
        return [*needs, f"checkpoint: {'stock class' if stock else 'widths per layer'}", "GPU: helps, not required"]

    @property
    def _needs_of_order(self) -> list[str]:
        needs = ["order: 1 forward pass over the calibration text"]
        if self.order_criterion in order.SEARCHES:
            needs = [
                "order: for each removal, a forward pass over some of the text for every candidate, from its layer on"
            ]
        if self.refit != "none":
            times = "2 forward passes" if self.refit == "sequential" else "1 forward pass"
            each = "; in the search, after each removal" if self.criterion in order.SEARCHES else ""
            needs.append(f"refit: {times} over the same text, a layer at a time{each}")
        return [*needs, f"checkpoint: {'stock class' if self.structure == 'layers' else 'widths per layer'}"]


class Preset(BaseModel):
    """A method that is known by name.

    Attributes:
        name: as configs, tables and legends have it.
        summary: what it does, in a line.
        recipe: what it does here.
        citation: where it comes from.
        differs: what the original does otherwise; nothing where this is the original.
        calibration: the original's text, samples and length, for people.
        recovery: the original's training after the cut, as keys of a way in the config's `recovery`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    recipe: MethodRecipe
    citation: str
    differs: list[str] = []
    calibration: str | None = None
    recovery: dict[str, Any] = {}


@cache
def presets() -> dict[str, Preset]:
    """All presets by name; the published ones first."""
    import yaml

    found = [Preset.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))) for file in FOLDER.glob("*.yaml")]
    return {
        preset.name: preset for preset in sorted(found, key=lambda each: (each.name.startswith("hfprune"), each.name))
    }


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UserError: there is none.
    """
    if name not in presets():
        raise UserError(unknown(name))
    return presets()[name]


def unknown(name: str) -> str:
    """That no preset has this name, and which have, for a message."""
    by_lower = {known.lower(): known for known in presets()}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    hint = f"Did you mean {by_lower[near[0]]!r}?" if near else f"Known: {', '.join(presets())}."
    return f"no method is called {name!r}. {hint} `hfprune methods` explains them"


def method_name(parts: Mapping[str, Any]) -> str:
    """What results call a cut that no experiment has named: the preset of that recipe, or a name made of its parts.

    Args:
        parts: `criterion`, `structure`, `allocation`, `refit`; where it has them `ridge`, `rounds`, the shares,
            `round_to`, `pad` and `ratio_of`. Criteria and ways that are no longer known are taken as they are.
    """
    usual = {name: field.default for name, field in MethodRecipe.model_fields.items()}
    recipe = {name: parts[name] for name in ("criterion", "structure", "allocation", "refit")}
    recipe |= {"ridge": parts.get("ridge", usual["ridge"])} if recipe["refit"] in SOLVED else {}
    recipe |= {"rounds": parts.get("rounds", usual["rounds"])} if recipe["allocation"] == SEARCHED else {}
    shares = ("attention_share", "depth_share", "experts_share")
    recipe |= {name: parts[name] for name in shares if parts.get(name) is not None}
    known = [preset.name for preset in presets().values() if preset.recipe.read() == recipe]
    unusual = {name: value for name, value in recipe.items() if value != usual.get(name)}
    words = known or [value if isinstance(value, str) else f"{name} {value:g}" for name, value in unusual.items()]
    words += [f"round_to {parts['round_to']}"] if parts.get("round_to", 1) != 1 else []
    words += ["padded"] if parts.get("pad") else []
    return named(" ".join(words), parts.get("ratio_of", "all"))


def named(method: str, ratio_of: str) -> str:
    """What results call a method: its name, and what the ratio is of if that is no number of parameters."""
    return f"{method} ({ratio_of})" if ratio_of in SAVINGS else method


def shares_of(names: Iterable[str]) -> str:
    """What the ratios of methods are shares of, for titles.

    Args:
        names: of methods in results, perhaps with more behind a comma.
    """
    methods = [name.partition(", ")[0] for name in names]
    kinds = {next((of for of in SAVINGS if method.endswith(f" ({of})")), "all parameters") for method in methods}
    return f"of {kinds.pop()}" if len(kinds) == 1 else "of all parameters (or of what stands in brackets)"


def _is_gradient(criterion: str) -> bool:
    return isinstance(CRITERIA[criterion], GradientCriterion)


def overview() -> str:
    """All presets, each with what it does and what it takes."""
    lines = []
    for name, known in presets().items():
        lines += [name, f"  {known.summary}", f"  {'; '.join(known.recipe.needs)}"]
    return "\n".join([*lines, "", "`hfprune methods NAME` explains one; docs/methods.md says how to define your own."])


def explain(name: str) -> str:
    """One preset: its recipe, what it needs, where it comes from and what differs.

    Raises:
        UserError: there is none of that name.
    """
    import yaml

    found = preset(name)
    recipe = yaml.safe_dump(found.recipe.read(), sort_keys=False, default_flow_style=True, width=200).strip()
    parts = [f"{found.name}: {found.summary}", f"recipe   {recipe}"]
    parts += [f"{'needs' if number == 0 else '':8} {need}" for number, need in enumerate(found.recipe.needs)]
    parts += [f"source   {found.citation}"]
    parts += [f"{'differs' if number == 0 else '':8} {each}" for number, each in enumerate(found.differs)]
    if found.calibration:
        parts.append(f"calibration of the original: {found.calibration}")
    if found.recovery:
        settings = yaml.safe_dump(found.recovery, sort_keys=False, default_flow_style=True, width=200).strip()
        parts.append(f"recovery of the original, for `recovery` in a config: {settings}")
    return "\n".join(parts)

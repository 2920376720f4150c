"""The experiment: what a config file may say, every default, every bound.

What one stage reads is declared with the stage, in `hfprune.stages`; the sections here hold those values too.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from hfprune.data.readers import decoded
from hfprune.errors import UserError
from hfprune.stages.declaration import DType, Name, Sampling, Section, Seed, UserPath
from hfprune.stages.evaluate import BATCHING, Batching
from hfprune.stages.prune import (
    AllocationName,
    Count,
    Cut,
    PruneParameters,
    Ratio,
    RefitName,
    StructureName,
    fits_structures,
    one_budget,
)
from hfprune.stages.recover import Training
from hfprune.stages.score import DRAWS, CriterionName
from hfprune.stages.sources import Source
from hfprune.stages.task import TaskSource
from hfprune.stages.text import TextSource


class ModelSource(Source):
    """A dense checkpoint: safetensors with a config and a tokenizer, or one GGUF file."""

    dtype: DType = Field("auto", description="the type to compute and save in; auto: the checkpoint's own")


class Recovery(Training):
    """A way to train after the cut; grids of `pruning` name it."""

    text: Name = Field(description="a name in `texts`: instructions, of which responses are learned, or plain text")
    dense: bool = Field(True, description="train the dense model so too, the control; not for distillation")


class Calibration(Sampling):
    """The text that neurons are scored on."""

    text: Name = Field(description="a name in `texts`")
    seeds: list[Seed] = Field([0], min_length=1, description="each draws sequences of its own")
    draws: int = DRAWS
    shards: int = Field(1, ge=1, description="jobs that scoring is cut into; scores do not depend on it")

    @model_validator(mode="after")
    def _shards(self) -> Calibration:
        if self.shards > self.samples:
            raise ValueError(f"shards = {self.shards}: there are only {self.samples} samples to share out")
        return self


class Pruning(Cut):
    """What is cut: every combination of criterion, budget, structure, allocation and refit."""

    criteria: list[CriterionName] = Field(["entropy"], min_length=1, description="how neurons are ranked")
    target_parameters: list[Count] | None = Field(
        None, min_length=1, description="instead of ratios: how many of all parameters to leave"
    )
    ratios: list[Ratio] | None = Field(
        default_factory=lambda given: None if given.get("target_parameters") else [0.1, 0.2, 0.3],
        min_length=1,
        description="shares to remove (default: 0.1, 0.2, 0.3, where target_parameters is not given)",
    )
    structures: list[StructureName] = Field(["mlp"], min_length=1, description="what of a layer is cut")
    allocations: list[AllocationName] = Field(["uniform"], min_length=1, description="how layers share a budget")
    refits: list[RefitName] = Field(["none"], min_length=1, description="what makes up for the neurons that go")
    recoveries: list[Name] = Field(["none"], min_length=1, description="training after the cut: names in `recovery`")

    @model_validator(mode="after")
    def _budget(self) -> Pruning:
        one_budget(self, "ratios", "target_parameters")
        fits_structures(self, self.structures, "structures")
        return self

    def cuts(self, dtype: str) -> Iterator[PruneParameters]:
        """Every cut to make by one criterion's scores."""
        common = {name: getattr(self, name) for name in Cut.model_fields}
        budgets = [{"ratio": ratio} for ratio in self.ratios or []]
        budgets += [{"target_parameters": target} for target in self.target_parameters or []]
        for budget, structure, allocation, refit in product(budgets, self.structures, self.allocations, self.refits):
            shared = common | ({} if structure == "mlp+attention" else {"attention_share": None})
            way = {"structure": structure, "allocation": allocation, "refit": refit}
            yield PruneParameters(**budget, **shared, **way, dtype=dtype)


# One grid or several; the tags tell pydantic which is meant, and are no keys.
ONE, SEVERAL = "one grid", "several grids"
Prunings = Annotated[
    Annotated[Pruning, Tag(ONE)] | Annotated[list[Pruning], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(lambda value: SEVERAL if isinstance(value, list) else ONE),
]


class Evaluation(Section):
    """Zero-shot tasks of lm-eval."""

    tasks: dict[Name, TaskSource] = Field(
        {}, description="lm-eval's task name, and its documents; none: fidelity alone"
    )
    limit: int | None = Field(None, ge=1, description="documents per task, drawn by the seed; null: all")
    seed: Seed = 0
    batching: Batching = BATCHING


class Fidelity(Sampling):
    """The held-out texts that models are compared with the dense one on; `samples` of each."""

    texts: list[Name] = Field(min_length=1, description="names in `texts`; the first stands in tables and figures")
    seed: Seed = 0


class Experiment(Section):
    """A whole experiment, as a config file states it."""

    experiment: Name = Field(description="results go to results/<experiment>")
    store: UserPath = Field(Path("store"), description="folder of all artifacts; HFPRUNE_STORE overrides it")
    strict: bool = Field(
        False, description="score nothing where what is calibrated or trained on overlaps with what is tested on"
    )
    model: ModelSource
    texts: dict[Name, TextSource] = Field(min_length=1)
    calibration: Calibration
    pruning: Prunings = Field(Pruning(), description="one grid of cuts, or a list of grids")
    recovery: dict[Name, Recovery] = Field({}, description="ways to train after the cut, by a name of your own")
    evaluation: Evaluation = Evaluation()
    fidelity: Fidelity
    further: list[Name] = Field([], description="experiments that have been run, whose models table 3 shows too")

    @property
    def grids(self) -> list[Pruning]:
        """What is cut, always as a list."""
        return self.pruning if isinstance(self.pruning, list) else [self.pruning]

    @property
    def criteria(self) -> list[str]:
        """All criteria of all grids, each once."""
        return list(dict.fromkeys(name for grid in self.grids for name in grid.criteria))

    def cuts(self) -> dict[tuple[str, PruneParameters], list[str]]:
        """Every cut of all grids with its criterion, and how the model is trained after it, each once."""
        found: dict[tuple[str, PruneParameters], dict[str, None]] = {}
        for grid in self.grids:
            for name, cut in product(grid.criteria, grid.cuts(self.model.dtype)):
                found.setdefault((name, cut), {}).update(dict.fromkeys(grid.recoveries))
        return {each: list(recoveries) for each, recoveries in found.items()}

    @model_validator(mode="after")
    def _texts(self) -> Experiment:
        read = {"calibration.text": self.calibration.text}
        read |= {f"recovery.{name}.text": way.text for name, way in self.recovery.items()}
        heldout = {f"fidelity.texts.{i}": name for i, name in enumerate(self.fidelity.texts)}
        for key, name in (read | heldout).items():
            if name not in self.texts:
                raise ValueError(f"{key} = {name!r}: not one of `texts`: {', '.join(self.texts)}")
            if not key.startswith("recovery") and self.texts[name].instruction is not None:
                raise ValueError(f"{key} = {name!r} holds instructions; plain text is needed here")
        for (key, name), (other, used) in product(heldout.items(), read.items()):
            if _share_documents(self.texts[name], self.texts[used]):
                raise ValueError(
                    f"{key} = {name!r} shares documents with {other} = {used!r}: held-out text must be other text. "
                    "Name another, or split the documents of one by `documents: [first, after last]`"
                )
        for (key, name), (other, same) in combinations(heldout.items(), 2):
            if _is_same(self.texts[name], self.texts[same]):
                raise ValueError(f"{key} = {name!r} and {other} = {same!r} are the same text. Leave one out")
        return self

    @model_validator(mode="after")
    def _named_apart(self) -> Experiment:
        """Refuse cuts that results would call by one name."""
        seen: dict[tuple, PruneParameters] = {}
        for criterion, cut in self.cuts():
            budget = (cut.ratio, cut.ratio_of, cut.target_parameters)
            other = seen.setdefault((criterion, *budget, cut.structure, cut.allocation, cut.refit), cut)
            if differing := [name for name in Cut.model_fields if getattr(cut, name) != getattr(other, name)]:
                raise ValueError(
                    f"pruning: two cuts by {criterion} ({cut.label}) differ only in {differing[0]}, which results do "
                    "not tell apart: put them into two experiments"
                )
        return self

    @model_validator(mode="after")
    def _further(self) -> Experiment:
        if self.experiment in self.further or len(set(self.further)) < len(self.further):
            raise ValueError(
                f"further = {self.further}: expected other experiments than {self.experiment!r}, each once"
            )
        return self

    @model_validator(mode="after")
    def _recoveries(self) -> Experiment:
        if "none" in self.recovery:
            raise ValueError("recovery.none: 'none' stands for no training after the cut; choose another name")
        for number, grid in enumerate(self.grids):
            for name in grid.recoveries:
                if name != "none" and name not in self.recovery:
                    where = f"pruning.{number}" if isinstance(self.pruning, list) else "pruning"
                    known = ", ".join(["none", *self.recovery])
                    raise ValueError(f"{where}.recoveries = {name!r}: not one of `recovery`: {known}")
        return self


def _share_documents(one: TextSource, other: TextSource) -> bool:
    if one.origin() != other.origin():
        return False
    (start, stop), (other_start, other_stop) = (each.documents or (0, float("inf")) for each in (one, other))
    return start < other_stop and other_start < stop


def _is_same(one: TextSource, other: TextSource) -> bool:
    return (one.origin(), one.form) == (other.origin(), other.form)


def load(path: Path) -> Experiment:
    """The experiment that a config file states.

    Raises:
        UserError: the file is missing, not YAML, or not an experiment.
    """
    return parse(Experiment, read(path), str(path))


def read(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        UserError: the file is missing, not UTF-8 or not YAML, or has a key twice.
    """
    import yaml

    try:
        content = decoded(path)
        values = yaml.safe_load(content)
        _refuse_repeated_keys(yaml.compose(content, yaml.SafeLoader), path)
    except OSError as error:
        said = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UserError(f"{path}: {said}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}.")
    return values


def _refuse_repeated_keys(node: Any, path: Path) -> None:
    """Refuse a key that stands twice in one section of a composed YAML file: of two values YAML drops one silently."""
    seen = {}
    for child in node.value if isinstance(getattr(node, "value", None), list) else []:
        if isinstance(child, tuple):
            key, child = child
            first = seen.setdefault(str(key.value), key)
            if first is not key:
                lines = key.start_mark.line + 1, first.start_mark.line + 1
                raise UserError(f"{path}: line {lines[0]}: {key.value!r} stands in line {lines[1]} already. Keep one.")
        _refuse_repeated_keys(child, path)


def schema() -> str:
    """The JSON schema of a config file."""
    return json.dumps(Experiment.model_json_schema(), indent=1) + "\n"


def parse(model: type[BaseModel], values: Mapping[str, Any], origin: str) -> Any:
    """`values` as a validated `model`.

    Raises:
        UserError: one line per fault, each with the origin, the key, the value found and what was expected.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("\n".join(_explain(model, fault, origin) for fault in error.errors())) from None


def _explain(model: type[Section], fault: Mapping[str, Any], origin: str) -> str:
    location = tuple(part for part in fault["loc"] if part not in (ONE, SEVERAL))
    path = ".".join(map(str, location))
    where = f"{origin}: {path}" if path else origin
    if fault["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{where}: unknown key. " + (f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}.")
    if fault["type"] == "missing":
        return f"{where}: missing; it has no default."
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {message}."
    near = []
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        choices = [part.strip(" '") for part in fault["ctx"]["expected"].replace(" or ", ",").split(",")]
        near = difflib.get_close_matches(fault["input"], choices, n=1)
    return f"{where} = {fault['input']!r}: {message}." + (f" Did you mean {near[0]!r}?" if near else "")


def _keys_at(model: Any, loc: tuple) -> list[str]:
    """The keys that the section at `loc` below `model` knows."""
    for part in loc:
        if isinstance(part, int):  # an item of a list
            continue
        if isinstance(model, type) and issubclass(model, Section):
            model = Pruning if part == "pruning" else model.model_fields[part].annotation
        else:
            model = get_args(model)[-1]  # dict[Name, X]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, Section) else []

"""The config file of an experiment: its keys, defaults and bounds.

The parameters of a stage are declared with the stage, in `hfprune.stages`; the sections here include them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from hfprune.data.readers import decoded
from hfprune.errors import UserError
from hfprune.models.units import DEPTH, DEPTH_SHARE
from hfprune.pruning.convergence import check_until
from hfprune.pruning.methods import (
    DENSE,
    AllocationName,
    CriterionName,
    MethodRecipe,
    RefitName,
    StructureName,
    presets,
    unknown,
)
from hfprune.pruning.refit_names import RIDGE
from hfprune.pruning.saving import SAVINGS
from hfprune.pruning.searched import ROUNDS, SEARCHED, too_few
from hfprune.sharing.quantizer import FileType
from hfprune.stages.budget import (
    CONTEXT,
    LATENCIES,
    ROUND_TO,
    Context,
    Count,
    LatencyFile,
    Ratio,
    RatioOf,
    RoundTo,
)
from hfprune.stages.declaration import DType, Memory, Name, Products, Sampling, Section, Seed, UserPath
from hfprune.stages.evaluate import BATCHING, Batching, check_batching
from hfprune.stages.prune import PruneParameters
from hfprune.stages.recover import Training
from hfprune.stages.score import DRAWS, UNTIL
from hfprune.stages.sources import Source
from hfprune.stages.task import TaskSource
from hfprune.stages.text import TextSource

MethodName = Annotated[
    str,
    Field(
        pattern=r"^\w([\w .+()-]*[\w.+)])?$", description="letters and digits; inside it also spaces and . + - _ ( )"
    ),
]
SHAPE = ("ratio_of", "round_to", "pad")  # settings of a cut beside its method and its budget


class ModelSource(Source):
    """A dense checkpoint: safetensors with a config and a tokenizer, or one GGUF file."""

    dtype: DType = Field("auto", description="number format to compute and save in; auto: that of the checkpoint")
    memory: Memory = "auto"


class Mixture(Section):
    """Several texts as one."""

    mix: list[Name] = Field(
        min_length=2,
        description="names in `texts`; calibration draws as many sequences of each, training reads all documents",
    )

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (others := [name for name in values if name != "mix"]):
            raise ValueError(f"{others[0]!r} does not go with 'mix': it belongs to the texts that are mixed")
        return values


SOURCE, MIXTURE = "a source", "a mixture"  # tags that tell pydantic which form a text has; they are no keys
Text = Annotated[
    Annotated[TextSource, Tag(SOURCE)] | Annotated[Mixture, Tag(MIXTURE)],
    Discriminator(
        lambda value: (
            MIXTURE if isinstance(value, Mixture) or (isinstance(value, Mapping) and "mix" in value) else SOURCE
        )
    ),
]


class Recovery(Training):
    """A training after the cut; `recoveries` name it."""

    text: Name = Field(description="a name in `texts`: plain text, or instructions (the model learns the responses)")
    dense: bool = Field(
        True, description="also train the dense model, as a control; not with distillation or select degradation"
    )


class Calibration(Sampling):
    """The text on which neurons are scored."""

    text: Name = Field(description="a name in `texts`")
    seeds: list[Seed] = Field([0], min_length=1, description="each draws other sequences; results are means over them")
    draws: int = DRAWS
    shards: int = Field(1, ge=1, description="jobs that share the scoring; scores do not depend on it")
    products: Products = "auto"
    until: float | None = UNTIL

    @model_validator(mode="after")
    def _shards(self) -> Calibration:
        if self.shards > self.samples:
            raise ValueError(f"shards = {self.shards}: there are only {self.samples} samples to share out")
        check_until(self.until, self.samples)
        if self.until is not None and self.shards > 1:
            raise ValueError(
                f"until = {self.until} with shards = {self.shards}: shards sum all samples, so none can stop early. "
                "Write `shards: 1`, or leave out until"
            )
        return self


class MethodSettings(Section):
    """One method in a config: its recipe, and settings that replace those of the experiment."""

    like: str | None = Field(None, description="a preset to start from; the other keys here replace its values")
    criterion: CriterionName | None = Field(None, description="how units are ranked")
    structure: StructureName | None = Field(None, description="which part of each layer is cut (default: mlp)")
    allocation: AllocationName | None = Field(None, description="how layers share the budget (default: uniform)")
    refit: RefitName | None = Field(None, description="how the other weights make up for removed units (default: none)")
    attention_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="attention's share of what is removed (default: from one ranking of all units)",
    )
    depth_share: float | None = Field(None, gt=0, lt=1, description=DEPTH_SHARE)
    experts_share: float | None = Field(
        None, gt=0, lt=1, description="of what mlp+experts removes, the share of whole experts (default: from scores)"
    )
    ridge: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description=f"how strongly a refit is held to the old weights (default: {RIDGE})",
    )
    rounds: int | None = Field(
        None, ge=1, description=f"with allocation searched, how often all widths are measured (default: {ROUNDS})"
    )
    ratios: list[Ratio] | None = Field(None, min_length=1, description="replaces the experiment's `ratios`")
    target_parameters: list[Count] | None = Field(
        None, min_length=1, description="replaces the experiment's `target_parameters`"
    )
    ratio_of: RatioOf | None = Field(None, description="replaces the experiment's `ratio_of`")
    round_to: RoundTo | None = Field(None, description="replaces the experiment's `round_to`")
    pad: bool | None = Field(None, description="replaces the experiment's `pad`")
    recoveries: list[Name] | None = Field(None, min_length=1, description="replaces the experiment's `recoveries`")

    @model_validator(mode="after")
    def _budget(self) -> MethodSettings:
        if self.ratios and self.target_parameters:
            raise ValueError("give at most one of ratios and target_parameters, not both")
        self.recipe()
        return self

    def recipe(self) -> MethodRecipe | None:
        """The recipe written here; None if there are only settings, as for a preset."""
        values = self.model_dump(include=set(MethodRecipe.model_fields), exclude_none=True)
        if self.like is not None:
            if self.like not in presets():
                raise ValueError(f"like = {self.like!r}: {unknown(self.like)}")
            values = presets()[self.like].recipe.model_dump(exclude_none=True) | values
        elif not values:
            return None
        elif "criterion" not in values:
            raise ValueError(
                f"{next(iter(values))!r} alone: a method needs a `criterion`, or a preset to start from in `like`"
            )
        if "attention_share" in values and values.get("structure") != "mlp+attention":
            raise ValueError("'attention_share' goes with structure mlp+attention alone")
        return MethodRecipe(**values)


NAME, SETTINGS = "a name", "a name with settings"  # tags that tell pydantic which form an entry has; they are no keys


def _read_entry(value: Any) -> Any:
    """Refuse an entry that is neither a name nor one name with its settings; clearer than pydantic's own message."""
    if isinstance(value, dict):
        if len(value) != 1:
            raise ValueError(
                f"expected one name with its settings indented below it, found {len(value)} keys: "
                f"{', '.join(map(str, value))}. Write `- mine: {{criterion: entropy, refit: sequential}}`"
            )
        ((name, settings),) = value.items()
        return name if settings is None else value
    if not isinstance(value, str):
        raise ValueError(f"expected a method's name, or one with its settings, found {value!r}")
    return value


def entry_name(entry: str | dict[str, MethodSettings]) -> str:
    """The name of a method in the config's list."""
    return entry if isinstance(entry, str) else next(iter(entry))


def _read_methods(value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError("expected a list of methods: [HFPrune, FLAP], each of your own as `- name: {criterion: ...}`")
    return value


def recipes(entries: Sequence[str | dict[str, MethodSettings]]) -> dict[str, MethodRecipe]:
    """The recipes of all presets and of the methods in a config's list, by name.

    Raises:
        ValueError: a name has no recipe, or two; or `dense` or a preset's name has a recipe.
    """
    known = {name: preset.recipe for name, preset in presets().items()}
    for number, entry in enumerate(entries):
        name = entry_name(entry)
        recipe = None if isinstance(entry, str) else entry[name].recipe()
        where = f"methods.{number} = {name!r}"
        if name in (DENSE, "none"):
            raise ValueError(f"{where}: stands for the model before the cut; choose another name")
        if recipe is not None and name in presets():
            raise ValueError(
                f"{where}: a preset. One that differs needs a name of its own: `- my {name}: {{like: {name}, ...}}`"
            )
        if recipe is None and name not in known:
            raise ValueError(
                f"{where}: {unknown(name)}. A method of your own needs a recipe: `- {name}: {{criterion: entropy}}`"
            )
        if recipe is not None and known.setdefault(name, recipe).read() != recipe.read():
            raise ValueError(f"{where}: stands there twice with different recipes. Give one of them another name")
    return known


def _known(entries: list[str | dict[str, MethodSettings]]) -> list[str | dict[str, MethodSettings]]:
    recipes(entries)
    return entries


MethodEntry = Annotated[
    Annotated[MethodName, Tag(NAME)] | Annotated[dict[MethodName, MethodSettings], Tag(SETTINGS)],
    Discriminator(lambda value: SETTINGS if isinstance(value, dict) else NAME),
    BeforeValidator(_read_entry),
]


class MethodCut(NamedTuple):
    """A method at one budget.

    Attributes:
        method: its name.
        criterion: whose scores it reads.
        cut: what stage `prune` reads.
    """

    method: str
    criterion: str
    cut: PruneParameters


class Evaluation(Section):
    """Zero-shot tasks, run by lm-eval."""

    tasks: dict[Name, TaskSource] = Field(
        {}, description="by lm-eval's name, the source of a task's documents; without tasks only fidelity is measured"
    )
    limit: int | None = Field(None, ge=1, description="documents per task, drawn by the seed; null: all of them")
    seed: Seed = 0
    batching: Batching = BATCHING


class Fidelity(Sampling):
    """The held-out texts on which models are compared with the dense one; `samples` sequences of each."""

    texts: list[Name] = Field(min_length=1, description="names in `texts`; tables and figures show the first")
    seed: Seed = 0


COMMITTED = ("leaderboard", "published")  # folders of results/ whose files come with the project


def _not_committed(name: str) -> str:
    if name in COMMITTED:
        raise ValueError(
            f"{name!r}: results/{name} has files that come with the project; give the experiment another name"
        )
    return name


class Deploy(Section):
    """What `snakemake deploy` compares: every model as GGUF files of these types, beside the dense model in them."""

    types: list[FileType] = Field(
        ["f16", "q8_0"], min_length=1, description="types of the files; q2_k to q6_k need llama-quantize on the PATH"
    )
    text: Name | None = Field(None, description="held-out text, one of `fidelity.texts`; null: the first")
    samples: int | None = Field(None, ge=1, description="sequences of it, at most `fidelity.samples`; null: all")


class Experiment(Section):
    """A whole experiment: what a config file contains."""

    experiment: Annotated[Name, AfterValidator(_not_committed)] = Field(
        description="name; results go to results/<experiment>"
    )
    store: UserPath = Field(Path("store"), description="folder of all artifacts; $HFPRUNE_STORE overrides it")
    strict: bool = Field(
        False, description="stop before scoring if calibration or training text overlaps with held-out text or tasks"
    )
    model: ModelSource
    texts: dict[Name, Text] = Field(min_length=1)
    calibration: Calibration
    methods: Annotated[list[MethodEntry], BeforeValidator(_read_methods), AfterValidator(_known)] = Field(
        ["HFPrune"],
        min_length=1,
        description="presets by name (`hfprune methods` lists them), and methods of your own: a name with its recipe",
    )
    target_parameters: list[Count] | None = Field(
        None, min_length=1, description="instead of ratios: how many parameters the model keeps"
    )
    ratios: list[Ratio] | None = Field(
        default_factory=lambda values: None if values.get("target_parameters") else [0.1, 0.2, 0.3],
        min_length=1,
        description="shares to remove (default: 0.1, 0.2, 0.3, unless target_parameters is set)",
    )
    ratio_of: RatioOf = Field(
        "all",
        description="what ratios refer to: all parameters (tied embeddings count once), the MLPs' neurons, the memory "
        "of weights and cache, or the time to decode a token",
    )
    context: Context | None = Field(None, description=CONTEXT)
    latencies: LatencyFile | None = Field(None, description=LATENCIES)
    round_to: RoundTo | None = Field(None, description=ROUND_TO)
    pad: bool = Field(False, description="give all layers one width again by zeros, which save no memory")
    recoveries: list[Name] = Field(
        ["none"], min_length=1, description="trainings after the cut: none, or names in `recovery`"
    )
    recovery: dict[Name, Recovery] = Field({}, description="trainings after the cut, by names of your own")
    evaluation: Evaluation = Evaluation()
    fidelity: Fidelity
    deploy: Deploy | None = Field(None, description="what `snakemake deploy` compares; null: nothing")
    further: list[Name] = Field([], description="other experiments, already run, whose models table 3 shows too")

    @property
    def criteria(self) -> list[str]:
        """The criteria that score units, of all methods, without repeats."""
        return list(dict.fromkeys(cut.criterion for cut in self.cuts() if cut.cut.structure not in DEPTH))

    @property
    def until_ratio(self) -> float | None:
        """The largest ratio of the cuts that read scores, at which halves of the calibration text agree least."""
        return max(
            (cut.cut.ratio for cut in self.cuts() if cut.cut.ratio and cut.cut.structure not in DEPTH), default=None
        )

    def cuts(self) -> dict[MethodCut, list[str]]:
        """Every method at each of its budgets, with its trainings after the cut; without repeats."""
        recoveries: dict[MethodCut, dict[str, None]] = {}
        for entry, recipe in self._entries():
            for cut, names in self._cuts_of(entry, recipe):
                recoveries.setdefault(cut, {}).update(dict.fromkeys(names))
        return {cut: list(names) for cut, names in recoveries.items()}

    def _entries(self) -> list[tuple[str | dict[str, MethodSettings], MethodRecipe]]:
        """The list of methods with their recipes."""
        known = recipes(self.methods)
        return [(entry, known[entry_name(entry)]) for entry in self.methods]

    def _cuts_of(
        self, entry: str | dict[str, MethodSettings], recipe: MethodRecipe
    ) -> Iterator[tuple[MethodCut, list[str]]]:
        """The cuts of one method in the list, each with its trainings after the cut."""
        name = entry_name(entry)
        settings = MethodSettings() if isinstance(entry, str) else entry[name]
        source = settings if settings.ratios or settings.target_parameters else self
        budgets: list[dict[str, Any]] = [{"ratio": ratio} for ratio in source.ratios or []]
        budgets += [{"target_parameters": target} for target in source.target_parameters or []]
        shape = {key: getattr(self, key) if (own := getattr(settings, key)) is None else own for key in SHAPE}
        if needed := SAVINGS.get(shape["ratio_of"]):
            shape[needed] = getattr(self, needed)
        for budget in budgets:
            loading = self.model.model_dump(include={"dtype", "memory"})
            parameters = {**recipe.model_dump(exclude={"criterion"}), **budget, **shape, **loading}
            yield (
                MethodCut(name, recipe.criterion, PruneParameters(**parameters)),
                settings.recoveries or self.recoveries,
            )

    @model_validator(mode="before")
    @classmethod
    def _no_grids(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "pruning" in values:
            raise ValueError(
                "`pruning` grids are now `methods:`, a list of names, with `ratios` and `recoveries` beside it. A "
                "grid's criterion, structure, allocation and refit together are one method with a name: "
                "`- mine: {criterion: entropy, refit: sequential}`; docs/methods.md shows how"
            )
        return values

    @model_validator(mode="after")
    def _budgets(self) -> Experiment:
        if (self.ratios is None) == (self.target_parameters is None):
            present = "both" if self.ratios else "none"
            raise ValueError(f"give exactly one of ratios and target_parameters, not {present}")
        for number, (entry, recipe) in enumerate(self._entries()):
            try:
                list(self._cuts_of(entry, recipe))
            except ValidationError as error:  # settings of the entry and of the experiment that do not go together
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"methods.{number} ({entry_name(entry)}): {message}") from None
        for of, name in SAVINGS.items():
            if getattr(self, name) is not None and not any(cut.cut.ratio_of == of for cut in self.cuts()):
                raise ValueError(f"{name!r} goes with 'ratio_of: {of}' alone, which no method has")
        return self

    @model_validator(mode="after")
    def _until(self) -> Experiment:
        if self.calibration.until is not None and self.criteria and self.until_ratio is None:
            raise ValueError(
                f"calibration.until = {self.calibration.until}: halves of the text are compared at the largest of "
                "`ratios`, and there are only target_parameters. Write ratios, or leave out calibration.until"
            )
        return self

    def sources(self, name: str) -> dict[str, TextSource]:
        """The text of this name in `texts`, or those that it mixes, by their names."""
        text = self.texts[name]
        return {part: self.texts[part] for part in text.mix} if isinstance(text, Mixture) else {name: text}

    @model_validator(mode="after")
    def _texts(self) -> Experiment:
        read = {"calibration.text": self.calibration.text}
        read |= {f"recovery.{name}.text": recovery.text for name, recovery in self.recovery.items()}
        heldout = {f"fidelity.texts.{i}": name for i, name in enumerate(self.fidelity.texts)}
        mixed = {
            f"texts.{name}.mix.{i}": part
            for name, text in self.texts.items()
            if isinstance(text, Mixture)
            for i, part in enumerate(text.mix)
        }
        for key, name in (mixed | read | heldout).items():
            if name not in self.texts:
                raise ValueError(f"{key} = {name!r}: not one of `texts`: {', '.join(self.texts)}")
            if isinstance(self.texts[name], Mixture):
                if key not in read:
                    raise ValueError(f"{key} = {name!r} is a mixture, and only calibration and training read one")
                continue
            if self.texts[name].random and key != "calibration.text":
                raise ValueError(f"{key} = {name!r} holds random tokens, which only calibrate; name another text")
            if not key.startswith("recovery") and self.texts[name].instruction is not None:
                raise ValueError(f"{key} = {name!r} holds instructions; plain text is needed here")
        if self.calibration.samples < (texts := len(self.sources(self.calibration.text))):
            raise ValueError(
                f"calibration.samples = {self.calibration.samples}: {self.calibration.text!r} mixes {texts} texts, and "
                "each gives one sequence or more"
            )
        parts = [
            (f"texts.{name}.mix" if isinstance(self.texts[name], Mixture) else key, part)
            for key, name in read.items()
            for part in self.sources(name)
        ]
        for (key, name), (other, used) in product(heldout.items(), parts):
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
    def _deployed(self) -> Experiment:
        if not self.deploy:
            return self
        if self.deploy.text not in (None, *self.fidelity.texts):
            known = ", ".join(self.fidelity.texts)
            raise ValueError(f"deploy.text = {self.deploy.text!r}: not one of `fidelity.texts`: {known}")
        if (self.deploy.samples or 0) > self.fidelity.samples:
            raise ValueError(
                f"deploy.samples = {self.deploy.samples}: more than fidelity.samples = {self.fidelity.samples}, of "
                "which they are the first. Raise that, or take fewer"
            )
        return self

    @model_validator(mode="after")
    def _named_apart(self) -> Experiment:
        """Refuse two names for one cut, and one name for two."""
        names: dict[str, str] = {}
        cuts: dict[tuple, PruneParameters] = {}
        for method, criterion, cut in self.cuts():
            other = names.setdefault(json.dumps([criterion, cut.read()]), method)
            if other != method:
                raise ValueError(f"methods: {other!r} and {method!r} are the same cut ({cut.label}). Leave one out")
            known = cuts.setdefault((method, cut.ratio, cut.ratio_of, cut.target_parameters), cut)
            differing = [name for name in type(cut).model_fields if getattr(cut, name) != getattr(known, name)]
            if differing:
                raise ValueError(
                    f"methods: {method!r} stands there twice for {cut.label}, and differs in {differing[0]}. Give one "
                    "of them another name"
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
    def _batching(self) -> Experiment:
        check_batching(self.evaluation.batching, self.model.memory)
        return self

    @model_validator(mode="after")
    def _searches(self) -> Experiment:
        searched = next((cut.method for cut in self.cuts() if cut.cut.allocation == SEARCHED), None)
        if searched is None:
            return self
        if reason := too_few(self.calibration.samples):
            raise ValueError(f"calibration.samples = {self.calibration.samples} with method {searched!r}: {reason}")
        if self.model.memory == "streamed":
            raise ValueError(
                f"model.memory = 'streamed' with method {searched!r}: allocation {SEARCHED} changes and reads all "
                "weights many times. Write `memory: auto`, or take a method of another allocation, such as hfprune-best"
            )
        return self

    @model_validator(mode="after")
    def _recoveries(self) -> Experiment:
        trained = [way for ways in self.cuts().values() for way in ways if way != "none"]
        if trained and self.model.memory == "streamed":
            raise ValueError(
                f"model.memory = 'streamed' with recoveries {trained[0]!r}: training needs the weights in memory, "
                "because every step changes or reads all of them. Write `memory: auto`, or leave out the recoveries"
            )
        if "none" in self.recovery:
            raise ValueError("recovery.none: 'none' stands for no training after the cut; choose another name")
        named = {"recoveries": self.recoveries}
        for number, entry in enumerate(self.methods):
            if isinstance(entry, dict):
                name = entry_name(entry)
                named[f"methods.{number}.{name}.recoveries"] = entry[name].recoveries or []
        for where, names in named.items():
            for name in names:
                if name != "none" and name not in self.recovery:
                    known = ", ".join(["none", *self.recovery])
                    raise ValueError(f"{where} = {name!r}: not one of `recovery`: {known}")
        return self


def _share_documents(one: TextSource, other: TextSource) -> bool:
    if one.origin() != other.origin():
        return False
    (start, stop), (other_start, other_stop) = (source.documents or (0, float("inf")) for source in (one, other))
    return start < other_stop and other_start < stop


def _is_same(one: TextSource, other: TextSource) -> bool:
    return (one.origin(), one.form) == (other.origin(), other.form)


def load(path: Path) -> Experiment:
    """The experiment that a config file states.

    Raises:
        UserError: the file is missing, not YAML, or not an experiment.
    """
    return parse(Experiment, read(path), str(path))


def as_yaml(experiment: Experiment) -> str:
    """An experiment as a config file, with every default filled in."""
    import yaml

    return yaml.safe_dump(json.loads(experiment.model_dump_json(exclude_none=True)), sort_keys=False)


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
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UserError(f"{path}: {reason}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}.")
    return values


def _refuse_repeated_keys(node: Any, path: Path) -> None:
    """Refuse a key that is written twice in one section of a composed YAML file: YAML drops one value silently."""
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


def parse(model: type[BaseModel], values: Mapping[str, Any], origin: str = "") -> Any:
    """`values` as a validated `model`. `origin` is where they stand; a command's options stand nowhere.

    Raises:
        UserError: one line per fault, each with the origin, the key, the value found and what was expected.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("\n".join(_explain(model, fault, origin) for fault in error.errors())) from None


def _explain(model: type[Section], fault: Mapping[str, Any], origin: str) -> str:
    location = tuple(part for part in fault["loc"] if part not in (NAME, SETTINGS, SOURCE, MIXTURE))
    path = ".".join(map(str, location))
    where = ": ".join(part for part in (origin, path) if part)
    if fault["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{where}: unknown key. " + (f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}.")
    if fault["type"] == "missing":
        return f"{where}: missing; it has no default."
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return ": ".join(part for part in (where, f"{message}.") if part)
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
            model = dict[str, MethodSettings] if part == "methods" else model.model_fields[part].annotation
        else:
            model = get_args(model)[-1]  # dict[Name, X]
    section = _first_section(model)
    return list(section.model_fields) if section else []


def _first_section(annotation: Any) -> type[Section] | None:
    """The first section that a type names."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_first_section, get_args(annotation))), None)

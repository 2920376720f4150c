"""Running a stage: the key of its artifact, and making it."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hfprune.errors import UserError
from hfprune.stages.declaration import Parameters, Stage
from hfprune.store import artifacts
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.keys import Recipe, code_digest, versions


class ArtifactOrJob(Protocol):
    """An artifact, or a job that will make one."""

    @property
    def key(self) -> str:
        """Key of the artifact."""

    @property
    def parameters(self) -> Any:
        """The stage's parameters that affect the artifact's content."""


Inputs = Mapping[str, ArtifactOrJob | Sequence[ArtifactOrJob] | None]


def recipe(stage: Stage, parameters: Parameters, inputs: Inputs) -> Recipe:
    """The recipe of a stage's artifact, from its parameters and its inputs."""
    keys: dict[str, str] = {}
    for name, source in inputs.items():
        if source is not None and stage.inputs[name].in_key:
            several = isinstance(source, list)
            keys |= {f"{name}.{i}": one.key for i, one in enumerate(source)} if several else {name: source.key}
    read = parameters.read()
    if stage.parts:
        read = {}
        keys |= {name: recipe(*part).key for name, part in stage.parts(parameters, inputs).items()}
    return Recipe(stage.name, read, keys, code_digest(stage.module), versions(stage.libraries))


def open_artifact(path: Path, *stages: str, files: Sequence[str] = ()) -> Artifact:
    """Open the artifact at `path` (its folder or manifest), which must come from one of the `stages`.

    If `files` are given, only these are read and verified.

    Raises:
        UserError: the artifact comes from another stage, is missing, or is damaged.
    """
    artifact = artifacts.read(path, *files)
    if artifact.manifest["stage"] not in stages:
        raise UserError(
            f"{path}: an artifact of {artifact.manifest['stage']!r}; expected one of {' or '.join(stages)}."
        )
    return artifact


class StageRun:
    """One run of a stage. Its `produce` and `check` reach the store through it.

    Args:
        store: the store to write to.
        stage: the stage.
        inputs: the opened inputs, by name.
        together: parameters of further artifacts to make in the same run if they are missing.
    """

    def __init__(self, store: Store, stage: Stage, inputs: Inputs, together: Sequence[Parameters] = ()) -> None:
        self.store, self.stage, self.inputs, self.together = store, stage, inputs, together

    def key(self, stage: Stage, parameters: Parameters, inputs: Inputs) -> str:
        """The key that another artifact has."""
        return recipe(stage, parameters, inputs).key

    def has(self, stage: Stage, parameters: Parameters, inputs: Inputs) -> bool:
        """Whether another artifact is in the store."""
        return self.store.has(stage.name, self.key(stage, parameters, inputs))

    def make(self, stage: Stage, parameters: Parameters, inputs: Inputs) -> Artifact:
        """Take another artifact from the store, or make it."""
        run = StageRun(self.store, stage, inputs)
        return self.store.make(
            recipe(stage, parameters, inputs), lambda folder: stage.produce(folder, inputs, parameters, run)
        )

    def missing(self) -> list[Parameters]:
        """The parameters in `together` whose artifacts are not in the store."""
        return [
            parameters
            for parameters in self.together
            if not self.store.has(self.stage.name, self._recipe(parameters).key)
        ]

    def add(self, parameters: Parameters, produce: Callable[[Path], dict[str, Any] | None]) -> None:
        """Write a further artifact of this run to the store, unless another process is making it."""
        self.store.make_unless_locked(self._recipe(parameters), produce)

    def _recipe(self, parameters: Parameters) -> Recipe:
        return recipe(self.stage, parameters, self.inputs)


def make(
    stage: Stage,
    parameters: Parameters,
    inputs: Inputs,
    store: Store,
    key: str | None = None,
    together: Sequence[Parameters] = (),
) -> Artifact | None:
    """Take a stage's artifact from the store, or make it. A process that only helps another one gets None.

    Args:
        stage: the stage.
        parameters: its parameters.
        inputs: the opened inputs, by name; a missing optional input is None.
        store: the store to write to.
        key: the key that the artifact must have, or None.
        together: parameters of further artifacts to make in the same run if they are missing.

    Raises:
        UserError: inputs and parameters do not match, the key differs, or the artifact cannot be made.
    """
    run = StageRun(store, stage, inputs, together)
    for checked in (parameters, *together):
        stage.check(checked, inputs, run)
    artifact_recipe = recipe(stage, parameters, inputs)
    if key not in (None, artifact_recipe.key):
        raise UserError(
            f"this {stage.name} would have key {artifact_recipe.key}, but --key is {key}: the code, a library or an "
            "input has changed since the workflow was planned. Start it again."
        )
    artifact: Artifact | None = None

    def make_by(produce: Callable[[Path], dict[str, Any] | None]) -> None:
        nonlocal artifact
        artifact = store.make(artifact_recipe, produce)

    def produce(folder: Path) -> dict[str, Any] | None:
        return stage.produce(folder, inputs, parameters, run)

    if stage.distribute and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        stage.distribute(make_by, produce)
    else:
        make_by(produce)
    for part in stage.parts(parameters, inputs).values() if stage.parts else ():
        if not store.has(part[0].name, recipe(*part).key):  # removed after the whole artifact was made
            run.make(*part)
    return artifact

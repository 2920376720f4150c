"""From a stage's declaration to an artifact: its key, and how it is made."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hfprune.errors import UserError
from hfprune.stages.declaration import Parameters, Stage
from hfprune.store import artifacts
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.keys import Recipe, code_digest, versions


class Source(Protocol):
    """An artifact, or a job that will make one."""

    @property
    def key(self) -> str:
        """Of the artifact."""

    @property
    def parameters(self) -> Any:
        """What of its stage's parameters decides its content."""


Inputs = Mapping[str, Source | Sequence[Source] | None]


def recipe(stage: Stage, parameters: Parameters, inputs: Inputs) -> Recipe:
    """The recipe of a stage's artifact, from its parameters and its inputs."""
    keys = {name: source.key for name, source in inputs.items() if source is not None and stage.inputs[name].in_key}
    read = parameters.read()
    if stage.parts:
        read = {}
        keys |= {name: recipe(*part).key for name, part in stage.parts(parameters, inputs).items()}
    return Recipe(stage.name, read, keys, code_digest(stage.module), versions(stage.libraries))


def open_artifact(path: Path, *stages: str, files: Sequence[str] = ()) -> Artifact:
    """The artifact at `path`, a folder or a manifest, which must be of one of the `stages`.

    Where `files` are named, they are all that is read of it, and all that is verified.

    Raises:
        UserError: it is of another, not there, or damaged.
    """
    artifact = artifacts.read(path, *files)
    if artifact.manifest["stage"] not in stages:
        raise UserError(
            f"{path}: an artifact of {artifact.manifest['stage']!r}; expected one of {' or '.join(stages)}."
        )
    return artifact


class Making:
    """One run of a stage: what its `produce` and `check` may ask beside their inputs.

    Args:
        store: that the artifact goes to.
        stage: that makes it.
        inputs: opened, by name.
        together: parameters of the artifacts that the same run is to make too, if they are missing.
    """

    def __init__(self, store: Store, stage: Stage, inputs: Inputs, together: Sequence[Parameters] = ()) -> None:
        self.store, self.stage, self.inputs, self.together = store, stage, inputs, together

    def key(self, stage: Stage, parameters: Parameters, inputs: Inputs) -> str:
        """The key of another artifact."""
        return recipe(stage, parameters, inputs).key

    def make(self, stage: Stage, parameters: Parameters, inputs: Inputs) -> Artifact:
        """Another artifact, that of the store or a new one."""
        making = Making(self.store, stage, inputs)
        return self.store.make(
            recipe(stage, parameters, inputs), lambda folder: stage.produce(folder, inputs, parameters, making)
        )

    def missing(self) -> list[Parameters]:
        """Of `together`, the parameters of the artifacts that the store lacks."""
        return [each for each in self.together if not self.store.has(self.stage.name, self._recipe(each).key)]

    def offer(self, parameters: Parameters, produce: Callable[[Path], dict[str, Any] | None]) -> None:
        """Put into the store what came out beside the artifact, unless another process is making it."""
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
    """The artifact of a stage, from the store or made now; None in a process that only helps another to make it.

    Args:
        stage: that makes it.
        parameters: of the stage.
        inputs: opened, by name; those that are not given are None.
        store: for the artifact.
        key: that it must have, or None.
        together: parameters of the artifacts that the same run is to make too, if they are missing.

    Raises:
        UserError: inputs and parameters do not go together, the key is another, or the artifact cannot be made.
    """
    making = Making(store, stage, inputs, together)
    for each in (parameters, *together):
        stage.check(each, inputs, making)
    wanted = recipe(stage, parameters, inputs)
    if key not in (None, wanted.key):
        raise UserError(
            f"this {stage.name} would have key {wanted.key}, but {key} is asked for: the code, a library or an input "
            "has changed since the workflow was planned. Start it again."
        )
    artifact: Artifact | None = None

    def make_by(produce: Callable[[Path], dict[str, Any] | None]) -> None:
        nonlocal artifact
        artifact = store.make(wanted, produce)

    def produce(folder: Path) -> dict[str, Any] | None:
        return stage.produce(folder, inputs, parameters, making)

    if stage.in_step and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        stage.in_step(make_by, produce)
    else:
        make_by(produce)
    for part in stage.parts(parameters, inputs).values() if stage.parts else ():
        if not store.has(part[0].name, recipe(*part).key):  # removed since the whole was made
            making.make(*part)
    return artifact

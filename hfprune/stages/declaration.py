"""What a stage is, said once: the command, the keys, the plan and the requests to a cluster all follow from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from hfprune.runtime.paths import expanded

DType = Literal["auto", "float32", "bfloat16", "float16"]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
UserPath = Annotated[Path, AfterValidator(expanded)]
Function = TypeVar("Function", bound=Callable)

CHECKPOINTS = ("model", "prune", "recover")  # stages whose artifacts are models


def outside_key(function: Function) -> Function:
    """Mark a function that no artifact's content depends on: `store.keys.code_digest` leaves it out."""
    return function


class Section(BaseModel):
    """A part of a config: unknown keys are refused, values cannot be changed afterwards."""

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


class Parameters(Section):
    """What one stage reads beside its inputs."""

    def read(self) -> dict[str, Any]:
        """The parameters that decide the content, as JSON values: those of the key."""
        return self.model_dump()

    def options(self) -> dict[str, Any]:
        """The parameters that a command names."""
        return self.model_dump()


class Sampling(Section):
    """How token sequences are taken from a text."""

    samples: int = Field(32, ge=1, description="sequences, each from a document of its own")
    length: int = Field(256, ge=2, description="tokens in a sequence")


@dataclass(frozen=True)
class Input:
    """An artifact that a stage reads.

    Attributes:
        stages: those that can make it, the usual one first.
        description: what it is, for the command's help.
        optional: whether the stage can do without.
        several: whether it is a list of artifacts.
        in_key: whether its key is part of the made artifact's key.
    """

    stages: tuple[str, ...]
    description: str
    optional: bool = False
    several: bool = False
    in_key: bool = True


def _accept(parameters: Any, inputs: Any, making: Any) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Stage:
    """A kind of artifact.

    Attributes:
        name: of the stage, of its command, and of its folder in the store.
        module: where it is declared, `__name__`; this module's code and what it imports are part of the key.
        description: what the command's help says.
        examples: command lines for the help.
        parameters: their class.
        produce: writes the artifact. Called with the empty folder, the opened inputs by name (each a
            `store.artifacts.Artifact`, a list of them, or None), the parameters, and a `making.Making`, which offers
            the store; returns details for the manifest.
        inputs: by the name under which the command and the key know them.
        libraries: whose arithmetic the content depends on; their versions are part of the key.
        check: called with parameters, inputs and `Making`; raises UserError where they do not go together.
        parts: of an artifact that is put together from others: by name, the stage, parameters and inputs of each. Their
            keys stand in the key for the parameters.
        together: the parameter of which one run can make the artifacts of several values.
        in_step: of a stage that several processes can share: called with a function that makes the artifact when it is
            given a `produce`, and with the `produce`.
        after: called with the artifact once it is there; may refuse it with a UserError.
        is_online: whether it may use the network; its command is then `hfprune download NAME`.
        is_inner: made only by other stages; it has no command.
        cost: called with a job and an `experiment.estimate.Estimate`: what the job takes, a `costs.Cost`. Without it
            the estimate has a method of the stage's name.
        loads_again: whether the made checkpoint is loaded once more, in a process of its own.
        gpus: "spread": as many as the weights need; "one": several would each take all of them; "none".
    """

    name: str
    module: str
    description: str
    examples: tuple[str, ...]
    parameters: type[Parameters]
    produce: Callable[..., dict[str, Any] | None]
    inputs: Mapping[str, Input] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    check: Callable[[Any, Any, Any], None] = _accept
    parts: Callable[[Any, Any], dict[str, tuple]] | None = None
    together: str | None = None
    in_step: Callable[..., None] | None = None
    after: Callable[[Any], None] | None = None
    is_online: bool = False
    is_inner: bool = False
    cost: Callable[[Any, Any], Any] | None = None
    loads_again: bool = False
    gpus: Literal["spread", "one", "none"] = "none"

    @property
    def words(self) -> tuple[str, ...]:
        """The command's words after `hfprune`."""
        return ("download", self.name) if self.is_online else (self.name,)

"""How to declare a stage. Its command, keys, place in the plan and requests to a cluster follow from that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from hfprune.runtime.paths import expanded

DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Field(description="type to compute and save in; auto: the checkpoint's own"),
]
Memory = Annotated[
    Literal["auto", "resident", "streamed"],
    Field(
        description="resident: all weights in memory; streamed: read layer by layer from the checkpoint's files; "
        "auto: resident if they fit"
    ),
]
Products = Annotated[
    Literal["auto", "float32"],
    Field(
        description="inputs of a float32 model's matrix products on a CPU, for gradients; auto: bfloat16 where the CPU "
        "multiplies it"
    ),
]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
UserPath = Annotated[Path, AfterValidator(expanded)]
Function = TypeVar("Function", bound=Callable)

NOT_IN_RESULT = frozenset({"memory"})  # parameters that decide how a stage runs, not what it makes
CHECKPOINTS = ("model", "prune", "recover")  # stages whose artifacts are checkpoints
ANY_TEXT = ("text", "mix")  # stages whose artifacts are texts


def outside_key(function: Function) -> Function:
    """Mark a function that does not affect any artifact's content. `store.keys.code_digest` leaves it out."""
    return function


class Section(BaseModel):
    """A part of a config. Unknown keys are refused; values cannot change later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _no_repeats(cls, value: Any) -> Any:
        """Refuse a list that has an item twice."""
        for place, item in enumerate(value if isinstance(value, list) else []):
            if (first := value.index(item)) != place:
                name = next(iter(item)) if isinstance(item, dict) else item  # a method with its settings
                raise ValueError(
                    f"{name!r} stands twice: {first} and {place}, counted from 0, are the same. Leave one out"
                )
        return value


class Parameters(Section):
    """The parameters of one stage."""

    def read(self) -> dict[str, Any]:
        """The parameters that affect the artifact's content, as JSON values. They are part of its key."""
        return self.model_dump(exclude=NOT_IN_RESULT)

    def options(self) -> dict[str, Any]:
        """The parameters to write on the stage's command line."""
        return self.model_dump()


class Sampling(Section):
    """How token sequences are drawn from a text."""

    samples: int = Field(32, ge=1, description="number of sequences, each from a different document")
    length: int = Field(256, ge=2, description="tokens in each sequence")


@dataclass(frozen=True)
class Input:
    """An artifact that a stage reads.

    Attributes:
        stages: names of the stages that can make it, the usual one first.
        description: text for the command's help.
        optional: whether it may be missing.
        several: whether it is a list of artifacts.
        in_key: whether its key is part of the new artifact's key.
    """

    stages: tuple[str, ...]
    description: str
    optional: bool = False
    several: bool = False
    in_key: bool = True


def _accept(parameters: Any, inputs: Any, run: Any) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Stage:
    """A kind of artifact.

    Attributes:
        name: name of the stage, of its command, and of its folder in the store.
        module: the declaring module's `__name__`. Its code and the code it imports are part of the key.
        description: text for the command's help.
        examples: command lines for the help.
        parameters: class of the parameters.
        produce: writes the artifact and returns details for the manifest. Its arguments are the empty folder, the
            opened inputs by name (each a `store.artifacts.Artifact`, a list of them, or None), the parameters, and the
            `run.StageRun`, which gives access to the store.
        inputs: the inputs, by their names in the command and the key.
        libraries: libraries that affect the content. Their versions are part of the key.
        check: called with parameters, inputs and the `StageRun`. Raises UserError if they do not match.
        parts: for an artifact that is composed of others. Returns, by name, the stage, parameters and inputs of each
            part. In the key, the parts' keys replace the parameters.
        together: name of the parameter for which one run can make the artifacts of several values.
        distribute: for a stage that several processes can share. Called with `make` and `produce`; `make(produce)`
            makes the artifact.
        after: called with the finished artifact. May refuse it with a UserError.
        is_online: whether it may use the network. Its command is then `hfprune download NAME`.
        is_internal: whether only other stages make it. It then has no command.
        cost: called with a job and an `experiment.estimate.Estimate`; returns the job's `costs.Cost`. A stage that
            other stages run has none: its cost is theirs.
        reloads_checkpoint: whether the new checkpoint is loaded again, in a separate process.
        gpus: "spread": as many as the weights need; "one": every further GPU would hold all of the weights; "none".
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
    distribute: Callable[..., None] | None = None
    after: Callable[[Any], None] | None = None
    is_online: bool = False
    is_internal: bool = False
    cost: Callable[[Any, Any], Any] | None = None
    reloads_checkpoint: bool = False
    gpus: Literal["spread", "one", "none"] = "none"

    @property
    def words(self) -> tuple[str, ...]:
        """The command's words after `hfprune`."""
        return ("download", self.name) if self.is_online else (self.name,)

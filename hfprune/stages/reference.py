"""The dense model's predictions on held-out text."""

from pathlib import Path
from typing import Any

from pydantic import Field

from hfprune.stages.declaration import CHECKPOINTS, DType, Input, Parameters, Sampling, Seed, Stage


class ReferenceParameters(Sampling, Parameters):
    """Parameters of stage `reference`."""

    seed: Seed = Field(0, description="seed for drawing the sequences")
    dtype: DType = "auto"


def _produce(folder: Path, inputs: Any, parameters: ReferenceParameters, run: Any) -> dict[str, Any]:
    from hfprune.evaluation.fidelity import reference

    return reference(folder, inputs["model"].folder, inputs["text"].folder, **parameters.model_dump())


REFERENCE = Stage(
    name="reference",
    module=__name__,
    description="Record the dense model's predictions on held-out text.",
    examples=("hfprune reference --model store/model/KEY --text store/text/KEY --samples 16 --length 256",),
    parameters=ReferenceParameters,
    produce=_produce,
    inputs={
        "model": Input(CHECKPOINTS, description="dense checkpoint"),
        "text": Input(("text",), description="held-out text"),
    },
    libraries=("torch", "transformers"),
    gpus="spread",
)

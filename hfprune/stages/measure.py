"""Perplexity of a checkpoint, and its fidelity to the dense model."""

from pathlib import Path
from typing import Any

from hfprune.stages.declaration import DType, Input, Parameters, Stage


class MeasureParameters(Parameters):
    """Parameters of stage `measure`."""

    dtype: DType = "auto"


def _produce(folder: Path, inputs: Any, parameters: MeasureParameters, run: Any) -> dict[str, Any]:
    from hfprune.evaluation.fidelity import measure

    return measure(folder, inputs["model"].folder, inputs["reference"].folder, **parameters.model_dump())


MEASURE = Stage(
    name="measure",
    module=__name__,
    description="Measure a checkpoint's perplexity and its fidelity to the dense model.",
    examples=("hfprune measure --model store/prune/KEY --reference store/reference/KEY",),
    parameters=MeasureParameters,
    produce=_produce,
    inputs={
        "model": Input(("recover", "prune", "model"), description="checkpoint"),
        "reference": Input(("reference",), description="the dense model's predictions, from `hfprune reference`"),
    },
    libraries=("torch", "transformers"),
    gpus="spread",
)

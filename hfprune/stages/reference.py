"""The dense model's predictions on held-out text."""

from pathlib import Path
from typing import Any

from pydantic import Field

from hfprune.stages.declaration import CHECKPOINTS, DType, Input, Memory, Parameters, Sampling, Seed, Stage, outside_key


class ReferenceParameters(Sampling, Parameters):
    """Parameters of stage `reference`."""

    seed: Seed = Field(0, description="seed for drawing the sequences")
    dtype: DType = "auto"
    memory: Memory = "auto"


def _produce(folder: Path, inputs: Any, parameters: ReferenceParameters, run: Any) -> dict[str, Any]:
    from hfprune.evaluation.fidelity import reference

    return reference(folder, inputs["model"].folder, inputs["text"].folder, **parameters.model_dump())


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    from hfprune.models.activations import graph_bytes
    from hfprune.models.loading import flops_per_token
    from hfprune.stages.costs import Cost, streamed_bytes, weight_bytes

    dense, length = estimate.models.dense, job.settings.length
    tokens = job.settings.samples * length
    size = (tokens + dense.config.vocab_size) * dense.config.hidden_size * dense.dtype.itemsize
    layer = graph_bytes(dense, length) // dense.config.num_hidden_layers
    weights = streamed_bytes(dense) if estimate.is_streamed(job, dense) else weight_bytes(dense)
    memory = estimate.device.process + weights + size + layer
    return Cost(tokens * flops_per_token(dense, length), memory, size + 8 * tokens)


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
    cost=_cost,
)

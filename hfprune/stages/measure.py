"""Perplexity of a checkpoint, and its fidelity to the dense model."""

from pathlib import Path
from typing import Any

from hfprune.stages.declaration import DType, Input, Memory, Parameters, Stage, outside_key


class MeasureParameters(Parameters):
    """Parameters of stage `measure`."""

    dtype: DType = "auto"
    memory: Memory = "auto"


def _produce(folder: Path, inputs: Any, parameters: MeasureParameters, run: Any) -> dict[str, Any]:
    from hfprune.evaluation.fidelity import measure

    return measure(folder, inputs["model"].folder, inputs["reference"].folder, **parameters.model_dump())


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    from hfprune.evaluation.fidelity import LOGITS_PER_CHUNK
    from hfprune.models.activations import graph_bytes
    from hfprune.models.loading import flops_per_token
    from hfprune.stages.costs import Cost, streamed_bytes, weight_bytes

    model, reference = estimate.models.of(job.inputs["model"]), job.inputs["reference"]
    length, config = reference.settings.length, model.config
    dense_logits = 2 * config.hidden_size * config.vocab_size
    flops = reference.settings.samples * length * (flops_per_token(model, length) + dense_logits)
    layer = graph_bytes(model, length) // config.num_hidden_layers
    chunk = min(length * config.vocab_size, LOGITS_PER_CHUNK)
    weights = streamed_bytes(model) if estimate.is_streamed(job, model) else weight_bytes(model)
    memory = weights + estimate.cost(reference).disk_bytes + layer + 8 * 4 * chunk
    return Cost(flops, estimate.device.process + memory, 2**10)


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
    cost=_cost,
)

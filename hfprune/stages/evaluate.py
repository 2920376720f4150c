"""Zero-shot accuracy of a checkpoint on lm-eval tasks. Each task's results are a separate artifact."""

from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hfprune.stages.declaration import DType, Input, Memory, Parameters, Seed, Stage, outside_key

Batching = Literal["shared", "stock"]
BATCHING: Any = Field(
    "shared", description="shared: compute the common beginning of a question's choices once; stock: as lm-eval does"
)


class EvaluateParameters(Parameters):
    """Parameters of stage `evaluate`."""

    limit: int | None = Field(None, ge=1, description="documents per task, drawn with the seed (default: all)")
    seed: Seed = Field(0, description="seed for drawing the documents")
    batching: Batching = BATCHING
    dtype: DType = "auto"
    memory: Memory = "auto"

    @model_validator(mode="after")
    def _batching(self) -> "EvaluateParameters":
        check_batching(self.batching, self.memory)
        return self


def check_batching(batching: str, memory: str) -> None:
    """Refuse lm-eval's batching for streamed weights.

    Raises:
        ValueError: both are set.
    """
    if batching == "stock" and memory == "streamed":
        raise ValueError(
            "batching = 'stock' with memory = 'streamed': lm-eval's batches run through the whole model, so each would "
            "read all weights from the disk. Write `batching: shared` or `memory: resident`"
        )


MODEL = Input(("recover", "prune", "model"), description="checkpoint")
LIBRARIES = ("torch", "transformers", "lm_eval")


@cache  # one load serves all tasks
def _language_model(folder: Path, dtype: str, batching: str, memory: str) -> Any:
    from hfprune.evaluation.lm_eval_runner import language_model

    return language_model(folder, dtype, batching, memory)


def _model_of(inputs: Any, parameters: EvaluateParameters) -> Any:
    return _language_model(inputs["model"].folder, parameters.dtype, parameters.batching, parameters.memory)


def _asked(task: Any, parameters: EvaluateParameters) -> dict[str, Any]:
    """The arguments of `lm_eval_runner.evaluate_task` for a task."""
    sampling = {"limit": parameters.limit, "seed": parameters.seed}
    examples = task.parameters.get("num_fewshot", 0)
    return {"name": task.parameters["name"], "task": task.folder, "num_fewshot": examples, **sampling}


def _one_task(folder: Path, inputs: Any, parameters: EvaluateParameters, run: Any) -> dict[str, Any]:
    from hfprune.evaluation.lm_eval_runner import evaluate_task

    return evaluate_task(folder, _model_of(inputs, parameters), **_asked(inputs["task"], parameters))


def _parts(parameters: EvaluateParameters, inputs: Any) -> dict[str, tuple]:
    """For each task name, the stage, parameters and inputs of its artifact."""
    return {
        task.parameters["name"]: (EVALUATE_TASK, parameters, {"model": inputs["model"], "task": task})
        for task in inputs["tasks"]
    }


def _produce(folder: Path, inputs: Any, parameters: EvaluateParameters, run: Any) -> dict[str, Any]:
    from hfprune.evaluation.lm_eval_runner import answer_together, evaluate

    missing = [part for part in _parts(parameters, inputs).values() if not run.has(*part)]
    if len(missing) > 1:
        together = [_asked(sources["task"], parameters) for _, _, sources in missing]
        answer_together(folder, _model_of(inputs, parameters), together)
    tasks = {name: run.make(*part) for name, part in _parts(parameters, inputs).items()}
    evaluate(folder, {name: task.folder for name, task in tasks.items()})
    return {"tasks": {name: task.manifest["details"] for name, task in tasks.items()}}


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    import math

    from hfprune.evaluation.shared_prefix import LOGITS, ROWS, TOKENS
    from hfprune.models.activations import forward_bytes
    from hfprune.models.loading import flops_per_token
    from hfprune.stages.costs import Cost, streamed_bytes, weight_bytes

    longest_request = 3  # a task's longest request, as a multiple of the mean; memory depends on it
    bytes_per_sample = 130  # per document in samples.jsonl
    model, limit = estimate.models.of(job.inputs["model"]), job.settings.limit or math.inf
    streamed = job.settings.batching == "shared" and estimate.is_streamed(job, model)
    flops = longest = documents = tokens = 0
    for task in job.inputs["tasks"]:
        count, requests, length = estimate.task(task)
        documents += min(count, limit)
        tokens += min(count, limit) * requests * length
        flops += min(count, limit) * requests * length * flops_per_token(model, round(length))
        longest = max(longest, longest_request * length)
    is_stock = job.settings.batching == "stock"
    rows = ROWS if is_stock else max(1, TOKENS[estimate.kind] // longest)
    weights = weight_bytes(model)
    if streamed:  # also the embeddings, by which each layer's masks are made
        weights = streamed_bytes(model) + weight_bytes(model.get_input_embeddings())
    memory = weights + rows * forward_bytes(model, longest, whole=is_stock) + 2 * 4 * LOGITS
    scratch = round(tokens) * model.config.hidden_size * model.dtype.itemsize if streamed else 0
    return Cost(round(flops), estimate.device.process + memory, bytes_per_sample * documents, scratch)


EVALUATE_TASK = Stage(
    name="evaluate-task",
    module=__name__,
    description="Measure the zero-shot accuracy of a checkpoint on one task.",
    examples=(),
    parameters=EvaluateParameters,
    produce=_one_task,
    inputs={"model": MODEL, "task": Input(("task",), description="downloaded task")},
    libraries=LIBRARIES,
    is_internal=True,
)
EVALUATE = Stage(
    name="evaluate",
    module=__name__,
    description="Measure the zero-shot accuracy of a checkpoint on lm-eval tasks.",
    examples=("hfprune evaluate --model store/prune/KEY --tasks store/task/KEY store/task/KEY --limit 100",),
    parameters=EvaluateParameters,
    produce=_produce,
    inputs={
        "model": MODEL,
        "tasks": Input(
            ("task",), description="downloaded tasks: their folders or manifests", several=True, in_key=False
        ),
    },
    libraries=LIBRARIES,
    parts=_parts,
    gpus="spread",
    cost=_cost,
)

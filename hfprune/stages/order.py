"""The order in which whole sublayers or layers go, by their influence or by a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hfprune.models.units import DEPTH, MIXED, TWO_STAGES
from hfprune.pruning.order import CRITERIA, SEARCHES
from hfprune.pruning.refit_names import IN_DEPTH, RIDGE
from hfprune.stages.declaration import (
    ANY_TEXT,
    CHECKPOINTS,
    NOT_IN_RESULT,
    DType,
    Input,
    Memory,
    Parameters,
    Sampling,
    Seed,
    Stage,
    outside_key,
)


class OrderParameters(Sampling, Parameters):
    """Parameters of stage `order`."""

    criterion: Literal[tuple(CRITERIA)] = Field("greedy_kl", description="what orders the sublayers or layers")
    structure: Literal[(*DEPTH, TWO_STAGES)] = Field(
        "layers",
        description="what goes: attention or MLP of a layer, or whole layers; for 2SSP the attentions among what goes",
    )
    refit: Literal["none", *IN_DEPTH] = Field(
        "none", description="what makes up for each removal before the next is measured; for a search"
    )
    ridge: float = Field(
        RIDGE, ge=0, allow_inf_nan=False, description="how strongly a refit stays near the old weights"
    )
    share: float = Field(1.0, gt=0, le=1, description="a search ends when this share of all parameters is gone")
    seed: Seed = Field(0, description="seed for the sequences")
    dtype: DType = "auto"
    memory: Memory = "auto"

    def read(self) -> dict[str, Any]:
        """The parameters that affect the order: refit and share only in a search, `ridge` only if the refit solves."""
        unread = {"ridge"} if self.refit == "none" else set()
        if self.criterion not in SEARCHES:
            unread = {"refit", "ridge", "share"}
        return self.model_dump(exclude=NOT_IN_RESULT | unread)

    def options(self) -> dict[str, Any]:
        """The parameters to write on the command line."""
        return self.read() | {"memory": self.memory}


def _produce(folder: Path, inputs: Any, parameters: OrderParameters, run: Any) -> dict[str, Any]:
    from hfprune.pruning.depth import write_order

    folders = {name: inputs[name].folder for name in ("model", "text")}
    details = write_order(folder, **folders, **parameters.model_dump())
    return {"text": inputs["text"].manifest["details"]["name"], **details}


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    from hfprune.models.loading import flops_per_token
    from hfprune.pruning import depth
    from hfprune.pruning.candidates import bytes_of_walk
    from hfprune.stages.costs import Cost, refit_cost, streamed_bytes, weight_bytes

    settings, dense = job.settings, estimate.models.dense
    tokens, streamed = settings.samples * settings.length, estimate.is_streamed(job, dense)
    memory = estimate.device.process + (streamed_bytes(dense) if streamed else weight_bytes(dense))
    streams = tokens * dense.config.hidden_size
    if settings.criterion in SEARCHES:
        sampled = (settings.samples, settings.length)
        flops = depth.cost(dense, sampled, settings.criterion, settings.structure, settings.refit, settings.share)
        walked = min(settings.samples, depth.sequences(settings.length)) * settings.length
        candidates = len(depth.steps_of(estimate.models.shape, MIXED.get(settings.structure, settings.structure)))
        memory += bytes_of_walk(dense, walked, candidates, estimate.kind)
    else:
        flops = tokens * flops_per_token(dense, settings.length)
    scratch = 0
    if settings.refit != "none" and settings.criterion in SEARCHES:
        solving, streams = refit_cost(dense, settings.refit, tokens, carries=True)
        memory += solving + (0 if streamed else weight_bytes(dense) // 2)
    if streamed:
        scratch = streams * dense.dtype.itemsize
    else:
        memory += streams * dense.dtype.itemsize
    return Cost(flops, memory, 100 * 2 * len(estimate.models.shape.layers), scratch)


ORDER = Stage(
    name="order",
    module=__name__,
    description="Find the order in which whole layers, or attention and MLPs of layers, go; for `hfprune prune`.",
    examples=(
        "hfprune order --model store/model/KEY --text store/text/KEY --structure layers",
        "hfprune order --model store/model/KEY --text store/text/KEY --structure sublayers --criterion greedy_kl \\\n"
        "    --refit sequential",
    ),
    parameters=OrderParameters,
    produce=_produce,
    inputs={
        "model": Input(CHECKPOINTS, description="dense checkpoint"),
        "text": Input(ANY_TEXT, description="calibration text"),
    },
    libraries=("torch", "transformers"),
    gpus="one",
    cost=_cost,
)

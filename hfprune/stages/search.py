"""The search of widths: which layers should be narrower, by the measured KL of what refits leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hfprune.errors import UserError
from hfprune.models.units import STRUCTURES as PARTS_OF
from hfprune.pruning.refit_names import RIDGE
from hfprune.pruning.searched import STRUCTURES, held_out, too_few
from hfprune.stages.budget import ROUNDS_OF_SEARCH, Budget, refuse_other_scores
from hfprune.stages.declaration import ANY_TEXT, CHECKPOINTS, Input, Stage, outside_key


class SearchParameters(Budget):
    """Parameters of stage `search`."""

    structure: Literal[STRUCTURES] = Field("mlp", description="part of each layer to cut")
    ridge: float = Field(
        RIDGE, ge=0, allow_inf_nan=False, description="how strongly its refits stay near the old weights"
    )
    rounds: int = ROUNDS_OF_SEARCH

    @model_validator(mode="after")
    def _budget(self) -> SearchParameters:
        self.check_budget(self.structure)
        return self


def _check(parameters: SearchParameters, inputs: Any, run: Any) -> None:
    """Refuse scores of another model or on another text, and too few sequences to hold some out."""
    scores = inputs["scores"]
    refuse_other_scores(scores, inputs["model"], inputs["text"])
    if reason := too_few(scores.parameters["samples"]):
        raise UserError(f"{scores.folder}: samples = {scores.parameters['samples']}: {reason}.")


def _produce(folder: Path, inputs: Any, parameters: SearchParameters, run: Any) -> dict[str, Any]:
    from hfprune.pruning.width_search import write_widths

    folders = {name: inputs[name].folder for name in ("model", "scores", "text")}
    calibration = {name: inputs["scores"].parameters[name] for name in ("criterion", "samples", "length", "seed")}
    details = write_widths(folder, **folders, calibration=calibration, **parameters.model_dump())
    return {"text": inputs["text"].manifest["details"]["name"], **details}


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    from hfprune.pruning import width_search
    from hfprune.pruning.candidates import bytes_of_walk
    from hfprune.stages.costs import Cost, weight_bytes

    settings, calibration, dense = job.settings, job.inputs["scores"].settings, estimate.models.dense
    shape = (calibration.samples, calibration.length)
    flops = width_search.most_operations(dense, shape, settings.structure, settings.rounds)["flops"]
    tokens = held_out(*shape) * calibration.length
    memory = estimate.device.process + weight_bytes(dense)
    memory += width_search.bytes_of_libraries(dense, PARTS_OF[settings.structure])
    memory += bytes_of_walk(dense, tokens, width_search.TOGETHER, estimate.kind)
    memory += calibration.samples * calibration.length * dense.config.hidden_size * dense.dtype.itemsize
    return Cost(flops, memory, 100 * 2 * len(estimate.models.shape.layers) * (1 + settings.rounds))


SEARCH = Stage(
    name="search",
    module=__name__,
    description="Find how wide each layer should be, by measuring refitted widths; for `hfprune prune`.",
    examples=(
        "hfprune search --model store/model/KEY --scores store/score/KEY --text store/text/KEY --ratio 0.2",
        "hfprune search --model store/model/KEY --scores store/score/KEY --text store/text/KEY --ratio 0.2 \\\n"
        "    --structure mlp+attention --rounds 5",
    ),
    parameters=SearchParameters,
    produce=_produce,
    inputs={
        "model": Input(CHECKPOINTS, description="dense checkpoint"),
        "scores": Input(("score",), description="the model's scores, from `hfprune score`"),
        "text": Input(ANY_TEXT, description="the text that the scores come from"),
    },
    libraries=("torch", "transformers"),
    check=_check,
    gpus="one",
    cost=_cost,
)

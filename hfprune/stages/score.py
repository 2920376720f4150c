"""The importance of every neuron and key-value group: in one pass over the calibration text, or by shards of it."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hfprune.errors import UserError
from hfprune.pruning.criteria import CRITERIA
from hfprune.stages.declaration import CHECKPOINTS, DType, Input, Parameters, Sampling, Seed, Stage
from hfprune.store.filenames import SCORES, SUMS

CriterionName = Literal[tuple(CRITERIA)]
DRAWS: Any = Field(1, ge=1, description="labels drawn per position, for criteria that sample (fisher_*)")


class ScoreParameters(Sampling, Parameters):
    """What stage `score` reads."""

    criterion: CriterionName = Field("entropy", description="how neurons are ranked")
    seed: Seed = Field(0, description="draws the sequences, labels and random scores")
    draws: int = DRAWS
    dtype: DType = "auto"

    def read(self) -> dict[str, Any]:
        """The parameters that this criterion reads: `draws` only where labels are sampled."""
        return self.model_dump(exclude=set() if CRITERIA[self.criterion].sampled else {"draws"})


class ShardParameters(ScoreParameters):
    """What stage `shard` reads."""

    shard: int = Field(ge=0, description="number of this part of the sequences, from 0")
    shards: int = Field(ge=1, description="parts in all")

    @model_validator(mode="after")
    def _number(self) -> ShardParameters:
        if not self.shard < self.shards <= self.samples:
            raise ValueError(f"shard {self.shard} of {self.shards}: expected shard < shards <= samples, {self.samples}")
        return self


INPUTS = {
    "model": Input(CHECKPOINTS, description="dense checkpoint"),
    "text": Input(("text",), description="calibration text"),
    "light_cut": Input(
        ("score",), description="scores to silence neurons by first, for criteria that need it", optional=True
    ),
}


def _check(parameters: ScoreParameters, inputs: Any, making: Any) -> None:
    """Refuse a light cut by scores of another model, or by another criterion than the one needed."""
    scores, model, light_cut = inputs["light_cut"], inputs["model"], None
    if scores:
        light_cut = scores.parameters["criterion"]
        if scores.manifest["inputs"]["model"] != model.key:
            raise UserError(
                f"{scores.folder}: scores of model {scores.manifest['inputs']['model']}, not of {model.key}."
            )
    needed = CRITERIA[parameters.criterion].light_cut
    if needed != light_cut:
        wanted = f"--light-cut with scores by {needed}" if needed else "no --light-cut"
        given = f"scores by {light_cut}" if light_cut else "none"
        raise UserError(f"criterion {parameters.criterion} takes {wanted}; given: {given}.")


def _one_pass(folder: Path, inputs: Any, parameters: ScoreParameters, making: Any) -> dict[str, Any]:
    """Write what was asked for; of the same pass over the text, offer what the store lacks of the other criteria."""
    from hfprune.models.units import save_scores
    from hfprune.pruning import scoring

    whole = making.stage.name == "score"
    compute = scoring.score if whole else scoring.shard
    folders = {name: inputs[name].folder for name in INPUTS if inputs[name]}
    missing = making.missing()
    together = [parameters.criterion, *(other.criterion for other in missing)]
    started = time.monotonic()
    results, costs = compute(folder, criteria=together, **folders, **parameters.model_dump(exclude={"criterion"}))
    seconds = round(time.monotonic() - started, 3)
    text = inputs["text"].manifest["details"]["name"]
    details = {"text": text, "together": together, "seconds_together": seconds}

    def save(criterion: str, into: Path) -> dict[str, Any]:
        if whole:
            save_scores(into / SCORES, results[criterion])
        else:
            results[criterion].save(into / SUMS)
        return details | costs[criterion]

    for other in missing:
        making.offer(other, partial(save, other.criterion))
    return save(parameters.criterion, folder)


def _merge(folder: Path, inputs: Any, parameters: ScoreParameters, making: Any) -> dict[str, Any]:
    """Write the scores that the shards of a pass add up to."""
    from hfprune.models.units import save_scores
    from hfprune.pruning.scoring import merge

    shards = inputs["shards"]
    folders = {shard.key: shard.folder for shard in shards}
    read = parameters.model_dump(include={"criterion", "length", "seed", "draws", "dtype"})
    merged = merge(
        [folders[key] for key in _shard_keys(parameters, inputs, making)], model=inputs["model"].folder, **read
    )
    save_scores(folder / SCORES, merged)
    cost = {
        name: sum(shard.manifest["details"][name] for shard in shards)
        for name in ("seconds_together", "tokens", "flops", "flops_together")
    }
    return {"text": inputs["text"].manifest["details"]["name"], "shards": len(shards), **cost}


def _shard_keys(parameters: ScoreParameters, inputs: Any, making: Any) -> list[str]:
    """The keys of the shards that make up these scores, in their order."""
    shards = len(inputs["shards"])
    common, sources = parameters.model_dump(), {name: inputs[name] for name in INPUTS}
    return [
        making.key(SHARD, ShardParameters(**common, shard=number, shards=shards), sources) for number in range(shards)
    ]


def _check_shards(parameters: ScoreParameters, inputs: Any, making: Any) -> None:
    _check(parameters, inputs, making)
    if inputs["shards"] and {shard.key for shard in inputs["shards"]} != {*_shard_keys(parameters, inputs, making)}:
        raise UserError(
            f"--shards: not the {len(inputs['shards'])} parts of these scores. Give every shard of this criterion, "
            "model, text and calibration, each once."
        )


def _score(folder: Path, inputs: Any, parameters: ScoreParameters, making: Any) -> dict[str, Any]:
    return (_merge if inputs["shards"] else _one_pass)(folder, inputs, parameters, making)


SHARD = Stage(
    name="shard",
    module=__name__,
    description="Add up one part of the calibration text, for `hfprune score --shards` to merge.",
    examples=("hfprune shard --model store/model/KEY --text store/text/KEY --criterion entropy --shard 0 --shards 4",),
    parameters=ShardParameters,
    produce=_one_pass,
    inputs=INPUTS,
    libraries=("torch", "transformers"),
    check=_check,
    together="criterion",
    gpus="spread",
)
SCORE = Stage(
    name="score",
    module=__name__,
    description="Score every neuron on calibration text.",
    examples=(
        "hfprune score --model store/model/KEY --text store/text/KEY --criterion entropy --samples 32 --length 256",
    ),
    parameters=ScoreParameters,
    produce=_score,
    inputs=INPUTS
    | {
        "shards": Input(
            ("shard",),
            description="merge these artifacts of `hfprune shard`",
            optional=True,
            several=True,
            in_key=False,
        )
    },
    libraries=("torch", "transformers"),
    check=_check_shards,
    together="criterion",
    gpus="spread",
)

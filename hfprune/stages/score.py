"""The importance of every neuron and key-value group, from one pass over the calibration text or from its shards."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hfprune.errors import UserError
from hfprune.pruning.convergence import check_until
from hfprune.pruning.criteria import CRITERIA
from hfprune.stages.declaration import (
    ANY_TEXT,
    CHECKPOINTS,
    NOT_IN_RESULT,
    DType,
    Input,
    Memory,
    Parameters,
    Products,
    Sampling,
    Seed,
    Stage,
    outside_key,
)
from hfprune.store.filenames import SCORES, SUMS

CriterionName = Literal[tuple(CRITERIA)]
DRAWS: Any = Field(1, ge=1, description="labels drawn at each position; only for criteria that sample (fisher_*)")


UNTIL: Any = Field(
    None,
    gt=0,
    le=1,
    description="stop before all samples are scored, when this share of the kept units is the same for two halves of "
    "those so far",
)


class PassParameters(Sampling, Parameters):
    """Parameters of a pass over the calibration text."""

    criterion: CriterionName = Field("entropy", description="criterion that ranks the neurons")
    seed: Seed = Field(0, description="seed for the sequences, labels and random scores")
    draws: int = DRAWS
    dtype: DType = "auto"
    memory: Memory = "auto"
    products: Products = "auto"

    def read(self) -> dict[str, Any]:
        """The parameters that affect the scores: `draws` only if the criterion samples labels."""
        unread = NOT_IN_RESULT | (set() if CRITERIA[self.criterion].sampled else {"draws"})
        return self.model_dump(exclude=unread, exclude_none=True)


class ScoreParameters(PassParameters):
    """Parameters of stage `score`."""

    until: float | None = UNTIL
    until_ratio: float | None = Field(
        None, gt=0, lt=1, description="with --until: share of every layer's units that the halves do not keep"
    )

    @model_validator(mode="after")
    def _until(self) -> ScoreParameters:
        if (self.until is None) != (self.until_ratio is None):
            raise ValueError("until and until_ratio go together: give both, or neither")
        check_until(self.until, self.samples)
        return self


class ShardParameters(PassParameters):
    """Parameters of stage `shard`."""

    shard: int = Field(ge=0, description="number of this shard of the sequences, from 0")
    shards: int = Field(ge=1, description="number of shards")

    @model_validator(mode="after")
    def _number(self) -> ShardParameters:
        if not self.shard < self.shards <= self.samples:
            raise ValueError(f"shard {self.shard} of {self.shards}: expected shard < shards <= samples, {self.samples}")
        return self


INPUTS = {
    "model": Input(CHECKPOINTS, description="dense checkpoint"),
    "text": Input(ANY_TEXT, description="calibration text"),
    "light_cut": Input(
        ("score",), description="scores for a light first cut, for criteria that need one", optional=True
    ),
}


def _check(parameters: PassParameters, inputs: Any, run: Any) -> None:
    """Refuse light-cut scores of another model or criterion than needed."""
    scores, model, light_cut = inputs["light_cut"], inputs["model"], None
    if scores:
        light_cut = scores.parameters["criterion"]
        if scores.manifest["inputs"]["model"] != model.key:
            raise UserError(
                f"{scores.folder}: scores of model {scores.manifest['inputs']['model']}, not of {model.key}."
            )
    needed = CRITERIA[parameters.criterion].light_cut
    if needed != light_cut:
        expected = f"--light-cut with scores by {needed}" if needed else "no --light-cut"
        actual = f"scores by {light_cut}" if light_cut else "none"
        raise UserError(f"criterion {parameters.criterion} takes {expected}; given: {actual}.")


def _one_pass(folder: Path, inputs: Any, parameters: PassParameters, run: Any) -> dict[str, Any]:
    """Score in one pass. Write this criterion's artifact here, and those of the others in `together` to the store."""
    from hfprune.models.units import save_scores
    from hfprune.pruning import scoring

    whole = run.stage.name == "score"
    compute = scoring.score if whole else scoring.shard
    folders = {name: inputs[name].folder for name in INPUTS if inputs[name]}
    missing = run.missing()
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
        run.add(other, partial(save, other.criterion))
    return save(parameters.criterion, folder)


def _merge(folder: Path, inputs: Any, parameters: ScoreParameters, run: Any) -> dict[str, Any]:
    """Write the scores: the sum of the shards."""
    from hfprune.models.units import save_scores
    from hfprune.pruning.scoring import merge

    shards = inputs["shards"]
    folders = {shard.key: shard.folder for shard in shards}
    read = parameters.model_dump(include={"criterion", "length", "seed", "draws", "dtype", "memory"})
    merged = merge([folders[key] for key in _shard_keys(parameters, inputs, run)], model=inputs["model"].folder, **read)
    save_scores(folder / SCORES, merged)
    cost = {
        name: sum(shard.manifest["details"][name] for shard in shards)
        for name in ("seconds_together", "tokens", "flops", "flops_together")
    }
    products = sorted({shard.manifest["details"]["products"] for shard in shards})
    text = inputs["text"].manifest["details"]["name"]
    return {"text": text, "shards": len(shards), "products": " and ".join(products), **cost}


def _shard_keys(parameters: ScoreParameters, inputs: Any, run: Any) -> list[str]:
    """The keys of the shards of these scores, in order."""
    shards = len(inputs["shards"])
    common = parameters.model_dump(include={*PassParameters.model_fields})
    sources = {name: inputs[name] for name in INPUTS}
    return [run.key(SHARD, ShardParameters(**common, shard=number, shards=shards), sources) for number in range(shards)]


def _check_shards(parameters: ScoreParameters, inputs: Any, run: Any) -> None:
    _check(parameters, inputs, run)
    if inputs["shards"] and parameters.until is not None:
        raise UserError("--until does not go with --shards: all sequences are summed before they are compared.")
    if inputs["shards"] and {shard.key for shard in inputs["shards"]} != {*_shard_keys(parameters, inputs, run)}:
        raise UserError(
            f"--shards: not the {len(inputs['shards'])} parts of these scores. Give every shard of this criterion, "
            "model, text and calibration exactly once."
        )


def _score(folder: Path, inputs: Any, parameters: ScoreParameters, run: Any) -> dict[str, Any]:
    return (_merge if inputs["shards"] else _one_pass)(folder, inputs, parameters, run)


@outside_key
def _pass_cost(job: Any, estimate: Any, sequences: int, disk: int) -> Any:
    """The cost of a pass over `sequences`, which scores one or more criteria; `disk` is one criterion's artifact."""
    from hfprune.pruning import scoring
    from hfprune.pruning.recorder import bytes_of_sums
    from hfprune.stages.costs import Cost

    criteria, shape = [job.settings.criterion, *job.together], (sequences, job.settings.length)
    dense, streamed = estimate.models.dense, estimate.is_streamed(job, estimate.models.dense)
    light_cut = "light_cut" in job.inputs
    flops = scoring.cost(dense, shape, criteria, job.settings.draws, light_cut, streamed)["flops"]
    memory = estimate.device.process + estimate.scoring_memory(criteria, shape, streamed)
    if getattr(job.settings, "until", None):
        memory += bytes_of_sums(dense, criteria)  # of the sequences so far, beside those of a round
        estimate.assumptions[f"{job.label}: all {sequences:,} samples; `until` may need fewer"] = None
    scratch = scoring.scratch_bytes(dense, shape, criteria, job.settings.draws, light_cut) if streamed else 0
    return Cost(0 if job.after else flops, memory, disk, scratch)


@outside_key
def _shard_cost(job: Any, estimate: Any) -> Any:
    from hfprune.pruning.recorder import bytes_of_sums
    from hfprune.pruning.scoring import shard_range

    settings, dense = job.settings, estimate.models.dense
    share = shard_range(settings.samples, settings.length, settings.shard, settings.shards)
    return _pass_cost(job, estimate, len(share), bytes_of_sums(dense, [settings.criterion]))


@outside_key
def _score_cost(job: Any, estimate: Any) -> Any:
    from hfprune.stages.costs import Cost, streamed_bytes, weight_bytes

    disk = sum(4 * sum(units) for units in estimate.models.shape.units.values())
    if "shards" in job.inputs:  # the shards are only added up
        dense = estimate.models.dense
        weights = streamed_bytes(dense) if estimate.is_streamed(job, dense) else weight_bytes(dense)
        return Cost(0, estimate.device.process + weights, disk)
    return _pass_cost(job, estimate, job.settings.samples, disk)


SHARD = Stage(
    name="shard",
    module=__name__,
    description="Compute one shard of the scores; `hfprune score --shards` merges all shards.",
    examples=("hfprune shard --model store/model/KEY --text store/text/KEY --criterion entropy --shard 0 --shards 4",),
    parameters=ShardParameters,
    produce=_one_pass,
    inputs=INPUTS,
    libraries=("torch", "transformers"),
    check=_check,
    together="criterion",
    gpus="spread",
    cost=_shard_cost,
)
SCORE = Stage(
    name="score",
    module=__name__,
    description="Score the importance of every neuron and key-value group on calibration text.",
    examples=(
        "hfprune score --model store/model/KEY --text store/text/KEY --criterion entropy --samples 32 --length 256",
    ),
    parameters=ScoreParameters,
    produce=_score,
    inputs=INPUTS
    | {
        "shards": Input(
            ("shard",),
            description="instead of a pass over the text: merge these artifacts of `hfprune shard`",
            optional=True,
            several=True,
            in_key=False,
        )
    },
    libraries=("torch", "transformers"),
    check=_check_shards,
    together="criterion",
    gpus="spread",
    cost=_score_cost,
)

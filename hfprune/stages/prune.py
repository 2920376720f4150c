"""Cutting a checkpoint: its least important neurons, key-value groups, sublayers or layers are removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hfprune.errors import UserError
from hfprune.models.units import DEPTH, DEPTH_SHARE, MIXED, STRUCTURES, check_depth_share, check_experts_share
from hfprune.pruning.allocation import ALLOCATIONS
from hfprune.pruning.order import ordered
from hfprune.pruning.refit_names import IN_DEPTH, REFITS, RIDGE, SOLVED
from hfprune.pruning.searched import SEARCHED, check_searched
from hfprune.stages.budget import ROUNDS_OF_SEARCH, Budget, refuse_other_scores
from hfprune.stages.declaration import ANY_TEXT, CHECKPOINTS, Input, Stage, outside_key
from hfprune.stages.lineage import origin

AllocationName = Literal[tuple(ALLOCATIONS)]
StructureName = Literal[tuple(STRUCTURES)]
RefitName = Literal[REFITS]


def refuse_unread(structure: str, allocation: str, refit: str) -> None:
    """Refuse what does not go with whole sublayers and layers."""
    if structure in DEPTH and allocation != "uniform":
        raise ValueError(f"'allocation' does not go with structure {structure}: its order says what goes")
    if structure in (*DEPTH, *MIXED) and refit not in ("none", *IN_DEPTH):
        raise ValueError(f"refit {refit!r} does not go with structure {structure}. Use 'least_squares' or 'sequential'")


class PruneParameters(Budget):
    """Parameters of stage `prune`."""

    depth_share: float | None = Field(None, gt=0, lt=1, description=DEPTH_SHARE)
    experts_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="whole experts' share of what mlp+experts removes (default: the scores decide)",
    )
    ridge: float = Field(
        RIDGE,
        ge=0,
        allow_inf_nan=False,
        description="how strongly a refit stays near the old weights, see docs/pruning.md",
    )
    rounds: int = ROUNDS_OF_SEARCH
    pad: bool = Field(False, description="pad all layers to one width with zeros; the padding costs space and time")
    structure: StructureName = Field("mlp", description="part of each layer to cut")
    allocation: AllocationName = Field("uniform", description="how to share the budget among the layers")
    refit: RefitName = Field(
        "none", description="how to adjust the remaining weights to the cut; all but none need --text"
    )

    @model_validator(mode="after")
    def _budget(self) -> PruneParameters:
        self.check_budget(self.structure)
        if self.pad and self.structure.endswith("sublayers"):
            raise ValueError("'pad' does not go with structure sublayers: what is gone cannot be padded")
        check_depth_share(self.depth_share, self.structure)
        check_experts_share(self.experts_share, self.structure)
        refuse_unread(self.structure, self.allocation, self.refit)
        check_searched(self.allocation, self.structure, self.refit)
        return self

    @property
    def reads_text(self) -> bool:
        """Whether this cut reads the calibration text: for a refit, or to measure the layers' influence."""
        return self.refit != "none" or ALLOCATIONS[self.allocation].influence is not None

    @property
    def share_of_steps(self) -> float:
        """Of all parameters, what whole sublayers or layers take at most; 1 if only the model's size can say."""
        return 1.0 if self.ratio is None else self.ratio * (self.depth_share or 1)

    def read(self) -> dict[str, Any]:
        """The parameters that affect this cut: `ridge` only if the refit solves for weights, `rounds` of a search."""
        unread = {"ridge"} if self.refit not in SOLVED else set()
        unread |= {"rounds"} if self.allocation != SEARCHED else set()
        return {name: value for name, value in super().read().items() if name not in unread}


def _check(parameters: PruneParameters, inputs: Any, run: Any) -> None:
    """Refuse scores of another model, a text that the cut does not read, and one that the scores do not come from."""
    model, scores, text = inputs["model"], inputs["scores"], inputs["text"]
    if (text is not None) != parameters.reads_text:
        both = f"refit {parameters.refit!r} with allocation {parameters.allocation!r}"
        raise UserError(
            f"{both} reads no text: leave out --text."
            if text
            else f"{both} reads the calibration text: give --text, the one that the scores were made on."
        )
    _check_order(parameters, scores, inputs["order"])
    _check_widths(parameters, scores, inputs["widths"])
    refuse_other_scores(scores, model, text)


def _check_order(parameters: PruneParameters, scores: Any, order: Any) -> None:
    """Refuse scores where an order is needed, an order where scores are, and one of another structure or refit."""
    stage, structure = scores.manifest["stage"], parameters.structure
    if (order is not None) != (structure in MIXED):
        asked = "leave out --order" if order else "give --order, the order of `hfprune order`"
        raise UserError(f"structure {structure!r} takes {'--scores alone' if order else 'both'}: {asked}.")
    if order:
        if order.manifest["inputs"] != {name: scores.manifest["inputs"][name] for name in ("model", "text")}:
            raise UserError(f"{order.folder}: an order of another model, or on another text, than the scores.")
        _check_same(parameters, order)
    if stage != ("order" if structure in DEPTH else "score"):
        needed = "the order of `hfprune order`" if structure in DEPTH else "the scores of `hfprune score`"
        raise UserError(f"{scores.folder}: an artifact of {stage!r}; structure {structure!r} takes {needed}.")
    if stage == "order":
        _check_same(parameters, scores)


def _check_widths(parameters: PruneParameters, scores: Any, widths: Any) -> None:
    """Refuse widths where none are searched, none where they are, and those of a search for another cut."""
    if (widths is not None) != (parameters.allocation == SEARCHED):
        asked = "leave out --widths" if widths else "give --widths, those of `hfprune search`"
        raise UserError(f"allocation {parameters.allocation!r} takes {'no widths' if widths else 'widths'}: {asked}.")
    if widths is None:
        return
    if widths.manifest["inputs"]["scores"] != scores.key:
        raise UserError(f"{widths.folder}: a search by scores {widths.manifest['inputs']['scores']}, not {scores.key}.")
    asked, searched = parameters.read(), widths.parameters
    for name in (*Budget.model_fields, "structure", "ridge", "rounds"):
        if asked.get(name) != searched.get(name):
            raise UserError(
                f"{widths.folder}: a search with {name} {searched.get(name)!r}; this cut has {asked.get(name)!r}."
            )


def _check_same(parameters: PruneParameters, order: Any) -> None:
    """Refuse an order of another structure or refit, and one whose search ended before the budget."""
    if (share := order.parameters.get("share", 1.0)) < (removed := parameters.share_of_steps):
        needed, option = (removed, f"--share {removed}") if removed < 1 else ("the whole", "no --share")
        raise UserError(
            f"{order.folder}: an order searched for a share of {share} of all parameters; this cut needs {needed}. "
            f"Run `hfprune order` with {option}."
        )
    structure = ordered(parameters.structure, parameters.depth_share)
    for name, value in (("structure", structure), ("refit", parameters.refit), ("ridge", parameters.ridge)):
        if order.parameters.get(name, value) != value:
            raise UserError(
                f"{order.folder}: an order for {name} {order.parameters[name]!r}; this cut has {name} {value!r}."
            )


@outside_key  # the card only repeats the other files
def _write_card(folder: Path) -> None:
    from hfprune.sharing.model_card import write_card

    write_card(folder)


def _produce(folder: Path, inputs: Any, parameters: PruneParameters, run: Any) -> dict[str, Any]:
    from hfprune.pruning.surgery import prune

    model, scores = inputs["model"], inputs["scores"]
    calibration = scores.parameters | {"text": scores.manifest["details"]["text"]}
    paths = {name: inputs[name] and inputs[name].folder for name in ("text", "order", "widths")}
    details = prune(
        folder, model.folder, scores.folder, source=origin(model), calibration=calibration, **paths,
        **parameters.model_dump(),
    )  # fmt: skip
    _write_card(folder)
    return details


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    from hfprune.models.checkpoint import BYTES_PER_FILE
    from hfprune.models.loading import flops_per_token
    from hfprune.pruning.refit import flops_of_refit
    from hfprune.stages.costs import Cost, refit_cost, streamed_bytes, weight_bytes

    dense, flops, scratch = estimate.models.dense, 0, 0
    streamed, written = estimate.is_streamed(job, dense), weight_bytes(estimate.models.of(job))
    weights = streamed_bytes(dense) + min(BYTES_PER_FILE, written) if streamed else weight_bytes(dense)
    memory = estimate.device.process + weights
    calibration, streams = job.inputs["scores"].settings, 0
    tokens = calibration.samples * calibration.length
    if ALLOCATIONS[job.settings.allocation].influence:
        flops += tokens * flops_per_token(dense, calibration.length)
        streams = tokens * dense.config.hidden_size
    if job.settings.refit != "none":
        sampled = (calibration.samples, calibration.length)
        flops += flops_of_refit(dense, estimate.models.kept(job), sampled, job.settings.refit)
        carries = job.settings.structure in (*DEPTH, *MIXED)
        solving, streams = refit_cost(dense, job.settings.refit, tokens, carries)
        memory += solving
    if streamed:
        scratch = streams * dense.dtype.itemsize
    else:
        memory += streams * dense.dtype.itemsize
    return Cost(flops, memory, written, scratch)


PRUNE = Stage(
    name="prune",
    module=__name__,
    description="Remove the least important neurons, key-value groups or layers, and save the smaller checkpoint.",
    examples=(
        "hfprune prune --model store/model/KEY --scores store/score/KEY --ratio 0.2",
        "hfprune prune --model store/model/KEY --scores store/score/KEY --target-parameters 107000000 \\\n"
        "    --refit least_squares --text store/text/KEY",
    ),
    parameters=PruneParameters,
    produce=_produce,
    inputs={
        "model": Input(CHECKPOINTS, description="dense checkpoint"),
        "scores": Input(
            ("score", "order"),
            description="the model's scores, from `hfprune score`; for layers and sublayers their order, from `hfprune "
            "order`",
        ),
        "order": Input(
            ("order",),
            description="for mlp+layers and mlp+sublayers of both kinds: what goes first of them",
            optional=True,
        ),
        "widths": Input(("search",), description="for allocation searched: what `hfprune search` found", optional=True),
        "text": Input(
            ANY_TEXT, description="for a refit and some allocations: the text that the scores come from", optional=True
        ),
    },
    libraries=("torch", "transformers"),
    check=_check,
    reloads_checkpoint=True,
    gpus="one",
    cost=_cost,
)

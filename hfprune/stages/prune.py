"""Cutting a checkpoint: its least important neurons, key-value groups, sublayers or layers are removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from hfprune.errors import UserError
from hfprune.models.units import DEPTH, DEPTH_SHARE, MIXED, STRUCTURES, check_depth_share, check_experts_share
from hfprune.pruning.allocation import ALLOCATIONS
from hfprune.pruning.budget import STEPS
from hfprune.pruning.refit_names import IN_DEPTH, REFITS, RIDGE, SOLVED
from hfprune.pruning.saving import SAVINGS, fault, read_latencies
from hfprune.stages.declaration import (
    CHECKPOINTS,
    NOT_IN_RESULT,
    DType,
    Input,
    Memory,
    Parameters,
    Section,
    Stage,
    UserPath,
    outside_key,
)
from hfprune.stages.lineage import origin
from hfprune.store.keys import file_sha256

Ratio = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
AllocationName = Literal[tuple(ALLOCATIONS)]
StructureName = Literal[tuple(STRUCTURES)]
RefitName = Literal[REFITS]
# A command line's numbers are words, which a Literal does not take.
RoundTo = Annotated[
    Literal[STEPS],
    BeforeValidator(lambda value: int(value) if isinstance(value, str) and value.isdecimal() else value),
]


def _readable(path: Path) -> Path:
    """Refuse a file that is no table of latencies."""
    try:
        read_latencies(path)
    except UserError as error:
        raise ValueError(str(error).removesuffix(".")) from None
    return path


RatioOf = Literal["all", "mlp", *SAVINGS]
LatencyFile = Annotated[UserPath, AfterValidator(_readable)]
Context = Annotated[int, Field(ge=1)]
CONTEXT = "for ratio_of memory: tokens whose keys and values count, as in the cache of one sequence"
LATENCIES = "for ratio_of latency: the table that `hfprune latency` wrote on the machine that counts"
ROUND_TO = (
    "every MLP keeps a multiple of this many neurons (default: 64; 256 from hidden size 2048 on, 1 below hidden size "
    "256)"
)


class Cut(Section):
    """Settings that all cuts of an experiment share."""

    ratio_of: RatioOf = Field(
        "all",
        description="what the ratio counts: all parameters (tied embeddings once), the MLPs' neurons, the memory of "
        "weights and cache, or the time to decode a token",
    )
    context: Context | None = Field(None, description=CONTEXT)
    latencies: LatencyFile | None = Field(None, description=LATENCIES)
    round_to: RoundTo | None = Field(None, description=ROUND_TO)
    attention_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="attention's share of what mlp+attention removes (default: one ranking of all units decides)",
    )
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
    pad: bool = Field(False, description="pad all layers to one width with zeros; the padding costs space and time")


def one_budget(cut: Cut, ratio: str, target: str) -> None:
    """Refuse a cut that has both kinds of budget, or none."""
    budgets = [name for name in (ratio, target) if getattr(cut, name) is not None]
    if len(budgets) != 1:
        raise ValueError(f"give exactly one of {ratio} and {target}, not {'both' if budgets else 'none'}")
    if budgets == [target] and cut.ratio_of != "all":
        raise ValueError(f"'ratio_of' does not go with {target!r}, which counts all parameters")


def fits_structures(cut: Cut, structures: Sequence[str], key: str) -> None:
    """Refuse settings that do not fit the structures to cut."""
    if cut.ratio_of == "mlp" and set(structures) != {"mlp"}:
        raise ValueError(f"'ratio_of: mlp' goes with {key} mlp alone, not {', '.join(structures)}")
    if cut.pad and any(structure.endswith("sublayers") for structure in structures):
        raise ValueError(f"'pad' does not go with {key} sublayers: what is gone cannot be padded")
    if cut.attention_share is not None and "mlp+attention" not in structures:
        raise ValueError(f"'attention_share' goes with {key} mlp+attention, not {', '.join(structures)}")


def refuse_unread(structure: str, allocation: str, refit: str) -> None:
    """Refuse what does not go with whole sublayers and layers."""
    if structure in DEPTH and allocation != "uniform":
        raise ValueError(f"'allocation' does not go with structure {structure}: its order says what goes")
    if structure in (*DEPTH, *MIXED) and refit not in ("none", *IN_DEPTH):
        raise ValueError(f"refit {refit!r} does not go with structure {structure}. Use 'least_squares' or 'sequential'")


class PruneParameters(Cut, Parameters):
    """Parameters of stage `prune`."""

    ratio: Ratio | None = Field(None, description="share to remove, between 0 and 1")
    target_parameters: Count | None = Field(None, description="instead of a ratio: number of parameters to keep in all")
    structure: StructureName = Field("mlp", description="part of each layer to cut")
    allocation: AllocationName = Field("uniform", description="how to share the budget among the layers")
    refit: RefitName = Field(
        "none", description="how to adjust the remaining weights to the cut; all but none need --text"
    )
    dtype: DType = "auto"
    memory: Memory = "auto"

    @model_validator(mode="after")
    def _budget(self) -> PruneParameters:
        one_budget(self, "ratio", "target_parameters")
        fits_structures(self, [self.structure], "structure")
        check_depth_share(self.depth_share, self.structure)
        check_experts_share(self.experts_share, self.structure)
        refuse_unread(self.structure, self.allocation, self.refit)
        if reason := fault(self.ratio_of, self.structure, dict(self)):
            raise ValueError(reason)
        return self

    @property
    def label(self) -> str:
        """The size of the cut, for display."""
        share = {"all": "", "mlp": " of the MLPs"}.get(self.ratio_of, f" of {self.ratio_of}")
        return f"to {self.target_parameters:,} parameters" if self.ratio is None else f"{self.ratio:.4g}{share}"

    @property
    def reads_text(self) -> bool:
        """Whether this cut reads the calibration text: for a refit, or to measure the layers' influence."""
        return self.refit != "none" or ALLOCATIONS[self.allocation].influence is not None

    def read(self) -> dict[str, Any]:
        """The parameters that affect this cut: one budget; `ridge` only if the refit solves for weights."""
        unread = NOT_IN_RESULT | ({"ratio_of"} if self.ratio is None else set())
        unread |= set() if self.refit in SOLVED else {"ridge"}
        read = self.model_dump(exclude=unread, exclude_none=True)
        return read | ({"latencies": file_sha256(self.latencies)} if self.latencies else {})

    def options(self) -> dict[str, Any]:
        """The parameters to write on the command line."""
        return self.read() | {"memory": self.memory} | ({"latencies": self.latencies} if self.latencies else {})


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
    if scores.manifest["inputs"]["model"] != model.key:
        raise UserError(f"{scores.folder}: scores of model {scores.manifest['inputs']['model']}, not of {model.key}.")
    if text and scores.manifest["inputs"]["text"] != text.key:
        raise UserError(f"{scores.folder}: scores on text {scores.manifest['inputs']['text']}, not on {text.key}.")


def _check_order(parameters: PruneParameters, scores: Any, order: Any) -> None:
    """Refuse scores where an order is needed, an order where scores are, and one of another structure or refit."""
    stage, structure = scores.manifest["stage"], parameters.structure
    if (order is not None) != (structure in MIXED):
        asked = "leave out --order" if order else "give --order, the order of `hfprune order`"
        raise UserError(f"structure {structure!r} takes {'--scores alone' if order else 'both'}: {asked}.")
    if order:
        if order.manifest["inputs"] != {name: scores.manifest["inputs"][name] for name in ("model", "text")}:
            raise UserError(f"{order.folder}: an order of another model, or on another text, than the scores.")
        _check_same(parameters, order, MIXED[structure])
    if stage != ("order" if structure in DEPTH else "score"):
        needed = "the order of `hfprune order`" if structure in DEPTH else "the scores of `hfprune score`"
        raise UserError(f"{scores.folder}: an artifact of {stage!r}; structure {structure!r} takes {needed}.")
    if stage == "order":
        _check_same(parameters, scores, structure)


def _check_same(parameters: PruneParameters, order: Any, structure: str) -> None:
    """Refuse an order of another structure or refit."""
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
    paths = {name: inputs[name] and inputs[name].folder for name in ("text", "order")}
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
        "text": Input(
            ("text",), description="for a refit and some allocations: the text that the scores come from", optional=True
        ),
    },
    libraries=("torch", "transformers"),
    check=_check,
    reloads_checkpoint=True,
    gpus="one",
    cost=_cost,
)

"""The checkpoint without its least important neurons or key-value groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hfprune.errors import UserError
from hfprune.models.units import STRUCTURES
from hfprune.pruning.allocation import ALLOCATIONS
from hfprune.stages.declaration import CHECKPOINTS, DType, Input, Parameters, Section, Stage, outside_key
from hfprune.stages.lineage import origin

Ratio = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
AllocationName = Literal[tuple(ALLOCATIONS)]
StructureName = Literal[tuple(STRUCTURES)]
RefitName = Literal["none", "bias", "least_squares", "sequential"]
# A command line's numbers are words, which a Literal does not take.
RoundTo = Annotated[
    Literal[1, 8, 64, 128],
    BeforeValidator(lambda value: int(value) if isinstance(value, str) and value.isdecimal() else value),
]


class Cut(Section):
    """What every cut of an experiment has in common."""

    ratio_of: Literal["all", "mlp"] = Field(
        "all", description="what a ratio is a share of: all parameters (tied embeddings once), or the MLPs' neurons"
    )
    round_to: RoundTo = Field(1, description="every MLP keeps a multiple of so many neurons")
    attention_share: float | None = Field(
        None, ge=0, le=1, description="of what mlp+attention removes; null: what one ranking of all units gives"
    )
    ridge: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="how strongly refits keep to the old weights, see docs/pruning.md"
    )
    pad: bool = Field(False, description="make layers of several widths one width again, with zeros that save nothing")


def one_budget(cut: Cut, ratio: str, target: str) -> None:
    """Refuse a cut whose budget, under one of two names, is given twice or not at all."""
    given = [name for name in (ratio, target) if getattr(cut, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {ratio} and {target}, not {'both' if given else 'none'}")
    if given == [target] and cut.ratio_of != "all":
        raise ValueError(f"'ratio_of' does not go with {target!r}, which counts all parameters")


def fits_structures(cut: Cut, structures: Sequence[str], key: str) -> None:
    """Refuse what does not go with what is cut."""
    if cut.ratio_of == "mlp" and set(structures) != {"mlp"}:
        raise ValueError(f"'ratio_of: mlp' goes with {key} mlp alone, not {', '.join(structures)}")
    if cut.attention_share is not None and "mlp+attention" not in structures:
        raise ValueError(f"'attention_share' goes with {key} mlp+attention, not {', '.join(structures)}")


class PruneParameters(Cut, Parameters):
    """What stage `prune` reads."""

    ratio: Ratio | None = Field(None, description="share to remove")
    target_parameters: Count | None = Field(None, description="instead of a ratio: how many of all parameters to leave")
    structure: StructureName = Field("mlp", description="what of a layer is cut")
    allocation: AllocationName = Field("uniform", description="how layers share the budget")
    refit: RefitName = Field("none", description="what makes up for the neurons that go; all but none need the text")
    dtype: DType = "auto"

    @model_validator(mode="after")
    def _budget(self) -> PruneParameters:
        one_budget(self, "ratio", "target_parameters")
        fits_structures(self, [self.structure], "structure")
        return self

    @property
    def label(self) -> str:
        """How much is cut, for people."""
        share = "" if self.ratio_of == "all" else " of the MLPs"
        return f"to {self.target_parameters:,} parameters" if self.ratio is None else f"{self.ratio:.4g}{share}"

    def read(self) -> dict[str, Any]:
        """The parameters that this cut reads: one budget; `ridge` only where a refit solves for weights."""
        unread = {"ratio_of"} if self.ratio is None else set()
        unread |= set() if self.refit in ("least_squares", "sequential") else {"ridge"}
        return self.model_dump(exclude=unread, exclude_none=True)

    def options(self) -> dict[str, Any]:
        """The parameters that a command names."""
        return self.read()


def _check(parameters: PruneParameters, inputs: Any, making: Any) -> None:
    """Refuse scores of another model, and a text that the cut does not read or that the scores were not made on."""
    model, scores, text = inputs["model"], inputs["scores"], inputs["text"]
    if (text is None) != (parameters.refit == "none"):
        raise UserError(
            f"refit {parameters.refit!r} reads no text: leave out --text."
            if text
            else f"refit {parameters.refit!r} reads the calibration text: give --text, the one that the scores were "
            "made on."
        )
    if scores.manifest["inputs"]["model"] != model.key:
        raise UserError(f"{scores.folder}: scores of model {scores.manifest['inputs']['model']}, not of {model.key}.")
    if text and scores.manifest["inputs"]["text"] != text.key:
        raise UserError(f"{scores.folder}: scores on text {scores.manifest['inputs']['text']}, not on {text.key}.")


@outside_key  # its words follow from what the other files say
def _write_card(folder: Path) -> None:
    from hfprune.sharing.model_card import write_card

    write_card(folder)


def _produce(folder: Path, inputs: Any, parameters: PruneParameters, making: Any) -> dict[str, Any]:
    from hfprune.pruning.surgery import prune

    model, scores, text = inputs["model"], inputs["scores"], inputs["text"]
    calibration = scores.parameters | {"text": scores.manifest["details"]["text"]}
    words = text and text.folder
    details = prune(folder, model.folder, scores.folder, words, origin(model), calibration, **parameters.model_dump())
    _write_card(folder)
    return details


PRUNE = Stage(
    name="prune",
    module=__name__,
    description="Cut the least important neurons or key-value groups and save the checkpoint.",
    examples=(
        "hfprune prune --model store/model/KEY --scores store/score/KEY --ratio 0.2",
        "hfprune prune --model store/model/KEY --scores store/score/KEY --target-parameters 107000000 \\\n"
        "    --refit least_squares --text store/text/KEY",
    ),
    parameters=PruneParameters,
    produce=_produce,
    inputs={
        "model": Input(CHECKPOINTS, description="dense checkpoint"),
        "scores": Input(("score",), description="its scores"),
        "text": Input(("text",), description="what the scores were made on, for a refit", optional=True),
    },
    libraries=("torch", "transformers"),
    check=_check,
    loads_again=True,
    gpus="one",
)

"""The budget of a cut, and the scores that it is met by: what the stages that read them share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from hfprune.errors import UserError
from hfprune.pruning.budget import STEPS
from hfprune.pruning.saving import SAVINGS, fault, read_latencies
from hfprune.pruning.searched import ROUNDS
from hfprune.stages.declaration import NOT_IN_RESULT, DType, Memory, Parameters, UserPath
from hfprune.store.keys import file_sha256

Ratio = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
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
ROUNDS_OF_SEARCH = Field(
    ROUNDS,
    ge=1,
    description="for allocation searched: how often the width of every layer is measured a step narrower and wider",
)


class Budget(Parameters):
    """How much goes."""

    ratio: Ratio | None = Field(None, description="share to remove, between 0 and 1")
    target_parameters: Count | None = Field(None, description="instead of a ratio: number of parameters to keep in all")
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

    dtype: DType = "auto"
    memory: Memory = "auto"

    def check_budget(self, structure: str) -> None:
        """Refuse two budgets or none, and one that does not fit what is cut.

        Raises:
            ValueError: it is so.
        """
        budgets = [name for name in ("ratio", "target_parameters") if getattr(self, name) is not None]
        if len(budgets) != 1:
            raise ValueError(f"give exactly one of ratio and target_parameters, not {'both' if budgets else 'none'}")
        if self.ratio is None and self.ratio_of != "all":
            raise ValueError("'ratio_of' does not go with 'target_parameters', which counts all parameters")
        if self.ratio_of == "mlp" and structure != "mlp":
            raise ValueError(f"'ratio_of: mlp' goes with structure mlp alone, not {structure}")
        if self.attention_share is not None and structure != "mlp+attention":
            raise ValueError(f"'attention_share' goes with structure mlp+attention, not {structure}")
        if reason := fault(self.ratio_of, structure, dict(self)):
            raise ValueError(reason)

    @property
    def label(self) -> str:
        """The size of the cut, for display."""
        share = {"all": "", "mlp": " of the MLPs"}.get(self.ratio_of, f" of {self.ratio_of}")
        return f"to {self.target_parameters:,} parameters" if self.ratio is None else f"{self.ratio:.4g}{share}"

    def read(self) -> dict[str, Any]:
        """The parameters that affect the result: of one budget."""
        unread = NOT_IN_RESULT | ({"ratio_of"} if self.ratio is None else set())
        read = self.model_dump(exclude=unread, exclude_none=True)
        return read | ({"latencies": file_sha256(self.latencies)} if self.latencies else {})

    def options(self) -> dict[str, Any]:
        """The parameters to write on the command line."""
        return self.read() | {"memory": self.memory} | ({"latencies": self.latencies} if self.latencies else {})


def refuse_other_scores(scores: Any, model: Any, text: Any) -> None:
    """Refuse scores of another model, or on another text where one is given.

    Raises:
        UserError: it is so.
    """
    inputs = scores.manifest["inputs"]
    if inputs["model"] != model.key:
        raise UserError(f"{scores.folder}: scores of model {inputs['model']}, not of {model.key}.")
    if text and inputs["text"] != text.key:
        raise UserError(f"{scores.folder}: scores on text {inputs['text']}, not on {text.key}.")

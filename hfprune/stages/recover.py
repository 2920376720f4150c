"""The checkpoint trained after the cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hfprune.errors import UserError
from hfprune.stages.declaration import DType, Input, Parameters, Section, Stage, outside_key
from hfprune.stages.lineage import origin


class Training(Section):
    """How a model is trained after the cut; the defaults are the paper's."""

    method: Literal["lora", "norms", "full"] = Field(
        "lora", description="what is trained: adapters; norms, biases and a scale of the embeddings; every weight"
    )
    loss: Literal["cross_entropy", "distillation"] = Field(
        "cross_entropy", description="with the text's tokens, or KL from the dense model's predictions"
    )
    epochs: int = Field(2, ge=1, description="times that the text is seen")
    length: int = Field(1024, ge=2, description="tokens in a sequence, into which documents are packed")
    batch_tokens: int = Field(131072, ge=2, description="tokens of one step, in all processes together")
    learning_rate: float = Field(4e-4, gt=0, allow_inf_nan=False, description="falls to 0 by a cosine")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="of AdamW")
    rank: int = Field(32, ge=1, description="of an adapter")
    alpha: int = Field(64, ge=1, description="an adapter counts alpha / rank times")
    dropout: float = Field(0.05, ge=0, lt=1, description="of what enters an adapter")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="linear layers that get an adapter",
    )
    keep_adapter: bool = Field(False, description="keep the adapter beside the checkpoint that it is merged into")
    seed: int = Field(0, ge=0, lt=2**32, description="of the order of the sequences, of adapters and of dropout")
    micro_batch: int = Field(1, ge=1, description="sequences that a device takes at a time; only dropout sees it")
    save_steps: int = Field(50, ge=1, description="steps between two checkpoints: what a kill can lose")
    report_to: Literal["none", "tensorboard", "trackio"] = Field(
        "none", description="a tracker that is told of every step, if it is installed"
    )

    @model_validator(mode="after")
    def _fits_method(self) -> Training:
        if self.method != "lora" and (given := [name for name in OF_LORA if name in self._differing()]):
            raise ValueError(f"{given[0]!r} goes with method lora, not {self.method}")
        if self.batch_tokens % (self.length * self.micro_batch):
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is not a multiple of length x micro_batch = "
                f"{self.length} x {self.micro_batch}"
            )
        return self

    def _differing(self) -> list[str]:
        return [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]


OF_LORA = ("rank", "alpha", "dropout", "targets", "keep_adapter")
NOT_IN_RESULT = {"micro_batch", "save_steps", "report_to"}  # of Training: how it runs, not what comes out


class RecoverParameters(Training, Parameters):
    """What stage `recover` reads."""

    dtype: DType = "auto"

    def read(self) -> dict[str, Any]:
        """The parameters that decide the result: those of adapters only where there are any."""
        return self.model_dump(exclude={*NOT_IN_RESULT, *(() if self.method == "lora" else OF_LORA)})


@outside_key
def _dense_of(model: Any) -> str | None:
    """The key of the dense model that a model was made from; None for a dense one."""
    from hfprune.reporting.identity import lineage
    from hfprune.store.artifacts import Store

    dense, *later = lineage(model.key, Store(model.folder.resolve().parents[1]))
    return dense["key"] if later else None


def _check(parameters: RecoverParameters, inputs: Any, making: Any) -> None:
    """Refuse a teacher where none is learned from, and another one than the model that was cut."""
    model, teacher = inputs["model"], inputs["teacher"]
    if (teacher is None) != (parameters.loss == "cross_entropy"):
        raise UserError(
            f"loss {parameters.loss!r} has no teacher: leave out --teacher."
            if teacher
            else "loss 'distillation' compares with the dense model: give --teacher, the one that this was cut from."
        )
    if teacher and _dense_of(model) != teacher.key:
        raise UserError(f"--teacher {teacher.folder}: not the dense model that {model.folder} was cut from.")


@outside_key  # its words follow from what the other files say
def _write_card(folder: Path) -> None:
    from hfprune.sharing.model_card import write_card

    write_card(folder)


def _produce(folder: Path, inputs: Any, parameters: RecoverParameters, making: Any) -> dict[str, Any] | None:
    from hfprune.recovery.training import recover

    about = {"text": inputs["text"].manifest["details"]["name"], "source": origin(inputs["model"])}
    folders = {name: source and source.folder for name, source in inputs.items()}
    details = recover(folder, **folders, about=about, **parameters.model_dump())
    if details:  # of several processes, the first one's
        _write_card(folder)
    return details


def _in_step(make: Callable[[Callable], None], produce: Callable) -> None:
    from hfprune.recovery.training import in_step

    in_step(make, produce)


RECOVER = Stage(
    name="recover",
    module=__name__,
    description="Train a checkpoint after the cut, and save the checkpoint that comes out.",
    examples=(
        "hfprune recover --model store/prune/KEY --text store/text/KEY --length 1024 --batch-tokens 32768",
        "hfprune recover --model store/prune/KEY --text store/text/KEY --loss distillation \\\n"
        "    --teacher store/model/KEY",
        "accelerate launch --num_processes 4 -m hfprune recover --model store/prune/KEY --text store/text/KEY",
    ),
    parameters=RecoverParameters,
    produce=_produce,
    inputs={
        "model": Input(("prune", "recover", "model"), description="checkpoint, dense or pruned"),
        "text": Input(("text",), description="instructions or plain text"),
        "teacher": Input(("model",), description="dense checkpoint to distil from", optional=True),
    },
    libraries=("torch", "transformers", "peft", "accelerate"),
    check=_check,
    in_step=_in_step,
    loads_again=True,
    gpus="one",
)

"""Recovery: a checkpoint is trained after the cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hfprune.errors import UserError
from hfprune.stages.declaration import ANY_TEXT, DType, Input, Parameters, Section, Stage, outside_key
from hfprune.stages.lineage import origin


class Training(Section):
    """How a model is trained after the cut. The defaults are the paper's."""

    method: Literal["lora", "norms", "full"] = Field(
        "lora",
        description="what to train: lora: adapters; norms: norms, biases and a scale of the embeddings; full: all "
        "weights",
    )
    loss: Literal["cross_entropy", "distillation"] = Field(
        "cross_entropy",
        description="cross_entropy: with the text's tokens; distillation: KL divergence from the dense model's "
        "predictions",
    )
    start: Literal["weights", "random"] = Field(
        "weights",
        description="weights: the checkpoint's; random: random ones in its shape, a control; with method full",
    )
    epochs: int = Field(2, ge=1, description="passes over the text")
    share: float = Field(1.0, gt=0, le=1, description="train on this share of the text's tokens, in whole documents")
    select: Literal["random", "gradient_norm", "degradation"] = Field(
        "random",
        description="which documents, with share: random: drawn; gradient_norm: those whose loss has the largest "
        "gradient; degradation: those whose predictions the cut changed most",
    )
    length: int = Field(1024, ge=2, description="tokens in each sequence; documents are packed into sequences")
    batch_tokens: int = Field(131072, ge=2, description="tokens in one step, over all processes")
    learning_rate: float = Field(
        4e-4, gt=0, allow_inf_nan=False, description="of the first step; a cosine takes it to 0"
    )
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="weight decay of AdamW")
    rank: int = Field(32, ge=1, description="rank of an adapter")
    rank_by_layer: bool = Field(
        False, description="ranks in proportion to how far each layer turns its input; their mean is rank"
    )
    alpha: int = Field(64, ge=1, description="an adapter's output is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on an adapter's input")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the linear layers that get an adapter",
    )
    keep_adapter: bool = Field(False, description="also save the adapter itself, beside the merged checkpoint")
    seed: int = Field(0, ge=0, lt=2**32, description="seed for the order of the sequences, the adapters and dropout")
    micro_batch: int = Field(1, ge=1, description="sequences that a device computes at a time; affects only dropout")
    save_steps: int = Field(50, ge=1, description="steps between two checkpoints; a kill loses at most so many")
    report_to: Literal["none", "tensorboard", "trackio"] = Field(
        "none", description="tracker that gets every step's loss; it must be installed"
    )

    @model_validator(mode="after")
    def _fits_method(self) -> Training:
        if self.method != "lora" and (names := [name for name in OF_LORA if name in self._changed()]):
            raise ValueError(f"{names[0]!r} goes with method lora, not {self.method}")
        if self.start == "random" and self.method != "full":
            raise ValueError(
                f"'start: random' goes with method full, not {self.method}: no weights were trained before"
            )
        if self.share == 1 and self.select != "random":
            raise ValueError(
                f"select = {self.select!r} with share = 1: all documents are taken. Write a share below 1, or leave "
                "out select"
            )
        if self.batch_tokens % (self.length * self.micro_batch):
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is not a multiple of length x micro_batch = "
                f"{self.length} x {self.micro_batch}"
            )
        return self

    @property
    def reads_dense(self) -> bool:
        """Whether the model is compared with the dense one that it was cut from."""
        return self.loss == "distillation" or self.select == "degradation"

    def _changed(self) -> list[str]:
        return [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]


OF_LORA = ("rank", "rank_by_layer", "alpha", "dropout", "targets", "keep_adapter")
NOT_IN_RESULT = {"micro_batch", "save_steps", "report_to"}  # fields of Training that do not affect the result


class RecoverParameters(Training, Parameters):
    """Parameters of stage `recover`."""

    dtype: DType = "auto"

    def read(self) -> dict[str, Any]:
        """The parameters that affect the result. Those of adapters only with method lora."""
        unread = {*NOT_IN_RESULT, *(() if self.method == "lora" else OF_LORA)}
        unread |= set() if self.rank_by_layer else {"rank_by_layer"}
        unread |= set() if self.share < 1 else {"share", "select"}
        return self.model_dump(exclude=unread)


@outside_key
def _dense_of(model: Any) -> str | None:
    """The key of the dense model that a model was cut from; None if the model itself is dense."""
    from hfprune.reporting.identity import lineage
    from hfprune.store.artifacts import Store

    dense, *later = lineage(model.key, Store(model.folder.resolve().parents[1]))
    return dense["key"] if later else None


def _check(parameters: RecoverParameters, inputs: Any, run: Any) -> None:
    """Refuse a teacher that is not used, and one that is not the dense model of the checkpoint."""
    model, teacher = inputs["model"], inputs["teacher"]
    if (teacher is not None) != parameters.reads_dense:
        one = f"loss {parameters.loss!r} with select {parameters.select!r}"
        raise UserError(
            f"{one} has no teacher: leave out --teacher."
            if teacher
            else f"{one} compares with the dense model: give --teacher, the one that this was cut from."
        )
    if teacher and _dense_of(model) != teacher.key:
        raise UserError(f"--teacher {teacher.folder}: not the dense model that {model.folder} was cut from.")


@outside_key  # the card only repeats the other files
def _write_card(folder: Path) -> None:
    from hfprune.sharing.model_card import write_card

    write_card(folder)


def _produce(folder: Path, inputs: Any, parameters: RecoverParameters, run: Any) -> dict[str, Any] | None:
    from hfprune.recovery.training import recover

    about = {"text": inputs["text"].manifest["details"]["name"], "source": origin(inputs["model"])}
    folders = {name: source and source.folder for name, source in inputs.items()}
    details = recover(folder, **folders, about=about, **parameters.model_dump())
    if details:  # of several processes, only the first returns details
        _write_card(folder)
    return details


def _distribute(make: Callable[[Callable], None], produce: Callable) -> None:
    from hfprune.recovery.training import distribute

    distribute(make, produce)


@outside_key
def _cost(job: Any, estimate: Any) -> Any:
    import copy
    import warnings

    from hfprune.models.activations import graph_bytes
    from hfprune.models.loading import flops_per_token
    from hfprune.recovery.losses import LOGITS_PER_CHUNK
    from hfprune.recovery.ranks import SEQUENCES
    from hfprune.recovery.selection import flops_of_measure
    from hfprune.recovery.training import METHODS, bytes_beside_graph, training_flops
    from hfprune.stages.costs import Cost, weight_bytes

    settings, dense = job.settings, estimate.models.dense
    network = copy.deepcopy(estimate.models.of(job.inputs["model"]))
    disk, forward = weight_bytes(network), flops_per_token(network, settings.length)
    rows = estimate.rows(job.inputs["text"], settings.length, settings.share * settings.epochs)
    preparation = 0  # operations before the first step
    if settings.share < 1 and settings.select != "random":
        of_measure = flops_of_measure(network, dense if settings.reads_dense else None, settings.length)
        preparation += estimate.rows(job.inputs["text"], settings.length, 1) * settings.length * of_measure
    if settings.rank_by_layer:
        preparation += min(SEQUENCES, max(1, rows // settings.epochs)) * settings.length * forward
    adapters = {name: getattr(settings, name) for name in ("rank", "alpha", "dropout", "targets")}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # raised by transformers for adapters
        trained, _ = METHODS[settings.method](network, base="", **(adapters if settings.method == "lora" else {}))
    batch = settings.micro_batch * settings.length
    memory = weight_bytes(trained) + bytes_beside_graph(trained, network, batch)
    memory += 4 * 4 * min(batch * network.config.vocab_size, LOGITS_PER_CHUNK[estimate.kind])
    teacher = 0
    if settings.reads_dense:
        memory += weight_bytes(dense)
        teacher = flops_per_token(dense, settings.length) if settings.loss == "distillation" else 0
    graph, short = graph_bytes(network, batch), estimate.is_short(network, batch, memory)
    memory += estimate.graph(network, batch, memory) if short else graph
    steps = rows * settings.length // settings.batch_tokens
    flops = training_flops(trained, settings.method, forward, short, teacher) * settings.batch_tokens * steps
    return Cost(flops + preparation, estimate.device.process + memory, disk)


RECOVER = Stage(
    name="recover",
    module=__name__,
    description="Train a checkpoint after the cut, and save the trained checkpoint.",
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
        "text": Input(ANY_TEXT, description="text to train on: instructions with responses, or documents"),
        "teacher": Input(("model",), description="dense checkpoint to distil from", optional=True),
    },
    libraries=("torch", "transformers", "peft", "accelerate"),
    check=_check,
    distribute=_distribute,
    reloads_checkpoint=True,
    gpus="one",
    cost=_cost,
)

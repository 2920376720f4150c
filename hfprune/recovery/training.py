"""Training after the cut, so that what stays makes up for what went: the transformers Trainer, PEFT's adapters."""

import importlib.util
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hfprune.data.packing import NO_LABEL, Packed, read_examples
from hfprune.errors import UserError
from hfprune.models import checkpoint
from hfprune.models.context import check_checkpoint
from hfprune.models.history import BEFORE, read_step, since_the_last_cut, steps
from hfprune.models.loading import flops_per_token, load_model, load_tokenizer
from hfprune.recovery.losses import chunked, cross_entropy, distillation
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.memory import checkpointed, is_short
from hfprune.runtime.progress import bar
from hfprune.runtime.signals import Sigterm, Stopped, sigterm_deferred
from hfprune.store.filenames import ADAPTER, LOSSES, PRUNING, RECOVERY, RESUME

MAX_GRADIENT = 1.0  # norm that a step's gradient is clipped to, the Trainer's default
BYTES_PER_TRAINED = 12  # of each trained weight: its gradient and AdamW's two moments, float32
WINDOW = 10  # steps that the loss is averaged over before it counts as rising
STATE = "trainer_state.json"  # the last file that the Trainer writes of a checkpoint


def recover(
    folder: Path, model: Path, text: Path, teacher: Path | None, about: dict[str, Any], method: str, loss: str,
    epochs: int, length: int, batch_tokens: int, micro_batch: int, learning_rate: float, weight_decay: float,
    rank: int, alpha: int, dropout: float, targets: Sequence[str], keep_adapter: bool, seed: int, save_steps: int,
    report_to: str, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Stage `recover`: train the checkpoint in `model`, and write the checkpoint that comes out into `folder`.

    It is a plain checkpoint, reloaded in a fresh process (`checkpoint.prove`); beside it stand `recovery.json`,
    `losses.jsonl` (a line for each step) and, of a pruned model, its `pruning.json`. In several processes (`accelerate
    launch`) all train, each on its share of every step, and the first writes.

    Args:
        folder: where to write; its `.resume` has the Trainer's checkpoints, from which a killed training goes on.
        model: folder of a checkpoint, dense or pruned.
        text: folder of what to train on.
        teacher: folder of the dense checkpoint, for `loss` "distillation".
        about: for `recovery.json`: what is known of the text and of the model's source.
        method: a name in `METHODS`.
        loss: "cross_entropy", or "distillation": KL(teacher || student) over the whole vocabulary.
        epochs, length, seed: see `packing.Packed`.
        batch_tokens: of one step, all processes together: `batch_tokens` / `length` rows.
        micro_batch: rows that a process takes at a time.
        learning_rate, weight_decay: of AdamW; the rate falls to 0 by a cosine, without warm-up.
        rank, alpha, dropout, targets, keep_adapter: of "lora".
        save_steps: steps between the Trainer's checkpoints.
        report_to: "none", or a tracker that the Trainer knows.
        dtype: of the checkpoint written; what is trained is float32 whatever it is.

    Returns:
        Details for the manifest: the method, `steps`, `tokens` (without padding), `flops`, `seconds_together` of all
        attempts' steps, first and last loss.

    Raises:
        UserError: nothing to train on, sequences longer than the model's context, settings that do not fit one
            another, a loss that is not finite or rises, a checkpoint that does not reload.
    """
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(f"report_to = {report_to!r}: not installed. Run `pip install {report_to}`, or leave it out.")
    check_checkpoint(model, {"length": length})
    network = load_model(model, dtype, spread=False)
    own_dtype = network.dtype
    use_cache = network.config.use_cache
    rows = Packed(read_examples(load_tokenizer(model), network.config.vocab_size, text, length), length, epochs, seed)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_step = _rows_per_step(rows, batch_tokens, micro_batch, processes)
    per_token = flops_per_token(network, length)
    set_seed(seed)  # of the adapters' first weights
    network.name_or_path = model.name  # what an adapter says it belongs to: a key, not a path on this machine
    trained, finish = METHODS[method](network, rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    work = folder / RESUME
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path("tensorboard") / folder.name))
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=per_step // (micro_batch * processes),
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=weight_decay,
        max_grad_norm=MAX_GRADIENT,
        optim="adamw_torch",
        bf16=own_dtype != torch.float32,  # also of float16, whose small range would need its gradients scaled
        ddp_find_unused_parameters=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=save_steps,
        save_total_limit=2,
        report_to=report_to,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process would spread over all GPUs by DataParallel
    dense = load_model(teacher, dtype, spread=False).to(arguments.device) if teacher else None
    learned = sum(each.numel() for each in trained.parameters() if each.requires_grad)
    short = is_short(network, micro_batch * length, reserved=BYTES_PER_TRAINED * learned)
    flops = training_flops(trained, method, per_token, short, flops_per_token(dense, length) if dense else 0)
    trainer = RecoveryTrainer(
        model=trained,
        network=network,
        teacher=dense,
        args=arguments,
        train_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps(work / LOSSES, rows.tokens(), per_step))
    with arguments.main_process_first(local=False):
        last = _last_whole_checkpoint(work)
    with ExitStack() as stack:
        stack.callback(network.model.register_forward_hook(trainer.take).remove)
        stack.enter_context(fast_products(arguments.device))
        if short:
            print("memory is short: the backward pass computes each layer a second time", flush=True)
            stack.enter_context(checkpointed(network, nullcontext))
        sigterm = stack.enter_context(sigterm_deferred())
        trainer.add_callback(Leave(sigterm, trainer.accelerator))
        try:
            trainer.train(resume_from_checkpoint=last)
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory with micro_batch = {micro_batch}, length = {length}: {learned:,} weights are trained. "
                "Set a smaller micro_batch or length, or train less (method lora or norms)."
            ) from None
    if trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(f"the training is kept up to step {trainer.state.global_step} of {trainer.state.max_steps}")
    if not arguments.should_save:
        return {}
    history = [json.loads(line) for line in (work / LOSSES).read_text(encoding="utf-8").splitlines()]
    trained = trainer.accelerator.unwrap_model(trained, keep_fp32_wrapper=False)  # its forward pass as it was
    network = finish(trained, folder / ADAPTER if keep_adapter else None).eval().requires_grad_(False)
    network.config.use_cache = use_cache  # the Trainer switches it off
    for parameter in network.parameters():  # not `to`, which would round the rotary frequencies too
        parameter.data = parameter.data.to(own_dtype)
    expected = checkpoint.write(network, folder, model)
    del network, trained, trainer, dense, finish  # one copy in memory at a time: the reload is the next
    done = {
        "method": method,
        "loss": loss,
        "steps": len(history),
        "tokens": history[-1]["tokens"],
        "flops": flops * length * per_step * len(history),
        "seconds_together": round(sum(step["seconds"] for step in history), 3),
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
    }
    report = done | about | {
        "epochs": epochs, "length": length, "batch_tokens": batch_tokens, "learning_rate": learning_rate,
        "processes": processes, "reload": checkpoint.prove(folder, expected),
        BEFORE: since_the_last_cut(steps(model)),
    }  # fmt: skip
    (folder / RECOVERY).write_text(json.dumps(report) + "\n", encoding="utf-8")
    shutil.copyfile(work / LOSSES, folder / LOSSES)
    if read_step(model / PRUNING) is not None:
        shutil.copyfile(model / PRUNING, folder / PRUNING)
    return done


def _rows_per_step(rows: Packed, batch_tokens: int, micro_batch: int, processes: int) -> int:
    """How many rows make a step; `rows` keeps as many as fill whole steps."""
    per_step, odd = divmod(batch_tokens, length := rows.length)
    if odd or per_step % (micro_batch * processes):
        raise UserError(
            f"batch_tokens = {batch_tokens}: not a multiple of length x micro_batch x processes = "
            f"{length} x {micro_batch} x {processes} = {length * micro_batch * processes}. Write such a multiple."
        )
    if len(rows) < per_step:
        raise UserError(
            f"batch_tokens = {batch_tokens}: a step takes {per_step} sequences of {length} tokens; all documents and "
            f"epochs together fill {len(rows)}. Write {len(rows) * length} or less, or give more documents or epochs."
        )
    rows.truncate(len(rows) // per_step * per_step)
    return per_step


def _last_whole_checkpoint(work: Path) -> str | None:
    """The Trainer's last checkpoint; what a kill left of a later one is removed."""
    while (found := get_last_checkpoint(str(work))) is not None:
        try:
            json.loads((Path(found) / STATE).read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError):
            shutil.rmtree(found)
    return None


def distribute(make: Callable[[Callable[[Path], dict]], object], train: Callable[[Path], dict]) -> None:
    """Let the first of several processes `make` the artifact, by `train`, and the others train with it.

    Args:
        make: calls the function that it is given with the artifact's folder, unless the store has the artifact.
        train: does one process's share in that folder.
    """
    if PartialState(timeout=timedelta(days=1)).is_main_process:  # it may wait for another run that makes the same
        told: list[Path] = []

        def tell_and_train(folder: Path) -> dict:
            told.append(folder)
            broadcast_object_list([folder])
            return train(folder)

        make(tell_and_train)
        if not told:
            broadcast_object_list([None])
    else:
        heard = broadcast_object_list([None])
        if heard[0] is not None:
            train(heard[0])


def training_flops(trained: nn.Module, method: str, forward: int, short: bool, teacher: int) -> int:
    """Floating-point operations of training on one token.

    Args:
        trained: what a method of `METHODS` made of the model.
        method: its name.
        forward: operations of a forward pass of the model without what the method adds, for each token.
        short: whether layers are computed anew in the backward pass.
        teacher: operations of the teacher's forward pass, 0 without one.
    """
    # Forward, and backward to what enters each layer; adapters so too; then the gradients of the matrices trained.
    products = 2 if method == "full" else 6
    matrices = sum(products * each.numel() for each in _matrices(trained) if each.requires_grad)
    return 2 * forward + matrices + (forward if short else 0) + teacher


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights of its linear layers, each once."""
    found = {id(each.weight): each.weight for each in module.modules() if isinstance(each, nn.Linear)}
    return list(found.values())


def _lora(network: PreTrainedModel, rank: int, alpha: int, dropout: float, targets: Sequence[str]):
    """Low-rank adapters (arXiv 2106.09685) beside linear layers, merged into them at the end."""
    from peft import LoraConfig, get_peft_model

    names = {name.split(".")[-1] for name, each in network.model.named_modules() if isinstance(each, nn.Linear)}
    if missing := sorted(set(targets) - names):
        raise UserError(f"targets: this model has no linear layer {missing[0]!r}; it has {', '.join(sorted(names))}.")
    adapters = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    )

    def finish(adapted: Any, keep: Path | None) -> PreTrainedModel:
        if keep is not None:
            adapted.save_pretrained(keep)
        return adapted.merge_and_unload(safe_merge=True)

    return get_peft_model(network, adapters), finish


def _norms(network: PreTrainedModel, **_lora_settings: object):
    """Norms, biases and a scale of the embeddings alone, as in PERP (arXiv 2312.15230).

    The scale, one factor for each dimension, is folded into the embeddings. Where the output projection is tied to
    them, the last norm, before it, is divided by it: the same function, still a plain checkpoint.
    """
    embedding, last_norm = network.get_input_embeddings(), network.model.norm
    for parameter in network.parameters():
        if parameter.ndim == 1:  # norms and biases; all else is a matrix
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    embedding.scale = nn.Parameter(torch.zeros_like(last_norm.weight))  # less 1, so that weight decay draws to 1
    hook = embedding.register_forward_hook(lambda module, _inputs, output: output * (1 + module.scale))

    @torch.no_grad()
    def finish(trained: PreTrainedModel, _keep: Path | None) -> PreTrainedModel:
        hook.remove()
        scale = 1 + embedding.scale
        del embedding.scale
        if network.get_output_embeddings().weight is embedding.weight:
            last_norm.weight /= scale
        embedding.weight *= scale
        return trained

    return network, finish


def _full(network: PreTrainedModel, **_lora_settings: object):
    """Every weight, in float32."""
    return network.float().requires_grad_(True), lambda trained, _keep: trained


METHODS = {"lora": _lora, "norms": _norms, "full": _full}


class RecoveryTrainer(Trainer):
    """The Trainer with a loss from final hidden states, whose logits are made a chunk at a time.

    The forward pass is that of the module that the Trainer hands in, wrapped for several processes, so gradients are
    averaged over them; the loss is a mean over the labels of a whole step, all processes together. `network` is the
    causal model within that module.
    """

    def __init__(self, *, network: PreTrainedModel, teacher: PreTrainedModel | None, **others: Any) -> None:
        super().__init__(**others, compute_loss_func=_unused)
        self.network, self.teacher = network, teacher
        self.hidden: Tensor | None = None
        self.started = time.monotonic()
        self.trend: Trend | None = None

    def take(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        """The forward hook of `network.model` by which the loss gets at its final hidden states."""
        self.hidden = output.last_hidden_state

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over the labels, by the number of labels in the step; see transformers."""
        labels = inputs["labels"][:, 1:]
        learned = labels != NO_LABEL
        given = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}
        output = model(**given, logits_to_keep=1)
        with self.accelerator.autocast():
            hidden = self.hidden[:, :-1][learned]
            if self.teacher is None:
                term = cross_entropy(labels[learned])
            else:
                with torch.no_grad():
                    dense = self.teacher.model(**given).last_hidden_state[:, :-1][learned]
                term = distillation(dense, self.teacher.get_output_embeddings().weight)
            total = chunked(hidden, self.network.get_output_embeddings().weight, term)
        # Gradients are averaged over the processes, each of which counts the labels of all.
        loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's seconds; refuse a loss that leads nowhere, before the step is saved."""
        if "loss" in logs:
            now = time.monotonic()
            logs["seconds"], self.started = round(now - self.started, 3), now
            self._refuse(logs)
        super().log(logs, start_time)

    def _refuse(self, logs: dict[str, float]) -> None:
        if self.trend is None:  # the first step, or the first after a kill
            self.trend = Trend()
            for entry in self.state.log_history:
                if "loss" in entry:
                    self.trend.rises(entry["loss"])
        step, last = self.state.global_step, get_last_checkpoint(self.args.output_dir)
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(logs[name])]
        if broken:
            what = f"{broken[0]} is {logs[broken[0]]}; training has stopped; the last good checkpoint is {last}"
        elif self.trend.rises(logs["loss"], last=step == self.state.max_steps):
            what = f"the loss rises: {self.trend}; training has stopped; the last checkpoint is {last}"
        else:
            return
        raise UserError(f"step {step}: {what}. Set a smaller learning_rate (now {self.args.learning_rate}).")


class Trend:
    """The mean loss of the last steps, beside the lowest that it was."""

    def __init__(self) -> None:
        self.latest: deque[float] = deque(maxlen=WINDOW)
        self.mean = self.lowest = math.inf

    def rises(self, loss: float, last: bool = False) -> bool:
        """Whether the loss leads nowhere after a further step; judged over `WINDOW` steps, or when no more come."""
        self.latest.append(loss)
        self.mean = sum(self.latest) / len(self.latest)
        self.lowest = min(self.mean, self.lowest)
        return (last or len(self.latest) == WINDOW) and self.mean > 1.5 * self.lowest + 0.5

    def __str__(self) -> str:
        return f"{self.mean:.3g} over the last {len(self.latest)} steps, {self.lowest:.3g} at its best"


def _unused(*_given: object, **_named: object) -> Tensor:
    """Makes the Trainer count a step's labels, and not divide by its micro-batches; never called."""
    raise NotImplementedError


class Steps(TrainerCallback):
    """Shows how far training is, and keeps a line for each step in a file."""

    def __init__(self, file: Path, tokens: Sequence[int], per_step: int) -> None:
        self.file = file
        self.tokens = [sum(tokens[row : row + per_step]) for row in range(0, len(tokens), per_step)]  # of each step
        self.seen = list(accumulate(self.tokens))

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_others: object) -> None:
        """Begin, or go on from a checkpoint: what came after it is trained again."""
        if state.is_world_process_zero:
            self.bar = bar("recover", state.max_steps, "step", initial=state.global_step)
            self.file.write_text("".join(map(self._line, state.log_history)), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_others: object) -> None:
        """Write the step down, and show it."""
        if state.is_world_process_zero and "loss" in logs:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(self._line(state.log_history[-1]))
            pace = self.tokens[state.global_step - 1] / max(logs["seconds"], 1e-9)
            with suppress(BrokenPipeError):  # SIGTERM has ended whoever reads; the step is still to be saved
                self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {pace:,.0f} tokens/s", refresh=False)
                self.bar.update(1)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_others: object) -> None:
        """Close the bar."""
        if state.is_world_process_zero:
            self.bar.close()

    def _line(self, entry: dict[str, float]) -> str:
        names = ("step", "loss", "learning_rate", "grad_norm", "seconds")
        if "loss" not in entry:
            return ""
        found = {name: entry[name] for name in names} | {"tokens": self.seen[entry["step"] - 1]}
        return json.dumps(found) + "\n"


class Leave(TrainerCallback):
    """After the step in which SIGTERM came to any of the processes, all of them save and end their training."""

    def __init__(self, sigterm: Sigterm, accelerator: Accelerator) -> None:
        self.sigterm, self.accelerator = sigterm, accelerator

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_others: object) -> None:
        """Ask each process."""
        if self.sigterm.received:
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():
            control.should_save = control.should_training_stop = True

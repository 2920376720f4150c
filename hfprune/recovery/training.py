"""Recovery training after the cut, with the transformers Trainer and PEFT's adapters."""

import importlib.util
import json
import math
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from datetime import timedelta
from functools import partial
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
from hfprune.models.activations import checkpointed, is_short
from hfprune.models.context import check_checkpoint
from hfprune.models.families import layout_of
from hfprune.models.head import head_of
from hfprune.models.history import BEFORE, read_step, since_the_last_cut, steps
from hfprune.models.loading import LINEAR, flops_per_token, load_model, load_tokenizer
from hfprune.recovery.losses import chunked, cross_entropy, distillation
from hfprune.recovery.preparation import prepare
from hfprune.recovery.selection import budget_of
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.progress import bar
from hfprune.runtime.signals import Sigterm, Stopped, sigterm_deferred
from hfprune.store.filenames import ADAPTER, LOSSES, PRUNING, RECOVERY, RESUME

MAX_GRADIENT = 1.0  # gradients are clipped to this norm, the Trainer's default
BYTES_PER_TRAINED = 12  # for each trained weight: the gradient and AdamW's two moments, float32
WINDOW = 10  # steps to average the loss over when testing whether it rises
PREPARED = "prepared.json"  # in the folder of a killed run: what `preparation.prepare` chose
STATE = "trainer_state.json"  # the file of a checkpoint that the Trainer writes last


def recover(
    folder: Path, model: Path, text: Path, teacher: Path | None, about: dict[str, Any], method: str, loss: str,
    start: str, epochs: int, share: float, select: str, length: int, batch_tokens: int, micro_batch: int,
    learning_rate: float, weight_decay: float, rank: int, rank_by_layer: bool, alpha: int, dropout: float,
    targets: Sequence[str], keep_adapter: bool, seed: int, save_steps: int, report_to: str, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Stage `recover`: train the checkpoint in `model`, and write the trained checkpoint into `folder`.

    The result is a plain checkpoint. A fresh process reloads it as a test (`checkpoint.prove`). The folder also gets
    `recovery.json`, `losses.jsonl` (a line for each step) and, for a pruned model, its `pruning.json`. Several
    processes (`accelerate launch`) share the rows of every step; the first one writes.

    Args:
        folder: folder to write to. Its `.resume` holds the Trainer's checkpoints, from which a killed run continues.
        model: folder of a checkpoint, dense or pruned.
        text: folder of the training text.
        teacher: folder of the dense checkpoint, for `loss` "distillation" and `select` "degradation".
        about: facts on the text and the model's source, for `recovery.json`.
        method: a name in `METHODS`.
        loss: "cross_entropy", or "distillation": KL(teacher || student) over the whole vocabulary.
        start: "weights": those of the checkpoint; or "random": those that a new model of its class begins with.
        epochs, length, seed: see `packing.Packed`.
        share, select: train on that share of the text's tokens, chosen by this rule of `selection.select`.
        batch_tokens: tokens in one step, over all processes: `batch_tokens` / `length` rows.
        micro_batch: rows that a process computes at a time.
        learning_rate, weight_decay: settings of AdamW. A cosine takes the rate to 0, without warm-up.
        rank, rank_by_layer, alpha, dropout, targets, keep_adapter: settings of "lora".
        save_steps: steps between the Trainer's checkpoints.
        report_to: "none", or a tracker that the Trainer knows.
        dtype: type of the written checkpoint. Trained weights are always float32.

    Returns:
        Details for the manifest: the method, `steps`, `tokens` (without padding), `flops`, `seconds_together` (the
        steps of all attempts, and `preparation_seconds` before them), first and last loss; `documents` and
        `documents_selected` with a share, `ranks` with ranks by layer.

    Raises:
        UserError: there is nothing to train on, a sequence is longer than the model's context, settings do not match,
            the loss is not finite or rises, or the checkpoint does not reload.
    """
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(f"report_to = {report_to!r}: not installed. Run `pip install {report_to}`, or leave it out.")
    check_checkpoint(model, {"length": length})
    network = load_model(model, dtype, spread=False)
    if not layout_of(network).keeps_documents_apart:
        raise UserError(
            f"{model}: training packs several documents into a row, and in models of model_type "
            f"{network.config.model_type!r} they would see one another. These can be pruned and refitted, not trained."
        )
    own_dtype = network.dtype
    use_cache = network.config.use_cache
    examples = read_examples(load_tokenizer(model), network.config.vocab_size, text, length)
    documents, processes = len(examples), int(os.environ.get("WORLD_SIZE", "1"))
    per_step = _rows_per_step(length, batch_tokens, micro_batch, processes)
    set_seed(seed)  # of the adapters' first weights, and of random ones
    if start == "random":
        network.load_state_dict(type(network)(network.config).state_dict())
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
        bf16=own_dtype != torch.float32,  # also for float16, whose small range would need scaled gradients
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
    arguments._n_gpu = min(arguments.n_gpu, 1)  # otherwise one process would use all GPUs, by DataParallel
    dense = load_model(teacher, dtype, spread=False).to(arguments.device) if teacher else None
    rule, mean_rank = (select if share < 1 else None), (rank if rank_by_layer else None)
    prepared: dict[str, Any] = {}
    if rule or mean_rank:
        if method == "lora":
            _check_targets(network, targets)  # not only once documents are chosen
        budget = budget_of(sum(len(example.ids) for example in examples), share)
        if rule:
            _check_fills_a_step(budget * epochs // length, per_step, length)
        with arguments.main_process_first(local=False), fast_products(arguments.device):
            asked = (network.to(arguments.device), dense, examples, length, rule, budget, mean_rank, seed)
            prepared = _once(work / PREPARED, partial(prepare, *asked))
        del asked  # holds the models
        network.cpu()  # where adapters are made
        examples = [examples[document] for document in prepared["documents"]]
    if loss == "cross_entropy":
        dense = None  # it was only compared with
    rows = Packed(examples, length, epochs, seed)
    _check_fills_a_step(len(rows), per_step, length)
    rows.truncate(len(rows) // per_step * per_step)
    per_token = flops_per_token(network, length)
    lora_settings = {"rank": rank, "ranks": prepared.get("ranks"), "alpha": alpha, "dropout": dropout}
    trained, finish = METHODS[method](network, base=model.name, targets=targets, **lora_settings)
    trainable = sum(weight.numel() for weight in trained.parameters() if weight.requires_grad)
    trained.to(arguments.device)  # as the Trainer will: what is free there counts
    tokens = micro_batch * length
    short = is_short(network, tokens, reserved=bytes_beside_graph(trained, network, tokens))
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
    trainer.add_callback(StepLog(work / LOSSES, rows.tokens(), per_step))
    with arguments.main_process_first(local=False):
        last = _last_whole_checkpoint(work)
    with ExitStack() as stack:
        stack.callback(network.base_model.register_forward_hook(trainer.keep_hidden).remove)
        stack.enter_context(fast_products(arguments.device))
        if short:
            print("memory is short: the backward pass computes each layer a second time", flush=True)
            stack.enter_context(checkpointed(network, nullcontext))
        sigterm = stack.enter_context(sigterm_deferred())
        trainer.add_callback(StopOnSigterm(sigterm, trainer.accelerator))
        try:
            trainer.train(resume_from_checkpoint=last)
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory with micro_batch = {micro_batch}, length = {length}: {trainable:,} weights are "
                "trained. Set a smaller micro_batch or length, or train less (method lora or norms)."
            ) from None
    if trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(f"the training is kept up to step {trainer.state.global_step} of {trainer.state.max_steps}")
    if not arguments.should_save:
        return {}
    history = [json.loads(line) for line in (work / LOSSES).read_text(encoding="utf-8").splitlines()]
    trained = trainer.accelerator.unwrap_model(trained, keep_fp32_wrapper=False)  # restores the forward pass
    network = finish(trained, folder / ADAPTER if keep_adapter else None).eval().requires_grad_(False)
    network.config.use_cache = use_cache  # the Trainer switches it off
    for parameter in network.parameters():  # `to` would also round the rotary frequencies
        parameter.data = parameter.data.to(own_dtype)
    expected = checkpoint.write(network, folder, model)
    del network, trained, trainer, dense, finish  # free the memory: the reload needs as much again
    details = {
        "method": method,
        "loss": loss,
        "steps": len(history),
        "tokens": history[-1]["tokens"],
        "flops": flops * length * per_step * len(history) + prepared.get("flops", 0),
        "seconds_together": round(sum(step["seconds"] for step in history) + prepared.get("seconds", 0), 3),
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
    }
    if prepared:
        details["preparation_seconds"] = prepared["seconds"]
    if rule:
        details |= {"select": rule, "share": share, "documents": documents, "documents_selected": len(examples)}
    if mean_rank:
        details["ranks"] = prepared["ranks"]
    report = details | about | {
        "start": start, "epochs": epochs, "length": length, "batch_tokens": batch_tokens,
        "learning_rate": learning_rate, "processes": processes, "reload": checkpoint.prove(folder, expected),
        BEFORE: since_the_last_cut(steps(model)),
    }  # fmt: skip
    (folder / RECOVERY).write_text(json.dumps(report) + "\n", encoding="utf-8")
    shutil.copyfile(work / LOSSES, folder / LOSSES)
    if read_step(model / PRUNING) is not None:
        shutil.copyfile(model / PRUNING, folder / PRUNING)
    return details


def _rows_per_step(length: int, batch_tokens: int, micro_batch: int, processes: int) -> int:
    """The number of rows in a step."""
    per_step, remainder = divmod(batch_tokens, length)
    if remainder or per_step % (micro_batch * processes):
        raise UserError(
            f"batch_tokens = {batch_tokens}: not a multiple of length x micro_batch x processes = "
            f"{length} x {micro_batch} x {processes} = {length * micro_batch * processes}. Write such a multiple."
        )
    return per_step


def _check_fills_a_step(rows: int, per_step: int, length: int) -> None:
    """Refuse fewer rows than a step takes."""
    if rows < per_step:
        raise UserError(
            f"batch_tokens = {per_step * length}: a step takes {per_step} sequences of {length} tokens; all documents "
            f"and epochs together fill {rows}. Write {rows * length} or less, or give more documents or epochs, or a "
            "larger share."
        )


def _once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, kept in a file: a run that was killed goes on with the same."""
    if not file.exists():
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(make()), encoding="utf-8")
        unfinished.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def _last_whole_checkpoint(work: Path) -> str | None:
    """The Trainer's last complete checkpoint. A later one that a kill cut short is removed."""
    while (last := get_last_checkpoint(str(work))) is not None:
        try:
            json.loads((Path(last) / STATE).read_text(encoding="utf-8"))
            return last
        except (OSError, ValueError):
            shutil.rmtree(last)
    return None


def distribute(make: Callable[[Callable[[Path], dict]], object], train: Callable[[Path], dict]) -> None:
    """Make an artifact in several processes: the first one calls `make`, the others only train with it.

    Args:
        make: calls its argument with the artifact's folder, unless the store already has the artifact.
        train: trains one process's share, in that folder.
    """
    if PartialState(timeout=timedelta(days=1)).is_main_process:  # it may wait for another run of the same artifact
        has_started = False

        def start_and_train(folder: Path) -> dict:
            nonlocal has_started
            has_started = True
            broadcast_object_list([folder])
            return train(folder)

        make(start_and_train)
        if not has_started:
            broadcast_object_list([None])
    else:
        (folder,) = broadcast_object_list([None])
        if folder is not None:
            train(folder)


def bytes_beside_graph(trained: nn.Module, network: PreTrainedModel, tokens: int) -> int:
    """The most that training takes beside the weights, the logits and `activations.graph_bytes` of so many tokens.

    For each trained weight that is its gradient and AdamW's moments. Adapters keep their inputs in float32, before and
    after dropout. A float16 model computes in bfloat16, and the backward pass needs its frozen matrices in that type.

    Args:
        trained: the model as prepared by a method of `METHODS`.
        network: the model inside it.
        tokens: of a micro-batch.
    """
    trainable = sum(weight.numel() for weight in trained.parameters() if weight.requires_grad)
    inputs = sum(module.in_features for module in trained.modules() if hasattr(module, "lora_A"))
    frozen = sum(weight.numel() for weight in _matrices(network.base_model) if not weight.requires_grad)
    copies = 2 * frozen if network.dtype == torch.float16 else 0
    return BYTES_PER_TRAINED * trainable + 8 * tokens * inputs + copies


def training_flops(trained: nn.Module, method: str, forward: int, short: bool, teacher: int) -> int:
    """Floating-point operations of training on one token.

    Args:
        trained: the model as prepared by a method of `METHODS`.
        method: name of the method.
        forward: operations of the model's forward pass per token, without the method's additions.
        short: whether the backward pass computes each layer again.
        teacher: operations of the teacher's forward pass per token, 0 without a teacher.
    """
    # The forward pass, and the backward pass to each layer's input. Then the gradients of the trained matrices (2
    # operations for each weight); adapters also add their own forward and backward pass (4 more).
    products = 2 if method == "full" else 6
    matrices = sum(products * weight.numel() for weight in _matrices(trained) if weight.requires_grad)
    return 2 * forward + matrices + (forward if short else 0) + teacher


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """The distinct weights of the module's linear layers."""
    weights = {id(layer.weight): layer.weight for layer in module.modules() if isinstance(layer, LINEAR)}
    return list(weights.values())


def _check_targets(network: PreTrainedModel, targets: Sequence[str]) -> None:
    """Refuse names that no linear layer has."""
    names = {name.split(".")[-1] for name, module in network.base_model.named_modules() if isinstance(module, LINEAR)}
    if missing := sorted(set(targets) - names):
        raise UserError(f"targets: this model has no linear layer {missing[0]!r}; it has {', '.join(sorted(names))}.")


def _lora(
    network: PreTrainedModel, base: str, rank: int, alpha: int, dropout: float, targets: Sequence[str],
    ranks: Sequence[int] | None = None,
):  # fmt: skip
    """Low-rank adapters (arXiv 2106.09685) beside linear layers, merged into them at the end.

    An adapter names its base model: by `base`, a key, not by a path on this machine. With `ranks`, one for each layer,
    alpha changes in proportion, so that all layers have one scale, alpha / rank.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(network, targets)
    network.name_or_path = ""  # peft would look a named model up on the hub at each save
    by_layer = {rf"{re.escape(layout_of(network).layers)}\.{i}\..*": own for i, own in enumerate(ranks or [])}
    adapters = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        rank_pattern=by_layer,
        alpha_pattern={name: alpha * own / rank for name, own in by_layer.items()},
    )

    def finish(adapted: Any, keep: Path | None) -> PreTrainedModel:
        if keep is not None:
            adapted.active_peft_config.base_model_name_or_path = base
            adapted.save_pretrained(keep, save_embedding_layers=False)
        return adapted.merge_and_unload(safe_merge=True)

    return get_peft_model(network, adapters), finish


def _norms(network: PreTrainedModel, **_lora_settings: object):
    """Only norms, biases and a scale of the embeddings, as in PERP (arXiv 2312.15230).

    The scale has one factor for each dimension. It is folded into the embeddings at the end. If the output projection
    is tied to the embeddings, the last norm is divided by the scale. So the function stays the same, and the result is
    a plain checkpoint.
    """
    embedding = network.get_input_embeddings()
    last_norm = network.base_model.get_submodule(layout_of(network).final_norm)
    tied = network.get_output_embeddings().weight is embedding.weight
    if tied and getattr(last_norm, "weight", None) is None:
        raise UserError(
            f"method 'norms': the last norm of a {network.config.model_type} model has no weights, which would take up "
            "the scale of its tied embeddings. Use 'lora' or 'full'."
        )
    for parameter in network.parameters():
        if parameter.ndim == 1:  # norms and biases; all others are matrices
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    zeros = torch.zeros(embedding.weight.shape[1], device=embedding.weight.device)
    embedding.scale = nn.Parameter(zeros)  # scale - 1: weight decay pulls to 1
    hook = embedding.register_forward_hook(lambda module, _inputs, output: output * (1 + module.scale))

    @torch.no_grad()
    def finish(trained: PreTrainedModel, _keep: Path | None) -> PreTrainedModel:
        hook.remove()
        scale = 1 + embedding.scale
        del embedding.scale
        if tied:
            offset = _offset_of_gains(last_norm)
            last_norm.weight.copy_((last_norm.weight + offset) / scale - offset)
            if getattr(last_norm, "bias", None) is not None:
                last_norm.bias /= scale
        embedding.weight *= scale
        return trained

    return network, finish


def _offset_of_gains(norm: nn.Module) -> int:
    """What a norm adds to its weights before it multiplies by them: 1 in Gemma and Nemotron, else 0."""
    silent = {name: torch.zeros_like(parameter) for name, parameter in norm.named_parameters()}
    ramp = torch.linspace(-1, 1, len(norm.weight), device=norm.weight.device, dtype=norm.weight.dtype)
    return int(torch.func.functional_call(norm, silent, (ramp,)).any())


def _full(network: PreTrainedModel, **_lora_settings: object):
    """Every weight, in float32."""
    return network.float().requires_grad_(True), lambda trained, _keep: trained


METHODS = {"lora": _lora, "norms": _norms, "full": _full}


class RecoveryTrainer(Trainer):
    """The Trainer with a loss from final hidden states, whose logits are computed in chunks.

    The Trainer passes its module to `compute_loss`, wrapped for several processes, so gradients are averaged over the
    processes. The loss is the mean over the labels of a whole step in all processes. `network` is the causal model
    inside that module.
    """

    def __init__(self, *, network: PreTrainedModel, teacher: PreTrainedModel | None, **others: Any) -> None:
        super().__init__(**others, compute_loss_func=_unused)
        self.network, self.teacher = network, teacher
        self.hidden: Tensor | None = None
        self.started = time.monotonic()
        self.trend: LossTrend | None = None

    def keep_hidden(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        """Forward hook of the base model: keeps the final hidden states for the loss."""
        self.hidden = output.last_hidden_state

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The summed loss, divided by the number of labels in the step; see transformers."""
        labels = inputs["labels"][:, 1:]
        has_label = labels != NO_LABEL
        sequence = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}
        output = model(**sequence, logits_to_keep=1)
        with self.accelerator.autocast():
            hidden = self.hidden[:, :-1][has_label]
            if self.teacher is None:
                term = cross_entropy(labels[has_label])
            else:
                with torch.no_grad():
                    dense = self.teacher.base_model(**sequence).last_hidden_state[:, :-1][has_label]
                with head_of(self.teacher) as head:
                    term = distillation(dense, head)
            with head_of(self.network) as head:
                total = chunked(hidden, head, term)
        # Gradients are averaged over the processes, but `num_items_in_batch` counts the labels of all processes.
        loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's seconds. Refuse a loss that diverges, before the step is saved."""
        if "loss" in logs:
            now = time.monotonic()
            logs["seconds"], self.started = round(now - self.started, 3), now
            self._refuse_divergence(logs)
        super().log(logs, start_time)

    def _refuse_divergence(self, logs: dict[str, float]) -> None:
        if self.trend is None:  # the first step, or the first after a kill
            self.trend = LossTrend()
            for entry in self.state.log_history:
                if "loss" in entry:
                    self.trend.rises(entry["loss"])
        step, last = self.state.global_step, get_last_checkpoint(self.args.output_dir)
        not_finite = [name for name in ("loss", "grad_norm") if not math.isfinite(logs[name])]
        if not_finite:
            reason = (
                f"{not_finite[0]} is {logs[not_finite[0]]}; training has stopped; the last good checkpoint is {last}"
            )
        elif self.trend.rises(logs["loss"], last=step == self.state.max_steps):
            reason = f"the loss rises: {self.trend}; training has stopped; the last checkpoint is {last}"
        else:
            return
        raise UserError(f"step {step}: {reason}. Set a smaller learning_rate (now {self.args.learning_rate}).")


class LossTrend:
    """The mean loss of the last steps, and its lowest value so far."""

    def __init__(self) -> None:
        self.latest: deque[float] = deque(maxlen=WINDOW)
        self.mean = self.lowest = math.inf

    def rises(self, loss: float, last: bool = False) -> bool:
        """Whether the loss rises, now with one more step. Needs `WINDOW` steps, or the last one."""
        self.latest.append(loss)
        self.mean = sum(self.latest) / len(self.latest)
        self.lowest = min(self.mean, self.lowest)
        return (last or len(self.latest) == WINDOW) and self.mean > 1.5 * self.lowest + 0.5

    def __str__(self) -> str:
        return f"{self.mean:.3g} over the last {len(self.latest)} steps, {self.lowest:.3g} at its best"


def _unused(*_positional: object, **_by_name: object) -> Tensor:
    """Never runs. As a loss function, it makes the Trainer count a step's labels and not divide by micro-batches."""
    raise NotImplementedError


class StepLog(TrainerCallback):
    """Shows the training's progress, and writes a line for each step into a file."""

    def __init__(self, file: Path, tokens: Sequence[int], per_step: int) -> None:
        self.file = file
        self.tokens = [sum(tokens[row : row + per_step]) for row in range(0, len(tokens), per_step)]  # in each step
        self.total_tokens = list(accumulate(self.tokens))  # up to each step

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_others: object) -> None:
        """Open the progress bar, and drop lines after the checkpoint: their steps are trained again."""
        if state.is_world_process_zero:
            self.bar = bar("recover", state.max_steps, "step", initial=state.global_step)
            self.file.write_text("".join(map(self._line, state.log_history)), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_others: object) -> None:
        """Write and show the step."""
        if state.is_world_process_zero and "loss" in logs:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(self._line(state.log_history[-1]))
            pace = self.tokens[state.global_step - 1] / max(logs["seconds"], 1e-9)
            with suppress(BrokenPipeError):  # SIGTERM may have ended the reader; the step must still be saved
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
        values = {name: entry[name] for name in names} | {"tokens": self.total_tokens[entry["step"] - 1]}
        return json.dumps(values) + "\n"


class StopOnSigterm(TrainerCallback):
    """Saves and ends the training in all processes after the step in which any of them received SIGTERM."""

    def __init__(self, sigterm: Sigterm, accelerator: Accelerator) -> None:
        self.sigterm, self.accelerator = sigterm, accelerator

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_others: object) -> None:
        """Check whether any process has received SIGTERM."""
        if self.sigterm.received:
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():
            control.should_save = control.should_training_stop = True

"""The cost of an experiment before anything is downloaded: operations, memory and disk of every job.

The models are built from a config.json alone, on the meta device, which has shapes but no weights. Estimates use the
stages' own formulas, so they agree with what the stages record. Unknowns before a download, such as the length of
documents, are assumed, and the report lists these assumptions.
"""

import copy
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hfprune.data import packing
from hfprune.data.download import _hub_errors, describe
from hfprune.errors import UserError
from hfprune.experiment.plan import Job, Plan
from hfprune.experiment.schema import DType, Experiment, Source
from hfprune.models.activations import bytes_beside_weights, forward_bytes, graph_bytes
from hfprune.models.loading import (
    PREFILL,
    active_parameters,
    check_family,
    flops_per_token,
    load_tokenizer,
)
from hfprune.models.units import DEPTH, MIXED, STRUCTURES
from hfprune.pruning import scoring
from hfprune.pruning.budget import BUDGET, refuse_method, shape_of, units_shapes, units_to_keep
from hfprune.pruning.criteria import CRITERIA, GradientCriterion
from hfprune.pruning.head import LOGITS_PER_CHUNK
from hfprune.pruning.order import best_steps, kept_without, steps_of, those_that_go
from hfprune.pruning.recorder import bytes_of_sums
from hfprune.pruning.saving import SAVINGS, saving_of
from hfprune.pruning.searched import held_out
from hfprune.pruning.surgery import best_units, cut, units_within, without_and_narrower
from hfprune.pruning.width_search import most_operations
from hfprune.stages.costs import Cost, streamed_bytes, weight_bytes
from hfprune.stages.declaration import ANY_TEXT
from hfprune.stages.registry import STAGES
from hfprune.store.artifacts import Store
from hfprune.store.filenames import DOCUMENTS
from hfprune.store.keys import canonical

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """The device that jobs run on.

    Attributes:
        name: name for display.
        peak: peak operations per second by the dtype's name, for dense (not sparse) matrix products.
        memory: memory in bytes.
        process: bytes of a process without a model: the libraries. 0 on a GPU.
        source: source of these numbers.
    """

    name: str
    peak: Mapping[str, float]
    memory: int
    process: int
    source: str


def _gpu(name: str, half: float, single: float, memory: int, source: str) -> Device:
    """A GPU from its data sheet: TFLOP/s in bfloat16 on tensor cores, TFLOP/s in float32, memory in GB."""
    peak = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Device(name, peak, memory * 10**9, 0, source)


GPUS = {
    "h200": _gpu("NVIDIA H200 SXM", 989.5, 67, 141, "NVIDIA H200 data sheet"),
    "h100": _gpu("NVIDIA H100 SXM", 989.5, 67, 80, "NVIDIA H100 data sheet"),
    "a100": _gpu("NVIDIA A100 80GB SXM", 312, 19.5, 80, "NVIDIA A100 data sheet"),
    "a6000": _gpu("NVIDIA RTX A6000", 154.8, 38.7, 48, "NVIDIA Ampere GA102 whitepaper, RTX A6000"),
    "l40s": _gpu("NVIDIA L40S", 362, 91.6, 48, "NVIDIA L40S data sheet"),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 165.2, 82.6, 24, "NVIDIA Ada GPU architecture whitepaper"),
}
CPU_PEAK = 100e9  # per core: oneDNN's float32 products on the AMD EPYC with AVX-512 of docs/scoring.md
PROCESS_BYTES = int(0.6 * GIB)  # torch, transformers and the libraries that they load

# Requests to a cluster. They are generous: a cluster kills a job that exceeds its request.
HOST_PROCESS_BYTES = 4 * GIB  # host memory of a process with a GPU, CUDA's libraries included; an assumption
SNAKEMAKE_BYTES = GIB // 2  # inside a job, Snakemake starts a second Snakemake, which runs the stage
DATA_IN_MEMORY = 4  # bytes of documents in memory (Python objects and tokens) per byte on disk
SPARE = 1.5  # factor on the computed memory
START_SECONDS = 15 * 60  # imports, tokenising and other work without matrix products
SECONDS_PER_GIB = 60  # for reading and writing
SLOW_SHARE = 0.2  # share of the peak speed: half of the default of `hfprune plan`

# Further costs of timing.
TIMED_ROUNDS = 7  # of `hfprune efficiency`: 5 measured, one before them, and one in the process that measures memory
SCORED_ROUNDS = 5  # of `hfprune scoring-cost`: 3 measured and the same two others, which use part of the text
FILE_ROUNDS, FILE_TOKENS = 5, 64  # the defaults of `hfprune files`
FILE_SECONDS = 10  # until llama.cpp has loaded a file; an assumption
PROCESS_SECONDS = 60  # start of a separate process, one for each model or criterion
STEP_SECONDS = 0.05  # per decoded token, for a model of any size; an assumption
BYTES_PER_SECOND = {"cpu": 10e9, "cuda": 300e9}  # memory bandwidth: every decoded token reads all weights

# lm-eval's tasks: documents, requests per document, tokens per request (context and continuation). The tokens were
# counted with the embedded model's tokenizer; those of arc_challenge and race are assumptions.
TASKS = {
    "arc_challenge": (1172, 4, 38),
    "arc_easy": (2376, 4, 32),
    "boolq": (3270, 2, 156),
    "crows_pairs_english": (1677, 2, 15),
    "openbookqa": (500, 4, 15),
    "piqa": (1838, 2, 29),
    "race": (1045, 4, 520),
    "social_iqa": (1954, 3, 33),
    "truthfulqa_mc2": (817, 7.4, 199),
    "winogrande": (1267, 2, 22),
}
OTHER_TASK = (2000, 4, 100)

BYTES_PER_TOKEN = 4.3  # in English text
TOKENIZED_DOCUMENTS = 100  # documents to tokenize to measure the bytes per token
# Datasets on the hub: documents, bytes per document (C4: a sample's mean; LaMini-instruction: count from its card).
TEXTS = {"allenai/c4": (350_000, 2200), "MBZUAI/LaMini-instruction": (2_585_615, 450)}
OTHER_TEXT = (10_000, 2000)


@dataclass(frozen=True)
class Request:
    """A job's request to a cluster: bytes of the node's memory, seconds, GPUs."""

    memory_bytes: int
    seconds: float
    gpus: int


@dataclass(frozen=True)
class Text:
    """The size of a text, known or assumed.

    Attributes:
        documents: number of documents.
        size: mean bytes per document.
        sizes: bytes of every document, if the text is in the store.
        per_token: bytes per token.
        template: tokens in the template of an instruction.
    """

    documents: int
    size: float
    sizes: list[int] | None = None
    per_token: float = BYTES_PER_TOKEN
    template: float = len(packing.PROMPT) / BYTES_PER_TOKEN


def device_of(name: str, cores: int | None = None) -> Device:
    """The device with this name: a GPU in `GPUS`, or "cpu".

    Args:
        name: name of the device.
        cores: for "cpu", the cores of another machine with unlimited memory; None means this machine.

    Raises:
        UserError: there is no such device.
    """
    if name == "cpu":
        memory = sys.maxsize if cores else psutil.virtual_memory().total
        cores = cores or os.cpu_count() or 1
        peak = dict.fromkeys(("float32", "bfloat16", "float16"), cores * CPU_PEAK)
        return Device(f"{cores} CPU cores", peak, memory, PROCESS_BYTES, "measured, see docs/scoring.md")
    if name not in GPUS:
        known = [*GPUS, "cpu"]
        matches = get_close_matches(name.lower(), known, n=1)
        hint = f" Did you mean {matches[0]!r}?" if matches else ""
        raise UserError(f"gpu {name}: not known. Known: {', '.join(known)}.{hint}")
    return GPUS[name]


def config_of(model: Source, job: Job, store: Store, shape: Path | None) -> tuple[PreTrainedConfig, str]:
    """The config of an experiment's model, and where it comes from, for display.

    Args:
        model: source of the experiment's model.
        job: job that downloads the model.
        store: store that may have the model already.
        shape: a config.json to use instead of the model's. If None, the config comes from the store, the model's `path`
            or the hub, in this order; only the config.json is downloaded.

    Raises:
        UserError: there is no config, or its model cannot be pruned here.
    """
    if shape is not None:
        return _read_config(shape), f"{shape}"
    if store.has("model", job.key):
        return check_family(store.folder(job.recipe)), "the store"
    if model.path is not None and model.path.is_dir():
        return check_family(model.path), f"{model.path}"
    if model.hub is None:
        command = " ".join(["hfprune download model", *job.options])
        raise UserError(
            f"{model.label}: its shape is inside a GGUF file that is not downloaded. Run `{command}` first, or give a "
            "config.json of a model of this shape by --shape."
        )
    from huggingface_hub import HfApi, errors

    origin, hub = model.origin(), HfApi()
    try:
        with _hub_errors(origin), tempfile.TemporaryDirectory() as folder:
            commit = hub.model_info(model.hub, revision=model.revision).sha
            file = hub.hf_hub_download(model.hub, "config.json", revision=commit, local_dir=folder)
            return _read_config(Path(file)), f"the hub, {model.hub} at {commit[:12]}"
    except UserError as error:
        raise UserError(f"{error} Or give the model's config.json by --shape.") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{describe(origin)}: its config.json could not be had. Give one by --shape.") from None


def _read_config(file: Path) -> PreTrainedConfig:
    """The config in a file of any name.

    Raises:
        UserError: the file is no config, or its model cannot be pruned here.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--shape {file}: cannot be read: {error.strerror}.") from None
    except ValueError:
        raise UserError(f"--shape {file}: not JSON; expected a model's config.json.") from None
    needed = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    if not isinstance(values, dict) or (missing := [name for name in needed if name not in values]):
        reason = f"it lacks {', '.join(missing)}" if isinstance(values, dict) else "it holds no keys"
        raise UserError(f"--shape {file}: not a model's config.json: {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        return check_family(Path(folder), str(file))


class Models:
    """The models of an experiment, dense and pruned, as shapes without weights.

    Args:
        config: config of the dense model.
        dtype: type to compute and save in; "auto": the config's.
    """

    def __init__(self, config: PreTrainedConfig, dtype: DType) -> None:
        kind = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
        with torch.device("meta"):
            self.dense = AutoModelForCausalLM.from_config(config, dtype=kind).eval().requires_grad_(False)
        self.shape = shape_of(self.dense)
        self.dtype = str(kind).removeprefix("torch.")
        self._pruned: dict[str, PreTrainedModel] = {}  # by the parameters of the cut

    def of(self, job: Job) -> PreTrainedModel:
        """The model that a job of stage `model`, `prune` or `recover` makes."""
        if job.recipe.stage == "model":
            return self.dense
        if job.recipe.stage == "recover":
            return self.of(job.inputs["model"])
        parameters = canonical(job.recipe.parameters)  # the scores do not change the shape
        if parameters not in self._pruned:
            self._pruned[parameters] = copy.deepcopy(self.dense)
            cut(self._pruned[parameters], self.kept(job))
        return self._pruned[parameters]

    def kept(self, job: Job) -> dict[str, list[torch.Tensor]]:
        """The units that a job of `prune` keeps: their number is right, but random scores choose them.

        Only real scores tell which units go. With `mlp+attention` and `mlp+experts` and no share of one they also tell
        how much of the cut falls on attention or on whole experts; here all of it falls on the neurons.

        Raises:
            UserError: the model cannot be cut that far.
        """
        settings, criterion = job.settings, job.inputs["scores"].settings.criterion
        structure, allocation = settings.structure, settings.allocation
        refuse_method(self.shape, structure, criterion, settings.refit)
        budget = {name: getattr(settings, name) for name in BUDGET}
        config, needed = self.dense.config, {name: budget.pop(name) for name in SAVINGS.values()}
        generator = torch.Generator().manual_seed(0)
        shapes = {name: units_shapes(self.shape, name) for name in STRUCTURES[structure]}
        scores = {name: [torch.rand(shape, generator=generator) for shape in shapes[name]] for name in shapes}
        alike = torch.ones(config.num_hidden_layers, dtype=torch.float64)
        if saving := saving_of(self.shape, settings.ratio_of, structure, config, **needed):
            names = ("ratio", "structure", "allocation", "round_to")
            of_these = {name: budget[name] for name in names}
            return units_within(self.shape, saving, **of_these, scores=scores, influence=alike)[1]
        whole = units_to_keep(self.shape, **budget)
        if structure in DEPTH:
            last_first = those_that_go(self.shape, steps_of(self.shape, structure)[::-1])
            return kept_without(self.shape, best_steps(self.shape, last_first, whole.share * self.shape.total))
        if structure in MIXED:
            return without_and_narrower(self.shape, whole, scores, allocation, alike)
        return best_units(whole, scores, allocation, alike)


class Estimate:
    """The cost of a plan's jobs on a device.

    Attributes:
        assumptions: assumptions about data that is not downloaded yet: sentences for display, in a dict without values.
    """

    def __init__(self, plan: Plan, models: Models, device: Device) -> None:
        self.plan, self.models, self.device = plan, models, device
        self.kind = "cpu" if device.process else "cuda"
        self.assumptions: dict[str, None] = {}
        self._texts: dict[str, Text] = {}

    def cost(self, job: Job) -> Cost:
        """The cost of a job.

        If several criteria share one pass, the first criterion's job has all of its operations and the others none.
        """
        return STAGES[job.recipe.stage].cost(job, self)

    def seconds(self, flops: int, utilisation: float) -> float:
        """Time for `flops` operations at this share of the peak speed."""
        return flops / (self.device.peak[self.models.dtype] * utilisation)

    def request(self, job: Job) -> Request:
        """A job's request to a cluster, generous.

        On a CPU the memory is what the job computes in. With a GPU it is host memory for the files on their way to and
        from the GPU.
        """
        stage, on_cpu = STAGES[job.recipe.stage], bool(self.device.process)
        cost = self.cost(job.after or job)  # a later job of a pass has the whole pass to do if the first one failed
        files = sum(self._size(file_job) for file_job in [job, *job.sources])
        data = sum(self._size(source) for source in job.sources if source.recipe.stage in (*ANY_TEXT, "task"))
        process = self.device.process or HOST_PROCESS_BYTES
        memory = cost.memory_bytes if on_cpu else process + files
        memory += SNAKEMAKE_BYTES + DATA_IN_MEMORY * data
        if stage.reloads_checkpoint:
            is_streamed = job.recipe.stage == "prune" and self.is_streamed(job, self.models.dense)
            memory += process + (streamed_bytes(self.models.dense) if is_streamed else self._size(job))
        seconds = START_SECONDS + SECONDS_PER_GIB * files / GIB + self.seconds(cost.flops, SLOW_SHARE)
        if on_cpu or job.is_light or stage.gpus == "none":
            gpus = 0
        else:
            gpus = 1 if stage.gpus == "one" else math.ceil(cost.memory_bytes / self.device.memory)
        return Request(round(SPARE * memory), seconds, gpus)

    def efficiency(self, new_tokens: int) -> Request:
        """The request of `hfprune efficiency`, for room to hold all of the plan's timed models at once."""
        from hfprune.evaluation.timing import BATCHES, PROMPT

        models = [self.models.of(job) for job in self.plan.timed]
        length, rows = PROMPT + new_tokens, sum(BATCHES)
        weights, flops, seconds = sum(map(weight_bytes, models)), 0, 0.0
        for model in models:
            flops += PREFILL * flops_per_token(model, PREFILL) + rows * length * flops_per_token(model, length)
            step = STEP_SECONDS + weight_bytes(model) / BYTES_PER_SECOND[self.kind]
            seconds += TIMED_ROUNDS * len(BATCHES) * new_tokens * step
        seconds += self.seconds(TIMED_ROUNDS * flops, SLOW_SHARE)
        activations = max(forward_bytes(model, PREFILL, whole=True) for model in models)  # more than the KV cache
        return self._timing(weights + max(BATCHES) * activations, weights, len(models), seconds)

    def scoring_cost(self) -> Request:
        """The request of `hfprune scoring-cost` for the plan's criteria."""
        calibration, criteria = self.plan.experiment.calibration, self.plan.experiment.criteria
        dense, shape, draws = self.models.dense, (calibration.samples, calibration.length), calibration.draws
        costs = [scoring.cost(dense, shape, [name], draws, bool(CRITERIA[name].light_cut), False) for name in criteria]
        seconds = self.seconds(SCORED_ROUNDS * sum(cost["flops"] for cost in costs), SLOW_SHARE)
        memory = max((self.scoring_memory([name], shape, False) for name in criteria), default=0)
        return self._timing(memory, weight_bytes(dense), len(criteria), seconds)

    def files(self, threads: int) -> Request:
        """The request of `hfprune files`. llama.cpp computes on the CPU, with one file in memory at a time."""
        asked, read = self.plan.experiment.deploy, self.plan.compared_with.settings
        jobs = {job.inputs["model"].key: job.inputs["model"] for job in self.plan.files}
        models = [self.models.of(job) for job in jobs.values()]
        flops = seconds = 0
        for model in models:
            tokens = (asked.samples or read.samples) * read.length * flops_per_token(model, read.length)
            flops += tokens + FILE_ROUNDS * 2 * PREFILL * flops_per_token(model, PREFILL)
            step = STEP_SECONDS + weight_bytes(model) / BYTES_PER_SECOND["cpu"]
            seconds += FILE_ROUNDS * (FILE_TOKENS * step + FILE_SECONDS)
        seconds += flops / (threads * CPU_PEAK * SLOW_SHARE)
        largest = max(map(weight_bytes, models))
        memory = 2 * HOST_PROCESS_BYTES + SNAKEMAKE_BYTES + 2 * largest + self.cost(self.plan.compared_with).disk_bytes
        return Request(round(SPARE * memory), START_SECONDS + len(asked.types) * seconds, 0)

    def _timing(self, memory: int, files: int, processes: int, seconds: float) -> Request:
        """The request of a timing job.

        Args:
            memory: bytes that it computes in.
            files: bytes of the files that it reads.
            processes: number of further processes that it starts.
            seconds: time of the measurements.
        """
        seconds += START_SECONDS + PROCESS_SECONDS * processes + SECONDS_PER_GIB * files / GIB
        on_cpu, process = bool(self.device.process), self.device.process or HOST_PROCESS_BYTES
        gpus = 0 if on_cpu else math.ceil(memory / self.device.memory)
        return Request(round(SPARE * (2 * process + SNAKEMAKE_BYTES + (memory if on_cpu else files))), seconds, gpus)

    def refuse_trainings(self) -> None:
        """Refuse trainings that are not in the store and do not fit: every GPU holds the whole training.

        Raises:
            UserError: a line for each training that does not fit.
        """
        if lines := self.trainings_without_room():
            raise UserError("\n".join(lines))

    def trainings_without_room(self) -> list[str]:
        """A line for each training that is not in the store and does not fit on the device."""
        lines = []
        for job in self.plan.recoveries:
            if self.plan.has(job) or (needed := self.cost(job).memory_bytes) <= self.device.memory:
                continue
            lines.append(
                f"{job.label}: its training takes about {needed / GIB:,.1f} GiB on every GPU, {self.device.name} has "
                f"{self.device.memory / GIB:,.1f}. Each of several GPUs holds all of it: train less (method lora or "
                "norms), with a smaller micro_batch or length, or on a larger GPU."
            )
        return lines

    def searches(self) -> list[str]:
        """A line for each search of widths that is not in the store: what it takes at most, in forward passes."""
        lines = []
        for job in self.plan.jobs["search"].values():
            drawn, settings = job.inputs["scores"].settings, job.settings
            shape = (drawn.samples, drawn.length)
            if not self.plan.has(job):
                most = most_operations(self.models.dense, shape, settings.structure, settings.rounds)
                passes, part = most["forward_passes"], f"{held_out(*shape)} of {drawn.samples} calibration sequences"
                lines.append(f"search {job.label}: at most {passes:,.0f} forward passes over {part}")
        return lines

    def stages(self) -> list[dict[str, Any]]:
        """A row for each stage: its name, its jobs, how many are in the store, and the cost of the others.

        Operations and disk are sums; memory and scratch are those of the largest job.
        """
        rows = []
        for stage, jobs in self.plan.jobs.items():
            missing = [job for job in jobs.values() if not self.plan.has(job)]
            costs = [self.cost(job) for job in missing]
            rows.append({
                "stage": stage,
                "jobs": len(jobs),
                "made": len(jobs) - len(missing),
                "flops": sum(cost.flops for cost in costs),
                "memory_bytes": max((cost.memory_bytes for cost in costs), default=0),
                "disk_bytes": sum(cost.disk_bytes for cost in costs),
                "scratch_bytes": max((cost.scratch_bytes for cost in costs), default=0),
            })  # fmt: skip
        return rows

    # What the stages' costs share.

    def is_streamed(self, job: Job, model: PreTrainedModel) -> bool:
        """Whether a job reads the model's weights layer by layer, as `loading.load_model` decides in the run.

        A model that does not fit one GPU is streamed, unless `memory: resident` asks for several.
        """
        too_large = weight_bytes(model) + bytes_beside_weights(model) > self.device.memory
        return job.settings.memory == "streamed" or (job.settings.memory == "auto" and too_large)

    def scoring_memory(self, criteria: list[str], shape: tuple[int, int], streamed: bool) -> int:
        """Bytes that scoring `shape` (sequences, length) tokens by these criteria in one pass computes in."""
        dense, (sequences, length) = self.models.dense, shape
        held = bytes_of_sums(dense, criteria) + (0 if streamed else weight_bytes(dense))
        free = self.device.memory - self.device.process - held
        at_once = scoring.tokens_at_once(dense, self.kind, streamed, free)
        batch = length * min(sequences, scoring.batch_size(length, at_once))
        logits = 3 * 4 * min(batch * dense.config.vocab_size, LOGITS_PER_CHUNK[self.kind])
        layer = graph_bytes(dense, batch) // dense.config.num_hidden_layers
        if streamed:
            return streamed_bytes(dense) + held + max(logits, layer)
        has_gradient = any(isinstance(CRITERIA[name], GradientCriterion) for name in criteria)
        return held + logits + (self.graph(dense, batch, reserved=held) if has_gradient else layer)

    def is_short(self, model: PreTrainedModel, tokens: int, reserved: int) -> bool:
        """Whether the backward pass will compute each layer again, as `memory.is_short` decides in the run."""
        return graph_bytes(model, tokens) > (self.device.memory - self.device.process - reserved) / 2

    def graph(self, model: PreTrainedModel, tokens: int, reserved: int) -> int:
        """Bytes that a forward pass over `tokens` keeps for the backward pass."""
        graph = graph_bytes(model, tokens)
        if not self.is_short(model, tokens, reserved):
            return graph
        layers = model.config.num_hidden_layers
        return graph // layers + layers * tokens * model.config.hidden_size * model.dtype.itemsize

    def rows(self, job: Job, length: int, epochs: float) -> int:
        """Number of sequences of `length` tokens that a text fills over all epochs; a part of one is a share of it."""
        text = self._text(job)
        instructions = "instruction" in job.recipe.parameters
        sizes = text.sizes or [text.size]
        tokens = [size / text.per_token + text.template * instructions for size in sizes]
        usable = sum(count for count in tokens if count <= length or not instructions)  # long instructions are dropped
        return int(usable * text.documents / len(sizes) * epochs / length)

    def _size(self, job: Job) -> int:
        """Bytes of an artifact, including files that the store only links to."""
        if job.recipe.stage in ("model", "prune", "recover"):
            return weight_bytes(self.models.of(job))
        return self.cost(job).disk_bytes

    def _text(self, job: Job) -> Text:
        """The size of a text: exact once it is in the store, otherwise assumed."""
        if job.key not in self._texts:
            self._texts[job.key] = self._read_text(job)
        return self._texts[job.key]

    def _read_text(self, job: Job) -> Text:
        source, is_mixture = job.settings, job.recipe.stage == "mix"
        if not is_mixture and source.random:
            return Text(0, 0)
        if self.plan.has(job):
            with (self.plan.store.folder(job.recipe) / DOCUMENTS).open(encoding="utf-8") as file:
                records = [json.loads(line) for line in file]
            documents = ["".join(value for value in record.values() if isinstance(value, str)) for record in records]
            sizes = [len(document.encode()) for document in documents]
            return Text(len(sizes), sum(sizes) / len(sizes), sizes, *self._tokens(documents[:TOKENIZED_DOCUMENTS]))
        if is_mixture:
            texts = [self._text(text) for text in job.inputs["texts"]]
            documents = sum(text.documents for text in texts)
            return Text(documents, sum(text.documents * text.size for text in texts) / documents)
        documents, size = TEXTS.get(source.hub, OTHER_TEXT)
        if source.path is not None:
            path = source.path
            whole = sum(
                file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()
            )
            documents, size = max(1, whole // OTHER_TEXT[1]), min(whole, OTHER_TEXT[1])
        if source.documents:
            first, last = source.documents
            documents = last - first
        self.assumptions[f"{job.label}: {documents:,} documents of {size:,} bytes, {BYTES_PER_TOKEN} bytes a token"] = (
            None
        )
        return Text(documents, size)

    def _tokens(self, documents: list[str]) -> tuple[float, ...]:
        """Bytes per token and tokens of the template, by the model's tokenizer; empty if it is not in the store."""
        (model,) = self.plan.jobs["model"].values()
        if not self.plan.has(model):
            return ()
        tokenizer = load_tokenizer(self.plan.store.folder(model.recipe))
        *tokens, template = tokenizer([*documents, packing.PROMPT], add_special_tokens=False)["input_ids"]
        size = sum(len(document.encode()) for document in documents)
        return size / max(1, sum(map(len, tokens))), len(template)

    def task(self, job: Job) -> tuple[float, float, float]:
        """Documents of a task, requests per document, tokens per request."""
        name = job.recipe.parameters["name"]
        documents, requests, length = TASKS.get(name, OTHER_TASK)
        if self.plan.has(job):
            documents = self.plan.store.manifest("task", job.key)["details"]["documents"]
        self.assumptions[f"{name}: {documents:,} documents, {requests:g} requests of {length} tokens for each"] = None
        return documents, requests, length

    def data_bytes(self, job: Job) -> int:
        """Bytes of the documents of a text or task."""
        if job.recipe.stage in ANY_TEXT:
            text = self._text(job)
            return round(text.documents * text.size)
        documents, _, length = self.task(job)
        return round(documents * length * BYTES_PER_TOKEN)


def estimate(plan: Plan, device: Device, shape: Path | None = None) -> tuple[Estimate, str]:
    """The estimate of a plan's jobs, and where the model's shape comes from, for display.

    Args:
        plan: plan of an experiment.
        device: device of all jobs.
        shape: see `config_of`.

    Raises:
        UserError: see `config_of`.
    """
    model = plan.experiment.model
    (download,) = plan.jobs["model"].values()
    config, origin = config_of(model, download, plan.store, shape)
    return Estimate(plan, Models(config, model.dtype), device), origin


def report(experiment: Experiment, gpu: str, utilisation: float, shape: Path | None) -> str:
    """The cost of an experiment as text: a line for each stage, and the assumptions.

    Args:
        experiment: the experiment.
        gpu: a name in `GPUS`, or "cpu".
        utilisation: share of the peak speed that jobs reach.
        shape: see `config_of`.

    Raises:
        UserError: the device is unknown, the model has no config, or a cut is impossible.
    """
    device = device_of(gpu)
    costs, origin = estimate(Plan(experiment), device, shape)
    models, rows = costs.models, costs.stages()
    total = {name: sum(row[name] for row in rows) for name in ("jobs", "made", "flops", "disk_bytes")}
    rows.append(total | {"stage": "total", "memory_bytes": max(row["memory_bytes"] for row in rows)})
    active = active_parameters(models.dense)
    experts = "" if active == models.shape.total else f" ({active:,} of them for a token)"
    lines = [
        f"{experiment.experiment}: {experiment.model.label}, {models.shape.total:,} parameters{experts}, "
        f"{models.dtype}; its shape from {origin}",
        f"hours on one {device.name}: {device.peak[models.dtype] / 1e12:,.4g} TFLOP/s ({device.source}), of which "
        f"{utilisation:.0%} in use",
        "what the store lacks:",
        f"{'stage':10} {'jobs':>5} {'in store':>9} {'PFLOP':>10} {'hours':>8} {'memory (GiB)':>13} {'disk (GiB)':>11}",
    ]
    for row in rows:
        hours = costs.seconds(row["flops"], utilisation) / 3600
        lines.append(
            f"{row['stage']:10} {row['jobs']:5} {row['made']:9} {row['flops'] / 1e15:10.3g} {hours:8.3g} "
            f"{row['memory_bytes'] / GIB:13.3g} {row['disk_bytes'] / GIB:11.3g}"
        )
    large = [row["stage"] for row in rows[:-1] if row["memory_bytes"] > device.memory]
    if large:
        lines.append(f"more than the {device.memory / GIB:.3g} GiB of {device.name}: {', '.join(large)}")
    if scratch := max(row["scratch_bytes"] for row in rows[:-1]):
        lines.append(f"weights are read layer by layer: up to {scratch / GIB:.3g} GiB more disk while a job runs")
    lines += costs.searches()
    lines += costs.trainings_without_room()
    if costs.assumptions:
        lines += ["assumed:", *(f"  {assumption}" for assumption in sorted(costs.assumptions))]
    return "\n".join(lines)

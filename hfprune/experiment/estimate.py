"""What an experiment will cost, before anything is downloaded: operations, memory and disk of every job.

The models of an experiment are built on the meta device, which has shapes but no weights, from a config.json alone.
What the stages themselves count by is asked of them, so that an estimate and a record are one formula. What nobody can
know before a download (how long documents are) is assumed, and said.
"""

import copy
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hfprune.data import packing
from hfprune.data.download import _hub_errors, describe
from hfprune.errors import UserError
from hfprune.evaluation import fidelity
from hfprune.experiment.plan import Job, Plan
from hfprune.experiment.schema import DType, Experiment, Source
from hfprune.models.loading import PREFILL, check_family, flops_per_token, load_tokenizer
from hfprune.models.units import PARTS, part_of, parts
from hfprune.pruning import refit, scoring
from hfprune.pruning.allocation import allocate
from hfprune.pruning.budget import shape_of, units_to_keep
from hfprune.pruning.criteria import CRITERIA, GradientCriterion
from hfprune.pruning.surgery import cut
from hfprune.recovery import losses
from hfprune.recovery.training import BYTES_PER_TRAINED, METHODS, training_flops
from hfprune.runtime.memory import forward_bytes, graph_bytes
from hfprune.stages.costs import Cost
from hfprune.stages.registry import STAGES
from hfprune.store.artifacts import Store
from hfprune.store.filenames import DOCUMENTS
from hfprune.store.keys import canonical

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What jobs run on.

    Attributes:
        name: for people.
        peak: operations a second, by a dtype's name: dense (not sparse) matrix products.
        memory: bytes.
        process: bytes that a job takes before it has a model: libraries, on a CPU.
        source: of the figures.
    """

    name: str
    peak: Mapping[str, float]
    memory: int
    process: int
    source: str


def _gpu(name: str, half: float, single: float, memory: int, source: str) -> Device:
    """A GPU by its data sheet: TFLOP/s of tensor cores in bfloat16 and of float32, GB."""
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
CPU_PEAK = 100e9  # of a core: oneDNN's float32 products on the AMD EPYC with AVX-512 of docs/scoring.md
PROCESS_BYTES = int(0.6 * GIB)  # torch, transformers and what they load

# What is asked of a cluster, where too little kills a job.
HOST_PROCESS_BYTES = 4 * GIB  # of a process beside a GPU: CUDA's libraries too; put, not measured
SNAKEMAKE_BYTES = GIB // 2  # a job is a Snakemake in a Snakemake, which runs the stage
DATA_IN_MEMORY = 4  # documents as Python objects and tokens, by their bytes on disk
SPARE = 1.5  # times the memory counted
START_SECONDS = 15 * 60  # imports, tokenising, whatever has no operations
SECONDS_PER_GIB = 60  # of what a job reads and writes
SLOW_SHARE = 0.2  # of the peak: half of what `hfprune plan` counts by

# What timing takes beside operations.
TIMED_ROUNDS = 7  # of `hfprune efficiency`: those measured, one before, and one in a process that measures memory
SCORED_ROUNDS = 5  # of `hfprune scoring-cost`: likewise, though those beside take part of the text
PROCESS_SECONDS = 60  # until a process of its own, one for each model or criterion, has its libraries
STEP_SECONDS = 0.05  # of a decoded token, whatever the model's size; put, not measured
BYTES_PER_SECOND = {"cpu": 10e9, "cuda": 300e9}  # of the memory that weights are read from, for each decoded token

# Of lm-eval's definitions: documents, requests a document, tokens a request (context and continuation). Counted with
# the embedded model's tokenizer; the tokens of arc_challenge and race, which were not at hand, are put.
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
LONGEST_REQUEST = 3  # times the mean: of a task's requests, the longest come first
BYTES_PER_SAMPLE = 130  # of evaluate's samples.jsonl, a document

BYTES_PER_TOKEN = 4.3  # of English text
SOME = 100  # documents, which say how many bytes a token has
# Documents, bytes a document: of what the hub's sets hold (C4: a sample's mean; LaMini-instruction: its card's count).
TEXTS = {"allenai/c4": (350_000, 2200), "MBZUAI/LaMini-instruction": (2_585_615, 450)}
OTHER_TEXT = (10_000, 2000)


@dataclass(frozen=True)
class Request:
    """What a job asks of a cluster: bytes of a node's memory, seconds, GPUs."""

    memory_bytes: int
    seconds: float
    gpus: int


@dataclass(frozen=True)
class Text:
    """A text as far as it is known.

    Attributes:
        documents: how many.
        size: bytes of one, the mean.
        sizes: bytes of each, where the text is at hand.
        per_token: bytes of a token.
        template: tokens of the template of an instruction.
    """

    documents: int
    size: float
    sizes: list[int] | None = None
    per_token: float = BYTES_PER_TOKEN
    template: float = len(packing.PROMPT) / BYTES_PER_TOKEN


def device_of(name: str, cores: int | None = None) -> Device:
    """The device of that name: one of `GPUS`, or "cpu": this machine, or so many cores of another, however much memory.

    Raises:
        UserError: not known.
    """
    if name == "cpu":
        memory = sys.maxsize if cores else psutil.virtual_memory().total
        cores = cores or os.cpu_count() or 1
        peak = dict.fromkeys(("float32", "bfloat16", "float16"), cores * CPU_PEAK)
        return Device(f"{cores} CPU cores", peak, memory, PROCESS_BYTES, "measured, see docs/scoring.md")
    if name not in GPUS:
        known = [*GPUS, "cpu"]
        near = get_close_matches(name.lower(), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"gpu {name}: not known. Known: {', '.join(known)}.{hint}")
    return GPUS[name]


def config_of(model: Source, job: Job, store: Store, shape: Path | None) -> tuple[PreTrainedConfig, str]:
    """The config of an experiment's model, and where it was found, for people.

    Args:
        model: the source of the experiment's model.
        job: that downloads it.
        store: which may have it already.
        shape: a config.json that stands for the model's, or None. Then the store is asked, the `path`, or the hub, for
            its config.json alone.

    Raises:
        UserError: there is none to be had, or it is not a config of a model that can be pruned here.
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
    """The config in one file, whatever the file is called.

    Raises:
        UserError: it is not one, or of a model that cannot be pruned here.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--shape {file}: cannot be read: {error.strerror}.") from None
    except ValueError:
        raise UserError(f"--shape {file}: not JSON; expected a model's config.json.") from None
    needed = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    if not isinstance(values, dict) or (missing := [name for name in needed if name not in values]):
        lacks = f"it lacks {', '.join(missing)}" if isinstance(values, dict) else "it holds no keys"
        raise UserError(f"--shape {file}: not a model's config.json: {lacks}.")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        return check_family(Path(folder), str(file))


class Models:
    """The models of an experiment, dense and cut, as shapes without weights.

    Args:
        config: of the dense model.
        dtype: to compute and save in; "auto": what the config says.
    """

    def __init__(self, config: PreTrainedConfig, dtype: DType) -> None:
        kind = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
        with torch.device("meta"):
            self.dense = AutoModelForCausalLM.from_config(config, dtype=kind).eval().requires_grad_(False)
        self.shape = shape_of(self.dense)
        self.dtype = str(kind).removeprefix("torch.")
        self._made: dict[str, PreTrainedModel] = {}

    def of(self, job: Job) -> PreTrainedModel:
        """The model that a job of stage `model`, `prune` or `recover` makes."""
        if job.recipe.stage == "model":
            return self.dense
        if job.recipe.stage == "recover":
            return self.of(job.inputs["model"])
        asked = canonical(job.recipe.parameters)  # whatever scores it goes by
        if asked not in self._made:
            self._made[asked] = copy.deepcopy(self.dense)
            cut(self._made[asked], self.kept(job))
        return self._made[asked]

    def kept(self, job: Job) -> dict[str, list[torch.Tensor]]:
        """What a job of `prune` leaves: as many units as it will, though not the same ones.

        Scores decide which units go, and with `mlp+attention` without `attention_share` how much of it attention gives:
        here all of it are neurons.

        Raises:
            UserError: the model cannot give that much.
        """
        asked = job.recipe.parameters
        names = ("ratio", "ratio_of", "target_parameters", "structure", "attention_share", "allocation", "round_to")
        given = {name: asked[name] for name in names if name in asked}
        keep = units_to_keep(self.shape, **given).keep
        drawn = torch.Generator().manual_seed(0)
        kept = {}
        for name, units in keep.items():
            scores = [torch.rand(width, generator=drawn) for width in self.shape.units[name]]
            kept[name] = allocate(asked["allocation"], scores, units, asked["round_to"] if name == "mlp" else 1)
        return kept


class Estimate:
    """What the jobs of a plan take on a device.

    Attributes:
        assumed: what is not known before a download, and was put instead: sentences for people.
    """

    def __init__(self, plan: Plan, models: Models, device: Device) -> None:
        self.plan, self.models, self.device = plan, models, device
        self.kind = "cpu" if device.process else "cuda"
        self.assumed: dict[str, None] = {}
        self._texts: dict[str, Text] = {}

    def cost(self, job: Job) -> Cost:
        """What a job takes.

        Of criteria scored in one pass, the first one's job has the pass's operations, the others' have none.
        """
        stage = STAGES[job.recipe.stage]
        return stage.cost(job, self) if stage.cost else getattr(self, f"_{stage.name}")(job)

    def seconds(self, flops: int, utilisation: float) -> float:
        """How long so many operations take."""
        return flops / (self.device.peak[self.models.dtype] * utilisation)

    def request(self, job: Job) -> Request:
        """What a job asks of a cluster, generously.

        On a CPU the memory is what the job computes in; beside a GPU, what passes through on the way there and back.
        """
        stage, on_cpu = STAGES[job.recipe.stage], bool(self.device.process)
        cost = self.cost(job.after or job)  # the first of a pass may have left nothing to do, or all
        files = sum(self._size(each) for each in [job, *job.sources])
        data = sum(self._size(each) for each in job.sources if each.recipe.stage in ("text", "task"))
        process = self.device.process or HOST_PROCESS_BYTES
        memory = cost.memory_bytes if on_cpu else process + files
        memory += SNAKEMAKE_BYTES + DATA_IN_MEMORY * data
        if stage.reloads_checkpoint:
            memory += process + self._size(job)
        seconds = START_SECONDS + SECONDS_PER_GIB * files / GIB + self.seconds(cost.flops, SLOW_SHARE)
        if on_cpu or job.is_light or stage.gpus == "none":
            gpus = 0
        else:
            gpus = 1 if stage.gpus == "one" else math.ceil(cost.memory_bytes / self.device.memory)
        return Request(round(SPARE * memory), seconds, gpus)

    def efficiency(self, new_tokens: int) -> Request:
        """What `hfprune efficiency` of the plan's models asks of a cluster: all of them stand in memory at once."""
        from hfprune.evaluation.timing import BATCHES, PROMPT

        models = [self.models.of(job) for job in self.plan.timed]
        length, rows = PROMPT + new_tokens, sum(BATCHES)
        weights, flops, seconds = sum(map(_weights, models)), 0, 0.0
        for model in models:
            flops += PREFILL * flops_per_token(model, PREFILL) + rows * length * flops_per_token(model, length)
            step = STEP_SECONDS + _weights(model) / BYTES_PER_SECOND[self.kind]
            seconds += TIMED_ROUNDS * len(BATCHES) * new_tokens * step
        seconds += self.seconds(TIMED_ROUNDS * flops, SLOW_SHARE)
        beside = max(forward_bytes(model, PREFILL, whole=True) for model in models)  # more than keys, values
        return self._timing(weights + max(BATCHES) * beside, weights, len(models), seconds)

    def scoring_cost(self) -> Request:
        """What `hfprune scoring-cost` of the plan's criteria asks of a cluster."""
        asked, criteria = self.plan.experiment.calibration, self.plan.experiment.criteria
        dense, shape = self.models.dense, (asked.samples, asked.length)
        passes = [scoring.cost(dense, shape, [name], asked.draws, bool(CRITERIA[name].light_cut)) for name in criteria]
        seconds = self.seconds(SCORED_ROUNDS * sum(each["flops"] for each in passes), SLOW_SHARE)
        memory = max(self._scoring_memory([name], asked.length) for name in criteria)
        return self._timing(memory, _weights(dense), len(criteria), seconds)

    def _timing(self, memory: int, files: int, processes: int, seconds: float) -> Request:
        """What a job that times asks for: bytes that it computes in, bytes of files, processes beside its own."""
        seconds += START_SECONDS + PROCESS_SECONDS * processes + SECONDS_PER_GIB * files / GIB
        on_cpu, process = bool(self.device.process), self.device.process or HOST_PROCESS_BYTES
        gpus = 0 if on_cpu else math.ceil(memory / self.device.memory)
        return Request(round(SPARE * (2 * process + SNAKEMAKE_BYTES + (memory if on_cpu else files))), seconds, gpus)

    def refuse_trainings(self) -> None:
        """Refuse trainings that are still to be made and find no room: several GPUs each hold all of a training.

        Raises:
            UserError: one line for each.
        """
        if lines := self.trainings_without_room():
            raise UserError("\n".join(lines))

    def trainings_without_room(self) -> list[str]:
        """One line for each training that is still to be made and that the device has no room for."""
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

    def stages(self) -> list[dict[str, Any]]:
        """A row for each stage: its name, its jobs, how many of them the store has, and of the others what they take.

        Operations and disk are sums, memory is that of the largest job.
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
            })  # fmt: skip
        return rows

    # The stages that do not say it themselves, by name.

    def _score(self, job: Job) -> Cost:
        asked, dense = job.recipe.parameters, self.models.dense
        disk = sum(4 * sum(units) for units in self.models.shape.units.values())
        if "shards" in job.inputs:  # sums are put together
            return Cost(0, self.device.process + _weights(dense), disk)
        return self._pass(job, (asked["samples"], asked["length"]), disk)

    def _shard(self, job: Job) -> Cost:
        asked = job.recipe.parameters
        share = scoring.shard_range(asked["samples"], asked["length"], asked["shard"], asked["shards"])
        sums = sum(8 * part.output.in_features for name in PARTS for part in parts(self.models.dense, name))
        return self._pass(job, (len(share), asked["length"]), sums)

    def _pass(self, job: Job, shape: tuple[int, int], disk: int) -> Cost:
        """Of criteria that are scored together on (sequences, length) tokens; `disk` is one criterion's."""
        asked, dense = job.recipe.parameters, self.models.dense
        given = _options(job)
        criteria, draws = [asked["criterion"], *given.get("together", [])], int(given["draws"][0])
        flops = scoring.cost(dense, shape, criteria, draws, "light_cut" in job.inputs)["flops"]
        memory = self._scoring_memory(criteria, asked["length"])
        return Cost(0 if job.after else flops, self.device.process + memory, disk)

    def _scoring_memory(self, criteria: list[str], length: int) -> int:
        """Bytes that scoring by these criteria together computes in."""
        dense, batch = self.models.dense, max(scoring.TOKENS_PER_BATCH, length)
        logits = min(batch * dense.config.vocab_size, scoring.LOGITS_PER_CHUNK[self.kind])
        memory = _weights(dense) + 3 * 4 * logits
        if any(isinstance(CRITERIA[name], GradientCriterion) for name in criteria):
            return memory + self._graph(dense, batch, reserved=memory)
        return memory + graph_bytes(dense, batch) // dense.config.num_hidden_layers

    def _prune(self, job: Job) -> Cost:
        asked, dense, made = job.recipe.parameters, self.models.dense, self.models.of(job)
        memory, flops = _weights(dense), 0
        if asked["refit"] != "none":
            scored = job.inputs["scores"].recipe.parameters
            tokens = scored["samples"] * scored["length"]
            sequential = asked["refit"] == "sequential"
            flops = tokens * flops_per_token(dense, scored["length"]) * (1 + sequential)
            kept = self.models.kept(job)
            for number, layer in enumerate(dense.model.layers):
                for name in PARTS:
                    part = part_of(layer, name)
                    stay = kept[name][number] if name in kept else torch.arange(part.units)
                    repair = refit.Repair(part, stay, name, number)
                    if asked["refit"] != "bias" and (repair.lossy or sequential):
                        repair.tokens = tokens
                        flops += repair.flops
            width, hidden = dense.config.intermediate_size, dense.config.hidden_size
            streams = tokens * hidden * (1 + sequential) + tokens * width * sequential
            memory += streams * _itemsize(dense) + 3 * 8 * width**2 + 4 * 5 * refit.TOKENS_PER_BATCH * width
        return Cost(flops, self.device.process + memory, _weights(made))

    def _recover(self, job: Job) -> Cost:
        asked, given = job.recipe.parameters, _options(job)
        network = copy.deepcopy(self.models.of(job.inputs["model"]))
        disk, forward = _weights(network), flops_per_token(network, asked["length"])
        adapters = {name: asked[name] for name in ("rank", "alpha", "dropout", "targets") if name in asked}
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # transformers' own, of adapters
            trained, _ = METHODS[asked["method"]](network, **adapters)
        learned = sum(each.numel() for each in trained.parameters() if each.requires_grad)
        memory = sum(each.nbytes for each in trained.parameters()) + BYTES_PER_TRAINED * learned
        batch = int(given["micro_batch"][0]) * asked["length"]
        memory += 4 * 4 * min(batch * network.config.vocab_size, losses.LOGITS_PER_CHUNK[self.kind])
        teacher = 0
        if "teacher" in job.inputs:
            teacher = flops_per_token(self.models.dense, asked["length"])
            memory += _weights(self.models.dense)
        if asked["method"] == "lora":  # of what enters an adapter, the part that dropout leaves
            memory += 8 * batch * sum(each.in_features for each in network.modules() if _adapted(each))
        graph, short = graph_bytes(network, batch), self._is_short(network, batch, memory)
        memory += self._graph(network, batch, memory) if short else graph
        rows = self._rows(job.inputs["text"], asked["length"], asked["epochs"])
        steps = rows * asked["length"] // asked["batch_tokens"]
        per_token = training_flops(trained, asked["method"], forward, short, teacher)
        return Cost(per_token * asked["batch_tokens"] * steps, self.device.process + memory, disk)

    def _reference(self, job: Job) -> Cost:
        asked, dense = job.recipe.parameters, self.models.dense
        tokens = asked["samples"] * asked["length"]
        kept = (tokens + dense.config.vocab_size) * dense.config.hidden_size * _itemsize(dense)
        layer = graph_bytes(dense, asked["length"]) // dense.config.num_hidden_layers
        memory = _weights(dense) + kept + layer
        flops = tokens * flops_per_token(dense, asked["length"])
        return Cost(flops, self.device.process + memory, kept + 8 * tokens)

    def _measure(self, job: Job) -> Cost:
        model, reference = self.models.of(job.inputs["model"]), self._reference(job.inputs["reference"])
        asked = job.inputs["reference"].recipe.parameters
        tokens, config = asked["samples"] * asked["length"], model.config
        dense_logits = 2 * config.hidden_size * config.vocab_size
        flops = tokens * (flops_per_token(model, asked["length"]) + dense_logits)
        layer = graph_bytes(model, asked["length"]) // config.num_hidden_layers
        chunk = min(asked["length"] * config.vocab_size, fidelity.LOGITS_PER_CHUNK)
        memory = _weights(model) + reference.disk_bytes + layer + 8 * 4 * chunk
        return Cost(flops, self.device.process + memory, 2**10)

    def _evaluate(self, job: Job) -> Cost:
        model, given = self.models.of(job.inputs["model"]), _options(job)
        limit = int(given["limit"][0]) if "limit" in given else math.inf
        flops = longest = documents = 0
        for task in job.inputs["tasks"]:
            count, requests, length = self._task(task)
            documents += min(count, limit)
            tokens = min(count, limit) * requests * length
            flops += tokens * flops_per_token(model, round(length))
            longest = max(longest, LONGEST_REQUEST * length)
        from hfprune.evaluation.shared_prefix import LOGITS, ROWS, TOKENS  # lm-eval with it, which takes seconds

        stock = given["batching"] == ["stock"]
        rows = ROWS if stock else max(1, TOKENS["cpu" if self.device.process else "cuda"] // longest)
        memory = _weights(model) + rows * forward_bytes(model, longest, whole=stock) + 2 * 4 * LOGITS
        return Cost(round(flops), self.device.process + memory, BYTES_PER_SAMPLE * documents)

    # What stages share.

    def _is_short(self, model: PreTrainedModel, tokens: int, reserved: int) -> bool:
        """Whether layers will be computed anew in the backward pass, as `memory.is_short` decides when it runs."""
        return graph_bytes(model, tokens) > (self.device.memory - self.device.process - reserved) / 2

    def _graph(self, model: PreTrainedModel, tokens: int, reserved: int) -> int:
        """What a forward pass over so many tokens keeps for the backward pass."""
        graph = graph_bytes(model, tokens)
        if not self._is_short(model, tokens, reserved):
            return graph
        layers = model.config.num_hidden_layers
        return graph // layers + layers * tokens * model.config.hidden_size * _itemsize(model)

    def _rows(self, job: Job, length: int, epochs: int) -> int:
        """Sequences of `length` tokens that a text fills in all epochs."""
        text = self._text(job)
        instructions = "instruction" in job.recipe.parameters
        sizes = text.sizes or [text.size]
        tokens = [size / text.per_token + text.template * instructions for size in sizes]
        fitting = sum(each for each in tokens if each <= length or not instructions)
        return int(fitting * text.documents / len(sizes) * epochs / length)

    def _size(self, job: Job) -> int:
        """Bytes of an artifact, wherever they lie."""
        if job.recipe.stage in ("model", "prune", "recover"):
            return _weights(self.models.of(job))
        return self.cost(job).disk_bytes

    def _text(self, job: Job) -> Text:
        """What is known of a text: all of it, once it is in the store."""
        if job.key not in self._texts:
            self._texts[job.key] = self._read_text(job)
        return self._texts[job.key]

    def _read_text(self, job: Job) -> Text:
        if self.plan.has(job):
            with (self.plan.store.folder(job.recipe) / DOCUMENTS).open(encoding="utf-8") as file:
                documents = ["".join(json.loads(line).values()) for line in file]
            sizes = [len(document.encode()) for document in documents]
            return Text(len(sizes), sum(sizes) / len(sizes), sizes, *self._tokens(documents[:SOME]))
        given = _options(job)
        documents, size = TEXTS.get(given.get("hub", [""])[0], OTHER_TEXT)
        if "path" in given:
            path = Path(given["path"][0])
            whole = sum(
                file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()
            )
            documents, size = max(1, whole // OTHER_TEXT[1]), min(whole, OTHER_TEXT[1])
        if "documents" in given:
            first, last = map(int, given["documents"])
            documents = last - first
        self.assumed[f"{job.label}: {documents:,} documents of {size:,} bytes, {BYTES_PER_TOKEN} bytes a token"] = None
        return Text(documents, size)

    def _tokens(self, documents: list[str]) -> tuple[float, ...]:
        """Bytes of a token, and tokens of the template, by the model's tokenizer where the store has it."""
        (model,) = self.plan.jobs["model"].values()
        if not self.plan.has(model):
            return ()
        tokenizer = load_tokenizer(self.plan.store.folder(model.recipe))
        *found, template = tokenizer([*documents, packing.PROMPT], add_special_tokens=False)["input_ids"]
        return sum(len(each.encode()) for each in documents) / max(1, sum(map(len, found))), len(template)

    def _task(self, job: Job) -> tuple[float, float, float]:
        """Documents of a task, requests a document, tokens a request."""
        name = job.recipe.parameters["name"]
        documents, requests, length = TASKS.get(name, OTHER_TASK)
        if self.plan.has(job):
            documents = self.plan.store.manifest("task", job.key)["details"]["documents"]
        self.assumed[f"{name}: {documents:,} documents, {requests:g} requests of {length} tokens for each"] = None
        return documents, requests, length

    def data_bytes(self, job: Job) -> int:
        """Of a text's or a task's documents."""
        if job.recipe.stage == "text":
            text = self._text(job)
            return round(text.documents * text.size)
        documents, _, length = self._task(job)
        return round(documents * length * BYTES_PER_TOKEN)


def estimate(plan: Plan, device: Device, shape: Path | None = None) -> tuple[Estimate, str]:
    """The estimate of a plan's jobs, and where the model's shape was found, for people.

    Args:
        plan: of an experiment.
        device: that all of them run on.
        shape: see `config_of`.

    Raises:
        UserError: see `config_of`.
    """
    model = plan.experiment.model
    (download,) = plan.jobs["model"].values()
    config, origin = config_of(model, download, plan.store, shape)
    return Estimate(plan, Models(config, model.dtype), device), origin


def report(experiment: Experiment, gpu: str, utilisation: float, shape: Path | None) -> str:
    """What an experiment takes, a line for each stage, and what was assumed: for people.

    Args:
        experiment: of a config file.
        gpu: a name in `GPUS`, or "cpu".
        utilisation: the share of its peak that jobs reach.
        shape: see `config_of`.

    Raises:
        UserError: the device is not known, there is no config of the model, or a cut cannot be made.
    """
    device = device_of(gpu)
    counted, origin = estimate(Plan(experiment), device, shape)
    models, rows = counted.models, counted.stages()
    total = {name: sum(row[name] for row in rows) for name in ("jobs", "made", "flops", "disk_bytes")}
    rows.append(total | {"stage": "total", "memory_bytes": max(row["memory_bytes"] for row in rows)})
    lines = [
        f"{experiment.experiment}: {experiment.model.label}, {models.shape.total:,} parameters, {models.dtype}; "
        f"its shape from {origin}",
        f"hours on one {device.name}: {device.peak[models.dtype] / 1e12:,.4g} TFLOP/s ({device.source}), of which "
        f"{utilisation:.0%} in use",
        "what the store lacks:",
        f"{'stage':10} {'jobs':>5} {'in store':>9} {'PFLOP':>10} {'hours':>8} {'memory (GiB)':>13} {'disk (GiB)':>11}",
    ]
    for row in rows:
        hours = counted.seconds(row["flops"], utilisation) / 3600
        lines.append(
            f"{row['stage']:10} {row['jobs']:5} {row['made']:9} {row['flops'] / 1e15:10.3g} {hours:8.3g} "
            f"{row['memory_bytes'] / GIB:13.3g} {row['disk_bytes'] / GIB:11.3g}"
        )
    large = [row["stage"] for row in rows[:-1] if row["memory_bytes"] > device.memory]
    if large:
        lines.append(f"more than the {device.memory / GIB:.3g} GiB of {device.name}: {', '.join(large)}")
    lines += counted.trainings_without_room()
    if counted.assumed:
        lines += ["assumed:", *(f"  {each}" for each in sorted(counted.assumed))]
    return "\n".join(lines)


def _options(job: Job) -> dict[str, list[str]]:
    """A job's command-line options, by the parameters' names."""
    found: dict[str, list[str]] = {}
    for word in job.options:
        if word.startswith("--"):
            found[name := word[2:].replace("-", "_")] = []
        else:
            found[name].append(word)
    return found


def _itemsize(model: PreTrainedModel) -> int:
    return model.dtype.itemsize


def _weights(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters."""
    return sum(each.nbytes for each in model.parameters())


def _adapted(module: nn.Module) -> bool:
    """Whether it is a linear layer with an adapter."""
    return hasattr(module, "lora_A")

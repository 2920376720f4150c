"""Zero-shot and few-shot accuracy through lm-eval."""

import json
import math
import os
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfprune.data.lm_eval_tasks import GROUPS, stock_tasks
from hfprune.errors import UserError
from hfprune.models.loading import load_model, load_tokenizer
from hfprune.models.streamed import is_streamed, memory_of
from hfprune.runtime.matmul import fast_products
from hfprune.store.filenames import RESULTS, SAMPLES

BOOTSTRAP = 1000  # draws for the standard error of a metric that is not a mean, such as a perplexity
FEWSHOT_SEED = 1234  # lm-eval's default


def language_model(model: Path, dtype: str, batching: str, memory: str = "auto") -> Any:
    """The checkpoint as an lm-eval model.

    Args:
        model: folder of the checkpoint.
        dtype, memory: see `load_model`. lm-eval's batching needs a resident model.
        batching: `shared` computes the common beginning of a question's choices once; `stock` is lm-eval's batching.
    """
    from hfprune.evaluation.layer_by_layer import LayerByLayer
    from hfprune.evaluation.shared_prefix import Shared, Stock

    if batching == "stock":
        return Stock(load_model(model, dtype), load_tokenizer(model))
    network = load_model(model, dtype, memory)
    return (LayerByLayer if is_streamed(network) else Shared)(network, load_tokenizer(model))


def answer_together(folder: Path, lm: Any, tasks: Sequence[dict[str, Any]]) -> None:
    """Have a streamed model answer the requests of several tasks in one walk over its layers. Others do nothing.

    `evaluate_task` then finds the answers.

    Args:
        folder: for temporary files.
        lm: `language_model` of the checkpoint.
        tasks: arguments of `evaluate_task`, except for `folder` and `lm`.

    Raises:
        UserError: a task needs more than log-likelihoods.
    """
    from hfprune.evaluation.layer_by_layer import LayerByLayer

    if not isinstance(lm, LayerByLayer):
        return
    with lm.collecting():
        for task in tasks:
            with tempfile.TemporaryDirectory(dir=folder) as unused:
                evaluate_task(Path(unused), lm, **task)
        lm.folder = folder


def evaluate(folder: Path, tasks: dict[str, Path]) -> None:
    """Stage `evaluate`: write one `results.json` with the results of all tasks, by task name.

    Args:
        folder: folder to write to.
        tasks: for each task name, the folder that `evaluate_task` wrote.
    """
    results = {name: json.loads((task / RESULTS).read_text(encoding="utf-8")) for name, task in tasks.items()}
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def evaluate_task(
    folder: Path, lm: Any, name: str, task: Path, limit: int | None, seed: int, num_fewshot: int = 0
) -> dict[str, Any]:
    """Evaluate one task. Its results are a separate artifact, so adding a task costs only that task.

    `results.json` maps each lm-eval metric to `value`, `stderr` and the number of documents `n`. If a task has several
    filters, a metric is named as lm-eval prints it, `metric,filter`. A group's value is the mean over its documents,
    which is the mean of its tasks weighted by their size.
    `samples.jsonl` has each document's index, metrics and responses (for a choice: its log-likelihood, and whether
    every token was the likeliest); in a group, also its task.

    Args:
        folder: folder to write to.
        lm: `language_model` of the checkpoint.
        name: lm-eval's name for the task.
        task: folder of the downloaded documents.
        limit: largest number of documents, the same ones for every model; None takes all.
        seed: seed for drawing the documents.
        num_fewshot: examples before each question.

    Returns:
        Details for the manifest: the versions of lm-eval and of the task, the numbers of examples and documents,
        `bos`: whether the tokenizer puts its beginning-of-sequence token before the text, and the `memory` used.

    Raises:
        UserError: a question does not fit into memory, or a streamed model would have to write text.
    """
    lm.folder = folder
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstrap in this process: forks are unsafe beside its threads
    parts = stock_tasks(name, task, num_fewshot)
    count = sum(len(part.documents) for part in parts.values())
    drawn = set(random.Random(seed).sample(range(count), min(limit or count, count)))
    indices = {part: [i for i, number in enumerate(parts[part].documents) if number in drawn] for part in parts}
    indices = {part: numbers for part, numbers in indices.items() if numbers}
    for part in indices:
        parts[part].task.set_fewshot_seed(FEWSHOT_SEED)
    tasks = {"tasks": {part: parts[part].task for part in indices}, "groups": {}, "group_map": {}}
    output = _run(lm, name, tasks, indices)
    lines: dict[int, dict[str, Any]] = defaultdict(dict)
    for part in indices:
        for sample in output["samples"][part]:
            number = parts[part].documents[sample["doc_id"]]
            line = lines[number]
            line |= {"doc_id": number} | ({"task": part} if name in GROUPS else {})
            line |= {_metric_name(metric, sample["filter"]): sample[metric] for metric in sample["metrics"]}
            line["responses"] = [responses[0] for responses in sample["resps"]]
    samples = [lines[number] for number in sorted(lines)]
    with (folder / SAMPLES).open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in samples)
    results = _group_results(samples) if name in GROUPS else _task_results(output["results"][name], len(samples))
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    first = next(iter(indices))
    return {
        "lm_eval": version("lm_eval"),
        "task_version": output["versions"][first],
        "num_fewshot": num_fewshot,
        "bos": lm.tok_encode("a")[0] == lm.tokenizer.bos_token_id,
        "memory": memory_of(lm.model),
        "documents": len(samples),
        "of": count,
    }


def _run(lm: Any, name: str, tasks: dict[str, Any], indices: dict[str, list[int]]) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate as run  # simple_evaluate would also list the machine's packages every time

    try:
        with fast_products(lm.device):
            return run(lm, tasks, samples=indices, bootstrap_iters=BOOTSTRAP)
    except UserError as error:
        raise UserError(f"task {name!r}: {error}") from None


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _task_results(output: dict[str, Any], n: int) -> dict[str, dict[str, Any]]:
    """The metrics in lm-eval's output for one task."""
    results = {}
    for key, value in output.items():
        metric, _, filter_name = key.partition(",")
        if filter_name and not metric.endswith("_stderr"):
            error = output.get(f"{metric}_stderr,{filter_name}")
            error = error if isinstance(error, float) else None
            results[_metric_name(metric, filter_name)] = {"value": value, "stderr": error, "n": n}
    return results


def _group_results(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the documents of all tasks of a group."""
    results = {}
    for metric in samples[0].keys() - {"doc_id", "task", "responses"}:
        values = [float(line[metric]) for line in samples]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        results[metric] = {"value": statistics.fmean(values), "stderr": error, "n": len(values)}
    return dict(sorted(results.items()))

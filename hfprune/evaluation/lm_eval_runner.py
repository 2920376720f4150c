"""Zero-shot and few-shot accuracy through lm-eval."""

import json
import math
import os
import random
import statistics
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfprune.data.lm_eval_tasks import GROUPS, stock_tasks
from hfprune.errors import UserError
from hfprune.models.loading import load_model, load_tokenizer
from hfprune.runtime.matmul import fast_products
from hfprune.store.filenames import RESULTS, SAMPLES

BOOTSTRAP = 1000  # draws for the standard error of what is no mean, such as a perplexity
FEWSHOT_SEED = 1234  # lm-eval's own


def language_model(model: Path, dtype: str, batching: str) -> Any:
    """A model class of lm-eval's around the checkpoint.

    Args:
        model: folder of the checkpoint.
        dtype: see `load_model`.
        batching: `shared` computes once what a question's choices have in common; `stock` is lm-eval's own.
    """
    from hfprune.evaluation.shared_prefix import Shared, Stock

    return {"shared": Shared, "stock": Stock}[batching](load_model(model, dtype), load_tokenizer(model))


def evaluate(folder: Path, tasks: dict[str, Path]) -> None:
    """Stage `evaluate`: write the `results.json` of all tasks together into `folder`, by task name.

    Args:
        folder: where to write.
        tasks: by task name, the folder that `evaluate_task` wrote.
    """
    results = {name: json.loads((done / RESULTS).read_text(encoding="utf-8")) for name, done in tasks.items()}
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def evaluate_task(
    folder: Path, lm: Any, name: str, task: Path, limit: int | None, seed: int, num_fewshot: int = 0
) -> dict[str, Any]:
    """Evaluate one task, an artifact of its own, so that a further task costs only itself.

    `results.json` maps each metric of lm-eval's to `value`, `stderr` and the number of documents `n`; of a task with
    several ways to read an answer, each way's metric is called as lm-eval prints it, `metric,way`. A group's value is
    the mean over its documents, which is that of its tasks weighted by their size.
    `samples.jsonl` has each document's index, metrics and responses (of a choice: its log-likelihood, and whether every
    token was the likeliest); in a group, also the task that it belongs to.

    Args:
        folder: where to write.
        lm: `language_model` of the checkpoint.
        name: lm-eval's name of the task.
        task: folder of its downloaded documents.
        limit: at most so many documents, the same ones for every model; None takes all.
        seed: draws them.
        num_fewshot: examples before each question.

    Returns:
        Details for the manifest: lm-eval's version and that of the task, examples, documents, and `bos`: whether what
        the model reads begins with the tokenizer's beginning-of-sequence token, which is the tokenizer's own setting.

    Raises:
        UserError: a question does not fit into memory.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstrapping in this process: no forks beside its threads
    parts = stock_tasks(name, task, num_fewshot)
    count = sum(len(part.documents) for part in parts.values())
    chosen = set(random.Random(seed).sample(range(count), min(limit or count, count)))
    asked = {each: [i for i, number in enumerate(part.documents) if number in chosen] for each, part in parts.items()}
    asked = {each: indices for each, indices in asked.items() if indices}
    for each in asked:
        parts[each].task.set_fewshot_seed(FEWSHOT_SEED)
    tasks = {"tasks": {each: parts[each].task for each in asked}, "groups": {}, "group_map": {}}
    found = _run(lm, name, tasks, asked)
    lines: dict[int, dict[str, Any]] = defaultdict(dict)
    for each in asked:
        for sample in found["samples"][each]:
            number = parts[each].documents[sample["doc_id"]]
            line = lines[number]
            line |= {"doc_id": number} | ({"task": each} if name in GROUPS else {})
            line |= {_named(metric, sample["filter"]): sample[metric] for metric in sample["metrics"]}
            line["responses"] = [responses[0] for responses in sample["resps"]]
    samples = [lines[number] for number in sorted(lines)]
    with (folder / SAMPLES).open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in samples)
    results = _of_group(samples) if name in GROUPS else _of_task(found["results"][name], len(samples))
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    first = next(iter(asked))
    return {
        "lm_eval": version("lm_eval"),
        "task_version": found["versions"][first],
        "num_fewshot": num_fewshot,
        "bos": lm.tok_encode("a")[0] == lm.tokenizer.bos_token_id,
        "documents": len(samples),
        "of": count,
    }


def _run(lm: Any, name: str, tasks: dict[str, Any], asked: dict[str, list[int]]) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate as run  # simple_evaluate also lists the machine's packages, each time

    try:
        with fast_products(lm.device):
            return run(lm, tasks, samples=asked, bootstrap_iters=BOOTSTRAP)
    except UserError as error:
        raise UserError(f"task {name!r}: {error}") from None


def _named(metric: str, way: str) -> str:
    return metric if way == "none" else f"{metric},{way}"


def _of_task(found: dict[str, Any], n: int) -> dict[str, dict[str, Any]]:
    """The metrics that lm-eval gives for one task."""
    results = {}
    for key, value in found.items():
        metric, _, way = key.partition(",")
        if way and not metric.endswith("_stderr"):
            error = found.get(f"{metric}_stderr,{way}")
            error = error if isinstance(error, float) else None
            results[_named(metric, way)] = {"value": value, "stderr": error, "n": n}
    return results


def _of_group(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the documents of all tasks of a group."""
    results = {}
    for metric in samples[0].keys() - {"doc_id", "task", "responses"}:
        values = [float(line[metric]) for line in samples]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        results[metric] = {"value": statistics.fmean(values), "stderr": error, "n": len(values)}
    return dict(sorted(results.items()))

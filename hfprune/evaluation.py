"""Zero-shot accuracy through lm-eval."""

import json
import random
from pathlib import Path
from typing import Any

from hfprune.layout import RESULTS, RESUME, SAMPLES
from hfprune.models import load_model, load_tokenizer
from hfprune.products import fast_products
from hfprune.tasks import stock_task

BATCH = 16


def language_model(model: Path, dtype: str) -> Any:
    """lm-eval's own Hugging Face model class around the checkpoint."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=load_model(model, dtype), tokenizer=load_tokenizer(model), batch_size=BATCH)


def evaluate(folder: Path, tasks: dict[str, Path]) -> None:
    """Stage `evaluate`: write the `results.json` of all tasks together into `folder`, by task name.

    Args:
        folder: where to write.
        tasks: by task name, the folder that `evaluate_task` wrote.
    """
    results = {name: json.loads((done / RESULTS).read_text(encoding="utf-8")) for name, done in tasks.items()}
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def evaluate_task(folder: Path, lm: Any, name: str, task: Path, limit: int | None, seed: int) -> dict[str, Any]:
    """Evaluate one task, an artifact of its own, so that a further task costs only itself.

    `results.json` maps each metric of lm-eval's to `value`, `stderr` and the number of documents `n`.
    `samples.jsonl` has each document's index, metrics and log-likelihoods.

    Args:
        folder: where to write.
        lm: `language_model` of the checkpoint.
        name: lm-eval's name of the task.
        task: folder of its downloaded documents.
        limit: at most so many documents, the same ones for every model; None takes all.
        seed: draws them.
    """
    from lm_eval.evaluator import evaluate as run  # simple_evaluate also lists the machine's packages, each time

    lm_eval_task = stock_task(name, task, folder / RESUME)
    count = len(lm_eval_task.eval_docs)
    chosen = sorted(random.Random(seed).sample(range(count), min(limit or count, count)))
    with fast_products(lm.device):
        found = run(lm, {"tasks": {name: lm_eval_task}, "groups": {}, "group_map": {}}, samples={name: chosen})
    results = {}
    for metric, value in found["results"][name].items():
        if metric.endswith(",none") and "_stderr" not in metric:
            metric = metric.removesuffix(",none")
            error = found["results"][name].get(f"{metric}_stderr,none")
            results[metric] = {
                "value": value,
                "stderr": error if isinstance(error, float) else None,
                "n": len(chosen),
            }
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with (folder / SAMPLES).open("w", encoding="utf-8") as out:
        for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"]):
            kept = {"doc_id": sample["doc_id"], **{metric: sample[metric] for metric in results}}
            out.write(json.dumps({**kept, "responses": sample["filtered_resps"]}) + "\n")
    return {"task_version": found["versions"][name], "num_fewshot": 0, "documents": len(chosen), "of": count}

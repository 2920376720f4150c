"""`metrics.csv`: collected from artifacts, read again, and the parts of it that every table and figure shows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hfprune.errors import UserError
from hfprune.reporting.identity import NO_NAMES, Names, heldout_texts, lineage, measured_models
from hfprune.reporting.statistics import MODEL
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.filenames import RESULTS

# One value a row. Users' own scripts read these.
COLUMNS = [
    "model", "stage", "method", "criterion", "allocation", "refit", "structure", "ratio", "ratio_achieved",
    "ratio_achieved_parent", "parameters", "recovery", "parent", "seed", "group", "task", "metric", "value", "stderr",
    "n", "key",
]  # fmt: skip
HELDOUT = ("perplexity", "fidelity")  # groups whose task is a held-out text
# The metrics that the paper reports; a task's headline is the first that it has.
HEADLINE = ("pct_stereotype", "acc_norm", "acc", "exact_match,strict-match")
TASK_TITLES = {
    "arc_challenge": "ARC-c",
    "arc_easy": "ARC-e",
    "boolq": "BoolQ",
    "crows_pairs_english": "CrowS",
    "openbookqa": "OBQA",
    "piqa": "PIQA",
    "race": "RACE",
    "social_iqa": "SIQA",
    "truthfulqa_mc2": "TfQA",
    "winogrande": "Wino",
}


def collect(artifacts: Sequence[Artifact], store: Store, names: Names = NO_NAMES) -> pd.DataFrame:
    """The rows of `metrics.csv`: the artifacts' values, and which models they belong to.

    Args:
        artifacts: of the stages `measure` and `evaluate`, in any order.
        store: holds the manifests of everything that they were made from.
        names: of methods and texts. Rows come in their order, so the first text is the headline text.

    Raises:
        UserError: see `identity.measured_models`.
    """
    models = measured_models(artifacts, store, names.methods)
    texts = heldout_texts(artifacts, store, names.texts)
    rows: list[dict[str, Any]] = []
    with_efficiency: set[str] = set()  # a model measured on several texts has these rows once
    for artifact in artifacts:
        model = artifact.manifest["inputs"]["model"]
        results = json.loads((artifact.folder / RESULTS).read_text(encoding="utf-8"))
        if artifact.key in texts:
            text, details = texts[artifact.key], artifact.manifest["details"]
            values = [
                ("perplexity" if metric == "perplexity" else "fidelity", text, metric, estimate)
                for metric, estimate in results.items()
            ]
            if model not in with_efficiency:
                with_efficiency.add(model)
                values += [
                    ("efficiency", "inference", metric, {"value": details[metric], "stderr": None, "n": 1})
                    for metric in ("flops_per_token", "bytes")
                ]
        else:
            values = [
                ("task", task, metric, estimate)
                for task, estimates in results.items()
                for metric, estimate in estimates.items()
            ]
        for group, task, metric, estimate in values:
            columns = {"group": group, "task": task, "metric": metric, **estimate, "key": artifact.key}
            rows.append(models[model] | columns)
    for key, columns in models.items():
        rows += [columns | cost for cost in _costs(lineage(key, store), store)]
    return _sorted(pd.DataFrame(rows, columns=COLUMNS), list(names.methods.values()), list(texts.values()))


def _sorted(table: pd.DataFrame, methods: Sequence[str], texts: Sequence[str]) -> pd.DataFrame:
    """`metrics.csv` with methods and texts in these orders; methods that are not listed come last."""
    methods = list(dict.fromkeys(methods))
    table["order"] = table["stage"].map(["dense", "pruned", "recovered"].index)
    table["place"] = [methods.index(name) if name in methods else len(methods) for name in table["method"]]
    table["text"] = [texts.index(task) if group in HELDOUT else 0 for group, task in table[["group", "task"]].values]
    by = ["order", "parent", "place", "method", "ratio", "recovery", "seed", "group", "text", "task", "metric"]
    return table.sort_values(by, kind="stable", ignore_index=True)[COLUMNS]


def _costs(steps: Sequence[Mapping[str, Any]], store: Store) -> list[dict[str, Any]]:
    """Seconds, peak bytes, tokens and FLOPs of each step of a `lineage`.

    Step `light_cut` is the scoring whose weakest neurons a criterion silences before it scores.
    """
    costly = []
    for manifest in steps[1:]:
        if manifest["stage"] == "score" and (light_cut := manifest["inputs"].get("light_cut")):
            costly.append(("light_cut", store.manifest("score", light_cut)))
        costly.append((manifest["stage"], manifest))
    rows = []
    for stage, manifest in costly:
        details = {name.removeprefix("refit_"): value for name, value in manifest["details"].items()}
        # Criteria scored in one pass share its time; an artifact's own seconds are those of writing its file. A
        # training that was killed and continued has the seconds of all attempts.
        seconds = details.get("seconds_together", manifest["seconds"])
        if "flops_together" in details:
            seconds *= details["flops"] / details["flops_together"]
        values = {"seconds": seconds, "peak_bytes": manifest["peak_memory_bytes"]}
        values |= {name: details[name] for name in ("tokens", "flops") if name in details}
        for metric, value in values.items():
            estimate = {"metric": metric, "value": value, "stderr": None, "n": 1}
            rows.append({"group": "cost", "task": stage, **estimate, "key": manifest["key"]})
    return rows


def read_metrics(path: Path) -> pd.DataFrame:
    """A metrics.csv.

    Raises:
        UserError: it is missing, or not one.
    """
    try:
        metrics = pd.read_csv(path, keep_default_na=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as metrics: {error}") from None
    if missing := [column for column in COLUMNS if column not in metrics]:
        raise UserError(f"{path}: not a metrics.csv: it lacks the columns {', '.join(missing)}.")
    return metrics


def headline(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of each task's headline metric, see `HEADLINE`; none of a task that has no such metric."""
    tasks = metrics[metrics["group"] == "task"]
    chosen = {
        task: next((metric for metric in HEADLINE if metric in set(metrics_of_task)), None)
        for task, metrics_of_task in tasks.groupby("task")["metric"]
    }
    return tasks[tasks["metric"] == tasks["task"].map(chosen)]


def on_headline_text(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of perplexity and fidelity on the headline text, the first that the config names."""
    rows = metrics[metrics["group"].isin(HELDOUT)]
    return rows[rows["task"] == rows["task"].iloc[0]]


def operations(metrics: pd.DataFrame) -> pd.Series:
    """FLOPs that it took to make each model, all stages together; index: the columns of `MODEL`, and the seed."""
    flops = metrics[(metrics["group"] == "cost") & (metrics["metric"] == "flops")]
    return flops.groupby([*MODEL, "seed"], dropna=False)["value"].sum()

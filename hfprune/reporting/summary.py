"""Two tables of every model, made from `metrics.csv`: what it is worth, and what it cost."""

import math
from pathlib import Path

import pandas as pd

from hfprune.reporting.metrics import TASK_TITLES, headline, on_headline_text, operations
from hfprune.reporting.statistics import MODEL, estimates, mean_accuracy, note, varying, with_ends, with_sizes
from hfprune.reporting.typeset import Cell, Row, Sheet

MEAN = "Mean"  # of the tasks' accuracies
REMOVED, PARAMETERS = "Removed (%)", "Parameters (M)"
SCALES = {REMOVED: 100, PARAMETERS: 1e-6}
DIGITS = {"KL (nats/token)": 3, "Top-1 agreement": 3}
COST_NOTE = (
    "Criteria scored in one pass share its seconds by their shares of its operations; each has the memory of the whole "
    "pass. A criterion that needs another's scores first is charged for them too."
)


def write_headline(metrics: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the summary of models before any training as `headline`.csv, .md and .tex into `folder`; their paths."""
    return _sheet("The models before any training.", summary(metrics)).write(folder, "headline")


def write_tables(metrics: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `summary` and `cost`, each as csv (full precision), md and tex, into `folder`; their paths."""
    sheets = {
        "summary": _sheet("Every model.", summary(metrics)),
        "cost": _sheet("What each model took to make.", cost(metrics), COST_NOTE),
    }
    return [path for name, sheet in sheets.items() for path in sheet.write(folder, name)]


def summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per model: size, accuracy of each task and their mean in per cent, perplexity, KL, top-1 agreement.

    The last three are of the headline text. Each value has the ends of its interval beside it, in columns named
    `... low` and `... high`; `seeds` is the number of calibration seeds.
    """
    titles = {"perplexity": "Perplexity", "kl": "KL (nats/token)", "top1_agreement": "Top-1 agreement"}
    heldout = on_headline_text(metrics)
    measures = estimates(heldout[heldout["metric"].isin(titles)])
    measures["task"] = measures["metric"].map(titles)
    accuracy = _accuracy(metrics)
    both = pd.concat([accuracy, measures]) if len(accuracy) else measures
    table = with_sizes(measures.drop_duplicates(MODEL)[[*MODEL, "seeds"]], metrics)
    table = table.rename(columns={"ratio_achieved": REMOVED, "parameters": PARAMETERS}).set_index(MODEL)
    for column in [*dict.fromkeys(accuracy["task"]), *titles.values()]:
        values = both[both["task"] == column].set_index(MODEL)
        for name, end in zip(with_ends(column), ("value", "low", "high"), strict=True):
            table[name] = values[end]
    return table.reset_index()


def _accuracy(metrics: pd.DataFrame) -> pd.DataFrame:
    """The accuracy of each task and their mean, in per cent; no rows if no task was evaluated."""
    rows = headline(metrics)
    accuracy = estimates(rows)
    if len(rows):
        accuracy["task"] = accuracy["task"].map(lambda name: TASK_TITLES.get(name, name))
        accuracy = pd.concat([accuracy, mean_accuracy(rows).assign(task=MEAN)])
        accuracy[["value", "low", "high"]] *= 100
    return accuracy


def cost(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per model: what it took to make, beside its fidelity.

    Seconds of scoring (with the scores that its criterion needs first, and a search for an order or for widths), of
    cutting with its refit, and of training; the FLOPs counted for the passes of all three (see docs/recovery.md); the
    peak memory of the largest of them.
    """
    rows = metrics[metrics["group"] == "cost"]
    by = [*MODEL, "seed"]
    columns = [REMOVED, PARAMETERS, "seeds", *with_ends("KL (nats/token)")]
    table = summary(metrics).set_index(MODEL)[columns]
    stages = {
        "Scoring (s)": ["light_cut", "score", "order", "search"],
        "Cutting (s)": ["prune"],
        "Training (s)": ["recover"],
    }
    costs = {
        title: rows[rows["task"].isin(names) & (rows["metric"] == "seconds")].groupby(by, dropna=False)["value"].sum()
        for title, names in stages.items()
    }
    costs["TFLOP"] = operations(metrics) / 1e12
    costs["Peak memory (GiB)"] = rows[rows["metric"] == "peak_bytes"].groupby(by, dropna=False)["value"].max() / 2**30
    for name, values in costs.items():
        table[name] = values.groupby(MODEL, dropna=False).mean()
    return table.reset_index()


def without_mean_of_one(table: pd.DataFrame) -> pd.DataFrame:
    """A `summary` for people: one task is its own mean."""
    measured = [name for name in table if f"{name} low" in table]
    return table.drop(columns=with_ends(MEAN)) if measured[1:2] == [MEAN] else table


def _sheet(caption: str, table: pd.DataFrame, *notes: str) -> Sheet:
    table, differing = without_mean_of_one(table), varying(table)
    ends = {name for column in table for name in with_ends(column)[1:]}
    columns = [name for name in table if name not in (*MODEL, "seeds", *ends)]
    rows = []
    for _, model in table.iterrows():
        cells = {}
        for name in columns:
            scale = SCALES.get(name, 1)
            cells[name] = Cell(*(scale * model.get(end, math.nan) for end in with_ends(name)))
        rows.append(Row([model["stage"], model["method"], *model[differing]], cells))
    digits = {name: DIGITS.get(name, 1) for name in columns}
    return Sheet(caption, ["Model", "Method", *map(str.capitalize, differing)], digits, rows, [note(table), *notes])

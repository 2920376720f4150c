"""The leaderboard: every model of an experiment with its fidelity, its speed and what it took to make, side by side."""

import math

import pandas as pd

from hfprune.reporting.comparison import with_best
from hfprune.reporting.labels import name_of
from hfprune.reporting.metrics import HELDOUT
from hfprune.reporting.paper_sheets import timed
from hfprune.reporting.statistics import MODEL, estimates, note, varying, with_ends
from hfprune.reporting.summary import PARAMETERS, REMOVED, cost
from hfprune.reporting.typeset import BEST, Cell, Row, Sheet

PREFILL, DECODE, MAKING = "Prefill (ms)", "Decoding (tokens/s)", "Making (s)"
SPEED_AND_COST = {PREFILL: 0, DECODE: 1, MAKING: 0, "TFLOP": 1}  # digits
FIDELITY = {"perplexity": ("Perplexity", 1), "top1_agreement": ("Top-1 agreement", 3), "acceptance": ("Acceptance", 3)}
KL = "KL, "  # before the name of a text
NOTE = (
    "Acceptance: the share of its draft tokens that the dense model accepts in speculative decoding. Making: seconds "
    "of scoring and cutting; TFLOP: the operations of their passes. Models of one shape share a time."
)


def first_kl(table: pd.DataFrame) -> str:
    """The title of a board's column of KL on the headline text."""
    return next(title for title in table if title.startswith(KL))


def board(metrics: pd.DataFrame, timings: pd.DataFrame | None, differences: pd.DataFrame) -> pd.DataFrame:
    """Every model, those of one size together, the nearest to the dense model first.

    Args:
        metrics: rows of metrics.csv.
        timings: see `paper_sheets.read_timings`; None: nothing was timed.
        differences: see `comparison.Comparison.differences`.

    Returns:
        Columns of `MODEL`; `name`; `seeds`; values with the ends of their intervals in `... low` and `... high`: KL on
        each held-out text, and of the headline text those of `FIDELITY`; the share removed from 0 to 1; those of
        `SPEED_AND_COST`; `best`: the lowest KL of its ratio on the headline text; `tied`: not distinguishable from it.
    """
    costs = cost(metrics)
    differing = varying(costs)
    table = costs[[*MODEL, "seeds", REMOVED]].copy()
    table["name"] = [name_of(model, differing) for _, model in costs.iterrows()]
    heldout = metrics[metrics["group"].isin(HELDOUT)]
    texts = list(dict.fromkeys(heldout["task"]))
    titles = {(text, "kl"): f"{KL}{text}" for text in texts}
    titles |= {(texts[0], metric): title for metric, (title, _) in FIDELITY.items()}
    values = estimates(heldout)
    for (text, metric), title in titles.items():
        column = values[(values["task"] == text) & (values["metric"] == metric)]
        ends = column[[*MODEL, "value", "low", "high"]].set_axis([*MODEL, *with_ends(title)], axis=1)
        table = table.merge(ends, on=MODEL, how="left")
    shapes = costs.rename(columns={PARAMETERS: "parameters"})
    table[PREFILL] = table[DECODE] = math.nan
    if timings is not None:
        table[PREFILL] = 1e3 * timed(shapes, timings[timings["metric"] == "prefill_seconds"])
        table[DECODE] = timed(shapes, timings[timings["task"] == "decode batch 1"])
    table[MAKING] = costs[["Scoring (s)", "Cutting (s)", "Training (s)"]].sum(axis=1)
    table["TFLOP"] = costs["TFLOP"].fillna(0)
    kl = values[(values["task"] == texts[0]) & (values["metric"] == "kl")]
    table = table.merge(with_best(kl, differences)[[*MODEL, "best", "tied"]], on=MODEL)
    return table.sort_values(["ratio", first_kl(table)], kind="stable", ignore_index=True)


def leaderboard_sheet(table: pd.DataFrame) -> Sheet:
    """A `board` for people."""
    measured = [title for title in table if f"{title} low" in table]
    digits = {REMOVED: 1} | dict.fromkeys(measured, 3) | dict(FIDELITY.values()) | SPEED_AND_COST
    digits = {title: count for title, count in digits.items() if table[title].notna().any()}
    first, rows = first_kl(table), []
    for _, model in table.iterrows():
        cells = {title: Cell(*(model.get(end, math.nan) for end in with_ends(title))) for title in digits}
        cells[first] = Cell(*model[with_ends(first)], bool(model["best"]), bool(model["tied"]))
        cells[REMOVED] = Cell(100 * model[REMOVED])
        rows.append(Row([f"{100 * model['ratio']:.4g}", model["name"]], cells))
    return Sheet("Every method at every size.", ["Ratio (%)", "Method"], digits, rows, [f"{note(table)} {BEST}", NOTE])

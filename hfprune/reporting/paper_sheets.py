"""Makes the paper's tables for any model, with the published rows below its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from hfprune.errors import UserError
from hfprune.reporting import statistics
from hfprune.reporting.comparison import Comparison, with_best
from hfprune.reporting.metrics import TASK_TITLES, headline, read_metrics
from hfprune.reporting.paper_tables import FILE_TABLES, MEAN, TABLES, Column, Setting, compared
from hfprune.reporting.statistics import MODEL, mean_accuracy, note, varying
from hfprune.reporting.typeset import BEST, Cell, Row, Sheet


def select(name: str, samples: pd.DataFrame) -> pd.DataFrame:
    """The samples of the models that one of `TABLES` compares.

    Args:
        name: the table's.
        samples: see `samples.read_samples`.

    Raises:
        UserError: there is nothing to compare, or there are several dense models.
    """
    if len(names := samples["model"].unique()) > 1:
        raise UserError(f"{name} compares what was made of one dense model, not of {len(names)}: {', '.join(names)}.")
    models = samples[MODEL].drop_duplicates()
    settings = [
        Setting(model.criterion, model.structure, model.allocation, model.refit, model.recovery, model.ratio)
        for model in models.itertuples()
    ]
    models = models[compared(name, settings, has_tasks=(samples["group"] == "task").any())]
    return samples.merge(models, on=MODEL)


def estimates(samples: pd.DataFrame) -> pd.DataFrame:
    """Every model's values with their intervals, and which models of one size are the best.

    Args:
        samples: see `samples.read_samples`.

    Returns:
        Columns of `MODEL`; `seeds`; `text`, the held-out text of a measure, empty for a task; `metric`, see `Column`;
        `value`, `low`, `high`; `best`: the best pruned model of its ratio; `tied`: not distinguishable from the best.
    """
    comparison = Comparison(samples)
    intervals = with_best(comparison.intervals(), comparison.differences())
    is_task, task = intervals["group"] == "task", intervals["task"]
    return intervals.assign(text=task.mask(is_task, ""), metric=intervals["metric"].mask(is_task, task))


def model_sheet(name: str, estimates: pd.DataFrame, published: Path) -> Sheet:
    """One of `TABLES`.

    Args:
        name: its name.
        estimates: see `estimates`.
        published: the csv of published values, which may be missing.
    """
    table = TABLES[name]
    ours, theirs = estimates, read_published(published)
    columns = [*(_task_columns(estimates) if table.has_task_columns else ()), *table.columns]
    columns = [column for column in columns if column.metric in set(estimates["metric"])]
    if table.has_text_rows:
        ours = ours[ours["text"] != ""]
    else:
        texts = [text for text in dict.fromkeys(ours["text"]) if text]
        ours = ours[ours["text"].isin(["", *texts[:1]])].assign(text="")
    theirs = theirs[theirs["ratio"].isin(ours["ratio"])]
    differing = varying(ours)
    heads = ["Removed (%)", *(["Text"] if table.has_text_rows else []), "Method", *map(str.capitalize, differing)]
    rows = []
    places = pd.concat([ours, theirs])[["ratio", "text"]].drop_duplicates().sort_values("ratio", kind="stable")
    for ratio, text in places.itertuples(index=False):
        first_heads = [f"{100 * ratio:.4g}", *([text] if table.has_text_rows else [])]
        ours_here = ours[(ours["ratio"] == ratio) & (ours["text"] == text)]
        for setting, values in ours_here.groupby(MODEL, sort=False):
            model = dict(zip(MODEL, setting, strict=True))
            row_heads = [*first_heads, model["method"], *(model[name] for name in differing)]
            rows.append(Row(row_heads, _cells(values, columns)))
        theirs_here = theirs[(theirs["ratio"] == ratio) & (theirs["text"] == text)]
        for (model, method), values in theirs_here.groupby(["model", "method"], sort=False):
            row_heads = [*first_heads, f"{method}, {model}, published", *[""] * len(differing)]
            cells = _published_cells(values, {column.title: column.metric for column in columns})
            rows.append(Row(row_heads, cells, published=True))
    digits = {column.title: column.digits for column in columns}
    return Sheet(table.caption, heads, digits, rows, [f"{note(estimates)} {BEST}", *_published_notes(theirs)])


def _task_columns(estimates: pd.DataFrame) -> list[Column]:
    tasks = dict.fromkeys(estimates[estimates["text"] == ""]["metric"])
    return [Column(TASK_TITLES.get(name, name), name, scale=100) for name in tasks if not name.startswith("mean")]


def _cells(estimates: pd.DataFrame, columns: Sequence[Column]) -> dict[str, Cell]:
    """By column title, the estimates of one model."""
    cells = {}
    for column in columns:
        for _, estimate in estimates[estimates["metric"] == column.metric].iterrows():
            numbers = [column.scale * estimate[name] for name in ("value", "low", "high")]
            cells[column.title] = Cell(*numbers, bool(estimate["best"]), bool(estimate["tied"]))
    return cells


def read_published(path: Path) -> pd.DataFrame:
    """Published values: columns model, ratio, method, text, metric, value, source, note; no rows if there is no file.

    Raises:
        UserError: it is not such a file.
    """
    columns = {"model": str, "ratio": float, "method": str, "text": str, "metric": str, "value": float}
    columns |= {"source": str, "note": str}
    if not path.exists():
        return pd.DataFrame(columns=list(columns))
    try:
        return pd.read_csv(path, dtype=columns).fillna({"text": "", "source": "", "note": ""})[list(columns)]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not published values with the columns {', '.join(columns)}: {error}") from None


def _published_cells(values: pd.DataFrame, metrics: Mapping[str, str | None]) -> dict[str, Cell]:
    """By column title, the published value of its metric, if there is one."""
    by_metric = values.set_index("metric")["value"]
    return {title: Cell(by_metric[metric]) for title, metric in metrics.items() if metric in by_metric}


def _published_notes(theirs: pd.DataFrame) -> list[str]:
    """The sources of published values, and their errata."""
    with_note = theirs[theirs["note"] != ""].drop_duplicates("note")
    errata = [f"{value.method}, {value.metric}: {value.note}." for value in with_note.itertuples()]
    return [" ".join([f"Published: {'; '.join(dict.fromkeys(theirs['source']))}.", *errata])] if len(theirs) else []


def further_sheet(sources: Sequence[Path], published: Path) -> Sheet:
    """Table 3: the tasks' accuracy of several dense models and of what was made of them.

    Args:
        sources: the metrics.csv of several experiments, each in a folder of the experiment's name.
        published: not read: the published table contradicts itself, see results/published/README.md.

    Raises:
        UserError: the experiments have other tasks, or other results for the dense model of one name.
    """
    experiments = [headline(read_metrics(path)) for path in sources]
    tasks_of_each = {tuple(sorted(metrics["task"].unique())) for metrics in experiments}
    if len(tasks_of_each) > 1 or not any(tasks_of_each):
        raise UserError(f"{', '.join(map(str, sources))}: expected accuracy of the same tasks in each.")
    folders = [path.parent.name for path in sources]
    names = folders if len(set(folders)) == len(sources) else [str(path) for path in sources]
    rows = _without_repeats([metrics.assign(experiment=name) for metrics, name in zip(experiments, names, strict=True)])
    # Names tell models apart only within an experiment, so each experiment is estimated by itself.
    parts = []
    for name, metrics in rows.groupby("experiment", sort=False):
        parts.append(pd.concat([statistics.estimates(metrics), mean_accuracy(metrics)]).assign(experiment=name))
    values = pd.concat(parts)
    values = values.assign(metric=values["task"], best=False, tied=False)
    by = [*MODEL, "experiment"]
    models = values[[*by, "seeds"]].drop_duplicates(by)
    same_name = models[models.duplicated(MODEL, keep=False)]
    if (same_name["stage"] == "dense").any():
        raise UserError(
            f"{', '.join(map(str, sources))}: the dense model {same_name['model'].iloc[0]} has other results in each: "
            "it was evaluated in two ways, such as on other documents, or there are two of that name."
        )
    differing, tasks = varying(values), list(dict.fromkeys(rows["task"]))
    columns = [*(Column(TASK_TITLES.get(name, name), name, scale=100) for name in tasks), MEAN]
    sheet_rows = []
    for setting, of_model in values.groupby(by, sort=False):
        model = dict(zip(by, setting, strict=True))
        heads = [model["model"], *([model["experiment"]] if len(same_name) else []), f"{100 * model['ratio']:.4g}"]
        heads += [model["method"], *(model[name] for name in differing)]
        sheet_rows.append(Row(heads, _cells(of_model, columns)))
    heads = ["Model", *(["Experiment"] if len(same_name) else []), "Removed (%)", "Method"]
    heads += map(str.capitalize, differing)
    digits = {column.title: column.digits for column in columns}
    return Sheet("Zero-shot accuracy (%) of further models.", heads, digits, sheet_rows, [note(models)])


def _without_repeats(experiments: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows of several experiments, each model once: from the one that has most of its artifacts."""
    rows = pd.concat(experiments, ignore_index=True)
    by = ["experiment", *MODEL]
    keys = rows.groupby(by, dropna=False, sort=False)["key"].agg(frozenset)
    kept: dict[tuple, frozenset] = {}
    for setting, artifacts in sorted(keys.items(), key=lambda item: -len(item[1])):  # stable: the first of equals stays
        if not any(artifacts <= others for others in kept.values()):
            kept[setting] = artifacts
    return rows[[setting in kept for setting in rows[by].itertuples(index=False, name=None)]]


TIMINGS = {  # title: task and metric of efficiency.csv, metric of the published table, factor, digits
    "Prefill (ms)": ("prefill 256", "prefill_seconds", "prefill_ms", 1e3, 1),
    "Decoding, batch 1 (tokens/s)": ("decode batch 1", "decode_tokens_per_second", None, 1, 1),
    "Decoding, batch 8 (tokens/s)": ("decode batch 8", "decode_tokens_per_second", "decode_tokens_per_second", 1, 1),
    "Peak memory (GiB)": ("inference", "peak_bytes", None, 2**-30, 2),
}


def timing_sheet(sources: Sequence[Path], published: Path) -> Sheet:
    """Table 4: prefill and decoding of the dense model and of pruned ones, on the machine that they were timed on.

    Args:
        sources: the csv of `hfprune efficiency`.
        published: the csv of published values, which may be missing.
    """
    timings, theirs = read_timings(sources), read_published(published)
    theirs = theirs[theirs["ratio"].isin(timings["ratio"])]
    rows = []
    for ratio in dict.fromkeys(timings["ratio"]):
        removed = f"{100 * ratio:.4g}"
        for _, of_model in timings[timings["ratio"] == ratio].groupby("key", sort=False):
            values = of_model.set_index(["task", "metric"])["value"]
            cells = {name: Cell(scale * values[task, metric]) for name, (task, metric, _, scale, _) in TIMINGS.items()}
            rows.append(Row([removed, of_model["method"].iloc[0]], cells))
        for name, values in theirs[theirs["ratio"] == ratio].groupby("model", sort=False):
            cells = _published_cells(values, {title: metric for title, (_, _, metric, _, _) in TIMINGS.items()})
            rows.append(Row([removed, f"{name}, published"], cells, published=True))
    digits = {title: digits for title, (*_, digits) in TIMINGS.items()}
    notes = [_machine(timings), *_published_notes(theirs)]
    return Sheet("Prefill of 256 tokens, and decoding.", ["Removed (%)", "Method"], digits, rows, notes)


def read_timings(sources: Sequence[Path]) -> pd.DataFrame:
    """The csv of `hfprune efficiency`.

    Raises:
        UserError: it is not one.
    """
    return _read(sources, ["key", *MODEL, "task", "metric", "value", "n", "device", "threads", "versions", "dtype"])


def timed(models: pd.DataFrame, timings: pd.DataFrame) -> pd.Series:
    """What was timed of each model, or else of one of the same shape; NaN if there is none.

    One model is timed for each cut. Of the same shape are models trained after that cut and, if all layers have one
    width, models that other criteria cut to as many parameters.

    Args:
        models: columns of `MODEL`, `parameters`.
        timings: rows of one task of `read_timings`.

    Returns:
        Their values, with the index of `models`.
    """
    own = timings.groupby(MODEL)["value"].mean()
    values = pd.MultiIndex.from_frame(models[MODEL]).map(own).to_series(models.index).astype(float)
    shape = models[["model", "structure", "allocation", "ratio", "parent", "parameters"]].assign(
        criterion=models["criterion"].where(models["allocation"] != "uniform", "")
    )
    return values.fillna(values.groupby([shape[name] for name in shape]).transform("mean"))


def scoring_sheet(sources: Sequence[Path], published: Path) -> Sheet:
    """Table 5: seconds and memory of scoring, each criterion alone.

    Args:
        sources: the csv of `hfprune scoring-cost`.
        published: the csv of published values, which may be missing.
    """
    names = ["criterion", "light_cut", "seconds", "peak_bytes", "tokens", "flops", "n", "device", "threads", "versions"]
    costs, theirs = _read(sources, [*names, "dtype"]), read_published(published)
    first = costs["seconds"].iloc[0]
    relative = f"Time / {costs['criterion'].iloc[0]}"
    rows = []
    for cost in costs.itertuples():
        head = cost.criterion if cost.light_cut == "none" else f"{cost.criterion}, after scoring by {cost.light_cut}"
        values = {"Seconds": cost.seconds, relative: cost.seconds / first, "Tokens/s": cost.tokens / cost.seconds}
        values |= {"TFLOP": cost.flops / 1e12, "Peak memory (GB)": cost.peak_bytes / 1e9}
        rows.append(Row([head], {title: Cell(value) for title, value in values.items()}))
    for (model, method), values in theirs.groupby(["model", "method"], sort=False):
        cells = _published_cells(values, {"Seconds": "seconds", "Peak memory (GB)": "peak_gigabytes"})
        rows.append(Row([f"{method}, {model}, published"], cells, published=True))
    digits = {"Seconds": 1, relative: 2, "Tokens/s": 0, "TFLOP": 1, "Peak memory (GB)": 2}
    caption = f"Scoring {costs['tokens'].iloc[0]:,} tokens by each criterion alone."
    return Sheet(caption, ["Criterion"], digits, rows, [_machine(costs), *_published_notes(theirs)])


FILE_SHEETS = dict(zip(FILE_TABLES, (further_sheet, timing_sheet, scoring_sheet), strict=True))


def _read(sources: Sequence[Path], columns: Sequence[str]) -> pd.DataFrame:
    if len(sources) != 1:
        raise UserError(f"one csv file is expected, not {len(sources)}: {', '.join(map(str, sources))}.")
    try:
        return pd.read_csv(sources[0])[list(columns)].fillna({name: "none" for name in MODEL if name in columns})
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{sources[0]}: not a csv with the columns {', '.join(columns)}: {error}") from None


def _machine(timings: pd.DataFrame) -> str:
    first = timings.iloc[0]
    rounds = f"Medians over {first['n']} rounds, taken in turn."
    return f"{rounds} {first['device']}, {first['threads']} threads, {first['dtype']}, {first['versions']}."

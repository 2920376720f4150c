"""The paper's tables for whatever model an experiment names, the published rows below its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hfprune.errors import UserError
from hfprune.reporting import statistics
from hfprune.reporting.comparison import Comparison, best_of, indistinguishable_from_best
from hfprune.reporting.statistics import MEASURE, MODEL, mean_accuracy, note, varying
from hfprune.reporting.tables import TASK_TITLES, headline, read_metrics
from hfprune.reporting.targets import Setting, compared
from hfprune.reporting.typeset import NOT_WORSE, Cell, Row, Sheet

BEST = f"Bold: the best of its size; {NOT_WORSE}: not distinguishable from it (5 %, Holm)."


@dataclass(frozen=True)
class Column:
    """A column of values: which estimate it shows, and how.

    Attributes:
        title: with its unit.
        metric: the name of a task, `mean`, `mean_without_crows`, or a measure on held-out text.
        digits: behind the point.
        scale: what an estimate is multiplied by.
    """

    title: str
    metric: str
    digits: int = 1
    scale: float = 1


MEANS = (Column("Mean (%)", "mean", scale=100), Column("Mean w/o CrowS (%)", "mean_without_crows", scale=100))
PERPLEXITY = Column("Perplexity", "perplexity")
KL = Column("KL (nats/token)", "kl", 3)
FIDELITY = (
    Column("JS distance", "js", 3),
    Column("Top-15 Jaccard", "top15_jaccard", 3),
    KL,
    Column("Top-1 agreement", "top1_agreement", 3),
)


@dataclass(frozen=True)
class Table:
    """What one of the paper's tables shows: `columns` of the models that `targets.TABLES` chooses.

    Attributes:
        caption: the first sentence of its caption.
        columns: its values.
        tasks: whether a column for each task comes first.
        texts: whether there is a row for each held-out text, not only for the first.
    """

    caption: str
    columns: Sequence[Column]
    tasks: bool = False
    texts: bool = False


TABLES = {
    "table1": Table("Zero-shot accuracy (%).", MEANS, tasks=True),
    "table2": Table("Perplexity of held-out text, and mean zero-shot accuracy.", (PERPLEXITY, *MEANS)),
    "table6": Table("Mean zero-shot accuracy by criterion, without recovery.", MEANS),
    "table7": Table("Fidelity to the dense model by criterion, on held-out text.", FIDELITY, texts=True),
    "table8": Table("The MLPs alone, and attention with them.", (*MEANS, KL, PERPLEXITY)),
}


def shown(name: str, documents: pd.DataFrame) -> pd.DataFrame:
    """Of what every document says, that of the models which one of `TABLES` shows.

    Args:
        name: the table's.
        documents: see `documents.read_documents`.

    Raises:
        UserError: there is nothing to compare, or there are several dense models.
    """
    if len(names := documents["model"].unique()) > 1:
        raise UserError(f"{name} compares what was made of one dense model, not of {len(names)}: {', '.join(names)}.")
    models = documents[MODEL].drop_duplicates()
    settings = [
        Setting(each.criterion, each.structure, each.allocation, each.refit, each.recovery, each.ratio)
        for each in models.itertuples()
    ]
    models = models[compared(name, settings, tasks=(documents["group"] == "task").any())]
    return documents.merge(models, on=MODEL)


def estimates(documents: pd.DataFrame) -> pd.DataFrame:
    """What every model reaches, with its interval, and which models of one size are the best.

    Args:
        documents: see `documents.read_documents`.

    Returns:
        Columns of `MODEL`; `seeds`; `text`, the corpus of a measure, empty for a task; `metric`, see `Column`; `value`,
        `low`, `high`; `best` of the pruned models of its ratio, or `tied`: not distinguishable from that.
    """
    comparison = Comparison(documents)
    found, differences = comparison.intervals(), comparison.differences()
    found["best"] = found["tied"] = False
    for (*_, ratio), rows in found.groupby([*MEASURE, "ratio"]):
        if ratio and len(rows) > 1:
            found.loc[rows.index, "tied"] = indistinguishable_from_best(rows, differences)
            found.loc[best_of(rows), ["best", "tied"]] = True, False
    task = found["group"] == "task"
    return found.assign(text=found["task"].mask(task, ""), metric=found["metric"].mask(task, found["task"]))


def sheet(name: str, estimates: pd.DataFrame, published: Path) -> Sheet:
    """One of `TABLES`.

    Args:
        name: its name.
        estimates: see `estimates`.
        published: the csv of published values, which may be missing.
    """
    table = TABLES[name]
    ours, theirs = estimates, read_published(published)
    columns = [*(_task_columns(estimates) if table.tasks else ()), *table.columns]
    columns = [column for column in columns if column.metric in set(estimates["metric"])]
    if table.texts:
        ours = ours[ours["text"] != ""]
    else:
        texts = [text for text in dict.fromkeys(ours["text"]) if text]
        ours = ours[ours["text"].isin(["", *texts[:1]])].assign(text="")
    theirs = theirs[theirs["ratio"].isin(ours["ratio"])]
    ways = varying(ours)
    heads = ["Removed (%)", *(["Text"] if table.texts else []), "Method", *map(str.capitalize, ways)]
    rows = []
    places = pd.concat([ours, theirs])[["ratio", "text"]].drop_duplicates().sort_values("ratio", kind="stable")
    for ratio, text in places.itertuples(index=False):
        where = [f"{100 * ratio:.4g}", *([text] if table.texts else [])]
        here = ours[(ours["ratio"] == ratio) & (ours["text"] == text)]
        for setting, found in here.groupby(MODEL, sort=False):
            model = dict(zip(MODEL, setting, strict=True))
            rows.append(Row([*where, model["method"], *(model[way] for way in ways)], _cells(found, columns)))
        there = theirs[(theirs["ratio"] == ratio) & (theirs["text"] == text)]
        for (model, method), found in there.groupby(["model", "method"], sort=False):
            known = [*where, f"{method}, {model}, published"]
            cells = _published_cells(found, {column.title: column.metric for column in columns})
            rows.append(Row([*known, *[""] * len(ways)], cells, published=True))
    digits = {column.title: column.digits for column in columns}
    return Sheet(table.caption, heads, digits, rows, _notes(estimates, theirs))


def _task_columns(estimates: pd.DataFrame) -> list[Column]:
    tasks = dict.fromkeys(estimates[estimates["text"] == ""]["metric"])
    return [Column(TASK_TITLES.get(name, name), name, scale=100) for name in tasks if not name.startswith("mean")]


def _cells(found: pd.DataFrame, columns: Sequence[Column]) -> dict[str, Cell]:
    cells = {}
    for column in columns:
        for _, each in found[found["metric"] == column.metric].iterrows():
            numbers = [column.scale * each[name] for name in ("value", "low", "high")]
            cells[column.title] = Cell(*numbers, bool(each["best"]), bool(each["tied"]))
    return cells


def read_published(path: Path) -> pd.DataFrame:
    """Published values: columns model, ratio, method, text, metric, value, source, note; none where there is no file.

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


def _published_cells(found: pd.DataFrame, metrics: Mapping[str, str | None]) -> dict[str, Cell]:
    """By column's title, the published value of its metric, where there is one."""
    values = found.set_index("metric")["value"]
    return {title: Cell(values[metric]) for title, metric in metrics.items() if metric in values}


def _notes(estimates: pd.DataFrame, theirs: pd.DataFrame) -> list[str]:
    return [f"{note(estimates)} {BEST}", *_published_notes(theirs)]


def _published_notes(theirs: pd.DataFrame) -> list[str]:
    """Where published values are from, and what is wrong with them."""
    said = theirs[theirs["note"] != ""].drop_duplicates("note")
    errata = [f"{each.method}, {each.metric}: {each.note}." for each in said.itertuples()]
    return [" ".join([f"Published: {'; '.join(dict.fromkeys(theirs['source']))}.", *errata])] if len(theirs) else []


def further_sheet(sources: Sequence[Path], published: Path) -> Sheet:
    """Table 3: the tasks' accuracy of several dense models and of what was made of them.

    Args:
        sources: the metrics.csv of several experiments, each in a folder of the experiment's name.
        published: not read: the published table contradicts itself, see results/published/README.md.

    Raises:
        UserError: the experiments have other tasks, or other results for the dense model of one name.
    """
    found = [headline(read_metrics(path)) for path in sources]
    if len(asked := {tuple(sorted(each["task"].unique())) for each in found}) > 1 or not any(asked):
        raise UserError(f"{', '.join(map(str, sources))}: expected accuracy of the same tasks in each.")
    folders = [path.parent.name for path in sources]
    names = folders if len(set(folders)) == len(sources) else [str(path) for path in sources]
    rows = _each_once([each.assign(experiment=name) for each, name in zip(found, names, strict=True)])
    # Names tell models apart within an experiment. Across experiments they do not: each is estimated by itself.
    parts = []
    for name, metrics in rows.groupby("experiment", sort=False):
        parts.append(pd.concat([statistics.estimates(metrics), mean_accuracy(metrics)]).assign(experiment=name))
    both = pd.concat(parts)
    both = both.assign(metric=both["task"], best=False, tied=False)
    by = [*MODEL, "experiment"]
    models = both[[*by, "seeds"]].drop_duplicates(by)
    alike = models[models.duplicated(MODEL, keep=False)]
    if (alike["stage"] == "dense").any():
        raise UserError(
            f"{', '.join(map(str, sources))}: the dense model {alike['model'].iloc[0]} has other results in each: it "
            "was evaluated in two ways, such as on other documents, or there are two of that name."
        )
    ways, tasks = varying(both), list(dict.fromkeys(rows["task"]))
    columns = [*(Column(TASK_TITLES.get(name, name), name, scale=100) for name in tasks), MEANS[0]]
    sheet_rows = []
    for setting, found in both.groupby(by, sort=False):
        model = dict(zip(by, setting, strict=True))
        heads = [model["model"], *([model["experiment"]] if len(alike) else []), f"{100 * model['ratio']:.4g}"]
        sheet_rows.append(Row([*heads, model["method"], *(model[way] for way in ways)], _cells(found, columns)))
    heads = ["Model", *(["Experiment"] if len(alike) else []), "Removed (%)", "Method", *map(str.capitalize, ways)]
    digits = {each.title: each.digits for each in columns}
    return Sheet("Zero-shot accuracy (%) of further models.", heads, digits, sheet_rows, [note(models)])


def _each_once(experiments: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows of several experiments, without the models that another one has too: the same artifacts, or more seeds."""
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
    timings = read_timings(sources)
    rows = []
    theirs = read_published(published)
    theirs = theirs[theirs["ratio"].isin(timings["ratio"])]
    for ratio in dict.fromkeys(timings["ratio"]):
        removed = f"{100 * ratio:.4g}"
        for _, found in timings[timings["ratio"] == ratio].groupby("key", sort=False):
            model, values = found.iloc[0], found.set_index(["task", "metric"])["value"]
            cells = {name: Cell(scale * values[task, metric]) for name, (task, metric, _, scale, _) in TIMINGS.items()}
            rows.append(Row([removed, model["method"]], cells))
        for name, found in theirs[theirs["ratio"] == ratio].groupby("model", sort=False):
            cells = _published_cells(found, {title: metric for title, (_, _, metric, _, _) in TIMINGS.items()})
            rows.append(Row([removed, f"{name}, published"], cells, published=True))
    heads = ["Removed (%)", "Method"]
    caption = "Prefill of 256 tokens, and decoding."
    digits = {title: digits for title, (*_, digits) in TIMINGS.items()}
    return Sheet(caption, heads, digits, rows, [_machine(timings), *_published_notes(theirs)])


def read_timings(sources: Sequence[Path]) -> pd.DataFrame:
    """The csv of `hfprune efficiency`.

    Raises:
        UserError: it is not one.
    """
    return _read(sources, ["key", *MODEL, "task", "metric", "value", "n", "device", "threads", "versions", "dtype"])


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
    for each in costs.itertuples():
        named = each.criterion if each.light_cut == "none" else f"{each.criterion}, after scoring by {each.light_cut}"
        values = {"Seconds": each.seconds, relative: each.seconds / first, "Tokens/s": each.tokens / each.seconds}
        values |= {"TFLOP": each.flops / 1e12, "Peak memory (GB)": each.peak_bytes / 1e9}
        rows.append(Row([named], {title: Cell(value) for title, value in values.items()}))
    for (model, method), found in theirs.groupby(["model", "method"], sort=False):
        cells = _published_cells(found, {"Seconds": "seconds", "Peak memory (GB)": "peak_gigabytes"})
        rows.append(Row([f"{method}, {model}, published"], cells, published=True))
    digits = {"Seconds": 1, relative: 2, "Tokens/s": 0, "TFLOP": 1, "Peak memory (GB)": 2}
    caption = f"Scoring {costs['tokens'].iloc[0]:,} tokens by each criterion alone."
    return Sheet(caption, ["Criterion"], digits, rows, [_machine(costs), *_published_notes(theirs)])


OF_FILES = {"table3": further_sheet, "table4": timing_sheet, "table5": scoring_sheet}


def _read(sources: Sequence[Path], columns: Sequence[str]) -> pd.DataFrame:
    if len(sources) != 1:
        raise UserError(f"one csv file is expected, not {len(sources)}: {', '.join(map(str, sources))}.")
    try:
        return pd.read_csv(sources[0])[list(columns)].fillna({way: "none" for way in MODEL if way in columns})
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{sources[0]}: not a csv with the columns {', '.join(columns)}: {error}") from None


def _machine(timings: pd.DataFrame) -> str:
    one = timings.iloc[0]
    rounds = f"Medians over {one['n']} rounds, taken in turn."
    return f"{rounds} {one['device']}, {one['threads']} threads, {one['dtype']}, {one['versions']}."

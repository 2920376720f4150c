"""The paper's tables for whatever model an experiment names, the published rows below its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hfprune.comparison import LOWER_IS_BETTER, MEASURE, Comparison, indistinguishable_from_best
from hfprune.errors import UserError
from hfprune.statistics import MODEL, WITHIN, mean_accuracy, over_seeds, varying
from hfprune.tables import TASK_TITLES, headline
from hfprune.typeset import NOT_WORSE, Cell, Row, Sheet

INTERVAL = (
    "± is half of the 95 % bootstrap interval, over documents and, where there are several, calibration seeds; "
    f"the csv has both ends. Bold: the best of its size; {NOT_WORSE}: not distinguishable from it (5 %, Holm)."
)


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
    for (_, _, metric, ratio), rows in found.groupby([*MEASURE, "ratio"]):
        if ratio and len(rows) > 1:
            best = rows["value"].idxmin() if metric in LOWER_IS_BETTER else rows["value"].idxmax()
            found.loc[rows.index, "tied"] = indistinguishable_from_best(rows, differences)
            found.loc[best, ["best", "tied"]] = True, False
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
            method = "dense" if model["criterion"] == "none" else model["criterion"]
            rows.append(Row([*where, method, *(model[way] for way in ways)], _cells(found, columns)))
        there = theirs[(theirs["ratio"] == ratio) & (theirs["text"] == text)]
        for (model, method), found in there.groupby(["model", "method"], sort=False):
            known = [*where, f"{method}, {model}, published"]
            rows.append(Row([*known, *[""] * len(ways)], _published_cells(found, columns), published=True))
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


def _published_cells(found: pd.DataFrame, columns: Sequence[Column]) -> dict[str, Cell]:
    values = found.set_index("metric")["value"]
    return {column.title: Cell(values[column.metric]) for column in columns if column.metric in values}


def _notes(estimates: pd.DataFrame, theirs: pd.DataFrame) -> list[str]:
    notes = [INTERVAL, f"Calibration seeds: {estimates['seeds'].max()}."]
    if len(theirs):
        said = theirs[theirs["note"] != ""].drop_duplicates("note")
        errata = [f"{each.method}, {each.metric}: {each.note}." for each in said.itertuples()]
        notes.append(" ".join([f"Published: {'; '.join(dict.fromkeys(theirs['source']))}.", *errata]))
    return notes


def further_sheet(metrics: pd.DataFrame) -> Sheet:
    """Table 3: the tasks' accuracy of several dense models and of what was made of them.

    Args:
        metrics: rows of the metrics.csv of several experiments. The published table is not shown, see
            results/published/README.md.
    """
    tasks = over_seeds(headline(metrics))
    both = pd.concat([tasks, mean_accuracy(tasks).assign(task="mean")])
    ways = varying(both)
    names = list(dict.fromkeys(tasks["task"]))
    columns = [*(Column(TASK_TITLES.get(name, name), name, scale=100) for name in names), MEANS[0]]
    both = both.assign(
        metric=both["task"], low=both["value"] - WITHIN * both["stderr"], high=both["value"] + WITHIN * both["stderr"]
    ).assign(best=False, tied=False)
    rows = []
    for setting, found in both.groupby(MODEL, sort=False):
        model = dict(zip(MODEL, setting, strict=True))
        method = "dense" if model["criterion"] == "none" else model["criterion"]
        heads = [model["model"], f"{100 * model['ratio']:.4g}", method, *(model[way] for way in ways)]
        rows.append(Row(heads, _cells(found, columns)))
    heads = ["Model", "Removed (%)", "Method", *map(str.capitalize, ways)]
    note = f"± is {WITHIN} standard errors, over documents and calibration seeds."
    return Sheet("Zero-shot accuracy (%) of further models.", heads, {each.title: 1 for each in columns}, rows, [note])


def timing_sheet(timings: pd.DataFrame, published: Path) -> Sheet:
    """Table 4: prefill and decoding of the dense model and of pruned ones, on the machine that they were timed on."""
    raise NotImplementedError


def scoring_sheet(costs: pd.DataFrame, published: Path) -> Sheet:
    """Table 5: seconds and memory of scoring, a criterion alone."""
    raise NotImplementedError

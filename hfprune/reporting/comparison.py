"""Which differences between models are more than chance: intervals, paired differences and tests.

Two models are compared on the same documents and the same calibration seeds: what varies is their difference on each
document, and at each seed. `statistics.Spread` turns these variances into an interval, and into the p-value of the t
test that agrees with it. If answers are right or wrong and there is one seed, the test is McNemar's exact
one. Tasks are fixed: a mean is one over these tasks.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from hfprune.errors import UserError
from hfprune.reporting.statistics import LEVEL, MEASURE, MODEL, Spread, estimates, mean_accuracy

PAIRS_AT_ONCE = 1000
LOWER_IS_BETTER = ("perplexity", "kl", "js")
NO_SEED = -1
CROWS = "crows_pairs"  # tasks whose metric is no accuracy: a second mean excludes them


@dataclass(frozen=True)
class Measure:
    """One measure of all models on one task or text, or the mean over tasks.

    Attributes:
        group, task, metric: as in metrics.csv; `mean` or `mean_without_crows` for a task.
        documents: for each task, (models, seeds, documents) values; for a perplexity, losses.
        binary: whether its values are right or wrong answers.
    """

    group: str
    task: str
    metric: str
    documents: list[np.ndarray]
    binary: bool = False

    @property
    def scaled(self) -> list[np.ndarray]:
        """`documents` on the scale of the measure: their means are its values.

        A perplexity is exp of the mean loss; its documents' values are on the tangent there (delta method).
        """
        if self.metric != "perplexity":
            return self.documents
        (losses,) = self.documents
        means = losses.mean(2, keepdims=True)
        return [np.exp(means) * (1 + losses - means)]

    def compare(self, one: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
        """Models (pairs,) against models (pairs,).

        Returns:
            (pairs,) each: `value`, `other_value`, `difference`, `low` and `high` of its interval, and `p` of the t
            test; that of a perplexity is of its loss.
        """
        value = np.mean([values.mean((1, 2)) for values in self.scaled], 0)
        difference, spread = _difference(self.scaled, one, other)
        low, high = difference - spread.half(), difference + spread.half()
        if self.group == "task":
            low, high = np.maximum(low, -1), np.minimum(high, 1)
        columns = {"value": value[one], "other_value": value[other], "difference": value[one] - value[other]}
        if self.metric == "perplexity":
            difference, spread = _difference(self.documents, one, other)
        return columns | {"low": low, "high": high, "p": spread.p(difference)}

    def mcnemar(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """(pairs,) p-values of McNemar's exact test; NaN if answers are not right or wrong.

        With several seeds a document counts once, for the model that is right with more of them.
        """
        if not self.binary:
            return np.full(len(one), np.nan)
        right = self.documents[0].mean(1)
        difference = right[one] - right[other]
        better, worse = (difference > 0).sum(1), (difference < 0).sum(1)
        # The binomial distribution with p = 1/2 is symmetric, so this is the two-sided exact test (binomtest).
        return np.minimum(1, 2 * stats.binom.cdf(np.minimum(better, worse), better + worse, 0.5))


def _difference(documents: list[np.ndarray], one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, Spread]:
    """(pairs,) differences of the means over tasks, seeds and documents, and their spread.

    The spread over documents is that of each document's mean over the seeds, since both models answered the same
    document at the same seed.
    """
    by_seed = np.mean([values.mean(2) for values in documents], 0)
    by_seed = by_seed[one] - by_seed[other]
    variances = [_variance_of_mean(values.mean(1)[one] - values.mean(1)[other]) for values in documents]
    n = np.array([values.shape[2] for values in documents])
    return by_seed.mean(1), Spread.of(by_seed, np.stack(variances, -1), n)


def _variance_of_mean(values: np.ndarray) -> np.ndarray:
    """(...) of the mean over the last axis; NaN if there is only one value."""
    n = values.shape[-1]
    return values.var(-1, ddof=1) / n if n > 1 else np.full(values.shape[:-1], np.nan)


class Comparison:
    """All models of an experiment on the same documents.

    Attributes:
        models: the settings, columns of `MODEL`; the dense model first.
        seeds: the calibration seeds.
        unseeded: (models,) whether a model has no seed; its documents then count for every seed.
        measures: every task's and every held-out text's.
        means: over tasks; without CrowS-Pairs too where that is one of them.
    """

    def __init__(self, documents: pd.DataFrame) -> None:
        """
        Args:
            documents: see `samples.read_samples`.

        Raises:
            UserError: models were not measured on the same documents and seeds.
        """
        self.seeds = sorted(documents["seed"].dropna().unique())
        self.models = documents[MODEL].drop_duplicates()
        self.models = self.models.sort_values("stage", key=lambda stage: stage != "dense", kind="stable")
        self.models = self.models.reset_index(drop=True)
        numbers = pd.MultiIndex.from_frame(self.models).get_indexer(pd.MultiIndex.from_frame(documents[MODEL]))
        self.unseeded = np.isin(self.models.index, numbers[documents["seed"].isna()])
        documents = documents[[*MEASURE, "seed", "document", "value"]].assign(model=numbers)
        documents["seed"] = documents["seed"].fillna(NO_SEED)
        self.measures: list[Measure] = []
        for (group, task, metric), rows in documents.groupby(MEASURE, sort=False):
            values = _arranged(rows, f"{metric} on {task}", len(self.models), self.seeds)
            binary = group == "task" and bool(np.isin(values, (0, 1)).all())
            self.measures.append(Measure(group, task, "perplexity" if metric == "loss" else metric, [values], binary))
        self.means: dict[str, list[Measure]] = {}
        if tasks := [measure for measure in self.measures if measure.group == "task"]:
            self.means["mean"] = tasks
            others = [measure for measure in tasks if not measure.task.startswith(CROWS)]
            if 0 < len(others) < len(tasks):
                self.means["mean_without_crows"] = others

    def intervals(self) -> pd.DataFrame:
        """Each model's estimates, with their 95 % intervals, as from metrics.csv.

        Returns:
            Columns as of `statistics.estimates`; `mean` and `mean_without_crows` are tasks too.
        """
        parts = [
            mean_accuracy(pd.concat(map(self._rows, measures))).assign(task=name)
            for name, measures in self.means.items()
        ]
        return pd.concat([*parts, *(estimates(self._rows(measure)) for measure in self.measures)], ignore_index=True)

    def _rows(self, measure: Measure) -> pd.DataFrame:
        """A measure of one task or text as rows of metrics.csv."""
        (documents,) = measure.scaled
        has_row = ~self.unseeded[:, None] | (np.arange(documents.shape[1]) == 0)
        model, place = np.nonzero(has_row)
        seed = np.where(self.unseeded[model], np.nan, np.array([*self.seeds, np.nan])[place])
        stderr = np.sqrt(_variance_of_mean(documents))
        columns = {"value": documents.mean(2)[has_row], "stderr": stderr[has_row], "n": documents.shape[2]}
        return self.models.iloc[model].assign(
            **{name: getattr(measure, name) for name in MEASURE}, seed=seed, **columns
        )

    def differences(self) -> pd.DataFrame:
        """Every pair of models of one ratio, every model against the dense one and against the dense one trained alike.

        Returns:
            Columns of `MODEL`, of the other model (`other_criterion`, ...), group, task, metric, n (documents), seeds,
            value, other_value; difference, its 95 % interval low, high; test (mcnemar or t), p, p_mcnemar (NaN where
            answers are not right or wrong), p_holm: p after Holm's correction over all pairs on that task and metric;
            distinguishable: p_holm below 0.05.
        """
        one, other = self._pairs()
        here = self.models.iloc[one].reset_index(drop=True)
        there = self.models.iloc[other].drop(columns="model").add_prefix("other_").reset_index(drop=True)
        seeds = max(1, len(self.seeds))
        means = [
            Measure("task", name, "accuracy", [measure.documents[0] for measure in measures])
            for name, measures in self.means.items()
        ]
        lots = np.split(np.arange(len(one)), range(PAIRS_AT_ONCE, len(one), PAIRS_AT_ONCE))
        parts = []
        for measure in (*means, *self.measures):
            compared = pd.concat(
                [pd.DataFrame(measure.compare(one[lot], other[lot])) for lot in lots], ignore_index=True
            )
            t, exact = compared.pop("p").to_numpy(), measure.mcnemar(one, other)
            test = "mcnemar" if measure.binary and seeds == 1 else "t"
            p = exact if test == "mcnemar" else t
            columns = {name: getattr(measure, name) for name in MEASURE}
            columns |= {"n": sum(values.shape[2] for values in measure.documents), "seeds": seeds}
            columns |= dict(compared) | {"test": test, "p": p, "p_mcnemar": exact, "p_holm": holm(p)}
            parts.append(pd.concat([here, there], axis=1).assign(**columns))
        table = pd.concat(parts, ignore_index=True)
        return table.assign(distinguishable=table["p_holm"] < 1 - LEVEL)

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the models to compare, the later and the earlier of each pair."""
        later, earlier = np.tril_indices(len(self.models), -1)
        one, other = self.models.iloc[later].reset_index(), self.models.iloc[earlier].reset_index()
        control = (other["criterion"] == "none") & (other["recovery"] == one["recovery"])
        chosen = (one["ratio"] == other["ratio"]) | (other["stage"] == "dense") | control
        # A control that stands after the models that it is the control of.
        behind = (one["criterion"] == "none") & (other["recovery"] == one["recovery"]) & ~chosen
        chosen = ((chosen | behind) & (one["model"] == other["model"])).to_numpy()
        return np.where(behind, earlier, later)[chosen], np.where(behind, later, earlier)[chosen]


def _arranged(rows: pd.DataFrame, what: str, models: int, seeds: list) -> np.ndarray:
    """(models, seeds, documents) values; a model without a seed has the same for each."""
    if rows.duplicated(["model", "seed", "document"]).any():
        raise UserError(f"{what}: a model's value is given twice. Give each model's artifacts once, from one config.")
    table = rows.pivot(index=["model", "seed"], columns="document", values="value")
    wanted = {
        model: [(model, NO_SEED)] * max(1, len(seeds))
        if (model, NO_SEED) in table.index
        else [(model, seed) for seed in seeds]
        for model in range(models)
    }
    index = [row for seeds_of_model in wanted.values() for row in seeds_of_model]
    if table.isna().any(axis=None) or not set(index) == set(table.index):
        raise UserError(
            f"{what}: not every model was measured on the same documents, and with the same calibration seeds. Give "
            "artifacts of one experiment."
        )
    return table.loc[index].to_numpy().reshape(models, -1, table.shape[1])


def holm(p: np.ndarray) -> np.ndarray:
    """p-values after Holm's correction for so many of them; those that are NaN do not count."""
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted


def best_of(rows: pd.DataFrame) -> Hashable:
    """The index of the best of some rows of `Comparison.intervals`, of one metric."""
    metric = rows["metric"].iloc[0]
    # Any change of entropy is bad, up or down.
    cost = rows["value"].abs() if metric == "entropy_change" else rows["value"]
    return (cost if metric in (*LOWER_IS_BETTER, "entropy_change") else -cost).idxmin()


def with_best(estimates: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """Estimates, and which cut models of one size are the best.

    Args:
        estimates: rows of `Comparison.intervals`.
        differences: `Comparison.differences` of the same experiment.

    Returns:
        `estimates` with the columns `best`: the best of its measure and ratio, of several; `tied`: not distinguishable
        from it.
    """
    marked = estimates.assign(best=False, tied=False)
    for (*_, ratio), rows in marked.groupby([*MEASURE, "ratio"]):
        if ratio and len(rows) > 1:
            marked.loc[rows.index, "tied"] = indistinguishable_from_best(rows, differences)
            marked.loc[best_of(rows), ["best", "tied"]] = True, False
    return marked


def indistinguishable_from_best(rows: pd.DataFrame, differences: pd.DataFrame) -> pd.Series:
    """Which models are not distinguishable from the best of them; the best is one of these.

    The p-values of the best's comparisons with the others are corrected by Holm for their number. That the best was
    chosen by the same data is not corrected for.

    Args:
        rows: of `Comparison.intervals`, of one task and metric, of models of one ratio.
        differences: `Comparison.differences` of the same experiment.

    Returns:
        bool, with the index of `rows`.

    Raises:
        ValueError: two of the models were not compared.
    """
    (measure,) = set(map(tuple, rows[MEASURE].to_numpy()))
    pairs = differences[(differences[MEASURE] == list(measure)).all(axis=1)]
    others = ["model", *(f"other_{name}" for name in MODEL[1:])]
    p = dict(zip(_settings(pairs, MODEL, others), pairs["p"], strict=True))
    settings = list(rows[MODEL].itertuples(index=False, name=None))
    best = settings[rows.index.get_loc(best_of(rows))]
    rest = [setting for setting in settings if setting != best]
    known = [p.get((best, setting), p.get((setting, best))) for setting in rest]
    if None in known:
        raise ValueError(f"{measure}: {best} and {rest[known.index(None)]} were not compared")
    distinguishable = {
        setting for setting, value in zip(rest, holm(np.array(known, float)), strict=True) if value < 1 - LEVEL
    }
    return pd.Series([setting not in distinguishable for setting in settings], rows.index)


def _settings(table: pd.DataFrame, *columns: list[str]) -> Iterator[tuple[tuple, ...]]:
    """A row's models, each by the values of its columns."""
    return zip(*(table[names].itertuples(index=False, name=None) for names in columns), strict=True)

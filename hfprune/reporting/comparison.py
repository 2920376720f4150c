"""Which differences between models are more than chance: intervals, paired differences and their tests.

What is resampled. Documents: a task's, or a held-out text's, are drawn with replacement, the same draw for every model
and seed, each task by itself. Calibration seeds: they too are drawn with replacement, the same draw for every method
and task; a model that has no seed (the dense one) stays as it is. So a replicate is what a further sample of documents
and of seeds might have given, with all models seen on the same ones; an interval holds the middle 95 % of `RESAMPLES`
replicates. Tasks are not resampled: a mean is one over these tasks.

What is tested. McNemar's exact test for answers that are right or wrong, where there is one seed. Else a paired t test,
whose variance is that over documents (of a mean over tasks: each task's share of it) plus that over seeds, with Welch
and Satterthwaite's degrees of freedom.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from hfprune.errors import UserError
from hfprune.reporting.statistics import MODEL

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
PAIRS_AT_ONCE = 1000
LOWER_IS_BETTER = ("perplexity", "kl", "js")
NO_SEED = -1
CROWS = "crows_pairs"  # tasks whose metric is no accuracy: also left out of a second mean
MEASURE = ["group", "task", "metric"]


@dataclass(frozen=True)
class Measure:
    """One measure of all models on one task or text, or the mean over tasks.

    Attributes:
        group, task, metric: as in metrics.csv; `mean` or `mean_without_crows` for a task.
        documents: for each task, (models, documents) means over seeds.
        by_seed: (models, seeds) means over documents, before `value`.
        replicates: (models, RESAMPLES) of `value`.
        value: (models,) the estimates.
        binary: its documents are right or wrong.
    """

    group: str
    task: str
    metric: str
    documents: list[np.ndarray]
    by_seed: np.ndarray
    replicates: np.ndarray
    value: np.ndarray
    binary: bool = False

    @property
    def n(self) -> int:
        """The number of documents."""
        return sum(each.shape[1] for each in self.documents)

    def welch(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """(pairs,) p-values of the t test between models (pairs,) and (pairs,); of a perplexity: of its loss."""
        tasks, seeds = len(self.documents), self.by_seed.shape[1]
        by_seed = self.by_seed[one] - self.by_seed[other]
        parts = [((each[one] - each[other]), each.shape[1]) for each in self.documents]
        variances = [(values.var(1, ddof=1) / n / tasks**2, n - 1) for values, n in parts if n > 1]
        if len(variances) < tasks:  # one document says nothing of its error
            return np.full(len(one), np.nan)
        if seeds > 1:
            variances.append((by_seed.var(1, ddof=1) / seeds, seeds - 1))
        total = np.sum([variance for variance, _ in variances], 0)
        difference = by_seed.mean(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            freedom = total**2 / np.sum([variance**2 / free for variance, free in variances], 0)
            p = 2 * stats.t.sf(np.abs(difference) / np.sqrt(total), freedom)
        return np.where(total > 0, p, np.where(difference == 0, 1.0, 0.0))

    def mcnemar(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """(pairs,) p-values of McNemar's exact test; NaN where answers are not right or wrong.

        Of several seeds a document counts once, for the model that is right about it with more of them.
        """
        if not self.binary:
            return np.full(len(one), np.nan)
        difference = self.documents[0][one] - self.documents[0][other]
        better, worse = (difference > 0).sum(1), (difference < 0).sum(1)
        # The binomial distribution with p = 1/2 is symmetric, so this is the two-sided exact test (binomtest).
        return np.minimum(1, 2 * stats.binom.cdf(np.minimum(better, worse), better + worse, 0.5))


class Comparison:
    """All models of an experiment on the same documents.

    Attributes:
        models: the settings, columns of `MODEL`; the dense model first.
        seeds: how many calibration seeds they have.
        measures: every task's, the means over tasks, and every held-out text's.
    """

    def __init__(self, documents: pd.DataFrame) -> None:
        """
        Args:
            documents: see `documents.read_documents`.

        Raises:
            UserError: models were not measured on the same documents and seeds.
        """
        seeds = sorted(documents["seed"].dropna().unique())
        self.seeds = max(1, len(seeds))
        self.models = documents[MODEL].drop_duplicates()
        self.models = self.models.sort_values("stage", key=lambda stage: stage != "dense", kind="stable")
        self.models = self.models.reset_index(drop=True)
        self.measures: list[Measure] = []
        numbers = pd.MultiIndex.from_frame(self.models).get_indexer(pd.MultiIndex.from_frame(documents[MODEL]))
        documents = documents[[*MEASURE, "seed", "document", "value"]].assign(model=numbers)
        documents["seed"] = documents["seed"].fillna(NO_SEED)
        share = np.random.default_rng(SEED).multinomial(self.seeds, [1 / self.seeds] * self.seeds, RESAMPLES)
        drawn_seeds = share / self.seeds
        for (_, task), found in documents.groupby([documents["group"] == "task", "task"], sort=False):
            drawn = None  # one draw for all measures on a text
            for (group, metric), rows in found.groupby(["group", "metric"], sort=False):
                values = _arranged(rows, f"{metric} on {task}", len(self.models), seeds)
                count = values.shape[2]
                if drawn is None:
                    draws = np.random.default_rng([SEED, *str(task).encode()])
                    drawn = draws.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
                by_seed = values.mean(2)
                replicates = (values.reshape(-1, count) @ drawn.T).reshape(*by_seed.shape, RESAMPLES)
                perplexity = metric == "loss"
                if perplexity:
                    replicates = np.exp(replicates)
                self.measures.append(
                    Measure(
                        group,
                        task,
                        "perplexity" if perplexity else metric,
                        documents=[values.mean(1)],
                        by_seed=by_seed,
                        replicates=np.einsum("msb,bs->mb", replicates, drawn_seeds),
                        value=(np.exp(by_seed) if perplexity else by_seed).mean(1),
                        binary=group == "task" and bool(np.isin(values, (0, 1)).all()),
                    )
                )
        self.measures = [*self._means(), *self.measures]

    def _means(self) -> Iterator[Measure]:
        """The mean over tasks, and that without CrowS-Pairs where that is one of them."""
        tasks = [each for each in self.measures if each.group == "task"]
        others = [each for each in tasks if not each.task.startswith(CROWS)]
        for name, chosen in {"mean": tasks, "mean_without_crows": others if len(others) < len(tasks) else []}.items():
            if chosen:
                yield Measure(
                    "task",
                    name,
                    "accuracy",
                    documents=[each.documents[0] for each in chosen],
                    by_seed=np.mean([each.by_seed for each in chosen], 0),
                    replicates=np.mean([each.replicates for each in chosen], 0),
                    value=np.mean([each.value for each in chosen], 0),
                )

    def intervals(self) -> pd.DataFrame:
        """Each model's estimates, with their 95 % bootstrap intervals.

        Returns:
            Columns of `MODEL`, group, task, metric, value, low, high, n (documents), seeds.
        """
        parts = []
        for each in self.measures:
            low, high = _interval(each.replicates)
            estimate = {"value": each.value, "low": low, "high": high, "n": each.n, "seeds": self.seeds}
            parts.append(self.models.assign(**{name: getattr(each, name) for name in MEASURE}, **estimate))
        return pd.concat(parts, ignore_index=True)

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
        parts = []
        for each in self.measures:
            exact = each.mcnemar(one, other)
            test = "mcnemar" if each.binary and self.seeds == 1 else "t"
            p = exact if test == "mcnemar" else each.welch(one, other)
            chunks = [slice(first, first + PAIRS_AT_ONCE) for first in range(0, len(one), PAIRS_AT_ONCE)]
            bounds = [_interval(each.replicates[one[chunk]] - each.replicates[other[chunk]]) for chunk in chunks]
            low, high = np.concatenate(bounds, 1) if bounds else np.empty((2, 0))
            found = {
                **{name: getattr(each, name) for name in MEASURE},
                "n": each.n,
                "seeds": self.seeds,
                "value": each.value[one],
                "other_value": each.value[other],
                "difference": each.value[one] - each.value[other],
                "low": low,
                "high": high,
                "test": test,
                "p": p,
                "p_mcnemar": exact,
                "p_holm": holm(p),
            }
            parts.append(pd.concat([here, there], axis=1).assign(**found))
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
    index = [row for found in wanted.values() for row in found]
    if table.isna().any(axis=None) or not set(index) == set(table.index):
        raise UserError(
            f"{what}: not every model was measured on the same documents, and with the same calibration seeds. Give "
            "artifacts of one experiment."
        )
    return table.loc[index].to_numpy().reshape(models, -1, table.shape[1])


def _interval(replicates: np.ndarray) -> np.ndarray:
    """(2, ...) the ends of the middle 95 % of (..., RESAMPLES) replicates."""
    return np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)


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
    # How far entropy moved is the worse the farther, whichever way.
    cost = rows["value"].abs() if metric == "entropy_change" else rows["value"]
    return (cost if metric in (*LOWER_IS_BETTER, "entropy_change") else -cost).idxmin()


def indistinguishable_from_best(rows: pd.DataFrame, differences: pd.DataFrame) -> pd.Series:
    """Which of some models cannot be told from the best of them, and the best itself.

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
    found = differences[(differences[MEASURE] == list(measure)).all(axis=1)]
    others = ["model", *(f"other_{name}" for name in MODEL[1:])]
    p = dict(zip(_settings(found, MODEL, others), found["p"], strict=True))
    settings = list(rows[MODEL].itertuples(index=False, name=None))
    best = settings[rows.index.get_loc(best_of(rows))]
    rest = [setting for setting in settings if setting != best]
    known = [p.get((best, setting), p.get((setting, best))) for setting in rest]
    if None in known:
        raise ValueError(f"{measure}: {best} and {rest[known.index(None)]} were not compared")
    told = {setting for setting, value in zip(rest, holm(np.array(known, float)), strict=True) if value < 1 - LEVEL}
    return pd.Series([setting not in told for setting in settings], rows.index)


def _settings(table: pd.DataFrame, *columns: list[str]) -> Iterator[tuple[tuple, ...]]:
    """A row's models, each by the values of its columns."""
    return zip(*(table[names].itertuples(index=False, name=None) for names in columns), strict=True)

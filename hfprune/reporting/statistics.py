"""Estimates with their uncertainty: every table and figure shows the same interval.

Two things vary. *Documents*: those of a task or a text are a sample; tasks are independent of each other. *Calibration
seeds*: one seed's text served all tasks, so it moves all of them at once. So the mean over tasks is taken for each
seed first, and the variance over seeds is that of these means. The squares of both half-widths add up, each with the t
quantile of its own degrees of freedom; see docs/statistics.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from hfprune.errors import UserError

MODEL = ["model", "stage", "method", "criterion", "allocation", "refit", "structure", "ratio", "recovery", "parent"]
MEASURE = ["group", "task", "metric"]

LEVEL = 0.95
BESIDE_METHOD = ["recovery", "parent"]  # columns that a method's name does not tell
RANGES = {"kl": (0, np.inf), "js": (0, 1), "top1_agreement": (0, 1), "top15_jaccard": (0, 1), "acceptance": (0, 1)}
SMALLEST_P = 1e-100
HALVINGS = 45  # of log(SMALLEST_P): p-values to eleven digits


def varying(models: pd.DataFrame) -> list[str]:
    """Those of `BESIDE_METHOD` in which the models differ: a table or legend shows them beside the method.

    Args:
        models: rows with the columns of `MODEL`.
    """
    return [name for name in BESIDE_METHOD if models[name].nunique() > 1]


@dataclass(frozen=True)
class Spread:
    """The uncertainty of estimates. All arrays have the estimates' shape.

    Attributes:
        documents: variances over documents; NaN if there is only one document.
        documents_freedom: their degrees of freedom.
        seeds: variances, over calibration seeds, of the mean over them; 0 if there is one seed.
        seeds_freedom: their degrees of freedom.
    """

    documents: np.ndarray
    documents_freedom: np.ndarray
    seeds: np.ndarray
    seeds_freedom: int

    @classmethod
    def of(cls, by_seed: np.ndarray, variances: np.ndarray, n: np.ndarray) -> "Spread":
        """The spread of means over seeds and tasks.

        Args:
            by_seed: (..., seeds) the mean over tasks at each seed.
            variances: (..., tasks) over documents, of each task's mean.
            n: (tasks,) documents.
        """
        seeds, parts = by_seed.shape[-1], variances / variances.shape[-1] ** 2
        documents = parts.sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):  # Welch and Satterthwaite's
            freedom = np.where(documents > 0, documents**2 / (parts**2 / (n - 1)).sum(-1), 1.0)
        between = by_seed.var(-1, ddof=1) / seeds if seeds > 1 else np.zeros_like(documents)
        return cls(documents, freedom, between, max(1, seeds - 1))

    def half(self, p: float | np.ndarray = 1 - LEVEL) -> np.ndarray:
        """Half the width of the interval that misses the true value with probability `p`."""
        documents = stats.t.isf(np.divide(p, 2), self.documents_freedom) ** 2 * self.documents
        return np.sqrt(documents + stats.t.isf(np.divide(p, 2), self.seeds_freedom) ** 2 * self.seeds)

    def p(self, difference: np.ndarray) -> np.ndarray:
        """The p at which the interval of `difference` ends at 0: below 0.05 if the 95 % interval excludes 0."""
        low, high = np.full(difference.shape, np.log(SMALLEST_P)), np.zeros(difference.shape)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            wider = self.half(np.exp(middle)) > np.abs(difference)
            low, high = np.where(wider, middle, low), np.where(wider, high, middle)
        total = self.documents + self.seeds
        p = np.where(total > 0, np.exp(high), np.where(difference == 0, 1.0, 0.0))
        return np.where(np.isnan(total), np.nan, p)


def share_interval(share: np.ndarray, half: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of shares of right answers, for the effective number of documents.

    Args:
        share: from 0 to 1.
        half: `Spread.half`; if all answers are alike, from `alike_variance`.
        n: documents.

    Returns:
        Both ends, from 0 to 1.
    """
    inner = np.clip(share, 1 / (n + 2), 1 - 1 / (n + 2))
    ratio = half**2 / (inner * (1 - inner))  # t**2 over the effective number of documents
    middle = (share + ratio / 2) / (1 + ratio)
    reach = np.sqrt(ratio * (share * (1 - share) + ratio / 4)) / (1 + ratio)
    return np.clip(middle - reach, 0, 1), np.clip(middle + reach, 0, 1)


def alike_variance(share: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The variance of the mean of answers that are all alike, by Laplace's rule: their own variance is 0."""
    expected = (share * n + 1) / (n + 2)
    return expected * (1 - expected) / n


def interval(group: str, metric: str, value: float, half: float, n: float) -> tuple[float, float]:
    """Both ends of a measure's interval, within the measure's range.

    Args:
        group, metric: as in metrics.csv.
        value: the estimate.
        half: its `Spread.half`.
        n: documents.
    """
    if group == "task":
        return share_interval(value, half, n)
    if metric == "perplexity":  # exp of a mean loss
        return value * np.exp(-half / value), value * np.exp(half / value)
    least, most = RANGES.get(metric, (-np.inf, np.inf))
    return np.maximum(value - half, least), np.minimum(value + half, most)


def with_ends(title: str) -> list[str]:
    """The titles of a column of values and of both ends of their intervals."""
    return [title, f"{title} low", f"{title} high"]


def estimates(metrics: pd.DataFrame) -> pd.DataFrame:
    """The mean over calibration seeds of each model's measures, with its interval.

    Args:
        metrics: rows of metrics.csv; of group `task` those of one metric a task, see `metrics.headline`.

    Returns:
        Columns of `MODEL`, of `MEASURE`, value, low, high, n (documents), seeds.

    Raises:
        UserError: a value is given twice, or rests on other documents at another seed.
    """
    return _estimates(metrics, [*MODEL, *MEASURE], {})


def mean_accuracy(metrics: pd.DataFrame) -> pd.DataFrame:
    """The mean over tasks of each model's headline accuracy.

    Args:
        metrics: rows of `metrics.headline`.

    Returns:
        As `estimates`, task `mean`, metric `accuracy`.

    Raises:
        UserError: see `estimates`; or a model, or a seed of it, lacks a task that others have.
    """
    means = _estimates(metrics, MODEL, {"group": "task", "task": "mean", "metric": "accuracy"})
    tasks = metrics.groupby(MODEL, dropna=False, sort=False)["task"].unique()
    for setting, has in tasks.items():
        if lacking := sorted(set(metrics["task"]) - set(has)):
            raise UserError(
                f"the mean over tasks: {_words(setting)} was not evaluated on {', '.join(lacking)}, as others were. "
                "Evaluate every model on the same tasks."
            )
    return means


def _estimates(metrics: pd.DataFrame, by: list[str], about: dict[str, str]) -> pd.DataFrame:
    """`_estimate` of each group of rows, with its values of `by` and the columns `about` that all share."""
    rows = []
    for setting, values in metrics.groupby(by, dropna=False, sort=False):
        known = dict(zip(by, setting, strict=True)) | about
        rows.append(known | _estimate(values.sort_values(["seed", "task"], kind="stable"), known["group"]))
    return pd.DataFrame(rows, columns=[*MODEL, *MEASURE, "value", "low", "high", "n", "seeds"])


def _estimate(rows: pd.DataFrame, group: str) -> dict[str, float]:
    """One model's value, interval, n and seeds: of one measure, or of the mean over tasks."""
    seeds, tasks = rows["seed"].nunique(dropna=False), rows["task"].nunique()
    what = f"{', '.join(rows['task'].unique())}: {_words(rows.iloc[0][MODEL])}"
    if rows.duplicated(["seed", "task"]).any():
        raise UserError(
            f"{what}: a value is given twice for one calibration seed. Give each model once; two that were made with "
            "other settings belong in two experiments."
        )
    if len(rows) != seeds * tasks:
        raise UserError(f"{what}: not every calibration seed has every task. Evaluate all on the same tasks.")
    value, stderr, n = (rows[name].to_numpy(float).reshape(seeds, tasks) for name in ("value", "stderr", "n"))
    if not np.array_equal(n, np.broadcast_to(n[0], n.shape), equal_nan=True):
        raise UserError(f"{what}: the number of documents is not the same for every calibration seed.")
    variances = stderr**2
    if group == "task":
        variances = np.where(stderr == 0, alike_variance(value, n), variances)
    half = Spread.of(value.mean(1), variances.mean(0), n[0]).half()
    mean, count = value.mean(), n[0].sum()
    low, high = interval(group, rows["metric"].iloc[0], mean, half, count)
    return {"value": mean, "low": low, "high": high, "n": int(count), "seeds": seeds}


def _words(setting: Iterable[str | float]) -> str:
    """A model for people, by its values of `MODEL`."""
    model = dict(zip(MODEL, setting, strict=True))
    ratio = f"{100 * model['ratio']:g} %" if model["ratio"] else "none"
    after = "none" if model["parent"] == "none" else f"after {model['parent']}"
    return ", ".join(
        word for word in (model["model"], model["method"], ratio, after, model["recovery"]) if word != "none"
    )


def with_sizes(estimates: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """`estimates` with the columns `ratio_achieved` and `parameters`, means over seeds, of `metrics`."""
    models = metrics.drop_duplicates([*MODEL, "seed"])
    sizes = models.groupby(MODEL, dropna=False)[["ratio_achieved", "parameters"]].mean()
    sizes["parameters"] = sizes["parameters"].round().astype(int)
    return estimates.join(sizes, on=MODEL)


def note(models: pd.DataFrame) -> str:
    """The note below a table: what ± is, and over what it was taken.

    Args:
        models: rows with `criterion` and `seeds`, as of `estimates`.
    """
    seeds = sorted(set(models[models["criterion"] != "none"]["seeds"]))
    several = " or ".join(str(count) for count in seeds if count > 1)
    if not seeds:
        varied = "over documents"
    elif not several:
        varied = "over documents alone: one calibration seed does not show what others would give"
    elif seeds[0] > 1:
        varied = f"over documents and {several} calibration seeds"
    else:
        varied = f"over documents and {several} calibration seeds; of models with one seed, over documents alone"
    return f"± is half of the {100 * LEVEL:.0f} % interval, {varied}. The csv has both ends."

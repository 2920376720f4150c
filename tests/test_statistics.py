"""The one interval: how often it holds the truth, that it stays within what can be, that everything shows the same."""

import csv
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hfprune.errors import UserError
from hfprune.reporting import figures, paper_sheets
from hfprune.reporting.comparison import Comparison
from hfprune.reporting.metrics import COLUMNS
from hfprune.reporting.samples import VALUES
from hfprune.reporting.statistics import Spread, estimates, interval, mean_accuracy, note, share_interval
from hfprune.reporting.summary import summary

PRUNED = {
    "model": "m", "stage": "pruned", "criterion": "entropy", "allocation": "uniform", "refit": "none",
    "structure": "mlp", "ratio": 0.2, "recovery": "none", "parent": "none", "method": "HFPrune",
}  # fmt: skip
DENSE = PRUNED | {
    "stage": "dense", "criterion": "none", "allocation": "none", "structure": "none", "ratio": 0.0, "method": "dense",
}  # fmt: skip


def rows(values, setting=PRUNED, n=100, stderr=0.04, group="task", metric="acc", key="key"):
    """Rows of metrics.csv: `values` by task, one for each calibration seed, or one number without a seed."""
    about = setting | {"group": group, "metric": metric, "stderr": stderr, "n": n, "parameters": 9}
    about |= {"ratio_achieved": setting["ratio"]}
    found = [
        about | {"task": task, "seed": seed, "value": value, "key": f"{key} {seed}"}
        for task, by_seed in values.items()
        for seed, value in (enumerate(by_seed) if isinstance(by_seed, list) else [(np.nan, by_seed)])
    ]
    return pd.DataFrame(found, columns=COLUMNS)


def answers(rng, replicates, seeds, tasks, documents, seed_effect):
    """(replicates, seeds, tasks, documents) right or wrong, and the share that is right over all there might be.

    A document is right where its own difficulty, the task's, the calibration seed's effect, the same in every task, and
    chance are above 0.
    """
    ease = np.linspace(-0.5, 1, tasks)
    seed = seed_effect * rng.normal(size=(replicates, seeds, 1, 1))
    own = np.sqrt(0.9) * rng.normal(size=(replicates, 1, tasks, documents))
    chance = np.sqrt(0.1) * rng.normal(size=(replicates, seeds, tasks, documents))
    return ease[:, None] + seed + own + chance > 0, stats.norm.cdf(ease / np.sqrt(1 + seed_effect**2)).mean()


# The variance of seeds is from none to most of it; one seed does not show it.
@pytest.mark.parametrize(("seeds", "seed_effect"), [(1, 0), *product([3, 5], [0, 0.05, 0.15, 0.5])])
@pytest.mark.parametrize("tasks", [4, 10])
def test_the_interval_of_a_mean_over_tasks_holds_the_truth_as_often_as_it_says(tasks, seeds, seed_effect):
    documents, replicates = 60, 1500
    right, truth = answers(np.random.default_rng(0), replicates, seeds, tasks, documents, seed_effect)
    means = right.mean(3)
    variances = (means * (1 - means) / (documents - 1)).mean(1)
    half = Spread.of(means.mean(2), variances, np.full(tasks, documents)).half()
    low, high = share_interval(means.mean((1, 2)), half, tasks * documents)
    covered = np.mean((low <= truth) & (truth <= high))
    assert 0.93 <= covered <= 0.995
    first = {str(task): list(means[0, :, task]) for task in range(tasks)}
    stderr = np.sqrt(means[0] * (1 - means[0]) / (documents - 1)).T.ravel()
    (shown,) = mean_accuracy(rows(first, n=documents).assign(stderr=stderr)).itertuples()
    assert (shown.low, shown.high) == pytest.approx((low[0], high[0])), "what the tables show"


@pytest.mark.parametrize("ratio", [0, 0.1, 1, 10, 100])  # of the variance over seeds to that over documents
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_interval_of_numbers_holds_the_truth_as_often_as_it_says(seeds, ratio):
    rng, replicates, documents = np.random.default_rng(1), 4000, 16
    own = rng.normal(size=(replicates, documents))
    seed = np.sqrt(ratio * seeds / documents) * rng.normal(size=(replicates, seeds))
    by_seed = own.mean(1, keepdims=True) + seed
    spread = Spread.of(by_seed, own.var(1, ddof=1, keepdims=True) / documents, np.array([documents]))
    assert np.mean(np.abs(by_seed.mean(1)) <= spread.half()) >= 0.94


def test_the_interval_and_the_t_test_agree():
    rng = np.random.default_rng(0)
    by_seed = rng.normal(size=(200, 3)) + np.linspace(-3, 3, 200)[:, None]
    spread = Spread.of(by_seed, rng.gamma(1, 0.2, size=(200, 2)), np.array([9, 30]))
    difference = by_seed.mean(1)
    p = spread.p(difference)
    assert ((p < 0.05) == (np.abs(difference) > spread.half())).all()
    assert spread.half(p) == pytest.approx(np.abs(difference))
    alone = Spread.of(by_seed, np.zeros((200, 1)), np.array([9]))
    assert alone.p(difference) == pytest.approx(stats.ttest_1samp(by_seed, 0, axis=1).pvalue)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 1])
@pytest.mark.parametrize("seeds", [1, 3])
def test_bounds_of_a_share_stay_between_nothing_and_all(share, seeds):
    values = {task: [np.clip(share + 0.1 * seed, 0, 1) for seed in range(seeds)] for task in ("a", "b")}
    stderr = [np.sqrt(value * (1 - value) / 9) for by_seed in values.values() for value in by_seed]
    found = rows(values, n=10).assign(stderr=stderr)
    for shown in (*estimates(found).itertuples(), *mean_accuracy(found).itertuples()):
        assert 0 <= shown.low <= shown.value <= shown.high <= 1
        assert shown.high - shown.low > 0.05, "ten answers that are all alike do not make it certain"


def test_ten_right_answers_of_ten_have_wilsons_interval_with_the_t_quantile():
    (shown,) = estimates(rows({"a": [1.0]}, n=10, stderr=0.0)).itertuples()
    t = stats.t.ppf(0.975, 9)
    assert (shown.low, shown.high) == pytest.approx((1 / (1 + t**2 / 10), 1))


def test_other_measures_stay_within_what_they_can_be():
    assert interval("fidelity", "kl", 0.1, 0.3, 9) == pytest.approx((0, 0.4))
    assert interval("fidelity", "js", 0.9, 0.3, 9) == pytest.approx((0.6, 1))
    assert interval("fidelity", "top1_agreement", 1.0, 0.0, 9) == (1, 1), "the dense model agrees with itself"
    assert interval("fidelity", "entropy_change", -0.1, 0.3, 9) == pytest.approx((-0.4, 0.2))
    low, high = interval("perplexity", "perplexity", 20.0, 30.0, 9)
    assert low > 0 and low * high == pytest.approx(400)


def test_seeds_move_all_tasks_at_once():
    spread = [0.4, 0.5, 0.6]
    together = mean_accuracy(rows(dict.fromkeys("abcd", spread), stderr=1e-6)).iloc[0]
    single = estimates(rows({"a": spread}, stderr=1e-6)).iloc[0]
    assert together["high"] - together["low"] == pytest.approx(single["high"] - single["low"], abs=1e-3)
    opposite = {"a": spread, "b": spread[::-1]}
    assert np.ptp(mean_accuracy(rows(opposite, stderr=1e-6))[["low", "high"]]) < 1e-4, "their mean did not move"


def test_what_was_varied_is_said():
    def said(*seeds):
        models = [{"criterion": "none", "seeds": 1}, *({"criterion": "entropy", "seeds": count} for count in seeds)]
        return note(pd.DataFrame(models))

    assert said() == "± is half of the 95 % interval, over documents. The csv has both ends."
    assert "over documents and 3 calibration seeds." in said(3, 3)
    assert "over documents alone: one calibration seed does not show what others would give." in said(1)
    assert "over documents and 3 calibration seeds; of models with one seed, over documents alone." in said(1, 3)


def test_values_that_do_not_belong_together_are_not_averaged():
    found = rows({"a": [0.5, 0.6], "b": [0.5, 0.6]})
    with pytest.raises(UserError, match=r"a: m, HFPrune, 20 %.* given twice for one calibration seed"):
        estimates(pd.concat([found, found.iloc[:1]]))
    with pytest.raises(UserError, match="not every calibration seed has every task"):
        mean_accuracy(found.iloc[:3])
    with pytest.raises(UserError, match="documents is not the same for every calibration seed"):
        estimates(found.assign(n=[100, 50, 100, 100]))
    with pytest.raises(UserError, match=r"m, dense was not evaluated on b, as others were"):
        mean_accuracy(pd.concat([found, rows({"a": 0.5}, DENSE)]))


def experiment(seeds):
    """What every document says of a dense model and of two pruned ones, and the metrics.csv of the same."""
    rng = np.random.default_rng(0)
    documents, metrics = [], []
    for setting, shift in ((DENSE, 0), (PRUNED | {"ratio": 0.1}, 1), (PRUNED, 2)):
        for group, task, metric in (
            ("task", "boolq", "acc"), ("task", "piqa", "acc"), ("fidelity", "text", "kl"),
            ("fidelity", "text", "top1_agreement"), ("perplexity", "text", "loss"),
        ):  # fmt: skip
            for seed in range(seeds) if shift else [np.nan]:
                values = rng.random(30)
                if group == "task":
                    values = (values < 0.7 - 0.1 * shift + 0.05 * rng.normal()).astype(float)
                about = setting | {"seed": seed, "group": group, "task": task, "metric": metric}
                documents.append(pd.DataFrame({"document": range(30), "value": values}).assign(**about)[VALUES])
                value, stderr = values.mean(), values.std(ddof=1) / np.sqrt(30)
                if metric == "loss":
                    value, stderr = np.exp(value), np.exp(value) * stderr
                about |= {"metric": metric.replace("loss", "perplexity"), "value": value, "stderr": stderr, "n": 30}
                metrics.append(about | {"ratio_achieved": setting["ratio"], "parameters": 9, "key": f"{shift}{seed}"})
    return pd.concat(documents), pd.DataFrame(metrics, columns=COLUMNS)


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_number_has_one_interval_everywhere(seeds, tmp_path):
    documents, metrics = experiment(seeds)
    intervals = Comparison(documents).intervals()
    intervals = intervals[intervals["ratio"] == 0.2].set_index(["task", "metric"])

    def ends(task, metric, scale=1):
        return pytest.approx([scale * intervals.loc[(task, metric), end] for end in ("value", "low", "high")])

    shown = summary(metrics).set_index("ratio").loc[0.2]
    columns = {
        "BoolQ": ends("boolq", "acc", 100), "Mean": ends("mean", "accuracy", 100),
        "Perplexity": ends("text", "perplexity"), "KL (nats/token)": ends("text", "kl"),
        "Top-1 agreement": ends("text", "top1_agreement"),
    }  # fmt: skip
    for column, expected in columns.items():
        assert [shown[column], shown[f"{column} low"], shown[f"{column} high"]] == expected, column
    path = tmp_path / "metrics.csv"
    metrics.to_csv(path, index=False)
    sheets = {
        "table1": paper_sheets.model_sheet("table1", paper_sheets.estimates(documents), tmp_path / "none.csv"),
        "table3": paper_sheets.further_sheet([path], tmp_path / "none.csv"),
    }
    for name, sheet in sheets.items():
        list(sheet.write(tmp_path, name))
        with (tmp_path / f"{name}.csv").open() as file:
            row = list(csv.DictReader(file))[-1]
        for title, expected in (("BoolQ", columns["BoolQ"]), ("Mean (%)", columns["Mean"])):
            assert [float(row[f"{title}{end}"]) for end in ("", " low", " high")] == expected, name
        assert note(intervals.reset_index()) in (tmp_path / f"{name}.md").read_text()
    for drawn, axis, task, metric, scale in (
        (figures.accuracy(metrics), 0, "mean", "accuracy", 100),
        (figures.accuracy(metrics), 1, "boolq", "acc", 100),
        (figures.kl(metrics), 0, "text", "kl", 1),
    ):
        (bars,) = drawn.axes[axis].collections
        (at_20,) = (bar for bar in bars.get_segments() if np.isclose(bar[0, 0], 20))
        low, high = (scale * intervals.loc[(task, metric), end] for end in ("low", "high"))
        assert list(at_20[:, 1]) == pytest.approx([low, high])
        plt.close(drawn)
    of_one_size = metrics[metrics["ratio"] != 0.1]
    for drawn, task, metric, scale in (
        (figures.accuracy(of_one_size), "mean", "accuracy", 100),
        (figures.kl(of_one_size), "text", "kl", 1),
    ):
        labels = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
        bar = drawn.axes[0].collections[labels.index("HFPrune")].get_segments()[0]
        assert list(bar[:, 0]) == pytest.approx([scale * intervals.loc[(task, metric), end] for end in ("low", "high")])
        plt.close(drawn)

"""Intervals, paired differences and tests against independent computations."""

import json
import shutil
from itertools import product
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hfprune.errors import UserError
from hfprune.reporting import comparison
from hfprune.reporting.comparison import MEASURE, Comparison, holm, indistinguishable_from_best
from hfprune.reporting.identity import NO_NAMES, Names
from hfprune.reporting.metrics import collect
from hfprune.reporting.samples import VALUES, read_samples
from hfprune.reporting.statistics import MODEL
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.keys import Recipe

UNCUT = {"structure": "none", "allocation": "none", "ratio": 0.0}


def model(criterion, **changes):
    """A setting: the columns of `MODEL`."""
    cut = {"stage": "pruned", "criterion": criterion, "structure": "mlp", "allocation": "uniform", "ratio": 0.2}
    cut["method"] = "dense" if criterion == "none" else criterion
    return {"model": "m", "refit": "none", "recovery": "none", "parent": "none", **cut, **changes}


def rows(setting, values, seed=None, group="task", task="boolq", metric="acc"):
    """Documents of one model on one task."""
    about = setting | {"seed": seed, "group": group, "task": task, "metric": metric}
    return pd.DataFrame({"document": range(len(values)), "value": np.asarray(values, float)}).assign(**about)[VALUES]


def answers(seed, count=200, share=0.5):
    return (np.random.default_rng(seed).random(count) < share).astype(float)


def only(table, **chosen):
    """The one row with these values."""
    found = table[np.logical_and.reduce([table[name] == value for name, value in chosen.items()])]
    assert len(found) == 1, found
    return found.iloc[0]


def test_an_interval_agrees_with_scipys_bootstrap_and_with_the_normal_approximation():
    values = answers(0)
    loss = np.random.default_rng(1).gamma(4, size=60)
    dense = model("none", **UNCUT, stage="dense")
    text = {"group": "perplexity", "task": "text", "metric": "loss"}
    table = Comparison(pd.concat([rows(dense, values), rows(dense, loss, **text)])).intervals()
    found = only(table, task="boolq")
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert [found["low"], found["high"]] == pytest.approx([theirs.low, theirs.high], abs=0.01)
    normal = 1.96 * values.std() / np.sqrt(200)
    assert [found["low"], found["high"]] == pytest.approx([values.mean() - normal, values.mean() + normal], abs=0.01)
    assert (found["value"], found["n"], found["seeds"]) == (values.mean(), 200, 1)
    found = only(table, metric="perplexity")
    assert found["value"] == pytest.approx(np.exp(loss.mean()))
    theirs = stats.bootstrap((loss,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert np.log([found["low"], found["high"]]) == pytest.approx([theirs.low, theirs.high], abs=0.06)


def test_intervals_contain_the_spread_of_seeds_and_pairs_share_the_documents_and_seeds_drawn():
    text = {"group": "fidelity", "task": "text", "metric": "kl"}
    noise = np.random.default_rng(0).normal(size=400)  # of documents, the same for both models and all seeds
    shifts = {0: -1.0, 1: 0.0, 2: 1.0}  # of seeds, the same for both models
    parts = [rows(model("none", **UNCUT, stage="dense"), np.zeros(400), **text)]
    parts += [rows(model("a"), noise + shift, seed, **text) for seed, shift in shifts.items()]
    parts += [rows(model("b"), noise + shift + 0.1, seed, **text) for seed, shift in shifts.items()]
    compared = Comparison(pd.concat(parts))
    found = only(compared.intervals(), criterion="a")
    # The KL divergence is no less than 0.
    half = np.sqrt(stats.t.ppf(0.975, 2) ** 2 / 3 + stats.t.ppf(0.975, 399) ** 2 * noise.var(ddof=1) / 400)
    assert [found["low"], found["high"]] == pytest.approx([0, noise.mean() + half])
    pair = only(compared.differences(), criterion="b", other_criterion="a")
    assert [pair["difference"], pair["low"], pair["high"]] == pytest.approx([0.1] * 3)
    assert pair["p"] < 1e-6
    against_dense = only(compared.differences(), criterion="b", other_criterion="none")
    assert against_dense["high"] - against_dense["low"] > 1.5
    assert not against_dense["distinguishable"], "by three seeds so far apart"


def exact_mcnemar(better, worse):
    """The two-sided p-value by enumeration of all ways in which the discordant documents may fall."""
    n = better + worse
    ways = [comb(n, k) for k in range(n + 1)]
    return sum(each for each in ways if each <= ways[better]) / 2**n


@pytest.mark.parametrize(("better", "worse"), [(9, 1), (5, 5), (0, 4), (12, 3)])
def test_mcnemars_test_is_exact(better, worse):
    one = np.array([1] * better + [0] * worse + [1] * 10 + [0] * 7)
    other = np.array([0] * better + [1] * worse + [1] * 10 + [0] * 7)
    found = only(
        Comparison(pd.concat([rows(model("a"), other), rows(model("b"), one)])).differences(),
        task="boolq",
    )
    assert found["test"] == "mcnemar"
    assert found["p"] == found["p_mcnemar"] == pytest.approx(exact_mcnemar(better, worse))
    assert found["p"] == pytest.approx(stats.binomtest(better, better + worse).pvalue)
    assert found["difference"] == pytest.approx((better - worse) / len(one))


def test_without_seeds_numbers_are_tested_by_the_paired_t_test():
    text = {"group": "fidelity", "task": "text", "metric": "kl"}
    one, other = np.random.default_rng(0).gamma(2, size=(2, 16))
    found = Comparison(pd.concat([rows(model("a"), other, **text), rows(model("b"), one, **text)])).differences()
    found = only(found, metric="kl")
    assert found["test"] == "t"
    assert np.isnan(found["p_mcnemar"])
    assert found["p"] == pytest.approx(stats.ttest_rel(one, other).pvalue)


def test_where_seeds_differ_and_documents_do_not_the_test_is_that_of_the_seeds():
    text = {"group": "fidelity", "task": "text", "metric": "kl"}
    one, other = np.random.default_rng(0).normal(size=(2, 4))
    noise = np.random.default_rng(1).normal(size=30)
    parts = [rows(model("a"), noise + shift, seed, **text) for seed, shift in enumerate(other)]
    parts += [rows(model("b"), noise + shift, seed, **text) for seed, shift in enumerate(one)]
    found = only(Comparison(pd.concat(parts)).differences(), metric="kl")
    assert found["p"] == pytest.approx(stats.ttest_rel(one, other).pvalue)


def test_of_several_seeds_a_document_counts_once_for_mcnemar():
    parts = [rows(model("a"), [0, 0, 0, 1, 1], seed) for seed in range(3)]
    parts += [rows(model("b"), values, seed) for seed, values in enumerate(([1, 1, 0, 1, 0], [1, 0, 0, 1, 1], [1] * 5))]
    found = only(Comparison(pd.concat(parts)).differences(), task="boolq")
    assert found["test"] == "t"
    assert found["p_mcnemar"] == pytest.approx(exact_mcnemar(3, 1))


def test_models_that_answer_alike_do_not_differ():
    alike = answers(0)
    kl = {"group": "fidelity", "task": "text", "metric": "kl"}
    parts = [rows(model(name), alike, seed) for name, seed in product("ab", (0, 1))]
    parts += [rows(model(name), alike / 3, seed, **kl) for name, seed in product("ab", (0, 1))]
    for _, found in Comparison(pd.concat(parts)).differences().iterrows():
        assert found[["difference", "low", "high"]].tolist() == [0, 0, 0]
        assert found[["p", "p_holm"]].tolist() == [1, 1]
        assert not found["distinguishable"]


def test_a_mean_is_over_tasks_with_and_without_crows_pairs():
    shares = {"boolq": 0.4, "piqa": 0.6, "crows_pairs_english": 0.9}
    values = {task: answers(i, 300, share) for i, (task, share) in enumerate(shares.items())}
    other = {task: answers(i + 9, 300, share) for i, (task, share) in enumerate(shares.items())}
    parts = [rows(model("a"), each, task=task) for task, each in values.items()]
    parts += [rows(model("b"), each, task=task) for task, each in other.items()]
    compared = Comparison(pd.concat(parts))
    for name, tasks in (("mean", list(shares)), ("mean_without_crows", ["boolq", "piqa"])):
        found = only(compared.intervals(), task=name, criterion="a")
        mean = np.mean([values[task].mean() for task in tasks])
        error = np.sqrt(sum(values[task].var() / 300 for task in tasks)) / len(tasks)
        assert (found["value"], found["n"]) == (pytest.approx(mean), 300 * len(tasks))
        ends = [mean - 1.96 * error, mean + 1.96 * error]
        assert [found["low"], found["high"]] == pytest.approx(ends, abs=0.006)
        pair = only(compared.differences(), task=name)
        error = np.sqrt(sum((other[task] - values[task]).var(ddof=1) / 300 for task in tasks)) / len(tasks)
        difference = np.mean([other[task].mean() - values[task].mean() for task in tasks])
        assert pair["difference"] == pytest.approx(difference)
        assert pair["p"] == pytest.approx(2 * stats.norm.sf(abs(difference) / error), abs=0.01)
    without = Comparison(pd.concat(parts[:2])).intervals()
    assert set(without["task"]) == {"boolq", "piqa", "mean"}


@pytest.mark.parametrize("control_first", [False, True])
def test_models_of_one_ratio_are_compared_and_each_with_the_dense_one_and_its_control(control_first):
    settings = {
        "dense": model("none", **UNCUT, stage="dense"),
        "a 10": model("a", ratio=0.1),
        "b 10": model("b", ratio=0.1),
        "a 20": model("a"),
        "a 20 lora": model("a", stage="recovered", recovery="lora"),
        "dense lora": model("none", **UNCUT, stage="recovered", recovery="lora"),
    }
    parts = [rows(each, answers(i)) for i, each in enumerate(settings.values())]
    if control_first:
        parts.insert(0, parts.pop())
    table = Comparison(pd.concat(parts)).differences()
    table = table[table["task"] == "boolq"]
    names = {tuple(each[name] for name in MODEL): title for title, each in settings.items()}
    others = ["model", *(f"other_{name}" for name in MODEL[1:])]
    pairs = {(names[tuple(row[MODEL])], names[tuple(row[others])]) for _, row in table.iterrows()}
    assert pairs == {
        ("a 10", "dense"), ("b 10", "dense"), ("a 20", "dense"), ("a 20 lora", "dense"), ("dense lora", "dense"),
        ("b 10", "a 10"), ("a 20 lora", "a 20"), ("a 20 lora", "dense lora"),
    }  # fmt: skip
    assert len(table) == 8
    row = only(table, criterion="b", other_criterion="a")
    assert (
        row["value"] - row["other_value"] == row["difference"] == pytest.approx(answers(2).mean() - answers(1).mean())
    )


def test_holms_correction():
    # The example of a step-down by hand: 0.01 x 4; max(0.04, 0.02 x 3); max(0.06, 0.03 x 2); 0.9.
    assert holm(np.array([0.9, 0.01, 0.03, np.nan, 0.02])) == pytest.approx(
        [0.9, 0.04, 0.06, np.nan, 0.06], nan_ok=True
    )
    assert holm(np.array([0.5, 0.6])).tolist() == [1, 1]


def test_what_cannot_be_told_from_the_best_is_found():
    good = answers(0, 400, 0.7)
    near, far = good.copy(), good.copy()
    near[np.flatnonzero(good)[:3]] = 0
    far[np.flatnonzero(good)[:80]] = 0
    kl = {"group": "fidelity", "task": "text", "metric": "kl"}
    parts = [rows(model(name), values) for name, values in (("far", far), ("good", good), ("near", near))]
    parts += [rows(model(name), 2 - values, **kl) for name, values in (("far", far), ("good", good), ("near", near))]
    compared = Comparison(pd.concat(parts))
    intervals, differences = compared.intervals(), compared.differences()
    for _, found in intervals.groupby(MEASURE):
        told = indistinguishable_from_best(found, differences)
        assert dict(zip(found["criterion"], told, strict=True)) == {"far": False, "good": True, "near": True}
        assert told.index.equals(found.index)
    with pytest.raises(ValueError, match="were not compared"):
        indistinguishable_from_best(found, differences.iloc[:0])


def test_models_on_other_documents_or_seeds_or_given_twice_are_refused():
    for other, message in (
        (rows(model("b"), answers(0, 100), 0), "not every model was measured on the same documents"),
        (rows(model("b"), answers(0), 1), "with the same calibration seeds"),
        (rows(model("a"), answers(0), 0), "acc on boolq: a model's value is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            Comparison(pd.concat([rows(model("a"), answers(0), 0), other]))


def test_pairs_in_several_lots_are_the_same(monkeypatch):
    parts = pd.concat([rows(model(name), answers(i)) for i, name in enumerate("abcd")])
    whole = Comparison(parts).differences()
    monkeypatch.setattr(comparison, "PAIRS_AT_ONCE", 4)
    pd.testing.assert_frame_equal(Comparison(parts).differences(), whole)


class Fabricated:
    """A store with manifests of a dense and a pruned model, measured on two texts of one file, and evaluated."""

    def __init__(self, root):
        self.store = Store(root)
        self.put("model", "dense", details={"name": "m"})
        self.put("score", "score", parameters={"criterion": "a", "seed": 0})
        cut = {"allocation": "uniform", "refit": "none", "structure": "mlp", "ratio": 0.2}
        cut |= {"ratio_achieved": 0.2, "ratio_achieved_parent": 0.2}
        self.put("prune", "cut", inputs={"model": "dense", "scores": "score"}, details=cut)
        for text in ("text1", "text2"):
            self.put("text", text, details={"name": "one file"})
            self.put("reference", f"on{text}", inputs={"text": text, "model": "dense"})
        self.artifacts = []
        for place, key in enumerate(("dense", "cut")):
            for text in ("text1", "text2"):
                details = {"parameters": 9, "flops_per_token": 1, "bytes": 1}
                inputs = {"model": key, "reference": f"on{text}"}
                kl = place * (1 + (text == "text2"))
                files = {
                    "results.json": json.dumps({"kl": {"value": kl, "stderr": 0.0, "n": 2}}),
                    "samples.jsonl": "".join(json.dumps({"doc_id": i, "kl": kl, "loss": 1.0}) + "\n" for i in (0, 1)),
                }
                self.artifacts.append(self.put("measure", f"{key}{text}", inputs=inputs, details=details, files=files))

    def put(self, stage, key, files=None, **manifest):
        folder = self.store.root / stage / key
        folder.mkdir(parents=True)
        made = {"stage": stage, "key": key, "inputs": {}, "details": {}, "parameters": {}, "seconds": 1}
        made |= {"peak_memory_bytes": 1} | manifest
        for name, text in {"manifest.json": json.dumps(made), **(files or {})}.items():
            (folder / name).write_text(text)
        return Artifact(folder, made)


def test_texts_have_the_names_and_the_order_of_the_config_and_efficiency_stands_once(tmp_path):
    made = Fabricated(tmp_path)
    named = collect(made.artifacts, made.store, Names(texts={"text2": "wiki", "text1": "news"}))
    kl = named[named["metric"] == "kl"]
    assert kl[["stage", "task", "value"]].values.tolist() == [
        ["dense", "wiki", 0], ["dense", "news", 0], ["pruned", "wiki", 2], ["pruned", "news", 1]
    ]  # fmt: skip
    assert (named["group"] == "efficiency").sum() == 2 * 2
    plain = collect(made.artifacts, made.store)
    assert plain[plain["metric"] == "kl"]["task"].tolist() == ["one file text1", "one file text2"] * 2
    documents = read_samples(made.artifacts, made.store, Names(texts={"text2": "wiki", "text1": "news"}))
    assert list(documents) == VALUES
    assert list(documents["task"].unique()) == ["wiki", "news"]
    assert set(map(tuple, documents[["group", "metric"]].values)) == {("fidelity", "kl"), ("perplexity", "loss")}


def test_documents_of_tasks_come_from_their_artifacts_and_what_is_no_number_is_left_out(tmp_path):
    made = Fabricated(tmp_path)
    samples = {
        "boolq": [
            {"doc_id": 3, "acc": True, "acc_norm": 1.0, "responses": []},
            {"doc_id": 5, "acc": 0, "acc_norm": 0.0},
        ],
        "wikitext": [{"doc_id": 0, "word_perplexity": [-3.5, 7]}],
        "gsm8k": [{"doc_id": 0, "exact_match": 1.0}],
    }

    def write(folder, lines):
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    done = {
        task: made.store.make(Recipe("evaluate-task", {"task": task}), lambda folder, lines=lines: write(folder, lines))
        for task, lines in samples.items()
    }
    keys = {task: each.key for task, each in done.items()}
    evaluated = made.put("evaluate", "evaluated", inputs={"model": "cut", **keys})
    found = read_samples([*made.artifacts, evaluated], made.store, NO_NAMES)
    found = found[found["group"] == "task"]
    assert found[["criterion", "seed", "task", "metric", "document", "value"]].values.tolist() == [
        ["a", 0, "boolq", "acc_norm", 3, 1], ["a", 0, "boolq", "acc_norm", 5, 0]
    ]  # fmt: skip
    shutil.rmtree(done["boolq"].folder)
    with pytest.raises(
        UserError, match=r"documents of task boolq are no longer in the store\. Remove .*evaluated and run"
    ):
        read_samples([*made.artifacts, evaluated], made.store, NO_NAMES)

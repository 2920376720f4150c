"""The overview page by itself; test_workflow.py looks at a whole one in a browser."""

from itertools import pairwise

import pandas as pd
import pytest

from hfprune.reporting.figures import COLUMN, draw_widths
from hfprune.reporting.labels import spread
from hfprune.reporting.overview import (
    ACCURACY_CHANGE,
    KL,
    Results,
    accuracy_finding,
    kl_finding,
    overview,
    trained_finding,
)
from hfprune.reporting.statistics import MODEL
from tests.test_tables import WAYS, metrics, trained


def test_names_at_lines_do_not_meet_and_stay_near():
    assert spread([3.0, 1.0], 0.5) == [3.0, 1.0]
    assert spread([1.0, 1.1, 5.0], 0.5) == pytest.approx([0.8, 1.3, 5.0])
    places = spread([2.0, 2.0, 2.1, 1.9, 2.6], 0.3)
    ordered = sorted(places)
    assert all(above - below >= 0.3 - 1e-9 for below, above in pairwise(ordered))
    assert sum(places) == pytest.approx(10.6)
    assert spread([], 1) == []


def models(*rows: tuple) -> pd.DataFrame:
    """Rows of name, stage, ratio, KL; the method is the name's first word."""
    table = pd.DataFrame(rows, columns=["name", "stage", "ratio", KL])
    trained = table["name"].str.partition(", ")[2].replace("", "none")
    return table.assign(method=table["name"].str.partition(", ")[0], recovery=trained)


def test_a_caption_says_what_was_found():
    one = models(("dense", "dense", 0, 0), ("A", "pruned", 0.1, 0.4), ("A", "pruned", 0.2, 1.08))
    assert kl_finding(one) == (
        "The more A removes, the farther the model is from the dense one: KL 0.40 at 10% and 1.08 at 20%."
    )
    several = models(
        *one.iloc[:, :4].itertuples(index=False), ("B", "pruned", 0.2, 0.7), ("A, lora", "recovered", 0.2, 1)
    )
    assert kl_finding(several) == (
        "With 20% removed, B stays nearest to the dense model (KL 0.70), and A is farthest (1.08)."
    )
    all_trained = several[several["recovery"] != "none"]
    assert kl_finding(all_trained) == "A, lora leaves the model at a distance from the dense one: KL 1.00 at 20%."
    assert trained_finding(one) is None
    assert trained_finding(several) == "Training after the cut: lora takes A, 20% from KL 1.08 to 1.00."


def test_a_caption_claims_no_difference_that_may_be_chance():
    changes = pd.DataFrame(
        {"name": ["A, 10%", "A, 30%"], ACCURACY_CHANGE: [3.2, -5.2], "distinguishable": [False, True]}
    )
    assert accuracy_finding(changes) == (
        "Mean accuracy differs from the dense model's for A, 30% (-5.2 points). The other 1 cannot be told from it."
    )
    assert "tells none of 2 models" in accuracy_finding(changes.assign(distinguishable=False))


def test_every_figure_is_as_wide_as_a_column_or_a_page(tmp_path):
    draw_widths(
        pd.DataFrame(
            [{"model": name, "ratio": 0.1, "part": "mlp", "layer": 0, "kept": 9, "dense": 10} for name in "ab"]
        ),
        tmp_path,
    )
    assert b'width="%d' % (72 * COLUMN) in (tmp_path / "widths.svg").read_bytes()


DIFFERENCES = [*MODEL, *(f"other_{name}" for name in MODEL), "task", "metric", "difference", "low", "high", "p_holm"]


def page_of(found: pd.DataFrame, **differences: object) -> str:
    """The page of these metrics, with a paired difference of mean accuracy from the dense model where one is given."""
    config = {
        "experiment": "it <b>", "calibration": {"samples": 1, "length": 2, "text": "c"}, "evaluation": {},
        "fidelity": {"samples": 1, "length": 2, "texts": ["text"]},
    }  # fmt: skip
    widths = pd.DataFrame([{"model": "entropy", "ratio": 0.2, "part": "mlp", "layer": 0, "kept": 1, "dense": 2}])
    overlap = pd.DataFrame(columns=["tested", "tested_for", "seen", "seen_for", "documents", "overlapping", "example"])
    models = found.drop_duplicates(MODEL)
    dense, cut = (models[(models["stage"] == "dense") == is_dense].iloc[0] for is_dense in (True, False))
    row = {name: cut[name] for name in MODEL} | {f"other_{name}": dense[name] for name in MODEL}
    row |= {"task": "mean", "metric": "accuracy", "p_holm": 0.01} | differences
    table = pd.DataFrame([row] if differences else [], columns=[*DIFFERENCES, "distinguishable"])
    return overview(Results(found, config, "a: <i>", [], table, widths, overlap))


@pytest.mark.parametrize("kind", ["cut", "all trained", "without tasks"])
def test_any_experiment_has_a_page(kind):
    rows = {"cut": metrics(WAYS[0]), "all trained": pd.concat([metrics()[:4], trained("lora")])}
    found = rows.get(kind, rows["cut"])
    page = page_of(found if kind != "without tasks" else found[found["group"] != "task"])
    assert "it &lt;b&gt;: what pruning costs m" in page and "a: &lt;i&gt;" in page
    assert ("chart-kl" in page) and "<td>" in page


@pytest.mark.parametrize("holds", [True, False])
def test_accuracy_is_drawn_where_it_tells_a_model_from_the_dense_one(holds):
    low = -0.3 if holds else -0.1
    page = page_of(metrics(WAYS[0]), difference=low + 0.15, low=low, high=low + 0.3, distinguishable=holds)
    assert ('id="chart-accuracy"' in page) == holds
    assert ("Mean accuracy tells none of 1 models" in page) != holds


def test_the_control_is_named_where_there_is_one():
    found = pd.concat([metrics(WAYS[0]), trained("lora")])
    assert "is the control" not in page_of(found)
    assert "is the control" in page_of(pd.concat([found, trained("lora", "none", 0.0)]))

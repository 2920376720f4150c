"""The overview page by itself; test_workflow.py looks at a whole one in a browser."""

from itertools import pairwise

import pandas as pd
import pytest

from hfprune.reporting.figures import COLUMN, draw_widths
from hfprune.reporting.labels import spread
from hfprune.reporting.overview import Results, overview
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


def test_one_task_has_one_column_and_several_their_mean(tmp_path):
    found = metrics(WAYS[0])
    one = page_of(found)
    assert ">Mean</th>" not in one and ">BoolQ</th>" in one
    second = found[found["group"] == "task"].assign(task="piqa")
    assert ">Mean</th>" in page_of(pd.concat([found, second]))


def test_how_many_were_trained_is_said():
    found = pd.concat([metrics(WAYS[0]), trained("lora")])
    assert "1 of 3 smaller models was trained after the cut: lora." in page_of(found)

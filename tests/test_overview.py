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


@pytest.mark.parametrize("kind", ["cut", "all trained", "without tasks"])
def test_any_experiment_has_a_page(kind):
    rows = {"cut": metrics(WAYS[0]), "all trained": pd.concat([metrics()[:4], trained("lora")])}
    found = rows.get(kind, rows["cut"])
    found = found if kind != "without tasks" else found[found["group"] != "task"]
    config = {
        "experiment": "it <b>", "calibration": {"samples": 1, "length": 2, "text": "c"}, "evaluation": {},
        "fidelity": {"samples": 1, "length": 2, "texts": ["text"]},
    }  # fmt: skip
    widths = pd.DataFrame([{"model": "entropy", "ratio": 0.2, "part": "mlp", "layer": 0, "kept": 1, "dense": 2}])
    overlap = pd.DataFrame(columns=["tested", "tested_for", "seen", "seen_for", "documents", "overlapping", "example"])
    differences = pd.DataFrame(columns=[*DIFFERENCES, "distinguishable"])
    page = overview(Results(found, config, "a: <i>", [], differences, widths, overlap))
    assert "it &lt;b&gt;: what pruning costs m" in page and "a: &lt;i&gt;" in page
    assert ("chart-kl" in page) and "<td>" in page

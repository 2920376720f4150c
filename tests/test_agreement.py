"""Agreement between scores, against cases whose answer is known."""

import numpy as np
import pytest
import torch

from hfprune.models.units import save_scores
from hfprune.reporting.agreement import (
    KEPT,
    between_criteria,
    compare,
    correlation,
    correlation_in_words,
    correlation_interval,
    overlap,
)
from hfprune.reporting.figures import importance
from hfprune.store.artifacts import Artifact
from hfprune.store.filenames import SCORES


def artifact(folder, criterion, seed, *layers):
    folder.mkdir()
    save_scores(folder / SCORES, {"mlp": [torch.tensor(layer, dtype=torch.float32) for layer in layers]})
    return Artifact(folder, {"key": folder.name, "parameters": {"criterion": criterion, "seed": seed}})


def test_overlap_counts_the_shared_kept_neurons():
    one = np.arange(9.0)
    assert overlap(one, one) == 1
    assert overlap(one, one[::-1]) == pytest.approx((2 * KEPT - 1) / KEPT)
    assert overlap(np.zeros(9), np.zeros(9)) == 1  # ties are broken alike


@pytest.mark.parametrize("normal", [0.0, 0.5, 0.85])
def test_nineteen_of_twenty_intervals_hold_the_rank_correlation_that_pairs_were_drawn_from(normal):
    """Of normal pairs with correlation r it is 6 / pi asin(r / 2)."""
    random, true, count = np.random.default_rng(0), 6 / np.pi * np.arcsin(normal / 2), 24
    pairs = random.multivariate_normal([0, 0], [[1, normal], [normal, 1]], (1500, count))
    intervals = np.array([correlation_interval(correlation(*sample.T), count) for sample in pairs])
    held = (intervals[:, 0] <= true) & (true <= intervals[:, 1])
    assert held.mean() == pytest.approx(0.95, abs=0.02)


def test_ranks_that_say_too_little_have_no_interval():
    up = np.arange(5.0)
    assert correlation_in_words(up[:3], up[[0, 2, 1]]) == "0.50"
    assert correlation_in_words(up, -up) == "-1.00"
    assert correlation_in_words(up, np.ones(5)) == ""


def test_pairs_layers_and_the_mean_over_layers(tmp_path):
    up, down = [float(i) for i in range(9)], [float(-i) for i in range(9)]
    found = compare(
        [
            artifact(tmp_path / "a", "entropy", 0, up, up),
            artifact(tmp_path / "b", "entropy", 1, up, up),
            artifact(tmp_path / "c", "wanda", 0, up, down),
        ]
    )
    assert len(found) == 3 * 3
    pair = found[(found["criterion"] == "entropy") & (found["seed"] == 0) & (found["other_criterion"] == "wanda")]
    assert dict(zip(pair["layer"], pair["spearman"], strict=True)) == pytest.approx({0: 1, 1: -1, -1: 0})
    table = between_criteria(found, "spearman")
    assert table.loc["entropy", "entropy"] == 1
    assert table.loc["entropy", "wanda"] == table.loc["wanda", "entropy"] == pytest.approx(0)
    assert np.isnan(table.loc["wanda", "wanda"])


def test_scores_below_0_are_drawn_on_a_linear_axis(tmp_path):
    positive, z_scores = [1.0, 2.0, 30.0], [-1.0, 0.0, 1.0]
    scores = [
        artifact(tmp_path / "a", "entropy", 0, positive, positive),
        artifact(tmp_path / "b", "flap_standardized", 0, z_scores, z_scores),
    ]
    figure = importance(scores)
    assert {axis.get_title(): axis.get_yscale() for axis in figure.axes if axis.get_visible()} == {
        "entropy": "log", "flap_standardized": "linear"
    }  # fmt: skip


def test_layers_keep_their_numbers_and_those_that_rank_nothing_do_not_count(tmp_path):
    """Layer 0 has no such units, as the dense ones of a mixture of experts; in layer 1 all scores are equal."""
    up, equal = [1.0, 2.0, 30.0], [0.0, 0.0, 0.0]
    scores = [artifact(tmp_path / name, name, 0, [], equal, up) for name in ("entropy", "wanda")]
    found = compare(scores).set_index("layer")["spearman"]
    assert list(found.index) == [1, 2, -1]
    assert np.isnan(found[1]) and found[2] == found[-1] == 1
    figure = importance(scores)
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[1, 2]]

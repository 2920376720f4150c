"""Which neurons stay: the budget exactly, the best ones, nothing below the floor."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from hfprune.pruning.allocation import ALLOCATIONS, allocate, fewest_kept


def random_scores(*widths):
    torch.manual_seed(0)
    return [torch.rand(width) * (layer + 1) for layer, width in enumerate(widths)]


def test_uniform_keeps_the_best_of_every_layer():
    scores = [torch.tensor([0.1, 0.9, 0.5, 0.5]), torch.tensor([4.0, 3.0, 2.0, 1.0])]
    assert [kept.tolist() for kept in allocate("uniform", scores, 4, 1)] == [[1, 2], [0, 1]]


def test_global_keeps_the_best_of_the_whole_model():
    scores = random_scores(40, 40, 40)
    kept = allocate("global", scores, 70, 1)
    threshold = torch.cat(scores).sort(descending=True).values[69]
    assert [layer.tolist() for layer in kept] == [(layer >= threshold).nonzero()[:, 0].tolist() for layer in scores]
    assert len({len(layer) for layer in kept}) == 3


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize(("keep", "step"), [(100.4, 1), (100, 8), (57, 8), (190, 8)])
def test_the_budget_is_met_and_widths_are_multiples(allocation, keep, step):
    kept = allocate(allocation, random_scores(64, 64, 64), keep, step)
    assert all(len(layer) % step == 0 for layer in kept)
    assert abs(sum(map(len, kept)) - keep) <= step / 2 * (3 if allocation == "uniform" else 1)


def test_global_widths_keep_the_largest_sum_of_scores_that_multiples_allow():
    scores = random_scores(16, 16, 16)
    kept = allocate("global", scores, 24, 4)

    def worth(widths):
        return sum(
            layer.sort(descending=True).values[:width].sum() for layer, width in zip(scores, widths, strict=True)
        )

    possible = [widths for widths in product(range(4, 17, 4), repeat=3) if sum(widths) == 24]
    assert worth([len(layer) for layer in kept]) == max(map(worth, possible))


def test_a_block_counts_by_all_its_neurons():
    scores = [torch.tensor([9.0, 9, 5, 0]), torch.tensor([9.0, 9, 4, 4])]
    assert [kept.tolist() for kept in allocate("global", scores, 6, 2)] == [[0, 1], [0, 1, 2, 3]]


def test_a_layer_that_loses_everywhere_keeps_the_floor():
    scores = [torch.rand(40) + 10, torch.rand(40), torch.rand(40) + 10]
    assert fewest_kept("global", [40, 40, 40], 1) == [4, 4, 4]
    assert [len(layer) for layer in allocate("global", scores, 60, 1)][1] == 4
    assert [len(layer) for layer in allocate("global", scores, 64, 8)][1] == 8
    assert set(allocate("global", scores, 60, 1)[1].tolist()) == set(scores[1].topk(4).indices.tolist())


def test_among_equal_scores_the_first_layers_and_the_lower_indices_stay():
    assert [kept.tolist() for kept in allocate("global", [torch.ones(4)] * 2, 5, 1)] == [[0, 1, 2, 3], [0]]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("below", [0.4, 3, 30])
def test_a_budget_below_the_fewest_keeps_the_fewest(allocation, below):
    """Not almost everything, as a negative slice of the ranking would."""
    scores = random_scores(40, 40, 40)
    fewest = fewest_kept(allocation, [40, 40, 40], 1)
    assert [len(layer) for layer in allocate(allocation, scores, sum(fewest) - below, 1)] == fewest


def test_an_allocation_that_misses_the_budget_is_a_fault(monkeypatch):
    monkeypatch.setitem(ALLOCATIONS, "uniform", replace(ALLOCATIONS["uniform"], widths=lambda *_: [40, 40, 40]))
    with pytest.raises(AssertionError, match="keeps 120 units of 60"):
        allocate("uniform", random_scores(40, 40, 40), 60, 1)

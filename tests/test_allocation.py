"""Which neurons stay: the budget exactly, the best ones, nothing below the floor."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from hfprune.pruning.allocation import ALLOCATIONS, allocate, fewest_kept, standard_scores
from hfprune.pruning.budget import Shape, units_to_keep


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


def test_standardized_keeps_the_units_that_stand_out_in_their_own_layer():
    scores = [torch.tensor([1.0, 2, 3, 10]), torch.tensor([0.0, 0.9, 0.9, 0.9]) / 100]
    assert [len(kept) for kept in allocate("global", scores, 4, 1)] == [3, 1]
    assert [kept.tolist() for kept in allocate("standardized", scores, 4, 1)] == [[3], [1, 2, 3]]
    moved = [scores[0], scores[1] * 1e6 - 7]
    assert [kept.tolist() for kept in allocate("standardized", moved, 4, 1)] == [[3], [1, 2, 3]]


def test_standardized_ranks_groups_and_neurons_by_z_scores_whatever_their_scale_and_size():
    shape = Shape(2000, {"mlp": [20, 20], "attention": [4, 4]}, {"mlp": 10, "attention": 40}, 16)
    scores = {"mlp": random_scores(20, 20), "attention": [1e6 + layer for layer in random_scores(4, 4)]}
    cut = {"structure": "mlp+attention", "scores": scores, "ratio": 0.14}
    by_z = [
        (z, size)
        for name, size in shape.parameters.items()
        for layer in scores[name]
        for z in ((layer.double() - layer.double().mean()) / layer.double().std()).tolist()
    ]
    groups, free = 0, 280
    for _, size in sorted(by_z):
        groups += size == 40 and free >= 40
        free -= size
    assert 0 < groups < 6
    assert units_to_keep(shape, allocation="standardized", **cut).keep == {
        "mlp": 40 - (280 - 40 * groups) / 10, "attention": 8 - groups
    }  # fmt: skip
    assert units_to_keep(shape, allocation="global", **cut).keep["attention"] == 8, "a group's score is much larger"


def test_z_scores_have_mean_0_and_deviation_1_and_equal_scores_are_all_0():
    z = standard_scores(torch.tensor([1.0, 2, 3, 10]).double())
    assert z.mean().item() == pytest.approx(0, abs=1e-12) and z.std().item() == pytest.approx(1)
    assert not standard_scores(torch.full((3,), 7.0)).any()
    assert not standard_scores(torch.tensor([7.0])).any()


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

"""Which neurons stay: the budget exactly, the best ones, nothing below the floor."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from hfprune.pruning.allocation import (
    ALLOCATIONS,
    Layers,
    allocate,
    angular,
    by_shares,
    fewest_kept,
    standard_scores,
)
from hfprune.pruning.budget import Shape, units_to_keep

INFLUENCE = torch.tensor([0.05, 0.3, 0.1]).double()


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
    kept = allocate(allocation, random_scores(64, 64, 64), keep, step, INFLUENCE)
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


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("allocation", [name for name, entry in ALLOCATIONS.items() if entry.influence])
def test_layers_that_turn_the_stream_more_keep_more(allocation, share):
    widths = [len(kept) for kept in allocate(allocation, random_scores(1000, 1000, 1000), share * 3000, 1, INFLUENCE)]
    assert widths[0] < widths[2] < widths[1] <= 1000
    assert sum(widths) == share * 3000


def test_layers_that_turn_the_stream_alike_keep_the_same():
    alike = torch.full((3,), 0.2).double()
    for allocation in [name for name, entry in ALLOCATIONS.items() if entry.influence]:
        assert [len(kept) for kept in allocate(allocation, random_scores(40, 40, 40), 60, 1, alike)] == [20, 20, 20]


def test_what_a_full_layer_cannot_keep_the_others_keep():
    shares = by_shares(lambda _layers, _share: [1.6, 0.3, 0.5])
    assert shares(Layers(random_scores(100, 100, 100)), 240, [1, 1, 1], 1) == [100, 60, 80]
    assert shares(Layers(random_scores(100, 100, 100)), 240, [8, 8, 8], 8) == [96, 64, 80]
    assert shares(Layers(random_scores(100, 100, 100)), 20, [8, 8, 8], 8) == [8, 8, 8]
    assert shares(Layers(random_scores(100, 100, 100)), 300, [1, 1, 1], 1) == [100, 100, 100]


def test_cosine_moves_the_most_important_layer_by_the_amplitude():
    cut = [
        1000 - len(kept) for kept in allocate("cosine", random_scores(*[1000] * 4), 3200, 1, torch.arange(4).double())
    ]
    assert cut == [320, 240, 160, 80], "200 and up to 0.03 for each 0.05 that goes"


def test_entropic_losses_are_a_softmax():
    influence = torch.tensor([0.10, 0.15, 0.40]).double()
    weights = [math.exp(-value / 0.1) for value in influence.tolist()]
    cut = [10_000 - len(kept) for kept in allocate("entropic", random_scores(*[10_000] * 3), 27_000, 1, influence)]
    assert cut == pytest.approx([3000 * weight / sum(weights) for weight in weights], abs=1)


def test_angular_is_cfsps_formula_on_its_own_number_of_tokens():
    """With sums over 128 x 1024 tokens, divided by 1e4, as in its code, and its shrinking where a share exceeds 1."""
    for ratio, spread in ((0.2, 0.02), (0.2, 0.5), (0.5, 0.02)):
        means = [0.1, 0.1 + spread, 0.1 + spread / 3, 0.1 + spread / 2]
        sums = [128 * 1024 * value for value in means]
        centre = sum(sums) / 4
        size = [1 / (1 + math.exp(-(value - centre) / 1e4)) for value in sums]
        average, largest = sum(size) / 4, max(size)
        if largest / average * (1 - ratio) >= 1:
            factor = (average * (1 / (1 - ratio) - 1)) / (largest - average) / 1.05
            size = [average + (each - average) * factor for each in size]
            average = sum(size) / 4
        expected = [each / average * (1 - ratio) for each in size]
        found = angular(Layers(random_scores(*[9] * 4), torch.tensor(means, dtype=torch.float64)), 1 - ratio)
        assert found == pytest.approx(expected, rel=1e-12)
        assert max(found) < 1


def test_pq_index_keeps_more_where_scores_are_alike():
    scores = [
        torch.ones(100),
        torch.cat([torch.ones(25), torch.zeros(75)]),
        torch.cat([torch.ones(50), torch.zeros(50)]),
    ]
    widths = [len(kept) for kept in allocate("pq_index", scores, 105, 1)]
    assert widths == [60, 15, 30], "1 - I is the share of units that are not 0"
    moved = [len(kept) for kept in allocate("pq_index", [1000 * scores[0], -scores[1], scores[2]], 105, 1)]
    assert moved == widths, "whatever the scale"
    by_formula = [
        1 - len(layer) ** (1 / 1 - 1 / 0.5) * layer.norm(0.5).item() / layer.norm(1).item() for layer in scores
    ]
    assert [1 - each for each in by_formula] == pytest.approx([1, 0.25, 0.5])


def test_logarithmic_cuts_nothing_of_the_first_layer_and_grows_with_depth():
    cut = [1000 - len(kept) for kept in allocate("logarithmic", random_scores(*[1000] * 4), 3600, 1)]
    logs = [math.log(number) for number in (1, 2, 3, 4)]
    assert cut == pytest.approx([400 * each / sum(logs) for each in logs], abs=1)
    assert len(allocate("logarithmic", random_scores(10), 6, 1)[0]) == 6


def test_among_equal_scores_the_first_layers_and_the_lower_indices_stay():
    assert [kept.tolist() for kept in allocate("global", [torch.ones(4)] * 2, 5, 1)] == [[0, 1, 2, 3], [0]]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("below", [0.4, 3, 30])
def test_a_budget_below_the_fewest_keeps_the_fewest(allocation, below):
    """Not almost everything, as a negative slice of the ranking would."""
    scores = random_scores(40, 40, 40)
    fewest = fewest_kept(allocation, [40, 40, 40], 1)
    assert [len(layer) for layer in allocate(allocation, scores, sum(fewest) - below, 1, INFLUENCE)] == fewest


def test_an_allocation_that_misses_the_budget_is_a_fault(monkeypatch):
    monkeypatch.setitem(ALLOCATIONS, "uniform", replace(ALLOCATIONS["uniform"], widths=lambda *_: [40, 40, 40]))
    with pytest.raises(AssertionError, match="keeps 120 units of 60"):
        allocate("uniform", random_scores(40, 40, 40), 60, 1)

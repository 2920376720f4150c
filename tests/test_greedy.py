"""Units that are chosen together: in the order and at the cost that brute force finds."""

from itertools import combinations, pairwise

import torch

from hfprune.pruning.greedy import one_by_one, swapped, with_repair


def gram(size=12, tokens=40):
    torch.manual_seed(0)
    h = torch.randn(tokens, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    return h.T @ h / tokens


def order(scores):
    return scores.argsort().tolist()


def test_one_by_one_takes_the_unit_that_adds_least_to_the_form():
    matrix, gone, costs = gram(), [], []
    while len(gone) < 12:
        before = matrix[gone][:, gone].sum().item()
        left = set(range(12)) - set(gone)
        adds = {unit: matrix[[*gone, unit]][:, [*gone, unit]].sum().item() - before for unit in left}
        gone.append(min(adds, key=adds.get))
        costs.append(adds[gone[-1]])
    scores = one_by_one(matrix)
    assert order(scores) == gone
    assert any(later < sooner for sooner, later in pairwise(costs)), "some costs fall"
    torch.testing.assert_close(scores[gone], torch.tensor(costs).cummax(0).values)
    assert scores[gone].diff().min() > 0


def test_units_whose_effects_cancel_go_together():
    """Each alone is dear, both cost nothing: a diagonal score would never see it."""
    matrix = torch.tensor([[4.0, -4, 0], [-4, 4, 0], [0, 0, 5]])
    scores = one_by_one(matrix)
    assert order(scores) == [0, 1, 2]
    assert scores[1] > scores[0] == 4
    assert scores[1] < 4.001


def test_with_repair_is_free_for_a_unit_that_another_repeats():
    h = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = torch.cat([h, 2 * h[:, :1]], dim=1)
    products = h.T @ h / 50 + 1e-9 * torch.eye(4)
    scores = with_repair(torch.linalg.inv(products), torch.ones(2, 4, dtype=torch.float64), 4)
    assert order(scores)[0] in (0, 3)
    assert scores.min() < 1e-6
    assert scores.sort().values[1] > 0.1, "once it is gone, the other is not free any more"


def lost(products, weights, gone):
    """The least squared error without these columns."""
    stays = [column for column in range(len(products)) if column not in gone]
    schur = products[gone][:, gone] - products[gone][:, stays] @ torch.linalg.solve(
        products[stays][:, stays], products[stays][:, gone]
    )
    return (weights[:, gone] @ schur @ weights[:, gone].T).trace().item()


def test_with_repair_in_rounds_loses_little_more_than_one_unit_at_a_time(monkeypatch):
    products, weights = gram(96, 400), torch.randn(5, 96, dtype=torch.float64)
    exact = with_repair(torch.linalg.inv(products), weights, 48)  # of two columns each
    monkeypatch.setattr("hfprune.pruning.greedy.ROUNDS", 8)
    coarse = with_repair(torch.linalg.inv(products), weights, 48)
    columns = [[2 * unit + i for unit in order(scores)[:12] for i in (0, 1)] for scores in (exact, coarse)]
    errors = [lost(products, weights, gone) for gone in (*columns, list(range(24)))]
    assert len(coarse.unique()) == 48
    assert exact.sort().values[:12].sum().item() >= errors[0] * 0.999, "what the scores say, costs that fell aside"
    assert errors[0] < 1.01 * errors[1] < 0.5 * errors[2]


def fitted(h, y, kept):
    """The squared output that a least-squares fit by these columns leaves."""
    return (y - h[:, kept] @ torch.linalg.lstsq(h[:, kept], y).solution).square().sum().item()


def test_a_local_search_exchanges_the_columns_that_a_fit_misses_least_for_those_that_help_most():
    draw = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    h = normal(60, 10) @ normal(10, 10)
    y = normal(60, 4) + h @ normal(10, 4)
    errors = {columns: fitted(h, y, list(columns)) for columns in combinations(range(10), 4)}
    ranked = sorted(errors, key=errors.get)
    for start in (ranked[-1], ranked[len(ranked) // 2]):
        kept, rounds = swapped(h.T @ h, y.T @ h, torch.tensor(start))
        chosen = tuple(kept.tolist())
        assert chosen == tuple(sorted(chosen)) and len(set(chosen)) == 4 and 0 < rounds <= 20
        assert ranked.index(chosen) < 5 < ranked.index(start)
        # Where it ends, one more exchange does not help: the column that is missed least, for the one that helps most.
        weakest = min(chosen, key=lambda column: fitted(h, y, [each for each in chosen if each != column]))
        stays = [each for each in chosen if each != weakest]
        best = min(set(range(10)) - set(stays), key=lambda column: fitted(h, y, [*stays, column]))
        assert fitted(h, y, [*stays, best]) >= errors[chosen] - 1e-9


def test_a_local_search_leaves_what_has_no_alternative():
    everything = torch.arange(12)
    kept, rounds = swapped(gram(), torch.ones(2, 12, dtype=torch.float64), everything)
    assert torch.equal(kept, everything) and rounds == 0

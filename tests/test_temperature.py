"""The temperature that `refit: trained` ends with: the least KL, and a norm that carries it in every family."""

import pytest
import torch

from hfprune.models.head import Head
from hfprune.models.walk import exit_norm
from hfprune.pruning import temperature
from hfprune.pruning.refit import flops_of_refit, refit
from hfprune.pruning.temperature import best_factor, set_temperature
from tests.conftest import make_model
from tests.test_families import DENSE, make
from tests.test_part_training import SEQUENCES


def divergence(dense, cut):
    """KL(dense || cut) of (tokens, vocabulary) logits, in float64."""
    dense, cut = dense.double().log_softmax(-1), cut.double().log_softmax(-1)
    return (dense.exp() * (dense - cut)).sum(-1).mean().item()


@pytest.mark.parametrize("cap", [None, 3.0])
def test_it_is_the_factor_of_least_kl(cap):
    """Against every factor in steps of 0.002, of a model that is too sure by a third and sees noise."""
    drawn = torch.Generator().manual_seed(0)
    head = Head(torch.randn(50, 16, generator=drawn) / 2, cap=cap)
    dense = torch.randn(400, 16, generator=drawn)
    states = 4 / 3 * (dense + 0.3 * torch.randn(400, 16, generator=drawn))
    factors = torch.arange(0.5, 1.2, 0.002).tolist()
    losses = [divergence(head.logits(dense), head.logits(factor * states)) for factor in factors]
    best = factors[losses.index(min(losses))]
    assert 0.6 < best < 0.8
    assert best_factor(states, dense, head) == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1.0), (100.0, 0.6), (0.01, 1.1)])
def test_it_stays_within_bounds(scale, factor):
    drawn = torch.Generator().manual_seed(0)
    head, dense = Head(torch.randn(50, 16, generator=drawn)), torch.randn(100, 16, generator=drawn)
    assert best_factor(scale * dense, dense, head) == pytest.approx(factor, abs=0.01)


@pytest.mark.parametrize("family", DENSE)
@torch.no_grad()
def test_the_last_norm_carries_it(family, monkeypatch):
    model = make(family)
    norm, states = exit_norm(model), torch.randn(3, 5, model.config.hidden_size)
    if norm.__class__.__name__ == "OlmoLayerNorm":
        assert set_temperature(model, states, states) == 1.0
        return
    monkeypatch.setattr(temperature, "best_factor", lambda *_: 0.8)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    wanted = 0.8 * norm(states)
    assert set_temperature(model, states, states) == 1.25
    assert torch.allclose(exit_norm(model)(states), wanted, rtol=1e-5, atol=1e-6)
    inside = {id(weight) for weight in norm.parameters()}
    assert all(
        torch.equal(weight, before[name]) for name, weight in model.named_parameters() if id(weight) not in inside
    )


def test_the_trained_model_is_the_nearer_for_it(monkeypatch):
    kept, models, done = {"mlp": [torch.arange(10)] * 3}, {}, {}
    for name in ("with", "without"):
        models[name] = make_model()
        done[name] = refit(models[name], kept, SEQUENCES, "trained", 0.1)
        monkeypatch.setattr(temperature, "best_factor", lambda *_: 1.0)
    with torch.no_grad():
        dense = make_model()(SEQUENCES).logits.flatten(0, 1)
        found = {name: model(SEQUENCES).logits.flatten(0, 1) for name, model in models.items()}
    scale = done["with"]["temperature"]
    assert abs(scale - 1) > 0.01
    assert done["without"]["temperature"] == 1.0
    assert torch.allclose(found["with"] * scale, found["without"], rtol=1e-4, atol=1e-5)
    assert divergence(dense, found["with"]) < divergence(dense, found["without"])
    assert done["with"]["refit_flops"] == flops_of_refit(make_model(), kept, tuple(SEQUENCES.shape), "trained")

"""Closed-form gradients against autograd and finite differences in float64."""

import pytest
import torch

from hfprune.criteria import CRITERIA


def entropy(logits):
    """Mean over nothing: the sum over tokens of the entropy, by its definition."""
    p = torch.softmax(logits, -1)
    return -(p * torch.log(p)).sum()


DEFINITIONS = {"entropy": entropy}


def test_every_criterion_has_a_definition_here():
    assert DEFINITIONS.keys() == CRITERIA.keys()


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_closed_form_equals_autograd(name, scale):
    torch.manual_seed(1)
    logits = (scale * torch.randn(7, 50, dtype=torch.float64)).requires_grad_()
    (expected,) = torch.autograd.grad(DEFINITIONS[name](logits), logits)
    torch.testing.assert_close(CRITERIA[name].logit_gradient(logits.detach()), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_closed_form_equals_finite_differences(name):
    torch.manual_seed(2)
    logits = 2 * torch.randn(3, 20, dtype=torch.float64)
    direction = torch.randn_like(logits)
    step = 1e-5
    there, back = (DEFINITIONS[name](logits + sign * step * direction) for sign in (1, -1))
    slope = (CRITERIA[name].logit_gradient(logits) * direction).sum()
    assert slope.item() == pytest.approx(((there - back) / (2 * step)).item(), rel=1e-7)


def test_entropy_of_a_certain_prediction_has_no_gradient_and_no_nan():
    logits = torch.tensor([[200.0, 0.0, -200.0]])
    gradient = CRITERIA["entropy"].logit_gradient(logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))

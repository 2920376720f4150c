"""Training of an MLP by its own error: what it lowers, and what it leaves alone."""

import copy

import pytest
import torch

from hfprune.models.families import layout_of
from hfprune.models.run_part import run_part
from hfprune.models.units import layers_of, matrix, part_of
from hfprune.models.walk import enter
from hfprune.pruning import part_training
from hfprune.pruning.part_training import train_part
from hfprune.pruning.refit import DRIFT, refit
from tests.conftest import make_model

KEPT, REMOVED = torch.arange(30), torch.arange(30, 48)
SEQUENCES = torch.randint(2, 320, (32, 32), generator=torch.Generator().manual_seed(0))  # 1, padding, has no embedding


class Setting:
    """The MLP of the first layer of a model, with the removed columns at 0, and what it wrote before."""

    def __init__(self, family="llama", dtype=torch.float32):
        self.model = make_model(family).to(dtype)
        self.part = part_of(self.model, "mlp", 0)
        self.states, arguments = enter(self.model, SEQUENCES)
        self.how = (layout_of(self.model), self.model.config, layers_of(self.model)[0], "mlp", arguments[0])
        with torch.no_grad():
            self.targets = self.write(self.states)
            matrix(self.part.output)[:, REMOVED] = 0
        self.before = copy.deepcopy(self.model.state_dict())

    def write(self, states):
        return run_part(*self.how, states).output

    def train(self):
        train_part(self.part, KEPT, self.write, self.states.split(20), self.targets.split(20))

    @torch.no_grad()
    def error(self):
        """The mean over tokens of the squared error, relative to the target."""
        off = (self.targets - self.write(self.states)).double().square().sum(-1)
        return (off / self.targets.double().square().sum(-1)).mean().item()


@pytest.fixture
def short(monkeypatch):
    """Settings for few tokens."""
    monkeypatch.setattr(part_training, "MOST_EPOCHS", 8)
    monkeypatch.setattr(part_training, "TOKENS_PER_STEP", 128)


KINDS = [("llama", torch.float32), ("phi3", torch.float32), ("llama", torch.bfloat16)]


@pytest.mark.parametrize(("family", "dtype"), KINDS)
def test_training_lowers_the_error_and_touches_nothing_but_the_weights_that_stay(family, dtype, short):
    setting = Setting(family, dtype)
    error, part = setting.error(), setting.part
    rows = [part.by_unit(matrix(linear), number)[REMOVED].clone() for number, linear in enumerate(part.inputs)]
    setting.train()
    assert setting.error() < 0.9 * error
    assert not matrix(part.output)[:, REMOVED].any()
    for number, linear in enumerate(part.inputs):
        assert torch.equal(part.by_unit(matrix(linear), number)[REMOVED], rows[number])
    trained = {id(linear.weight) for linear in part.linears}
    for name, parameter in setting.model.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, setting.before[name]) == (id(parameter) not in trained), name


def test_the_first_step_moves_each_weight_by_a_share_of_its_matrix(monkeypatch):
    """Adam's first step moves every weight that has a gradient by the rate, whatever the gradient."""
    for name, value in (("MOST_EPOCHS", 1), ("TOKENS_PER_STEP", 10**6), ("WARM_UP", 2)):
        monkeypatch.setattr(part_training, name, value)
    setting = Setting()
    train_part(setting.part, KEPT, setting.write, [setting.states], [setting.targets])
    for linear, name in zip(setting.part.inputs, ("gate_proj", "up_proj"), strict=True):
        before = setting.before[f"model.layers.0.mlp.{name}.weight"][KEPT]
        moved = (linear.weight[KEPT] - before).abs()
        assert torch.allclose(moved, 0.015 / 2 * before.square().mean().sqrt().expand_as(moved), rtol=0.02)


def test_its_gradient_is_that_of_the_formula():
    output, target = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    target[2] = 0  # a token with nothing to write
    (gradient,) = torch.autograd.grad(part_training._relative_error(output, target), output)
    sizes = target.square().sum(1).clamp(min=1e-3 * target.square().sum(1).median())
    assert torch.allclose(gradient, 2 * (output - target).detach() / sizes[:, None], rtol=1e-4)


@torch.no_grad()
def written(model, number, name, states):
    """What a part of a layer adds to (batch, length, hidden) states."""
    arguments = enter(model, SEQUENCES[:1])[1][number]
    return run_part(layout_of(model), model.config, layers_of(model)[number], name, arguments, states).written


@pytest.mark.parametrize(("family", "multiplier"), [("llama", 1.0), ("granite", 0.3)])
def test_an_mlp_is_to_write_what_the_whole_one_does_and_half_of_the_error_from_below(family, multiplier, monkeypatch):
    changes = {"residual_multiplier": multiplier} if family == "granite" else {}
    dense, model, given = make_model(family, **changes), make_model(family, **changes), []
    kept = {"mlp": [torch.arange(30)] * 3}
    monkeypatch.setattr(
        "hfprune.pruning.refit.train_part",
        lambda _part, _kept, _write, states, targets: given.append([torch.cat(each) for each in (states, targets)]),
    )
    refit(model, kept, SEQUENCES, "trained", 0.1)
    stream = enter(dense, SEQUENCES)[0]
    for number, (states, targets) in enumerate(given):
        for name in ("attention", "mlp"):
            stream = stream + written(dense, number, name, stream)
        whole = written(dense, number, "mlp", states)
        expected = whole + DRIFT * (stream - (states + whole))
        assert torch.allclose(targets * multiplier, expected, atol=1e-5), number
        assert number == 0 or not torch.allclose(expected, whole, atol=1e-2)
    assert len(given) == 3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_trained_part_is_nearer_to_what_it_should_write_than_a_refitted_one(family, short):
    """Behind the second MLP, where some of the error comes from the first. In Gemma 2 a norm follows."""
    kept = {"mlp": [torch.arange(30)] * 3}
    dense, errors = make_model(family), {}
    for method in ("sequential", "trained"):
        model = make_model(family)
        refit(model, kept, SEQUENCES, method, 0.1)
        states = {"dense": enter(dense, SEQUENCES)[0], method: enter(model, SEQUENCES)[0]}
        for number in range(2):
            for name in ("attention", "mlp"):
                for key, network in (("dense", dense), (method, model)):
                    states[key] = states[key] + written(network, number, name, states[key])
        errors[method] = (states["dense"] - states[method]).square().sum().item()
    assert errors["trained"] < 0.95 * errors["sequential"]


def test_attention_is_solved_and_not_trained():
    kept = {"attention": [torch.tensor([0])] * 3}
    models = {}
    for method in ("sequential", "trained"):
        models[method] = make_model()
        refit(models[method], kept, SEQUENCES, method, 0.1)
    for (name, one), other in zip(models["trained"].named_parameters(), models["sequential"].parameters(), strict=True):
        assert torch.equal(one, other) == (name != "model.norm.weight"), "the temperature alone"


def test_a_longer_text_is_seen_less_often():
    samples = (1, 64, 170, 171, 256, 257, 1024)
    assert [part_training.epochs(count * 256) for count in samples] == [3, 3, 3, 2, 2, 1, 1]

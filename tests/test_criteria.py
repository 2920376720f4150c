"""Closed forms against autograd and finite differences in float64; static scores against their formulas in numpy."""

import numpy as np
import pytest
import torch

from hfprune.models.units import PARTS, parts
from hfprune.pruning.criteria import (
    CRITERIA,
    TOP_K,
    GradientCriterion,
    Moments,
    Positions,
    StaticCriterion,
    fisher_gradient,
    race_times,
)
from tests.conftest import make_model

TOKENS, VOCABULARY = 7, 50
torch.manual_seed(0)
POSITIONS = Positions(
    torch.tensor([3, 9, 0, 49, 7, 7, -1]), torch.rand(TOKENS), torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)
)


def sampled_labels(logits):
    """The labels that win a race: at each position the first of exponential clocks with rates p, by numpy."""
    p = torch.softmax(logits.detach(), -1).numpy()
    return torch.tensor((race_times(POSITIONS.uniforms, VOCABULARY).numpy() / p).argmin(-1))


def entropy(logits):
    p = torch.softmax(logits, -1)
    return -(p * torch.log(p)).sum()


def entropy_top_k(logits):
    return entropy(logits.sort(-1, descending=True).values[:, :TOP_K])


def cross_entropy(logits):
    return torch.nn.functional.cross_entropy(logits[:-1], POSITIONS.next_tokens[:-1], reduction="sum")


def log_likelihood(logits):
    return torch.log_softmax(logits, -1).gather(-1, sampled_labels(LOGITS)[:, None]).sum()


def self_distillation(logits):
    teacher = torch.softmax(POSITIONS.dense_logits / 0.2, -1)
    divergence = torch.nn.functional.kl_div(torch.log_softmax(logits, -1), teacher, reduction="sum")
    return 0.6 * cross_entropy(logits) + 0.4 * divergence


# S, summed over positions, by its definition.
DEFINITIONS = {
    "entropy": entropy,
    "entropy_top_k": entropy_top_k,
    "cross_entropy": cross_entropy,
    "self_distillation": self_distillation,
    "fisher_token": log_likelihood,
    "fisher_sequence": log_likelihood,
    "fisher_pairs": log_likelihood,
    "llm_pruner_element_1": cross_entropy,
    "llm_pruner_element_2": cross_entropy,
    "llm_pruner_vector": cross_entropy,
}
LOGITS = 2 * torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)


def test_every_criterion_is_tested_here():
    gradient = {name for name, criterion in CRITERIA.items() if isinstance(criterion, GradientCriterion)}
    static = {name for name, criterion in CRITERIA.items() if isinstance(criterion, StaticCriterion)}
    assert DEFINITIONS.keys() == gradient
    assert FORMULAS.keys() | {"random"} == static


@pytest.mark.parametrize("name", DEFINITIONS)
def test_closed_form_equals_autograd(name):
    logits = LOGITS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(DEFINITIONS[name](logits), logits)
    found = CRITERIA[name].logit_gradient(LOGITS.clone(), POSITIONS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_closed_form_equals_finite_differences(name):
    torch.manual_seed(2)
    direction, step = torch.randn_like(LOGITS), 1e-5
    there, back = (DEFINITIONS[name](LOGITS + sign * step * direction) for sign in (1, -1))
    slope = (CRITERIA[name].logit_gradient(LOGITS.clone(), POSITIONS) * direction).sum()
    assert slope.item() == pytest.approx(((there - back) / (2 * step)).item(), rel=1e-6)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_certain_prediction_has_no_gradient_and_no_nan(name):
    logits = torch.tensor([[200.0, 0.0, -200.0]])
    positions = Positions(torch.tensor([0]), torch.tensor([0.5]), logits.clone())
    gradient = CRITERIA[name].logit_gradient(logits, positions)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_labels_are_drawn_from_the_models_own_output():
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5]).repeat(20_000, 1)
    torch.manual_seed(3)
    positions = Positions(torch.full((20_000,), -1), torch.rand(20_000))
    p = logits.softmax(-1)
    drawn = (fisher_gradient(logits.clone(), positions) + p).round()
    assert torch.equal(drawn.sum(-1), torch.ones(20_000))
    torch.testing.assert_close(drawn.mean(0), p[0], rtol=0, atol=0.012)


def test_every_position_draws_from_numbers_of_its_own_that_are_exponential():
    torch.manual_seed(4)
    times = race_times(torch.rand(500), 1000).double()
    assert times.shape == (500, 1000) and times.min() > 0
    for moment, expected in ((1, 1), (2, 2), (3, 6)):
        assert times.pow(moment).mean().item() == pytest.approx(expected, rel=0.03)
    assert torch.corrcoef(times).fill_diagonal_(0).abs().max() < 0.2  # 0.16 is what chance gives
    ends = race_times(torch.tensor([0.0, 1 - 2**-24]), 1000)  # the first window and the last
    assert torch.isfinite(ends).all()


def test_labels_hardly_depend_on_the_type_of_the_logits():
    torch.manual_seed(5)
    logits = 3 * torch.randn(400, 5000)
    positions = Positions(torch.full((400,), -1), torch.rand(400))
    exact, rounded = (
        fisher_gradient(each, positions).argmax(-1) for each in (logits.clone(), logits.bfloat16().float())
    )
    assert (exact != rounded).float().mean() < 0.03


def weights(layer, kind):
    """Of every unit, by numpy: rows of what it reads through, and columns of what it writes through."""
    if kind == "mlp":
        return [
            layer.mlp.gate_proj.weight.numpy(),
            layer.mlp.up_proj.weight.numpy(),
            layer.mlp.down_proj.weight.numpy().T,
        ]
    block = layer.self_attn  # 2 groups of 2 query heads, 8 dimensions each
    linears = (block.q_proj.weight, block.k_proj.weight, block.v_proj.weight, block.o_proj.weight.T)
    return [np.stack(np.split(weight.numpy(), 2)).reshape(2, -1) for weight in linears]


def per_unit(values, kind):
    return values if kind == "mlp" else np.array([values[:16].sum(), values[16:].sum()])


def written(layer, kind, order=2):
    """(columns,) norms of the columns of the output layer."""
    output = layer.mlp.down_proj if kind == "mlp" else layer.self_attn.o_proj
    return np.linalg.norm(output.weight.double().numpy(), order, axis=0)


def flap_standardized(layer, kind, h):
    fluctuation = h.var(axis=0, ddof=1) * written(layer, kind) ** 2
    fluctuation = fluctuation**2 if kind == "attention" else fluctuation
    z = (fluctuation - fluctuation.mean()) / fluctuation.std(ddof=1)
    weights_of_a_unit = sum(rows[0].size for rows in weights(layer, kind))
    return per_unit(z, kind) / (1 if kind == "mlp" else 16) * weights_of_a_unit


def spread(rows):
    return rows.max(1) + np.abs(rows.min(1))


def ppm(layer, kind, h):
    ranges = [spread(rows) for rows in weights(layer, kind)]
    return sum(each / each.max() for each in ranges) * np.sqrt(per_unit((h**2).sum(0), kind))


def output_weight(layer, kind):
    """(hidden, columns) float64."""
    return (layer.mlp.down_proj if kind == "mlp" else layer.self_attn.o_proj).weight.double().numpy()


def blocks(kind):
    """The columns of every unit."""
    return [[unit] for unit in range(48)] if kind == "mlp" else [list(range(16)), list(range(16, 32))]


def cheapest_first(units, error):
    """Scores by greedy choice: error(columns that are gone) is computed anew for every candidate."""
    gone, before, last, scores = [], error([]), -np.inf, np.zeros(len(units))
    left = set(range(len(units)))
    while left:
        costs = {unit: error(gone + units[unit]) - before for unit in left}
        unit = min(costs, key=costs.get)
        scores[unit] = last = max(costs[unit], last)
        left.remove(unit)
        gone, before = gone + units[unit], before + costs[unit]
    return scores


def contribution(layer, kind, h):
    weight = output_weight(layer, kind)
    return cheapest_first(blocks(kind), lambda gone: ((h[:, gone] @ weight[:, gone].T) ** 2).sum() / len(h))


def obs(layer, kind, h):
    """The residual of a least squares problem with the ridge as further rows."""
    weight, columns = output_weight(layer, kind), h.shape[1]
    rows = np.concatenate([h / np.sqrt(len(h)), np.sqrt(0.01 * (h**2).mean()) * np.eye(columns)])

    def error(gone):
        stays = [column for column in range(columns) if column not in gone]
        kept = rows[:, stays]
        solution = np.linalg.solve(kept.T @ kept, kept.T @ rows @ weight.T)
        return ((rows @ weight.T - kept @ solution) ** 2).sum()

    return cheapest_first(blocks(kind), error)


def leverage(_layer, kind, h):
    """By the singular values of the activations."""
    _, values, directions = np.linalg.svd(h / np.sqrt(len(h)), full_matrices=False)
    ridge = 0.01 * (values**2).sum() / h.shape[1]
    return per_unit((values**2 / (values**2 + ridge) * directions.T**2).sum(1), kind)


def spectral(layer, kind, _h):
    rows = (layer.mlp.gate_proj if kind == "mlp" else layer.self_attn.q_proj).weight.double().numpy()
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    ridge = (values**2).sum() / rows.shape[1]
    return per_unit((left**2 * values**2 / (values**2 + ridge)).sum(1), kind)


def cfsp(layer, kind, h):
    """CFSP's `three_w_one_wa` with a = b = c = 1, word for word, but for a factor that all units share."""
    size = np.sqrt((h**2).mean(0))
    if kind == "attention":  # CFSP has none
        return np.sqrt(per_unit((h**2).sum(0), kind))
    gate, up, down = (
        np.abs(linear.weight.double().numpy()) for linear in layer.mlp.children() if hasattr(linear, "weight")
    )
    down = down * size
    per_weight = (down / down.sum(0) + up.T / up.T.sum(0) + gate.T / gate.T.sum(0)) * size
    return per_weight.mean(0) * 32 / 3 * np.sqrt(len(h))


LENGTH = 25  # tokens of a sequence


def sequence_norms(kind, h):
    """The norm of each unit over each sequence, its columns and tokens in one row."""
    sequences = np.split(h, len(h) // LENGTH)
    return sum(np.array([np.linalg.norm(rows[:, unit]) for unit in blocks(kind)]) for rows in sequences)


FORMULAS = {
    "contribution": contribution,
    "obs": obs,
    "leverage": leverage,
    "spectral": spectral,
    "activation_norm": cfsp,
    "sequence_norms": lambda _layer, kind, h: sequence_norms(kind, h),
    "wanda": lambda layer, kind, h: per_unit(np.linalg.norm(h, axis=0) * written(layer, kind, 1), kind),
    "flap": lambda layer, kind, h: per_unit(h.var(axis=0, ddof=1) * written(layer, kind) ** 2, kind),
    "flap_standardized": flap_standardized,
    "ppm_activation": ppm,
    "magnitude": lambda layer, kind, _h: np.sqrt(sum((rows**2).sum(1) for rows in weights(layer, kind))),
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", FORMULAS)
def test_static_scores_equal_their_formulas(name, kind):
    model = make_model()
    layer, part = model.model.layers[1], parts(model, kind)[1]
    h = np.random.default_rng(0).normal(0.3, 1, (200, 48 if kind == "mlp" else 32))
    moments = Moments(200, *map(torch.tensor, (h.sum(0), (h**2).sum(0), h.T @ h, sequence_norms(kind, h))))
    found = CRITERIA[name].score(part, moments, torch.Generator())
    np.testing.assert_allclose(found.numpy(), FORMULAS[name](layer, kind, h), rtol=1e-5)


def test_ppm_activation_equals_optipfairs_own():
    from optipfair.pruning.mlp_glu import compute_neuron_pair_importance_maw_hybrid

    model = make_model()
    mlp = model.model.layers[0].mlp
    h = torch.randn(100, 48, dtype=torch.float64)
    theirs = compute_neuron_pair_importance_maw_hybrid(
        mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, h.norm(dim=0).float()
    )
    ours = CRITERIA["ppm_activation"].score(
        parts(model, "mlp")[0], Moments(100, h.sum(0), (h**2).sum(0)), torch.Generator()
    )
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings(
    "ignore:transformers .* is not tested with current version of modelopt", "ignore::DeprecationWarning"
)
def test_contribution_equals_modelopts_own():
    """On one token, where the mean norm of an error and the mean of its square order units alike."""
    from modelopt.torch.prune.importance_hooks.base_hooks import IterativeChannelContributionHook

    part = parts(make_model(), "mlp")[0]
    output = torch.nn.Linear(48, 32, bias=False)
    output.weight = part.output.weight
    for h in torch.randn(3, 1, 48):
        hook = IterativeChannelContributionHook(output, {"validation_full_iters": 48})
        for _ in range(48):  # each call takes the next channel
            hook(output, (h[None],), output(h[None]))
        moments = Moments(1, h.sum(0).double(), h.square().sum(0).double(), (h.T @ h).double())
        ours = CRITERIA["contribution"].score(part, moments, torch.Generator())
        assert ours.argsort().tolist() == hook.to_dict()["channels_importance_ascending"].tolist()

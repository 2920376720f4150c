"""Presets of published methods keep what the published procedure keeps, computed here without the package's parts."""

import copy

import numpy as np
import pytest
import torch

from hfprune import api
from hfprune.pruning.budget import shape_of, units_to_keep
from hfprune.pruning.depth import order
from hfprune.pruning.methods import presets
from hfprune.pruning.surgery import cut, without_and_narrower
from tests.conftest import make_model


def tokens(count=8, length=32):
    return torch.randint(320, (count, length), generator=torch.Generator().manual_seed(5))


def activations(model, sequences, kind):
    """(tokens, columns) float64 per layer: what meets the output layers of that part."""
    seen = []

    def remember(_module, inputs):
        seen.append(inputs[0].flatten(0, 1).double().numpy())

    outputs = [layer.mlp.down_proj if kind == "mlp" else layer.self_attn.o_proj for layer in model.model.layers]
    hooks = [output.register_forward_pre_hook(remember) for output in outputs]
    model(sequences)
    for hook in hooks:
        hook.remove()
    return seen


def kept_by(preset, model, sequences, ratio):
    """What a preset keeps: {part: [indices per layer]}."""
    recipe = presets()[preset].recipe
    scores = api.score(model, sequences, recipe.criterion)
    kept = api.allocate(model, scores, ratio, recipe.structure, recipe.allocation)
    return {name: [layer.tolist() for layer in layers] for name, layers in kept.items()}


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_flap_keeps_what_its_one_list_of_z_scores_keeps(ratio):
    """Single heads, as in LLaMA: every head has its own keys and values."""
    model, sequences = make_model(num_key_value_heads=4), tokens()
    heads, neurons, dimensions = 4, 48, 8
    cost = {"attention": 4 * 32 * dimensions, "mlp": 3 * 32}
    units = []  # (z, part, layer, unit)
    for kind in ("attention", "mlp"):
        for number, h in enumerate(activations(model, sequences, kind)):
            layer = model.model.layers[number]
            weight = (layer.mlp.down_proj if kind == "mlp" else layer.self_attn.o_proj).weight.double().numpy()
            wifv = h.var(axis=0, ddof=1) * (weight**2).sum(0)
            if kind == "attention":
                wifv = wifv**2
            z = (wifv - wifv.mean()) / wifv.std(ddof=1)
            z = z if kind == "mlp" else z.reshape(heads, dimensions).mean(1)
            units += [(value, kind, number, unit) for unit, value in enumerate(z)]
    total = sum(parameter.numel() for parameter in model.parameters())
    lowest_first, free, gone = sorted(units), ratio * total, set()
    left = {"attention": [heads] * 3, "mlp": [neurons] * 3}
    floor = {"attention": 1, "mlp": 5}  # a tenth
    for _, kind, number, unit in lowest_first:
        if cost[kind] <= free + cost["mlp"] / 2 and left[kind][number] > floor[kind]:
            free -= cost[kind]
            left[kind][number] -= 1
            gone.add((kind, number, unit))
    expected = {
        kind: [[unit for unit in range(count) if (kind, number, unit) not in gone] for number in range(3)]
        for kind, count in (("mlp", neurons), ("attention", heads))
    }
    found = kept_by("FLAP", model, sequences, ratio)
    assert found == expected
    assert len({len(layer) for layer in found["mlp"]}) > 1


def test_wanda_sp_keeps_the_neurons_with_the_largest_sums_of_its_scores():
    model, sequences = make_model(), tokens()
    found = kept_by("Wanda-sp", model, sequences, 0.2)["mlp"]
    for layer, h, kept in zip(model.model.layers, activations(model, sequences, "mlp"), found, strict=True):
        weight = layer.mlp.down_proj.weight.double().numpy()
        score = (np.abs(weight) * np.sqrt((h**2).mean(0))).mean(0)
        assert kept == sorted(np.argsort(-score)[: len(kept)].tolist())
        assert len(kept) < 48


@pytest.mark.parametrize("ratio", [0.1, 0.2])
def test_z_scores_of_the_allocation_and_of_the_criterion_are_the_same_for_neurons(ratio):
    model, sequences = make_model(), tokens()
    one = api.allocate(model, api.score(model, sequences, "flap"), ratio, "mlp", "standardized")["mlp"]
    other = api.allocate(model, api.score(model, sequences, "flap_standardized"), ratio, "mlp", "global")["mlp"]
    assert [layer.tolist() for layer in one] == [layer.tolist() for layer in other]


def test_modegpts_refit_without_a_ridge_is_nystroems_approximation():
    model, sequences = make_model(), tokens(20)
    h, weights = (
        activations(model, sequences, "mlp"),
        [layer.mlp.down_proj.weight.clone() for layer in model.model.layers],
    )
    kept = api.allocate(model, api.score(model, sequences, "leverage"), 0.1, round_to=1)
    assert presets()["MoDeGPT"].recipe.refit == "least_squares"
    api.refit(model, kept, sequences, "least_squares", 0.0)
    for layer, seen, weight, stays in zip(model.model.layers, h, weights, kept["mlp"], strict=True):
        products = seen.T @ seen
        expected = weight.double().numpy() @ products[:, stays] @ np.linalg.inv(products[stays][:, stays])
        np.testing.assert_allclose(layer.mlp.down_proj.weight[:, stays].numpy(), expected, rtol=0, atol=2e-4)
        assert np.abs(weight[:, stays].numpy() - expected).max() > 1e-2


def test_modegpt_and_slimgpt_choose_neurons_by_what_their_papers_say():
    """Leverage of the activations; Optimal Brain Surgeon, in which the neuron of the least saliency goes first."""
    model, sequences = make_model(), tokens(20)
    leverage, obs = (api.score(model, sequences, presets()[name].recipe.criterion) for name in ("MoDeGPT", "SlimGPT"))
    for number, h in enumerate(activations(model, sequences, "mlp")):
        mean = h.T @ h / len(h)
        ridge = 0.01 * np.trace(mean) / 48
        inverse = np.linalg.inv(mean + ridge * np.eye(48))
        np.testing.assert_allclose(leverage["mlp"][number].numpy(), np.diag(mean @ inverse), rtol=1e-4)
        weight = model.model.layers[number].mlp.down_proj.weight.double().numpy()
        saliency = (weight**2).sum(0) / np.diag(inverse)
        assert obs["mlp"][number].argmin() == saliency.argmin()
        assert obs["mlp"][number].min().item() == pytest.approx(saliency.min(), rel=1e-4)


def loss_without(model, sequences, gone):
    """The mean loss on next tokens of the model in which the attention of these layers writes nothing, in float64."""
    silent = copy.deepcopy(model).double()
    for number in gone:
        silent.model.layers[number].self_attn.o_proj.weight.zero_()
    predictions = silent(sequences).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(predictions, sequences[:, 1:].flatten()).item()


@pytest.mark.parametrize(("ratio", "attentions"), [(0.05, 0), (0.2, 1), (0.3, 2)])
def test_2ssp_splits_the_budget_as_published_and_keeps_what_its_two_stages_keep(ratio, attentions):
    model, sequences, count = make_model(num_hidden_layers=4), tokens(), 4
    parts = {"attention": 2 * 32 * 32 + 2 * 32 * 16, "mlp": 3 * 32 * 48}
    remove = ratio * model.num_parameters()
    share = remove / (count * (sum(parts.values()) + 2 * 32))
    assert round(count * share ** (parts["mlp"] / parts["attention"] / 1.5)) == attentions
    gone = []
    for _ in range(attentions):
        left = [number for number in range(count) if number not in gone]
        gone.append(min(left, key=lambda number: loss_without(model, sequences, [*gone, number])))
    width = round(48 - (remove - attentions * parts["attention"]) / (3 * 32) / count)
    small = prune_by_2ssp(model, sequences, ratio)
    for number, h in enumerate(activations(model, sequences, "mlp")):
        norms = np.linalg.norm(h.reshape(len(sequences), -1, 48), axis=1).mean(0)
        best = sorted(np.argsort(-norms)[:width].tolist())
        layer, before = small.model.layers[number], model.model.layers[number]
        assert torch.equal(layer.mlp.down_proj.weight, before.mlp.down_proj.weight[:, best])
        assert (layer.self_attn.o_proj.weight.shape[1] == 0) == (number in gone)


def prune_by_2ssp(model, sequences, ratio):
    """The model that the preset makes on these tokens."""
    recipe = presets()["2SSP"].recipe
    steps, _, _ = order(model, sequences, recipe.order_criterion, recipe.structure, share=ratio)
    shape, scores = shape_of(model), api.score(model, sequences, recipe.criterion)
    budget = units_to_keep(shape, ratio, structure=recipe.structure, round_to=1, order=steps)
    kept = without_and_narrower(shape, budget, scores, recipe.allocation)
    small = copy.deepcopy(model)
    cut(small, kept)
    return small

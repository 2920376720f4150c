"""The refit: the solution that the formula states, from the statistics that the whole model has."""

import copy
from itertools import product

import pytest
import torch

from hfprune.errors import UserError
from hfprune.evaluation.fidelity import token_measures
from hfprune.models.families import layout_of
from hfprune.models.loading import flops_per_token
from hfprune.models.run_part import Passed, run_part
from hfprune.models.units import parts
from hfprune.models.walk import enter
from hfprune.pruning.allocation import allocate
from hfprune.pruning.refit import DRIFT, Repair, Space, refit
from hfprune.pruning.surgery import cut
from tests.conftest import make_model

VARIANTS = [
    ("llama", {}),
    ("llama", {"mlp_bias": True}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),  # masks of two kinds
    ("qwen3", {"attn_implementation": "eager"}),
]
METHODS = ["least_squares", "sequential"]


def tokens(count, seed=0):
    return torch.randint(320, (count, 32), generator=torch.Generator().manual_seed(seed))


def some(share=2 / 3):
    torch.manual_seed(1)
    return allocate("global", [torch.rand(48) for _ in range(3)], share * 144, 1)


def seen_at(model, sequences, place, take):
    """In the model's own forward pass, what `take` makes of input and output of a module of every layer."""
    seen = []
    hooks = [
        place(layer).register_forward_hook(lambda _module, inputs, output: seen.append(take(inputs[0], output)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(sequences)
    for hook in hooks:
        hook.remove()
    return [each.flatten(0, 1) for each in seen]


def activations(model, sequences, name="mlp"):
    """What meets every output layer: (tokens, columns) per layer."""
    outputs = iter([part.output for part in parts(model, name)])
    return seen_at(model, sequences, lambda _layer: next(outputs), lambda meets, _output: meets)


def output(model, sequences):
    with torch.no_grad():
        return model(sequences).logits.flatten(0, 1).log_softmax(-1)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_layer_by_layer_every_layer_sees_what_it_sees_in_the_whole_model(family, changes):
    model, sequences = make_model(family, **changes), tokens(10)
    arguments = enter(model, sequences[:1])[1]
    stream = [enter(model, rows)[0] for rows in sequences.split(3)]
    for layer, keywords, expected in zip(model.model.layers, arguments, activations(model, sequences), strict=True):
        assert len(stream) == 4
        for name in ("attention", "mlp"):
            with torch.no_grad():
                how = (layout_of(model), model.config, layer, name, keywords)
                passed = [run_part(*how, states) for states in stream]
            stream = [states + each.written for states, each in zip(stream, passed, strict=True)]
        found = torch.cat([each.activations for each in passed]).flatten(0, 1)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(found.T @ found, expected.T @ expected, rtol=1e-4, atol=1e-4)


def ridge_solution(h, weight, stays, more=0.0):
    """W_S + D by torch's own solver: min sum ||W_P h_P + more - D h_S||^2 + ||D L^1/2||^2 as one problem."""
    h, weight = h.double(), weight.double()
    goes = [i for i in range(weight.shape[1]) if i not in stays]
    sizes = (0.1 * h[:, stays].square().sum(0)).sqrt()
    system = torch.cat([h[:, stays], sizes.diag()])
    right = torch.cat([h[:, goes] @ weight[:, goes].T + more, torch.zeros(len(stays), 32)])
    return weight[:, stays] + torch.linalg.lstsq(system, right, driver="gelsd").solution.T


GROUPS = [torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([0])]  # of two, each of 16 columns
COLUMNS = [torch.arange(32).view(2, 16)[stay].flatten() for stay in GROUPS]


@pytest.mark.parametrize("structure", ["mlp", "attention", "mlp+attention"])
def test_least_squares_solves_the_ridge_problem_on_the_intact_model(structure):
    dense, sequences, neurons = make_model(), tokens(20), some()
    kept = {name: each for name, each in (("mlp", neurons), ("attention", GROUPS)) if name in structure}
    model = copy.deepcopy(dense)
    details = refit(model, kept, sequences, "least_squares", 0.1)
    assert details.pop("refit_flops") > 640 * flops_per_token(dense, sequences.shape[1])
    assert details == {"refit_tokens": 640, "ridge": 0.1, "starved_layers": []}
    for number, (name, columns) in product(range(3), (("mlp", neurons), ("attention", COLUMNS))):
        weight, found = (parts(each, name)[number].output.weight for each in (dense, model))
        if name not in kept or len(columns[number]) == weight.shape[1]:
            assert torch.equal(found, weight)
            continue
        expected = ridge_solution(activations(dense, sequences, name)[number], weight, columns[number])
        assert torch.allclose(found[:, columns[number]].double(), expected, atol=1e-5), (number, name)
        assert not torch.allclose(weight[:, columns[number]].double(), expected, atol=1e-2)


def behind(model, sequences, name):
    """The residual stream behind that part of every layer: (tokens, hidden) per layer."""
    if name == "attention":
        return seen_at(model, sequences, lambda layer: layer.post_attention_layernorm, lambda meets, _output: meets)
    return seen_at(model, sequences, lambda layer: layer, lambda _meets, output: output)


@pytest.mark.parametrize(
    ("structure", "multiplier", "method"),
    [
        *product(["mlp", "attention", "mlp+attention"], [1.0, 0.3], ["sequential"]),
        ("mlp", 1.0, "local_search"), ("mlp+attention", 0.3, "local_search"),
    ],
)  # fmt: skip
def test_sequential_solves_it_on_the_model_refitted_below_and_makes_up_for_half_of_the_drift(
    structure, multiplier, method
):
    """Also where what a block writes is multiplied before it is added, as in Granite; and after a local search."""
    family = {"llama": {}} if multiplier == 1 else {"granite": {"residual_multiplier": multiplier}}
    ((family, changes),) = family.items()
    dense, sequences, neurons = make_model(family, **changes), tokens(20), some()
    kept = {name: each for name, each in (("mlp", neurons), ("attention", GROUPS)) if name in structure}
    model, seen = copy.deepcopy(dense), copy.deepcopy(dense)  # seen: refitted as far as the loop below has come
    details = refit(model, kept, sequences, method, 0.1)
    if method == "local_search":  # it has put others into `kept`, as many
        assert [len(layer) for layer in neurons] == [len(layer) for layer in some()]
        assert all(len(set(layer.tolist()) - set(old.tolist())) for layer, old in zip(neurons, some(), strict=True))
    assert details.pop("refit_flops") > 2 * 640 * flops_per_token(dense, sequences.shape[1])
    assert details == {"refit_tokens": 640, "ridge": 0.1, "starved_layers": []}
    columns = {"mlp": neurons if "mlp" in kept else [torch.arange(48)] * 3}
    columns["attention"] = COLUMNS if "attention" in kept else [torch.arange(32)] * 3
    for number, name in product(range(3), ("attention", "mlp")):
        stays, weight = columns[name][number], parts(dense, name)[number].output.weight
        right = behind(dense, sequences, name)[number]
        drift = right - behind(seen, sequences, name)[number]
        h = activations(seen, sequences, name)[number]
        expected = ridge_solution(h, weight, stays, DRIFT * drift / multiplier)
        found = parts(model, name)[number].output.weight
        assert torch.allclose(found[:, stays].double(), expected, atol=2e-5), (number, name)
        parts(seen, name)[number].output.weight.copy_(found)  # what everything above sees
        lost = torch.ones(weight.shape[1], dtype=torch.bool).index_fill_(0, stays, False)
        assert not found[:, lost].any()
    assert DRIFT == 0.5


def normed_layer():
    """A layer of Gemma 2, whose norm behind the MLP has gains of its own, and the space of its errors."""
    model = make_model("gemma2")
    layer, draw = model.model.layers[1], torch.Generator().manual_seed(0)
    layer.post_feedforward_layernorm.weight += 0.5 * torch.randn(32, generator=draw)
    return model, layer, Space(layout_of(model), model.config, layer, "mlp")


def test_where_a_norm_follows_the_refit_is_near_the_best_that_brute_force_finds():
    model, layer, space = normed_layer()
    part, norm, draw = parts(model, "mlp")[1], layer.post_feedforward_layernorm, torch.Generator().manual_seed(1)
    h = torch.randn(400, 48, generator=draw) @ torch.randn(48, 48, generator=draw)
    h = h * torch.randn(400, 1, generator=draw).mul(2).exp()  # tokens of very different sizes, which the norm evens out
    weight, stays = part.output.weight.clone(), torch.arange(36)
    right = norm(h @ weight.T)

    def error(kept):
        return (norm(h[:, stays] @ kept.T) - right).square().sum()

    repair = Repair(part, stays, "mlp", 1, space)
    outputs = (h @ weight.T)[None]
    repair.add(Passed(h[None], outputs, outputs))
    repair.solve(1e-6)
    ours = error(part.output.weight[:, stays]).item()
    plain = error(ridge_solution(h, weight, stays.tolist()).float()).item()
    best = part.output.weight[:, stays].clone().requires_grad_()
    search = torch.optim.LBFGS([best], max_iter=300, line_search_fn="strong_wolfe")

    def step():
        search.zero_grad()
        loss = error(best)
        loss.backward()
        return loss

    search.step(step)
    assert ours < 1.3 * error(best).item()
    assert ours < 0.7 * plain, "without the weights, the largest tokens decide alone"


def test_drift_goes_back_through_the_norm_to_first_order():
    _, layer, space = normed_layer()
    draw, norm = torch.Generator().manual_seed(2), layer.post_feedforward_layernorm.double()
    output, change = (torch.randn(6, 32, generator=draw, dtype=torch.float64) for _ in range(2))
    drift = torch.func.jvp(norm, (output,), (change,))[1]
    found = torch.func.jvp(norm, (output,), (space.back(drift, output),))[1]
    kept = (norm.weight + 1).abs() > 0.02 * (norm.weight + 1).abs().max()
    torch.testing.assert_close(found[:, kept], drift[:, kept], rtol=1e-3, atol=1e-3)


def test_a_refit_lowers_the_error_of_each_layers_output():
    model, sequences, kept = make_model(), tokens(20), some()
    h, weights = activations(model, sequences), [layer.mlp.down_proj.weight.clone() for layer in model.model.layers]
    refit(model, {"mlp": kept}, sequences, "least_squares", 0.1)
    for layer, stays, every, weight in zip(model.model.layers, kept, h, weights, strict=True):
        plain = (every @ weight.T - every[:, stays] @ weight[:, stays].T).square().sum()
        assert (every @ weight.T - every @ layer.mlp.down_proj.weight.T).square().sum() < 0.95 * plain


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("structure", ["mlp", "attention"])
def test_refits_lower_the_divergence_from_the_dense_model(family, changes, structure):
    dense, held_out = make_model(family, **changes), tokens(16, seed=1)
    kept = {structure: some() if structure == "mlp" else GROUPS}
    kl = []
    for method in ("none", "least_squares", "sequential", "trained"):
        model = copy.deepcopy(dense)
        if method != "none":
            refit(model, kept, tokens(64), method, 0.1)
        cut(model, kept)
        kl.append(token_measures(output(dense, held_out), output(model, held_out))["kl"].mean().item())
    assert kl[0] > 1.05 * max(kl[1:])


@pytest.mark.parametrize("method", [*METHODS, "trained"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_where_nothing_goes_nothing_changes(family, changes, method):
    dense = make_model(family, **changes)
    model = copy.deepcopy(dense)
    refit(model, {"mlp": [torch.arange(48)] * 3}, tokens(8), method, 0.1)
    for layer, before in zip(model.model.layers, dense.model.layers, strict=True):
        assert torch.equal(layer.mlp.down_proj.weight, before.mlp.down_proj.weight)


def test_bias_makes_up_for_the_mean_of_what_goes():
    dense, kept, sequences = make_model(mlp_bias=True), some(), tokens(20)
    model = copy.deepcopy(dense)
    assert refit(model, {"mlp": kept}, sequences, "bias", 0.1) == {
        "refit_tokens": 640, "refit_flops": 640 * flops_per_token(dense, sequences.shape[1])
    }  # fmt: skip
    cut(model, {"mlp": kept})
    every, mlp, before = activations(dense, sequences)[0], model.model.layers[0].mlp, dense.model.layers[0].mlp
    with torch.no_grad():
        difference = mlp.down_proj(every[:, kept[0]]) - before.down_proj(every)
    assert difference.mean(0).abs().max() < 1e-5
    assert difference.abs().max() > 1e-2
    assert torch.equal(mlp.down_proj.weight, before.down_proj.weight[:, kept[0]])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_bias_is_refused_where_a_checkpoint_cannot_hold_one(family):
    with pytest.raises(UserError, match=f"refit 'bias': .*{family} model have no bias.*Use 'least_squares'"):
        refit(make_model(family), {"mlp": some()}, tokens(4), "bias", 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_neurons_are_told_and_still_solved(method, capsys):
    model, kept = make_model(), [torch.arange(20), torch.arange(47), torch.arange(40)]
    assert refit(model, {"mlp": kept}, tokens(1), method, 0.1)["starved_layers"] == [1, 2]
    assert "only 32 calibration tokens" in capsys.readouterr().err
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_system_that_cannot_be_solved_names_its_layer():
    model = make_model()
    model.model.layers[1].mlp.gate_proj.weight[:5] = 0  # neurons that are always silent
    with pytest.raises(UserError, match=r"layer 1, mlp: .* with ridge 0.*Set a larger `ridge`"):
        refit(model, {"mlp": [torch.arange(47)] * 3}, tokens(8), "least_squares", 0.0)
    space = Space(layout_of(model), model.config, model.model.layers[0], "mlp")
    broken = Repair(parts(model, "mlp")[0], torch.arange(40), "mlp", 7, space)
    nothing = torch.zeros(2, 3, 32)
    broken.add(Passed(torch.full((2, 3, 48), torch.nan), nothing, nothing))
    with pytest.raises(UserError, match="layer 7, mlp: "):
        broken.solve(0.1)


def test_the_refit_does_not_depend_on_how_a_neuron_is_scaled():
    plain, sequences = make_model(), tokens(20)
    rescaled = copy.deepcopy(plain)
    for layer in rescaled.model.layers:
        layer.mlp.up_proj.weight[3] *= 64  # exact in float32
        layer.mlp.down_proj.weight[:, 3] /= 64
    assert torch.allclose(output(plain, sequences), output(rescaled, sequences), atol=1e-6)
    for model in (plain, rescaled):
        refit(model, {"mlp": [torch.arange(32)] * 3}, sequences, "sequential", 0.1)
    assert torch.allclose(output(plain, sequences), output(rescaled, sequences), atol=1e-5)


def test_a_neuron_that_is_always_silent_keeps_its_column():
    model = make_model()
    model.model.layers[1].mlp.gate_proj.weight[3] = 0
    before = model.model.layers[1].mlp.down_proj.weight[:, 3].clone()
    refit(model, {"mlp": [torch.arange(32)] * 3}, tokens(20), "sequential", 0.1)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight[:, 3], before)


@pytest.mark.parametrize("method", ["least_squares", "sequential", "trained"])
def test_hidden_states_that_would_take_half_of_the_memory_stand_in_files(method, tmp_path, monkeypatch):
    models, files = [make_model() for _ in range(2)], []
    refit(models[0], {"mlp": some()}, tokens(8), method, 0.1)
    monkeypatch.setattr("hfprune.pruning.refit.free_bytes", lambda _device: 1)
    listed = lambda _layer: files.append({file.name for file in tmp_path.rglob("*") if file.is_file()})  # noqa: E731
    refit(models[1], {"mlp": some()}, tokens(8), method, 0.1, tmp_path, listed)
    expected = {"states"} if method == "least_squares" else {"states", "dense", "activations"}
    assert files == [expected | ({"targets"} if method == "trained" else set())] * 3
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_half_precision_is_refitted_in_float32():
    exact, kept, sequences = make_model(), some(), tokens(40)
    half = copy.deepcopy(exact).bfloat16()
    for model in (exact, half):
        refit(model, {"mlp": kept}, sequences, "least_squares", 0.1)
    for one, other in zip(exact.model.layers, half.model.layers, strict=True):
        assert other.mlp.down_proj.weight.dtype == torch.bfloat16
        assert (one.mlp.down_proj.weight - other.mlp.down_proj.weight.float()).abs().max() < 0.02


@pytest.mark.parametrize("method", [*METHODS, "trained", "local_search"])
def test_a_layer_without_activations_is_left_as_it_is_and_named(method, capsys):
    model, kept = make_model(), some()
    model.model.layers[1].mlp.up_proj.weight[:] = 0
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    refit(model, {"mlp": list(kept)}, tokens(20), method, 0.1)
    assert "layer 1, mlp: not refitted: all activations of its neurons are zero" in capsys.readouterr().err
    expected = torch.zeros_like(before)
    expected[:, kept[1]] = before[:, kept[1]]
    assert model.model.layers[1].mlp.down_proj.weight.equal(expected)


def test_drift_less_than_the_rounding_of_bfloat16_states_is_seen(monkeypatch):
    model, drifts, add = make_model(), [], Repair.add
    model.model.embed_tokens.weight[:] *= 2000  # hidden states of about 40, which bfloat16 rounds to multiples of 0.25
    monkeypatch.setattr(Repair, "add", lambda self, passed, drift: (drifts.append(drift), add(self, passed, drift))[1])
    refit(model.bfloat16(), {"mlp": some()}, tokens(4), "sequential", 0.1)
    assert (drifts[-1] == 0).float().mean() < 0.4

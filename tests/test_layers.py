"""Whole layers of mixtures of experts and hybrids, whose layers are of several kinds: each that stays keeps its own."""

import copy
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfprune.cli.families import ANY
from hfprune.errors import UserError
from hfprune.models.families import FAMILIES, layout_for
from hfprune.models.fewer_layers import refuse_moved_layers
from hfprune.models.loading import count_parameters, load_model
from hfprune.models.mixtures import experts_in
from hfprune.models.units import layers_of
from hfprune.pruning import depth
from hfprune.pruning.budget import check, shape_of, shape_on_disk, units_to_keep
from hfprune.pruning.order import kept_without, may_go, save_order, size_of, steps_of, those_that_go
from hfprune.pruning.refit import refit
from hfprune.pruning.surgery import cut, without_and_narrower
from hfprune.reporting import curves
from hfprune.sharing.model_card import _sublayers
from hfprune.store.filenames import ORDER, PRUNING
from tests import test_experts
from tests.conftest import make_tokenizer
from tests.test_depth import TEXT, assert_finds_the_best, assert_generates_alike_with_a_cache, divergence, without
from tests.test_experts import MIXTURES, mixture, seen_by_experts
from tests.test_families import DENSE, logits, make
from tests.test_surgery import masked, prune_into

HYBRIDS = [name for name in DENSE if layout_for({"model_type": name, **ANY}).attention.others]
DEEP = [name for name in (*HYBRIDS, *MIXTURES) if not layout_for({"model_type": name, **ANY}).numbered]
FULL, LINEAR, CONV = "full_attention", "linear_attention", "conv"
# Further configs: (keys, what they are of the model without layers 0 and 2).
KINDS = [
    ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6},
     {"decoder_sparse_step": 1, "mlp_only_layers": [1, 2]}),
    ("qwen3_moe", {"mlp_only_layers": [0, 3], "num_hidden_layers": 5}, {"mlp_only_layers": [1]}),
    ("qwen3_next", {"layer_types": [LINEAR, FULL, LINEAR, LINEAR], "mlp_only_layers": [1], "num_hidden_layers": 4},
     {"layer_types": [FULL, LINEAR], "mlp_only_layers": [0]}),
    ("deepseek_v3", {"first_k_dense_replace": 3, "num_hidden_layers": 5}, {"first_k_dense_replace": 1}),
    ("exaone_moe", {"num_hidden_layers": 5},
     {"mlp_layer_types": ["sparse"] * 3, "layer_types": ["sliding_attention", FULL, "sliding_attention"]}),
    ("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_layer_end_index": 3, "num_hidden_layers": 5},
     {"moe_layer_start_index": 0, "moe_layer_end_index": 1}),
    ("lfm2_moe", {"layer_types": [CONV, CONV, FULL, FULL, CONV], "num_dense_layers": 2, "num_hidden_layers": 5},
     {"layer_types": [CONV, FULL, CONV], "num_dense_layers": 1}),
    ("lfm2", {"layer_types": None, "full_attn_idxs": [1, 2], "num_hidden_layers": 4},
     {"layer_types": [FULL, CONV], "full_attn_idxs": [0]}),
]  # fmt: skip


def model_of(name, **keys):
    return mixture(name, **keys) if name in MIXTURES else make(name, **keys)


def skipped(model, numbers):
    """A copy of the model whose layers of these numbers return what they are given."""
    model = copy.deepcopy(model)
    for number in numbers:
        layers_of(model)[number].forward = lambda states, *_, **__: states
    return model


def steps_by_layer(model):
    return {step[0][1]: step for step in steps_of(shape_of(model), "layers")}


@pytest.mark.parametrize(
    ("name", "keys", "stated"),
    [*((name, {}, {}) for name in DEEP), *KINDS],
    ids=[*DEEP, *(f"{name}-{'-'.join(keys)}" for name, keys, _ in KINDS)],
)
def test_a_model_without_layers_is_one_of_the_stock_class_that_skips_them(name, keys, stated, tmp_path):
    model = model_of(name, **keys)
    refuse_moved_layers(model.config)
    shape, steps, before = shape_of(model), steps_by_layer(model), logits(model)
    sets = [[number] for number in steps if may_go(shape, steps[number], [*steps.values()])]
    sets.append([0, 2] if stated else sorted(step[0][1] for step in those_that_go(shape, [*steps.values()])))
    for gone in sets:
        small, expected = without(model, [steps[number] for number in gone]), logits(skipped(model, gone))
        torch.testing.assert_close(logits(small), expected, rtol=1e-5, atol=1e-5)
        assert (expected - before).abs().max() > 1e-2
        assert count_parameters(small) == shape.total - sum(size_of(shape, steps[number]) for number in gone)
        if gone in (sets[0], sets[-1]):
            small.save_pretrained(tmp_path)
            again = AutoModelForCausalLM.from_pretrained(tmp_path)
            assert type(again) is type(model) and len(layers_of(again)) == len(steps) - len(gone)
            assert torch.equal(logits(again), logits(small))
            assert_generates_alike_with_a_cache(again)
            assert shape_on_disk(tmp_path) == shape_of(again)
    assert {key: getattr(small.config, key) for key in stated} == stated


def test_a_layer_with_experts_and_one_whose_keys_and_values_are_kept_stay():
    for name, stay in (("lfm2", {1}), ("qwen3_next", {1}), ("deepseek_v3", set()), ("mixtral", set())):
        model = model_of(name, num_experts_per_tok=3)
        shape, steps = shape_of(model), steps_by_layer(model)
        assert {number for number in steps if not may_go(shape, steps[number], [*steps.values()])} == stay
        for order in ([*steps.values()], [*steps.values()][::-1]):
            small = without(model, those_that_go(shape, order))
            assert any(shape_of(small).caches)
            assert not shape.mixture or any(shape_of(small).units["experts"])


KL, LOSS = "greedy_kl", "greedy_perplexity"
SEARCHES = [("qwen2_moe", "none", KL), ("deepseek_v3", "none", LOSS), ("minimax_m2", "sequential", KL)]
SEARCHES += [("qwen3_next", "sequential", LOSS), ("qwen3_5_text", "sequential", KL), ("lfm2", "least_squares", LOSS)]


@pytest.mark.parametrize(("name", "method", "criterion"), SEARCHES)
def test_a_search_finds_what_measuring_every_cut_finds(name, method, criterion):
    assert_finds_the_best(model_of(name), "layers", method, criterion)


@pytest.mark.parametrize("name", ["granitemoe", "lfm2_moe"])
def test_influence_is_one_minus_the_cosine_in_float64(name):
    model, exact, states = model_of(name), model_of(name).double(), []
    exact.config._experts_implementation = "eager"
    for layer in layers_of(exact):
        layer.register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0]))
    layers_of(exact)[-1].register_forward_hook(lambda _module, _inputs, output: states.append(output))
    exact(TEXT)
    expected = {
        number: 1 - torch.cosine_similarity(*states[number : number + 2], dim=-1).mean().item() for number in range(3)
    }
    steps, measures, _ = depth.order(model, TEXT, "block_influence", "layers")
    lowest_first = [steps_by_layer(model)[number] for number in sorted(expected, key=expected.get)]
    assert steps == those_that_go(shape_of(model), lowest_first)
    assert measures == pytest.approx([expected[step[0][1]] for step in steps], rel=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe"])
def test_the_experts_that_follow_are_fitted_to_what_went(name):
    """By least squares in float64, by the class's own code: layer 0 is gone; a dense layer in between passes it on."""
    model, exact = mixture(name), mixture(name).double()
    exact.config._experts_implementation = "eager"
    refit(model, kept_without(shape_of(model), [steps_by_layer(model)[0]]), test_experts.TEXT, "sequential", 0.1)
    passed = []
    hook = layers_of(exact)[0].register_forward_hook(lambda _m, inputs, left: passed.append(left - inputs[0]))
    logits(exact, test_experts.TEXT)
    hook.remove()
    (gone,), below = passed, skipped(exact, [0])
    for number in (1, 2):
        if not (before := experts_in(exact, number)):
            continue
        dense, _ = seen_by_experts(exact, number)
        ahead, (states, chosen, weights) = seen_by_experts(below, number)
        wanted = (gone + 0.5 * (dense - ahead - gone)).flatten(0, 1)
        gone, after, own = 0, experts_in(model, number), experts_in(below, number)
        for expert in range(before.count):
            routed, places = (chosen == expert).nonzero(as_tuple=True)
            weight = weights[routed, places, None]
            h = before.activations(expert, states[routed]) * weight
            r = wanted[routed] * weight / weights[routed].sum(1, keepdim=True)
            gram = h.T @ h
            gram.diagonal().mul_(1.1)
            found = after.neurons_of(expert).output.weight.double()
            expected = before.neurons_of(expert).output.weight + torch.linalg.solve(gram, h.T @ r).T
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
            own.neurons_of(expert).output.weight.copy_(found)


@pytest.mark.parametrize(
    "name", [*HYBRIDS, "mixtral", "deepseek_v3", "granitemoe", "gpt_oss", "qwen3_next", "lfm2_moe"]
)
def test_a_refit_lets_what_follows_make_up_for_a_layer(name):
    model, kl = model_of(name), []
    text = torch.randint(320, (60, 16), generator=torch.Generator().manual_seed(2))
    kept = kept_without(shape_of(model), [steps_by_layer(model)[0]])
    for refitted in (False, True):
        small = copy.deepcopy(model)
        if refitted:
            refit(small, kept, text, "sequential", 0.4)
        cut(small, kept)
        kl.append(divergence(model, small))
    assert kl[1] < kl[0]


@pytest.mark.parametrize(("name", "method"), [("qwen2_moe", "sequential"), ("qwen3_5_text", "none")])
def test_streamed_weights_give_the_same_order_at_the_estimated_cost(name, method, tmp_path):
    model_of(name).save_pretrained(tmp_path)
    streamed, resident = (
        depth.order(load_model(tmp_path, "float32", memory), TEXT, KL, "layers", method)
        for memory in ("streamed", "resident")
    )
    assert streamed[0] == resident[0]
    assert streamed[1] == pytest.approx(resident[1], rel=1e-5)
    estimated = depth.cost(model_of(name), tuple(TEXT.shape), KL, "layers", method)
    assert estimated == pytest.approx(streamed[2]["flops"], rel=0.2) == pytest.approx(resident[2]["flops"], rel=0.2)


@pytest.mark.parametrize(
    ("name", "method", "memories"),
    [("deepseek_v3", "sequential", ["resident", "streamed"]), ("qwen3_next", "none", ["streamed"])],
)
def test_the_checkpoint_is_the_cut_model_and_reloads_in_a_fresh_process(
    name, method, memories, texts, tmp_path, monkeypatch
):  # fmt: skip
    monkeypatch.setattr(curves, "described", lambda *_: pd.DataFrame({"method": ["a"], "ratio": [0.3], "seed": [0]}))
    model = mixture(name)
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    shape, gone = shape_of(model), [steps_by_layer(model)[0]]
    (tmp_path / "order").mkdir()
    save_order(tmp_path / "order" / ORDER, gone, [0.0])
    written = []
    for memory in memories:
        out = tmp_path / memory
        out.mkdir()
        asked = {"ratio": size_of(shape, gone[0]) / shape.total, "structure": "layers", "refit": method}
        prune_into(out, tmp_path / "dense", tmp_path / "order", texts, memory=memory, **asked)
        report = json.loads((out / PRUNING).read_text())
        assert report["reload"]["max_difference"] < 1e-4 and not report["reload"]["trust_remote_code"]
        assert report["ratio_achieved"] == pytest.approx(asked["ratio"])
        assert _sublayers(report["kept"]) == {"Layers": "2 of 3", "Layers gone": "0, counted from 0 before this step"}
        rows = curves.kept_widths([SimpleNamespace(folder=out, key="a key")], None, {})
        assert rows[["part", "kept", "dense"]].values.tolist() == [["attention", kept, 1] for kept in (0, 1, 1)]
        assert {name: sum(map(len, layers)) for name, layers in report["kept"].items()} == report["units"]
        assert report["units_dense"] == {name: sum(layers) for name, layers in shape.whole.items()}
        written.append(((out / "config.json").read_text(), load_file(out / "model.safetensors")))
    (config, tensors), (other_config, others) = written[0], written[-1]
    assert config == other_config
    for key, values in tensors.items():
        torch.testing.assert_close(others[key], values, rtol=1e-4, atol=1e-5)
    if method == "none":
        found = logits(AutoModelForCausalLM.from_pretrained(out))
        torch.testing.assert_close(found, logits(skipped(model, [0])), rtol=1e-5, atol=1e-5)


SEVERAL = "neither its class nor one of hfprune's knows a layer without one of its parts"


@pytest.mark.parametrize(
    ("name", "keys", "asked", "message"),
    [
        ("mixtral", {}, {"structure": "sublayers"}, rf"'sublayers': {SEVERAL}. Cut layers, experts or mlp\."),
        ("deepseek_v3", {}, {"structure": "attention_sublayers"}, rf"{SEVERAL}. Cut layers or experts\."),
        ("lfm2", {}, {"structure": "sublayers"}, rf"{SEVERAL}. Cut layers or mlp\."),
        ("lfm2", {}, {"structure": "mlp+sublayers", "criterion": "entropy"}, rf"'mlp.sublayers': {SEVERAL}"),
        ("minimax", {}, {}, r"linear attention forgets follows from the number of the layer. Cut experts or mlp\."),
        (
            "ernie4_5_moe",
            {"moe_layer_interval": 2, "num_hidden_layers": 4},
            {},
            r"moe_layer_interval = 2: its config says by the number of a layer .* Cut experts\.",
        ),
        (
            "mixtral",
            {},
            {"structure": "mlp+layers", "criterion": "entropy", "depth_share": 0.5},
            r"'mlp.layers': whole layers of a mixture of experts go alone. Set it to 'layers'\.",
        ),
        ("mixtral", {}, {"refit": "least_squares"}, r"'sequential' the experts that stay \(structures experts and lay"),
        ("mixtral", {}, {"ratio": 0.9}, r"leaves at least a layer with experts, .*largest ratio that allows is 0\.5"),
        ("lfm2", {}, {"ratio": 0.9}, r"leaves at least a layer with attention, and can remove"),
        ("qwen3_next", {}, {"ratio": 0.9}, r"leaves at least a layer with attention and one with experts, and can"),
    ],
)
def test_what_cannot_go_is_refused_before_anything_is_measured(name, keys, asked, message, tmp_path):
    model_of(name, **keys).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        check(tmp_path, [{"ratio": 0.3, "structure": "layers", "criterion": KL, "refit": "none"} | asked])


@pytest.mark.parametrize("name", HYBRIDS)
def test_neurons_of_a_hybrid_make_up_the_rest_of_a_budget(name, tmp_path):
    model = make(name)
    shape, scores = shape_of(model), {"mlp": [torch.rand(units) for units in shape_of(model).units["mlp"]]}
    budget = units_to_keep(shape, 0.3, structure="mlp+layers", depth_share=0.8, round_to=1, scores=scores)
    assert [step[0][1] for step in budget.gone] == [2], "the last one, without an order"
    kept = without_and_narrower(shape, budget, scores, "global")
    small, expected = copy.deepcopy(model), logits(masked(model, kept))
    cut(small, kept)
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-4)
    assert count_parameters(small) == pytest.approx(0.7 * shape.total, rel=0.01)
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path, "float32")), logits(small))


def test_every_family_whose_layers_are_of_several_kinds_is_tested():
    others = [name for name in FAMILIES if name not in (*DEEP, *DENSE)]
    assert others == ["minimax"]

"""Whole sublayers and layers: the order in which they go, the budget, the cut, and what reloads."""

import copy
import json
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfprune import api
from hfprune.cli import main
from hfprune.cli.families import ANY
from hfprune.data.sampling import sample_sequences
from hfprune.errors import UserError
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.models.families import FAMILIES, layout_for, layout_of
from hfprune.models.fewer_layers import LISTS, NUMBERS, refuse_moved_layers
from hfprune.models.loading import count_parameters, load_model, load_tokenizer
from hfprune.models.run_part import run_part
from hfprune.models.units import layers_of, part_of
from hfprune.models.walk import enter
from hfprune.pruning import depth
from hfprune.pruning import order as orders
from hfprune.pruning.budget import attention_of_two_stages, shape_of, units_to_keep
from hfprune.pruning.order import (
    best_steps,
    kept_without,
    may_go,
    read_order,
    removed_by,
    save_order,
    size_of,
    steps_of,
)
from hfprune.pruning.refit import refit
from hfprune.pruning.refit_names import RIDGE
from hfprune.pruning.scoring import unit_scores
from hfprune.pruning.surgery import cut, without_and_narrower
from hfprune.runtime.signals import Stopped
from hfprune.store.filenames import ORDER, PRUNING
from tests.conftest import make_model, make_tokenizer, save_dense, sentences
from tests.test_estimate import estimate
from tests.test_estimate import make as make_job
from tests.test_families import CASES, IDS, TOKENS, logits, make
from tests.test_surgery import masked, prune_into, random_scores, write_scores

DEEP = [  # dense families; of mixtures of experts and hybrids see test_layers.py
    pytest.param(name, keys, id=case)
    for case, (name, keys) in zip(IDS, CASES, strict=True)
    if not layout_for({"model_type": name, **ANY, **keys}).attention.others
]
LAYER_0, LAYER_1, LAYER_2 = ((("attention", number), ("mlp", number)) for number in range(3))
SUBLAYERS = ((("attention", 0),), (("mlp", 2),))
TEXT = torch.randint(320, (12, 16), generator=torch.Generator().manual_seed(0))


def silent(model, steps):
    """A copy of the model whose steps write nothing."""
    model = copy.deepcopy(model)
    for name, number in (sublayer for step in steps for sublayer in step):
        output = part_of(model, name, number).output
        output.weight.zero_()
        if output.bias is not None:
            output.bias.zero_()
    return model


def without(model, steps):
    """A copy of the model without the steps."""
    small = copy.deepcopy(model)
    cut(small, kept_without(shape_of(model), steps))
    return small


def divergence(dense, model, tokens=TEXT):
    log_p, log_q = (logits(each, tokens).double().log_softmax(-1) for each in (dense, model))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def loss(model, tokens=TEXT):
    """The mean loss on next tokens, in float64."""
    predictions = logits(model, tokens).double()[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(predictions, tokens[:, 1:].flatten()).item()


def assert_generates_alike_with_a_cache(model):
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    cached, whole = (
        model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=use, **greedy) for use in (True, False)
    )
    assert torch.equal(cached, whole)
    with torch.no_grad():
        before = model(TOKENS[:, :8], use_cache=True).past_key_values
        after = model(TOKENS[:, 8:], past_key_values=before).logits
    torch.testing.assert_close(after, logits(model)[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gone", [(LAYER_0,), (LAYER_1,)], ids=["first", "middle"])
@pytest.mark.parametrize(("name", "keys"), DEEP)
def test_a_model_without_a_layer_is_one_of_the_stock_class_that_computes_the_rest(name, keys, gone, tmp_path):
    model = make(name, **keys)
    refuse_moved_layers(model.config)
    small, expected = without(model, gone), logits(silent(model, gone))
    torch.testing.assert_close(logits(small), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(model)).abs().max() > 1e-2
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(layers_of(again)) == again.config.num_hidden_layers == 2
    assert torch.equal(logits(again), logits(small))
    assert_generates_alike_with_a_cache(again)


@pytest.mark.parametrize(("name", "keys"), DEEP)
def test_a_model_without_an_attention_and_an_mlp_computes_the_rest(name, keys, tmp_path):
    model = make(name, **keys)
    small = without(model, SUBLAYERS)
    torch.testing.assert_close(logits(small), logits(silent(model, SUBLAYERS)), rtol=1e-5, atol=1e-5)
    shape = shape_of(model)
    assert count_parameters(small) == shape.total - sum(size_of(shape, step) for step in SUBLAYERS)
    small.save_pretrained(tmp_path)
    again = load_model(tmp_path, "float32")
    assert torch.equal(logits(again), logits(small))
    assert count_parameters(again) == count_parameters(small)
    assert_generates_alike_with_a_cache(again)


def test_a_layer_that_loses_both_parts_goes_with_its_norms():
    small = without(make("gemma2"), [(("mlp", 1),), (("attention", 1),), (("attention", 2),)])
    assert len(layers_of(small)) == 2
    assert [part_of(small, name, 1).units for name in ("attention", "mlp")] == [0, 48]


def test_layers_of_a_model_whose_sublayers_are_gone_can_go():
    small = without(make("llama", num_hidden_layers=4), SUBLAYERS)
    steps, _, _ = depth.order(small, TEXT, "greedy_kl", "layers")
    assert len(steps) >= 2
    for gone in (steps[:1], [(("attention", 1),)]):
        smaller, expected = without(small, gone), logits(silent(small, gone))
        torch.testing.assert_close(logits(smaller), expected, rtol=1e-5, atol=1e-5)


def test_lists_per_layer_go_with_their_layers():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    small = without(make("smollm3", layer_types=kinds, no_rope_layers=[0, 1, 1], sliding_window=8), [LAYER_0])
    assert (small.config.layer_types, small.config.no_rope_layers) == (kinds[1:], [1, 1])


def test_a_class_that_counts_its_layers_is_refused_by_name():
    model = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match=r"layers of this gpt2 model cannot go: attn\.scaling depends on the number"):
        depth.order(model, TEXT, "block_influence", "layers")
    assert depth.order(model, TEXT, "block_influence", "sublayers")[0]


KL, LOSS = "greedy_kl", "greedy_perplexity"
SEARCHES = [("llama", "layers", "none", KL), ("llama", "sublayers", "sequential", KL)]
SEARCHES += [("cohere", "sublayers", "none", KL)]
SEARCHES += [("gemma2", "sublayers", "least_squares", KL), ("phi", "sublayers", "sequential", KL)]
SEARCHES += [("gpt2", "layers", "least_squares", KL), ("mpt", "layers", "sequential", KL)]
SEARCHES += [("bloom", "sublayers", "sequential", KL), ("llama", "layers", "none", LOSS)]
SEARCHES += [("gemma2", "sublayers", "sequential", LOSS), ("llama", "attention_sublayers", "none", LOSS)]


@pytest.mark.parametrize(("name", "structure", "method", "criterion"), SEARCHES)
def test_a_search_finds_what_measuring_every_cut_finds(name, structure, method, criterion):
    assert_finds_the_best(make(name), structure, method, criterion)


def assert_finds_the_best(model, structure, method, criterion):
    """A search finds what it should: every candidate cut for real, from a dense model refitted for what went before."""
    before = {key: values.clone() for key, values in model.state_dict().items()}
    steps, measures, _ = depth.order(model, TEXT, criterion, structure, method)
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())
    shape, remaining, gone, last = shape_of(model), steps_of(shape_of(model), structure), [], 0.0
    for step, measure in zip(steps, measures, strict=True):
        refitted = copy.deepcopy(model)
        if gone and method != "none":
            refit(refitted, kept_without(shape, gone), TEXT, method, RIDGE)
        small = {each: without(refitted, [*gone, each]) for each in remaining if may_go(shape, each, remaining)}
        if criterion == KL:
            found = {candidate: divergence(model, cut_model) for candidate, cut_model in small.items()}
            costs = {candidate: (kl - last) / size_of(shape, candidate) for candidate, kl in found.items()}
        else:
            found = costs = {candidate: loss(cut_model) for candidate, cut_model in small.items()}
        assert step == min(costs, key=costs.get)
        assert measure == pytest.approx(found[step], rel=1e-4, abs=1e-6)
        last = measure
        gone.append(step)
        remaining.remove(step)
    assert not any(may_go(shape, each, remaining) for each in remaining)


@pytest.mark.parametrize(("structure", "criterion"), [("sublayers", KL), ("layers", LOSS)])
def test_a_search_ends_when_its_share_is_gone_and_ranks_the_rest_as_last_measured(structure, criterion):
    model = make("llama", num_hidden_layers=4)
    shape, whole = shape_of(model), depth.order(model, TEXT, criterion, structure)
    removed = sum(size_of(shape, step) for step in whole[0][:2])
    steps, measures, record = depth.order(model, TEXT, criterion, structure, share=removed / shape.total)
    assert (steps[:2], measures[:2]) == (whole[0][:2], whole[1][:2])
    assert set(steps) == set(whole[0]) and record["flops"] < whole[2]["flops"]
    cost = depth.cost(model, TEXT.shape, criterion, structure, "none", removed / shape.total)
    assert depth.cost(model, TEXT.shape, criterion, structure, "none") == pytest.approx(whole[2]["flops"], rel=0.2)
    assert cost == pytest.approx(record["flops"], rel=0.5), "whether small or large ones go is not known before"
    left = dict(zip(steps[2:], measures[2:], strict=True))
    costs = [(kl - measures[0]) / size_of(shape, step) if criterion == KL else kl for step, kl in left.items()]
    assert costs == sorted(costs)
    for step, measure in left.items():  # as it was beside the first removal alone
        small = without(model, [steps[0], step])
        found = divergence(model, small) if criterion == KL else loss(small)
        assert measure == pytest.approx(found, rel=1e-4, abs=1e-6)


def test_a_search_for_2ssp_removes_as_many_attentions_as_its_split_takes():
    model = make("llama", num_hidden_layers=6)
    shape, whole = shape_of(model), depth.order(model, TEXT, LOSS, "attention_sublayers")
    steps, measures, record = depth.order(model, TEXT, LOSS, "mlp+attention_sublayers", share=0.4)
    count = round(attention_of_two_stages(shape, 0.4 * shape.total) / shape.sublayers["attention"][0])
    assert 0 < count < len(steps) - 1 and len(steps) == len(whole[0])
    assert (steps[:count], measures[:count]) == (whole[0][:count], whole[1][:count])
    cost = depth.cost(model, TEXT.shape, LOSS, "mlp+attention_sublayers", "none", 0.4)
    assert record["flops"] == pytest.approx(cost, rel=0.2)
    assert record["flops"] < whole[2]["flops"]
    assert depth.order(model, TEXT, LOSS, "mlp+attention_sublayers", share=1e-6)[0] == [], "it takes none"


@pytest.mark.parametrize("name", ["llama", "cohere", "olmo2"])
def test_influence_is_one_minus_the_cosine_in_float64(name):
    model = make(name)
    exact, states = make(name).double(), []
    for layer in layers_of(exact):
        layer.register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0]))
    layers_of(exact)[-1].register_forward_hook(lambda _module, _inputs, output: states.append(output))
    exact(TEXT)
    expected = {
        step: 1 - torch.cosine_similarity(*states[step[0][1] : step[0][1] + 2], dim=-1).mean().item()
        for step in steps_of(shape_of(model), "layers")
    }
    steps, measures, _ = depth.order(model, TEXT, "block_influence", "layers")
    assert steps == sorted(expected, key=expected.get)[:-1]
    assert measures == pytest.approx([expected[step] for step in steps], rel=1e-4)


def test_influence_of_sublayers_is_that_of_what_each_adds():
    model, added = make("llama").double(), {}
    for number, layer in enumerate(layers_of(model)):
        for name, norm, module in (
            ("attention", layer.input_layernorm, layer.self_attn),
            ("mlp", layer.post_attention_layernorm, layer.mlp),
        ):
            norm.register_forward_pre_hook(lambda _m, inputs, key=(name, number): added.update({key: [inputs[0]]}))
            module.register_forward_hook(
                lambda _m, _i, output, key=(name, number): added[key].append(
                    output[0] if key[0] == "attention" else output
                )
            )
    model(TEXT)
    expected = {
        (key,): 1 - torch.cosine_similarity(read, read + written, dim=-1).mean().item()
        for key, (read, written) in added.items()
    }
    steps, measures, _ = depth.order(make("llama"), TEXT, "block_influence", "sublayers")
    assert measures == pytest.approx([expected[step] for step in steps], rel=1e-4)
    assert measures == sorted(measures)
    assert {name for ((name, _),) in set(expected) - set(steps)} == {"attention", "mlp"}, "one of each stays"


@pytest.mark.parametrize("method", ["least_squares", "sequential"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "granite", "mpt", "bloom"])
def test_a_refit_lets_what_follows_make_up_for_a_layer(name, method):
    model = make(name)
    text = torch.randint(320, (60, 16), generator=torch.Generator().manual_seed(2))
    kl = []
    for refitted in (False, True):
        small = copy.deepcopy(model)
        kept = kept_without(shape_of(model), [LAYER_1])
        if refitted:
            refit(small, kept, text, method, 0.1)
            assert torch.equal(part_of(small, "mlp", 0).output.weight, part_of(model, "mlp", 0).output.weight)
        cut(small, kept)
        kl.append(divergence(model, small))
    assert kl[1] < kl[0]


def test_the_part_that_follows_is_fitted_to_what_went():
    """By least squares: the next output layer, from its activations in the intact model, adds what the MLP wrote."""
    model = make("llama").double()
    states, arguments = enter(model, TEXT)
    passed = []
    for number, name in ((0, "attention"), (0, "mlp"), (1, "attention")):
        with torch.no_grad():
            passed.append(
                run_part(layout_of(model), model.config, layers_of(model)[number], name, arguments[number], states)
            )
        states = states + passed[-1].written
    h, wanted = passed[2].activations.flatten(0, 1), passed[1].written.flatten(0, 1)
    gram = h.T @ h
    gram.diagonal().mul_(1.1)
    expected = part_of(model, "attention", 1).output.weight + torch.linalg.solve(gram, h.T @ wanted).T
    small = make("llama")
    refit(small, kept_without(shape_of(small), [(("mlp", 0),)]), TEXT, "least_squares", 0.1)
    torch.testing.assert_close(part_of(small, "attention", 1).output.weight.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.08, 0.2, 0.3, 0.45])
def test_a_budget_is_met_to_half_of_the_smallest_sublayer(ratio):
    shape = shape_of(make("llama", num_hidden_layers=6))
    remove = units_to_keep(shape, ratio, structure="sublayers").share * shape.total
    order = [step for step in steps_of(shape, "sublayers")[::-1] if step[0][1]]
    taken = best_steps(shape, order, remove)
    smallest = min(size_of(shape, step) for step in order)
    assert abs(sum(size_of(shape, step) for step in taken) - remove) <= smallest / 2
    assert len(taken) == len(set(taken))
    layers = best_steps(shape, steps_of(shape, "layers")[1:], remove)
    assert layers == steps_of(shape, "layers")[1 : 1 + round(remove / shape.layers[0])]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ratio": 0.99, "structure": "layers"}, "leaves at least a layer, .*The largest ratio that allows is 0.35"),
        ({"ratio": 0.99, "structure": "sublayers"}, "at least an attention and an MLP, .*largest ratio .* is 0.35"),
        ({"target_parameters": 9, "structure": "layers"}, "The smallest target_parameters that allows is [0-9]+"),
        (
            {"ratio": 0.01, "structure": "layers"},
            "less than half of the 7,744 that structure 'layers'.*nothing would",
        ),
        ({"ratio": 0.01, "structure": "sublayers"}, "less than half of the 3,072 that structure 'sublayers'"),
        ({"target_parameters": 10**6, "structure": "layers"}, "the target has to be smaller"),
    ],
    ids=str,
)
def test_what_layers_cannot_give_is_refused_with_what_they_can(asked, message):
    with pytest.raises(UserError, match=message):
        units_to_keep(shape_of(make_model()), **asked)


def test_the_last_budget_that_is_allowed_leaves_one_layer():
    shape = shape_of(make_model())
    with pytest.raises(UserError) as refused:
        units_to_keep(shape, target_parameters=9, structure="layers")
    smallest = int(str(refused.value).split()[-1].rstrip("."))
    share = units_to_keep(shape, target_parameters=smallest, structure="layers").share
    steps = best_steps(shape, steps_of(shape, "layers")[1:], share * shape.total)
    assert steps == [LAYER_1, LAYER_2]


def test_a_width_cut_of_a_model_without_a_part_is_refused():
    with pytest.raises(UserError, match=r"the mlp of some layers is gone already. Cut sublayers or layers"):
        units_to_keep(shape_of(without(make_model(), SUBLAYERS)), 0.1)


def test_a_search_that_is_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    model = make("llama", num_hidden_layers=4)
    whole = depth.order(model, TEXT, "greedy_kl", "layers", "sequential")[:2]
    measured = []
    measure = depth.Search._measure

    def counted(self, gone, *rest):
        measured.append(len(gone))
        return measure(self, gone, *rest)

    monkeypatch.setattr(depth.Search, "_measure", counted)
    stop = mock.MagicMock()
    stop.return_value.__enter__.return_value.received = True
    with monkeypatch.context() as stopped, pytest.raises(Stopped, match="1 removals are kept"):
        stopped.setattr(depth, "sigterm_deferred", stop)
        depth.order(model, TEXT, "greedy_kl", "layers", "sequential", resume=tmp_path)
    assert depth.order(model, TEXT, "greedy_kl", "layers", "sequential", resume=tmp_path)[:2] == whole
    assert measured == [0, 1, 2], "nothing twice"


def test_an_order_is_read_as_it_was_written(tmp_path):
    save_order(tmp_path / ORDER, [LAYER_2, LAYER_0], [0.25, 1e-9])
    assert read_order(tmp_path / ORDER) == ([LAYER_2, LAYER_0], [0.25, 1e-9])


@pytest.mark.parametrize("method", ["none", "sequential"])
@pytest.mark.parametrize(("structure", "gone"), [("layers", [LAYER_1]), ("sublayers", [SUBLAYERS[1], LAYER_0[:1]])])
def test_the_checkpoint_is_the_cut_model_and_reloads_in_a_fresh_process(structure, gone, method, texts, tmp_path):
    dense = save_dense(tmp_path / "dense")
    model = load_model(dense, "float32")
    shape, (out, order) = shape_of(model), (tmp_path / "out", tmp_path / "order")
    out.mkdir()
    order.mkdir()
    save_order(order / ORDER, gone, [0.0] * len(gone))
    ratio = sum(size_of(shape, step) for step in gone) / shape.total
    details = prune_into(out, dense, order, texts, ratio=ratio, structure=structure, refit=method)
    report = json.loads((out / PRUNING).read_text())
    assert report["reload"]["max_difference"] == 0 and report["reload"]["generated"] == 8
    assert report["reload"]["trust_remote_code"] == (structure == "sublayers")
    assert details["ratio_achieved"] == pytest.approx(ratio)
    kept = kept_without(shape, gone)
    assert report["kept"] == {name: [units.tolist() for units in layers] for name, layers in kept.items()}
    tokens = sample_sequences(load_tokenizer(dense), model.config, texts, 6, 32, 0)
    if method != "none":
        refit(model, kept, tokens, method, RIDGE)
    torch.testing.assert_close(logits(load_model(out, "float32")), logits(silent(model, gone)), rtol=1e-4, atol=1e-4)


def test_streamed_weights_give_the_same_order(tmp_path):
    dense = save_dense(tmp_path / "dense")
    orders = [
        depth.order(load_model(dense, "float32", memory), TEXT, "greedy_kl", "sublayers", "sequential")
        for memory in ("resident", "streamed")
    ]
    assert orders[0][0] == orders[1][0]
    assert orders[0][1] == pytest.approx(orders[1][1], rel=1e-5)


def test_the_python_interface_removes_layers():
    model = make_model()
    texts = [sentences(number, 60) for number in range(4)]
    small = api.prune(model, make_tokenizer(), texts, 0.15, "SLEB", samples=3, length=16)
    assert len(layers_of(small)) == 2 and type(small) is type(model)
    recipe = {"criterion": "greedy_kl", "structure": "sublayers", "refit": "sequential"}
    small = api.prune(model, make_tokenizer(), texts, 0.1, recipe, samples=3, length=16)
    assert type(small).__name__ == "PerLayerLlamaForCausalLM"
    with pytest.raises(UserError, match=r"structure 'layers': .*hfprune.prune"):
        api.allocate(model, {}, 0.1, "layers")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"criterion": "entropy", "structure": "layers"},
            "criterion entropy does not rank the units of structure layers",
        ),
        ({"criterion": "greedy_kl"}, "criterion greedy_kl does not rank the units of structure mlp; these do: entropy"),
        ({"criterion": "greedy_kl", "structure": "layers", "allocation": "global"}, "'allocation' does not go with"),
        ({"criterion": "greedy_kl", "structure": "layers", "refit": "bias"}, "refit 'bias' does not go with structure"),
        (
            {"criterion": "greedy_kl", "structure": "sublayers", "pad": True},
            "'pad' does not go with structure",
        ),
        (
            {"criterion": "fisher_token", "structure": "mlp+layers"},
            r"structure mlp\+layers needs 'depth_share': .* that whole layers give, such as 0.5",
        ),
        ({"criterion": "fisher_token", "depth_share": 0.5}, "'depth_share' goes with structure .*, not mlp"),
        (
            {"criterion": "greedy_kl", "structure": "mlp+layers", "depth_share": 0.5},
            "greedy_kl does not rank the units of structure mlp.layers",
        ),
        (
            {"criterion": "entropy", "structure": "mlp+layers", "depth_share": 0.5, "refit": "trained"},
            "refit 'trained' does not go with structure",
        ),
        ({"criterion": "greedy_kl", "structure": "layers", "ratio_of": "mlp"}, "'ratio_of: mlp' goes with"),
    ],
    ids=str,
)
def test_a_method_that_makes_no_sense_is_refused(settings, message, experiment):
    with pytest.raises(UserError, match=message):
        parse(Experiment, experiment | {"methods": [{"mine": settings}]}, "my.yaml")


def test_an_experiment_of_layers_runs_and_its_cost_is_that_recorded(experiment, tmp_path, monkeypatch, capsys):
    reload = {"trust_remote_code": False, "transformers": "5", "parameters": 1, "max_difference": 0.0, "generated": 8}
    reload |= {"tolerance": 1e-4, "dtype": "float32"}
    monkeypatch.setattr("hfprune.models.checkpoint.prove", lambda *_: reload)
    deep = {"criterion": "greedy_kl", "structure": "sublayers", "refit": "sequential"}
    methods = ["ShortGPT", {"mine": deep}, {"mine too": deep | {"criterion": "block_influence"}}]
    methods += ["2SSP", {"both": {"criterion": "wanda", "refit": "sequential", **MIXED_CUT}}]
    asked = experiment | {"store": str(tmp_path / "store"), "methods": methods, "ratios": [0.2, 0.3]}
    plan = Plan(parse(Experiment, asked, "test"))
    assert len(plan.scores) == 2 and len(plan.jobs["order"]) == 4, "a mixed cut reads the same order"
    costs = estimate(plan, plan.experiment)
    for job in plan.jobs["prune"].values():
        cost, manifest = costs.cost(job), make_job(plan, job)
        if job.settings.refit != "none":
            assert cost.flops == pytest.approx(manifest["details"]["refit_flops"], rel=0.2)
        if job.settings.structure == "layers":
            assert count_parameters(costs.models.of(job)) == manifest["details"]["parameters"]
    for job in plan.jobs["order"].values():
        recorded = plan.store.manifest("order", job.key)["details"]
        searches = job.settings.criterion in orders.SEARCHES  # whether small or large ones go is not known before
        assert costs.cost(job).flops == pytest.approx(recorded["flops"], rel=0.5 if searches else 0.01)
    card = (plan.store.folder(next(iter(plan.jobs["prune"].values())).recipe) / "README.md").read_text()
    assert "ShortGPT" in card and "| Layers | 2 of 3 |" in card
    measures = [job for model in plan.models for job in model.results if job.recipe.stage == "measure"]
    shown = [*measures[:3], measures[-1]]
    for job in shown:
        make_job(plan, job)
    words = [plan.manifest(job) for job in shown]
    assert main(["collect", "--store", str(plan.store.root), "--output", str(tmp_path / "metrics.csv"), *words]) == 0
    table = (tmp_path / "metrics.csv").read_text()
    assert "ShortGPT" in table and ",order,seconds" in table
    mixed = [line for line in table.splitlines() if ",mlp+sublayers," in line]
    assert any(",order,seconds" in line for line in mixed) and any(",score,seconds" in line for line in mixed)


def test_an_order_of_another_structure_is_refused(experiment, tmp_path, monkeypatch, capsys):
    asked = experiment | {"store": str(tmp_path / "store"), "methods": ["ShortGPT"], "ratios": [0.2]}
    plan = Plan(parse(Experiment, asked, "test"))
    (job,) = plan.jobs["prune"].values()
    make_job(plan, job.inputs["scores"])
    capsys.readouterr()
    words = ["--model", plan.manifest(job.inputs["model"]), "--scores", plan.manifest(job.inputs["scores"])]
    words = ["prune", *words, "--store", str(plan.store.root), "--ratio", "0.1"]
    for structure, message in (
        ("mlp", "an artifact of 'order'; structure 'mlp' takes the scores of `hfprune score`"),
        ("sublayers", "an order for structure 'layers'; this cut has structure 'sublayers'"),
        ("mlp+sublayers --depth-share 0.5", "structure 'mlp+sublayers' takes both: give --order"),
        (f"layers --order {plan.manifest(job.inputs['scores'])}", "'layers' takes --scores alone: leave out --order"),
    ):
        assert main([*words, "--structure", *structure.split()]) == 2
        assert message in capsys.readouterr().err


def test_an_order_that_was_searched_for_less_is_refused(experiment, tmp_path, monkeypatch, capsys):
    asked = experiment | {"store": str(tmp_path / "store"), "methods": ["SLEB"], "ratios": [0.1, 0.2]}
    plan = Plan(parse(Experiment, asked, "test"))
    (search,) = plan.jobs["order"].values()
    assert search.settings.share == 0.2, "cuts of all sizes read one order"
    make_job(plan, search)
    capsys.readouterr()
    words = ["prune", "--model", plan.manifest(search.inputs["model"]), "--scores", plan.manifest(search)]
    words += ["--store", str(plan.store.root), "--structure", "layers"]
    for budget, message in (
        (
            "--ratio 0.3",
            "for a share of 0.2 of all parameters; this cut needs 0.3. Run `hfprune order` with --share 0.3",
        ),
        ("--target-parameters 90000", "this cut needs the whole. Run `hfprune order` with no --share"),
    ):
        assert main([*words, *budget.split()]) == 2
        assert message in capsys.readouterr().err


def test_a_config_of_a_family_names_no_other_list_per_layer():
    """A list that nobody cuts would be of the wrong length."""
    for name in FAMILIES:
        config = AutoConfig.for_model(name, num_hidden_layers=7)
        lists = {key for key, value in config.to_dict().items() if isinstance(value, list)}
        assert lists <= {*LISTS, *NUMBERS, "eos_token_id"}


MIXED_CUT = {"structure": "mlp+sublayers", "depth_share": 0.5}


@pytest.mark.parametrize(("structure", "gone"), [("mlp+layers", [LAYER_1]), ("mlp+sublayers", [SUBLAYERS[0]])])
def test_neurons_make_up_the_rest_of_a_budget(structure, gone):
    """With scores that rise with the number of the neuron, the first of the MLPs that stay go."""
    shape = shape_of(make_model())
    share = sum(size_of(shape, step) for step in gone) / shape.total
    asked = {"structure": structure, "depth_share": 0.75, "round_to": 1, "order": gone}
    budget = units_to_keep(shape, share / 0.75, **asked)
    assert list(budget.gone) == gone
    scores = {"mlp": [torch.arange(float(units)) for units in shape.units["mlp"]]}
    kept = without_and_narrower(shape, budget, scores, "uniform")
    small = make_model()
    cut(small, kept)
    removed = 1 - count_parameters(small) / shape.total
    assert removed == pytest.approx(share / 0.75, abs=2 * shape.parameters["mlp"] / shape.total)
    for number, units in enumerate(kept["mlp"]):
        if ("mlp", number) in gone[0]:
            assert not len(units)
        else:
            width = shape.units["mlp"][number]
            assert 0 < len(units) < width
            assert torch.equal(units, torch.arange(width - len(units), width))
    assert count_parameters(without(make_model(), gone)) == shape.total - removed_by(shape, gone)


def test_a_layer_that_goes_in_two_steps_takes_its_norms():
    model = make_model()
    gone = [(("mlp", 1),), (("attention", 1),)]
    assert shape_of(model).total - removed_by(shape_of(model), gone) == count_parameters(without(model, gone))


@pytest.mark.parametrize("method", ["none", "sequential"])
def test_a_mixed_cut_is_the_model_with_both_silent_and_reloads_in_a_fresh_process(method, texts, tmp_path):
    dense = save_dense(tmp_path / "dense")
    model, order, out = load_model(dense, "float32"), tmp_path / "order", tmp_path / "out"
    for folder in (order, out):
        folder.mkdir()
    save_order(order / ORDER, SUBLAYERS, [0.0, 0.0])
    scores = write_scores(tmp_path / "scores", random_scores())
    asked = {"ratio": 0.15, "refit": method, "allocation": "global", **MIXED_CUT}
    details = prune_into(out, dense, scores, texts, order=order, **asked)
    report = json.loads((out / PRUNING).read_text())
    assert report["reload"]["max_difference"] < 1e-4 and report["depth_share"] == 0.5
    assert details["ratio_achieved"] == pytest.approx(0.15, abs=0.01)
    kept = {
        name: [torch.tensor(units, dtype=torch.int64) for units in layers] for name, layers in report["kept"].items()
    }
    assert any(not len(units) for layers in kept.values() for units in layers)
    assert any(0 < len(units) < 48 for units in kept["mlp"])
    if method != "none":
        tokens = sample_sequences(load_tokenizer(dense), model.config, texts, 6, 32, 0)
        refit(model, kept, tokens, method, RIDGE)
    expected = logits(masked(model, kept))
    torch.testing.assert_close(logits(load_model(out, "float32")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"ratio": 0.2, "depth_share": 0.01},
            "ratio 0.2 of all parameters with depth_share 0.01: layers take 87 of 8,7.* Set a depth_share above 0.44",
        ),
        ({"ratio": 0.01, "depth_share": 0.5}, "none would go. Remove more, or cut mlp"),
        (
            {"ratio": 0.16, "depth_share": 0.5},
            "smallest of them, which has 7,744: none would go. Remove more, or cut mlp",
        ),
        ({"ratio": 0.45, "depth_share": 0.3}, "that stay can give 9,024. Set a larger depth_share, or remove less"),
        (
            {"ratio": 0.6, "depth_share": 0.9},
            "where at least a layer stays. The largest depth_share that allows is 0.5",
        ),
        ({"ratio": 0.3, "depth_share": 0.99}, "make up 0, .* none would go. Set a smaller depth_share, or .*'layers'"),
        ({"target_parameters": 10**9, "depth_share": 0.5}, "the model has 43,744 parameters; the target has to be sm"),
    ],
)
def test_what_layers_and_neurons_cannot_give_together_is_refused(asked, message):
    with pytest.raises(UserError, match=message):
        units_to_keep(shape_of(make_model()), structure="mlp+layers", **asked)


@pytest.mark.parametrize("depth", ["layers", "sublayers", "attention_sublayers"])
def test_the_only_layer_stays(depth):
    shape = shape_of(make_model(num_hidden_layers=1))
    for structure, share in ((depth, None), (f"mlp+{depth}", 0.5)):
        with pytest.raises(UserError, match=r"leaves at least an? \w+.*Cut mlp"):
            units_to_keep(shape, 0.2, structure=structure, depth_share=share)


def test_a_model_without_some_sublayers_is_scored_and_cut_again():
    """Those that are gone have no scores; others go, and neurons of the MLPs that are left."""
    model = make_model(num_hidden_layers=4)
    gone = SUBLAYERS
    cut(model, kept_without(shape_of(model), gone))
    shape = shape_of(model)
    by_criterion = unit_scores(model, torch.arange(64).view(2, 32), ["entropy", "wanda"], 0, 1)
    for scores in by_criterion.values():
        assert {name: list(map(len, layers)) for name, layers in scores.items()} == shape.units
    budget = units_to_keep(shape, 0.3, structure="mlp+sublayers", depth_share=0.5, scores=by_criterion["wanda"])
    small = count_parameters(model) * 0.7
    cut(model, without_and_narrower(shape, budget, by_criterion["wanda"], "uniform"))
    assert count_parameters(model) == pytest.approx(small, rel=0.02)


def test_the_python_interface_removes_sublayers_and_neurons():
    texts = [sentences(number, 60) for number in range(4)]
    recipe = {"criterion": "wanda", "allocation": "global", "refit": "sequential", **MIXED_CUT}
    model = make_model()
    small = api.prune(model, make_tokenizer(), texts, 0.2, recipe, samples=3, length=16, round_to=1)
    units = [part_of(small, "mlp", number).units for number in range(len(layers_of(small)))]
    units += [part_of(small, "attention", number).units for number in range(len(layers_of(small)))]
    assert 0 in units or len(layers_of(small)) < 3
    assert count_parameters(small) / count_parameters(model) == pytest.approx(0.8, abs=0.02)
    with pytest.raises(UserError, match=r"structure 'mlp\+layers': no scores choose layers"):
        api.allocate(model, {}, 0.1, "mlp+layers")

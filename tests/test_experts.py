"""Mixtures of experts: each family's description agrees with its own class, and what is cut is the model without it."""

import copy
import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from hfprune.cli.families import ANY
from hfprune.data.sampling import sample_sequences
from hfprune.errors import UserError
from hfprune.experiment.estimate import report
from hfprune.experiment.schema import Experiment, parse
from hfprune.models.activations import CHUNK, graph_bytes
from hfprune.models.families import FAMILIES, layout_for
from hfprune.models.head import head_of
from hfprune.models.history import kept_shapes
from hfprune.models.loading import check_config, count_parameters, flops_per_token, load_model
from hfprune.models.mixtures import all_experts, experts_in
from hfprune.models.units import layers_of, parts
from hfprune.models.walk import final_states
from hfprune.pruning import scoring
from hfprune.pruning.budget import Budget, check, shape_of, shape_on_disk, units_shapes, units_to_keep
from hfprune.pruning.criteria import CRITERIA, GradientCriterion, entropy_gradient
from hfprune.pruning.recorder import Sums
from hfprune.pruning.refit import refit
from hfprune.pruning.refit_names import RIDGE
from hfprune.pruning.scoring import unit_scores
from hfprune.pruning.surgery import best_units, cut
from tests.conftest import make_tokenizer
from tests.test_families import HYBRID, TOKENS, bytes_kept, logits, make
from tests.test_surgery import run_prune

LATENT = {
    "num_key_value_heads": 4, "head_dim": None, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
NARROW = {"moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, **NARROW}
EVERY_SECOND = {"mlp_layer_types": ["sparse", "dense", "sparse"], **ROUTED}
GROUPED = {"n_group": 2, "topk_group": 1}
LOCAL = {"num_local_experts": 8}
MIXTURES = {
    "mixtral": LOCAL,
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1], **NARROW},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True, **NARROW},
    "olmoe": {"num_experts": 8},
    "granitemoe": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.5, **LOCAL},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5, **ROUTED, **LATENT, **GROUPED},
    "deepseek_v3": {**ROUTED, **LATENT, **GROUPED},
    "glm4_moe": ROUTED,
    "glm4_moe_lite": {**EVERY_SECOND, **LATENT},
    "dots1": {"norm_topk_prob": True, **ROUTED},
    "solar_open": {"n_routed_experts": 8, "n_shared_experts": 1, **NARROW},
    "exaone_moe": {"num_experts": 8, "num_shared_experts": 1, "sliding_window": 8, **NARROW, **GROUPED},
    "gpt_oss": {"sliding_window": 8, **LOCAL},
    "minimax": {
        "layer_types": ["full_attention", "linear_attention", "linear_attention"], "block_size": 8,
        "linear_attn_alpha_factor": 1.5, "mlp_alpha_factor": 1.5, "mlp_beta_factor": 0.7, **LOCAL,
    },
    "minimax_m2": LOCAL,
    "ernie4_5_moe": {
        "moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        "num_experts_per_tok": None, **NARROW,
    },
    "qwen3_next": {**HYBRID, "num_experts": 8, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0], **NARROW},
    "qwen3_5_moe_text": {**HYBRID, "num_experts": 8, "shared_expert_intermediate_size": 16, **NARROW},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"], "head_dim": None, "num_experts": 8, "num_dense_layers": 1,
        **NARROW,
    },
}  # fmt: skip
NARROWED = [name for name in MIXTURES if not layout_for({"model_type": name, **ANY}).mixture.refused]
WITH_HEADS = [name for name in MIXTURES if not layout_for({"model_type": name, **ANY}).attention.refused]
CORRECTED_FROM_OUTSIDE = ("minimax_m2", "lfm2_moe")  # the block gives its router the correction
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 1}


def mixture(name, **keys):
    """A random mixture of eight experts, of which a token is sent to three; a correction changes the choice."""
    model = make(name, **({"num_experts_per_tok": 3} | MIXTURES[name] | keys))
    for experts in all_experts(model):
        if experts.correction is not None:
            owner, key = experts._correction
            getattr(owner, key).normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return model


def masked_router(model, kept):
    """A copy whose routers, computed by their own code, never choose the experts that are not in `kept`."""
    model = copy.deepcopy(model)
    for number, stays in enumerate(kept):
        if experts := experts_in(model, number):
            gone = torch.ones(experts.count, dtype=torch.bool).index_fill_(0, stays, False)
            mask_router(experts, gone)
    return model


def mask_router(experts, gone):
    """Let an expert that is gone have a probability of 0, and never be chosen."""
    real = torch.nn.functional.linear

    def without(own, *inputs):
        def linear(*operands):
            return real(*operands).masked_fill(gone, -1e9)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", linear)
            return own(*inputs)

    experts.router.forward = partial(without, experts.router.forward)
    if experts.correction is not None:
        owner, key = experts._correction
        getattr(owner, key).masked_fill_(gone, -1e9)


def silenced_neurons(model, kept, experts_kept=None):
    """A copy whose experts, or those in `experts_kept`, write through the neurons in `kept` alone."""
    model = copy.deepcopy(model)
    for number, stays in enumerate(kept):
        if experts := experts_in(model, number):
            rows = experts_kept[number] if experts_kept else torch.arange(experts.count)
            silent = torch.ones(experts.count, experts.width).bool()
            silent[rows] = silent[rows].scatter(1, stays, False)
            module = experts.experts
            down = module.down_proj if module.is_transposed else module.down_proj.transpose(1, 2)
            down[silent] = 0
    return model


def some_experts(model):
    """The same number of experts of every layer, and of every group."""
    draw, kept = torch.Generator().manual_seed(2), []
    for number in range(len(layers_of(model))):
        experts = experts_in(model, number)
        groups = experts.groups if experts else 1
        stays = [torch.randperm(8 // groups, generator=draw)[: 6 // groups].sort().values for _ in range(groups)]
        stays = torch.cat([each + group * 8 // groups for group, each in enumerate(stays)])
        kept.append(stays if experts else torch.zeros(0, dtype=torch.int64))
    return kept


def some_neurons(model):
    """The same number of neurons of every expert, others in each."""
    draw, kept = torch.Generator().manual_seed(3), []
    for experts in (experts_in(model, number) for number in range(len(layers_of(model)))):
        if experts:
            order = torch.rand(experts.count, experts.width, generator=draw).argsort(1)
            kept.append(order[:, : experts.width - 8].sort(1).values)
        else:
            kept.append(torch.zeros(0, dtype=torch.int64))
    return kept


def test_every_family_is_tested():
    assert list(MIXTURES) == [name for name in FAMILIES if layout_for({"model_type": name, **ANY}).mixture]


@pytest.mark.parametrize("name", MIXTURES)
def test_the_router_chooses_as_its_class_does(name):
    experts = list(all_experts(mixture(name)))[-1]
    states = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    corrected = (experts.correction,) if name in CORRECTED_FROM_OUTSIDE else ()
    found_logits, expected, chosen = experts.router(states, *corrected)
    weights, ours = experts.route(found_logits.float())
    torch.testing.assert_close(
        torch.zeros(50, 8).scatter(1, ours, weights), torch.zeros(50, 8).scatter(1, chosen, expected)
    )


def reloaded(model, folder):
    """The model, saved and reloaded by its stock class."""
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model)
    assert count_parameters(again) == count_parameters(model)
    cached, whole = (
        again.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=use, **GREEDY) for use in (True, False)
    )
    assert torch.equal(cached, whole)
    return again


def assert_cut_to(model, kept, expected, before, folder):
    """Cut, saved and reloaded, the model has the expected logits, which are not those of before."""
    cut(model, kept)
    torch.testing.assert_close(logits(reloaded(model, folder)), expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", MIXTURES)
def test_a_model_without_experts_is_the_one_whose_router_never_chooses_them(name, tmp_path):
    model = mixture(name)
    kept, before = some_experts(model), logits(model)
    expected = logits(masked_router(model, kept))
    assert_cut_to(model, {"experts": kept}, expected, before, tmp_path)
    assert shape_of(model).mixture.count == 6


@pytest.mark.parametrize("name", NARROWED)
def test_a_model_with_narrower_experts_is_the_one_with_those_neurons_silent(name, tmp_path):
    model = mixture(name)
    kept, before = some_neurons(model), logits(model)
    expected = logits(silenced_neurons(model, kept))
    assert_cut_to(model, {"mlp": kept}, expected, before, tmp_path)


def some_of_both(model):
    """Some experts, and some neurons inside them; of a layer without experts nothing."""
    experts, neurons = some_experts(model), some_neurons(model)
    return {"experts": experts, "mlp": [rows[stay] for rows, stay in zip(neurons, experts, strict=True)]}


def without_both(model, kept):
    """The model whose routers never choose the experts that go, and whose other neurons that go are silent."""
    return masked_router(silenced_neurons(model, kept["mlp"], kept["experts"]), kept["experts"])


@pytest.mark.parametrize("name", NARROWED)
def test_a_model_with_fewer_and_narrower_experts_is_the_one_without_both(name, tmp_path):
    model = mixture(name)
    kept, before = some_of_both(model), logits(model)
    expected = logits(without_both(model, kept))
    assert_cut_to(model, kept, expected, before, tmp_path)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_attention_of_a_mixture_is_cut_as_that_of_a_dense_model(name, tmp_path):
    model = mixture(name)
    masked = copy.deepcopy(model)
    for part in parts(masked, "attention"):
        part.output.weight[:, part.columns :] = 0
    expected = logits(masked)
    cut(model, {"attention": [torch.tensor([0])] * 3})
    torch.testing.assert_close(logits(reloaded(model, tmp_path)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_budget_is_the_same_from_the_files_as_from_the_model(name, tmp_path):
    model = mixture(name)
    model.save_pretrained(tmp_path)
    assert shape_on_disk(tmp_path) == shape_of(model)
    shape, before = shape_of(model), count_parameters(model)
    cut(model, {"experts": some_experts(model)})
    removed = 2 // shape.mixture.groups * shape.parameters["experts"] * sum(map(bool, shape.units["experts"]))
    assert before - count_parameters(model) == removed


@pytest.mark.parametrize("name", MIXTURES)
def test_scores_of_experts_are_the_change_of_the_entropy_by_brute_force(name):
    """In float64, by autograd: what the experts write with each expert's router row gone, by the class's own code."""
    grouped = {"topk_group": 2} if "n_group" in MIXTURES[name] else {}  # groups do not restrict the choice
    ours = unit_scores(
        mixture(name, **grouped), TOKENS, ["entropy", "fisher_sequence", "reap", "easy_ep", "expert_frequency"]
    )
    model = mixture(name, **grouped).double()
    model.config._experts_implementation = "eager"
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    seen, normed, hooks = {}, {}, []
    for number in range(3):
        if experts := experts_in(model, number):

            def remember(module, inputs, output, number=number):
                output.retain_grad()
                seen.setdefault(number, []).append((module, inputs, output))

            def remember_norm(_module, inputs, output, number=number):
                normed.setdefault(number, []).append((inputs[0][0].detach(), output[0].detach()))

            hooks.append(experts.experts.register_forward_hook(remember))
            *_, norm = (child for kind, child in layers_of(model)[number].named_children() if "norm" in kind)
            hooks.append(norm.register_forward_hook(remember_norm))
    for row in TOKENS:
        log_p = model(row[None]).logits.log_softmax(-1)
        (-(log_p.exp() * log_p).sum()).backward()
    for hook in hooks:
        hook.remove()
    for number, passed in seen.items():
        experts, totals, routed, written = experts_in(model, number), [0.0] * 8, torch.zeros(8), [0.0] * 8
        turned = [0.0] * 8
        for (module, (states, chosen, weights), output), (before, after_norm) in zip(
            passed, normed[number], strict=True
        ):
            factor = getattr(model.config, "residual_multiplier", 1)
            if name == "minimax":
                before, factor = 1.5 * after_norm, 0.7
            turns = 1 - torch.nn.functional.cosine_similarity(before, before + factor * output.detach(), dim=1)
            states, weights = states.detach(), weights.detach()
            for expert in range(8):
                other = copy.deepcopy(experts)
                mask_router(other, torch.arange(8) == expert)
                corrected = (other.correction,) if name in CORRECTED_FROM_OUTSIDE else ()
                _, other_weights, others = other.router(states, *corrected)
                change = output.detach() - module(states, others, other_weights.double())
                mine = chosen == expert
                if name == "ernie4_5_moe":  # where an expert that is not chosen goes, its corrected choice changes
                    change = change * mine.any(1, keepdim=True)
                totals[expert] += (change * output.grad).sum(1).abs().sum().item() / TOKENS.numel()
                routed[expert] += mine.sum()
                alone = module(states, torch.full_like(chosen[:, :1], expert), torch.ones_like(weights[:, :1]))
                norms = (weights * mine).sum(1) * alone.norm(dim=1)
                written[expert] += norms.sum().item()
                turned[expert] += (norms * turns).sum().item()
        torch.testing.assert_close(ours["entropy"]["experts"][number], torch.tensor(totals), rtol=1e-3, atol=1e-6)
        assert torch.equal(ours["expert_frequency"]["experts"][number], routed)
        reap = torch.tensor(written) / routed.clamp(min=1)
        torch.testing.assert_close(ours["reap"]["experts"][number], reap, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours["easy_ep"]["experts"][number], torch.tensor(turned), rtol=1e-3, atol=1e-6)
    assert set(ours["reap"]) == {"experts"}
    assert {len(layer) for layer in ours["fisher_sequence"]["experts"]} <= {0, 8}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reap_equals_llm_compressors_own(name):
    linearize = pytest.importorskip(
        "llmcompressor.modeling.moe.linearize",
        reason="LLM Compressor needs transformers 5.17 or older: an environment of its own, see docs/methods.md",
    )
    from llmcompressor.core import State
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier

    ours = [layer for layer in unit_scores(mixture(name), TOKENS, ["reap"])["reap"]["experts"] if len(layer)]
    model = mixture(name)
    linearize.linearize_moe(model)
    modifier, state = REAPPruningModifier(sparsity=0.25), State(model=model)
    modifier.on_initialize(state)
    modifier.on_calibration_start(state, None)
    with torch.no_grad():
        model(TOKENS)
    theirs = [tracker.mean_saliency.float() for tracker in modifier._saliency_trackers.values()]
    assert len(theirs) == len(ours) > 0
    for layer, scores in zip(ours, theirs, strict=True):
        torch.testing.assert_close(layer, scores, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NARROWED)
def test_scores_of_neurons_in_experts_equal_float64_autograd(name, monkeypatch):
    """Each expert's neurons on its own tokens; the products of a sequence are summed before they are squared."""
    by_sequence = GradientCriterion(entropy_gradient, "square_of_sum", "this test")
    monkeypatch.setitem(CRITERIA, "by_sequence", by_sequence)
    ours = unit_scores(mixture(name), TOKENS, ["entropy", "by_sequence", "wanda"])
    model = mixture(name).double()
    model.config._experts_implementation = "batched_mm"
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    seen = {}
    for number in range(3):
        if experts := experts_in(model, number):
            gate = type(experts.experts)._apply_gate
            width = experts.width

            def remember(_module, inputs, number=number):
                seen[number] = [inputs[1].flatten()]

            def apply_gate(states, number=number, gate=gate, module=experts.experts):
                activations = gate(module, states)
                activations.retain_grad()
                seen[number].append(activations)
                return activations

            experts.experts.register_forward_pre_hook(remember)
            monkeypatch.setattr(experts.experts, "_apply_gate", apply_gate, raising=False)
    totals, squares, moments = ({number: torch.zeros(8, width).double() for number in range(3)} for _ in range(3))
    for row in TOKENS:
        log_p = model(row[None]).logits.log_softmax(-1)
        (-(log_p.exp() * log_p).sum()).backward()
        for number, (chosen, activations) in seen.items():
            products = (activations * activations.grad).detach() / TOKENS.numel()
            totals[number].index_add_(0, chosen, products.abs())
            summed = torch.zeros(8, width).double().index_add(0, chosen, products * TOKENS.numel())
            squares[number] += summed.square() / TOKENS.numel()
            moments[number].index_add_(0, chosen, activations.detach().square())
    for number in seen:
        module = experts_in(model, number).experts
        down = module.down_proj if module.is_transposed else module.down_proj.transpose(1, 2)
        wanda = moments[number].sqrt() * down.abs().sum(2)
        for criterion, expected in (("entropy", totals), ("by_sequence", squares), ("wanda", {number: wanda})):
            found = ours[criterion]["mlp"][number].double()
            torch.testing.assert_close(found, expected[number], rtol=1e-3, atol=1e-7)


TEXT = torch.randint(320, (40, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "both"),
    [*((name, False) for name in NARROWED), ("qwen3_moe", True), ("gpt_oss", True), ("lfm2_moe", True)],
)
def test_a_refit_inside_experts_is_the_least_squares_of_the_tokens_sent_to_each(name, both):
    """In float64, from what the class's own experts read in the intact model: a system for each expert.

    Where experts go as well, from what the class's own router sends to the others.
    """
    model, intact = mixture(name), mixture(name).double()
    intact.config._experts_implementation = "eager"
    kept, seen = some_of_both(model) if both else {"mlp": some_neurons(model)}, {}
    for number in range(3):
        if experts := experts_in(intact, number):
            hook = lambda _module, inputs, number=number: seen.update({number: inputs})  # noqa: E731
            experts.experts.register_forward_pre_hook(hook)
    logits(intact, TEXT)
    details = refit(model, kept, TEXT, "least_squares", 0.1)
    starved = set()
    for number, (states, chosen, weights) in seen.items():
        before, after = experts_in(intact, number), experts_in(model, number)
        stay = kept["experts"][number] if both else torch.arange(8)
        if both:
            router = copy.deepcopy(before)
            mask_router(router, torch.ones(8, dtype=torch.bool).index_fill_(0, stay, False))
            corrected = (router.correction,) if name in CORRECTED_FROM_OUTSIDE else ()
            _, weights, chosen = router.router(states, *corrected)
        for expert, stays in zip(stay.tolist(), kept["mlp"][number], strict=True):
            routed, places = (chosen == expert).nonzero(as_tuple=True)
            starved |= {number} if len(routed) < len(stays) else set()
            if not len(routed):
                continue
            h = before.activations(expert, states[routed]) * weights[routed, places, None]
            write, found = (each.neurons_of(expert).output.weight for each in (before, after))
            gone = torch.ones(before.width, dtype=torch.bool).index_fill_(0, stays, False)
            gram = h[:, stays].T @ h[:, stays]
            gram.diagonal().mul_(1.1)
            expected = write[:, stays] + torch.linalg.solve(gram, h[:, stays].T @ (h[:, gone] @ write[:, gone].T)).T
            torch.testing.assert_close(found[:, stays].double(), expected, rtol=1e-3, atol=1e-4)
            assert not found[:, gone].any()
    assert details["starved_layers"] == sorted(starved)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_refit_of_experts_brings_the_model_nearer_to_the_dense_one(name):
    model = mixture(name)
    kept = {"mlp": some_neurons(model)} if name in NARROWED else {"experts": some_experts(model)}
    dense, kl = logits(model, TEXT[:8]).log_softmax(-1), {}
    for method in ("none", "least_squares", "sequential") if name in NARROWED else ("none", "sequential"):
        small = copy.deepcopy(model)
        if method != "none":
            refit(small, kept, TEXT, method, 0.4)
        cut(small, kept)
        kl[method] = (dense.exp() * (dense - logits(small, TEXT[:8]).log_softmax(-1))).sum(-1).mean().item()
    assert max(kl, key=kl.get) == "none"


def seen_by_experts(model, number):
    """What leaves layer `number` of a model in float64, and what its experts read: states, choice and weights."""
    seen, hooks = [], []
    hooks.append(experts_in(model, number).experts.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs)))
    hooks.append(layers_of(model)[number].register_forward_hook(lambda _m, _i, left: seen.append(left)))
    logits(model, TEXT)
    for hook in hooks:
        hook.remove()
    inputs, left = seen
    return left[0] if isinstance(left, tuple) else left, inputs


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("qwen3_moe", ("experts", "mlp")),
        ("granitemoe", ("mlp",)),
        ("minimax", ("mlp",)),
        ("deepseek_v3", ("experts",)),
    ],
)
def test_a_sequential_refit_of_experts_is_the_least_squares_behind_what_is_refitted_already(name, removed):
    """In float64, by the classes' own code: the dense model, and one whose lower layers are cut and refitted."""
    model, dense = mixture(name), mixture(name).double()
    dense.config._experts_implementation = "eager"
    both = some_of_both(model)
    kept = both if len(removed) > 1 else {removed[0]: both["experts"] if "experts" in removed else some_neurons(model)}
    refit(model, kept, TEXT, "sequential", 0.1)
    factor = getattr(dense.config, "residual_multiplier", getattr(dense.config, "mlp_beta_factor", 1.0))
    below = copy.deepcopy(dense)
    for number in range(3):
        if not (before := experts_in(dense, number)):
            continue
        wanted, _ = seen_by_experts(dense, number)
        whole, _ = seen_by_experts(below, number)
        stay = kept["experts"][number] if "experts" in kept else torch.arange(8)
        if "experts" in kept:
            mask_router(experts_in(below, number), torch.ones(8, dtype=torch.bool).index_fill_(0, stay, False))
        without, (states, chosen, weights) = seen_by_experts(below, number)
        lost = ((whole - without + 0.5 * (wanted - whole)) / factor).flatten(0, 1)
        after, own = experts_in(model, number), experts_in(below, number)
        for place, expert in enumerate(stay.tolist()):
            stays = kept["mlp"][number][place] if "mlp" in kept else torch.arange(before.width)
            routed, places = (chosen == expert).nonzero(as_tuple=True)
            if not len(routed):
                continue
            weight = weights[routed, places, None]
            h = before.activations(expert, states[routed]) * weight
            write, found = (each.neurons_of(expert).output.weight for each in (before, after))
            gone = torch.ones(before.width, dtype=torch.bool).index_fill_(0, stays, False)
            r = h[:, gone] @ write[:, gone].T + lost[routed] * weight / weights[routed].sum(1, keepdim=True)
            gram = h[:, stays].T @ h[:, stays]
            gram.diagonal().mul_(1.1)
            expected = write[:, stays] + torch.linalg.solve(gram, h[:, stays].T @ r).T
            torch.testing.assert_close(found[:, stays].double(), expected, rtol=2e-3, atol=2e-4)
            own.neurons_of(expert).output.weight.copy_(found.double())


def test_an_expert_that_no_token_is_sent_to_keeps_its_weights():
    model = mixture("qwen3_moe")
    kept, experts = some_neurons(model), experts_in(model, 1)
    gone = torch.arange(8) == 5
    mask_router(experts, gone)
    before = experts.neurons_of(5).output.weight.clone()
    details = refit(model, {"mlp": kept}, TEXT, "least_squares", 0.1)
    assert details["starved_layers"] == [1]
    assert torch.equal(experts.neurons_of(5).output.weight[:, kept[1][5]], before[:, kept[1][5]])


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_scores_are_the_same_if_layers_run_a_second_time_and_in_any_batches(name, monkeypatch):
    criteria = ["entropy", "fisher_token", "reap", "flap", "random", "magnitude"]
    whole = unit_scores(mixture(name), TOKENS, criteria)
    single = unit_scores(mixture(name), TOKENS, criteria, batch=1)
    monkeypatch.setattr(scoring, "is_short", lambda *_: True)
    short = unit_scores(mixture(name), TOKENS, criteria)
    for criterion, by_part in whole.items():
        for part, layers in by_part.items():
            for number, layer in enumerate(layers):
                torch.testing.assert_close(single[criterion][part][number], layer, rtol=1e-3, atol=1e-6)
                torch.testing.assert_close(short[criterion][part][number], layer, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_read_layer_by_layer_from_files_it_has_the_same_scores_and_predictions(name, tmp_path):
    model = mixture(name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    streamed = load_model(tmp_path, "float32", "streamed")
    criteria = ["entropy", "fisher_sequence", "reap", "expert_frequency", "flap"]
    whole, found = (unit_scores(each, TOKENS, criteria) for each in (model, streamed))
    for criterion, by_part in whole.items():
        for part, layers in by_part.items():
            for number, layer in enumerate(layers):
                torch.testing.assert_close(found[criterion][part][number], layer, rtol=1e-4, atol=1e-6)
    assert {parameter.device.type for parameter in streamed.parameters()} == {"meta"}
    with head_of(streamed) as head, torch.no_grad():
        predicted = torch.cat([head.logits(states) for states in final_states(streamed, TOKENS, 2, "test")])
    torch.testing.assert_close(predicted, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in MIXTURES), ("gpt_oss", "float16")])
def test_read_layer_by_layer_every_weight_has_the_type_and_shape_of_the_model_in_memory(name, dtype, tmp_path):
    mixture(name).save_pretrained(tmp_path)
    streamed, resident = (load_model(tmp_path, dtype, memory) for memory in ("streamed", "resident"))
    for about in ("named_parameters", "named_buffers"):
        one, other = (
            {key: (values.dtype, values.shape) for key, values in getattr(model, about)()}
            for model in (streamed, resident)
        )
        assert one == other, about


@pytest.mark.parametrize(
    ("name", "structure", "method"),
    [
        ("mixtral", "mlp+experts", "least_squares"),
        ("deepseek_v3", "experts", "none"),
        ("gpt_oss", "mlp", "sequential"),
        ("ernie4_5_moe", "experts", "sequential"),
    ],
)
def test_a_cut_layer_by_layer_equals_that_of_the_model_in_memory(name, structure, method, texts, tmp_path):
    mixture(name).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    shape, draw = shape_of(mixture(name)), torch.Generator().manual_seed(0)
    parts_ranked = ("mlp", "experts") if "mlp" not in shape.refusals else ("experts",)
    scores = {part: [torch.rand(size, generator=draw) for size in units_shapes(shape, part)] for part in parts_ranked}
    calibration = {"criterion": "fisher_token", "samples": 6, "length": 32, "seed": 0, "text": "words"}
    asked = {"ratio": 0.1, "structure": structure, "refit": method, "calibration": calibration}
    text, written = None if method == "none" else texts, {}
    for memory in ("streamed", "resident"):
        (tmp_path / memory).mkdir()
        out, details = run_prune(tmp_path / "dense", tmp_path / memory, text, scores, memory=memory, **asked)
        assert details.pop("memory") == memory
        kept = json.loads((out / "pruning.json").read_text())["kept"]
        written[memory] = details, kept, (out / "config.json").read_text(), load_file(out / "model.safetensors")
    assert written["streamed"][:3] == written["resident"][:3]
    assert written["streamed"][3].keys() == written["resident"][3].keys()
    for key, expected in written["resident"][3].items():
        torch.testing.assert_close(written["streamed"][3][key], expected, rtol=1e-4, atol=1e-5)


def test_shards_add_up_to_the_scores_of_one_pass(tmp_path):
    """Also in a model whose second layer is dense."""
    model = mixture("qwen2_moe")
    model.save_pretrained(tmp_path)
    whole, criteria = unit_scores(model, TOKENS, ["entropy", "reap", "wanda"]), ["entropy", "reap", "wanda"]
    for criterion in criteria:
        merged = Sums()
        for shard in range(2):
            sums = scoring.add_up(model, TOKENS, criteria, 0, 1, None, None, range(shard, shard + 1))
            sums.of(criterion).save(tmp_path / str(shard) / criterion)
            merged.load(tmp_path / str(shard) / criterion)
        found = scoring.finish(criterion, merged, TOKENS.numel(), 0, 1, model)
        assert found.keys() == whole[criterion].keys()
        for part, layers in found.items():
            assert [len(layer) for layer in layers] == [len(layer) for layer in whole[criterion][part]]
            for layer, expected in zip(layers, whole[criterion][part], strict=True):
                torch.testing.assert_close(layer, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_operations_are_those_of_the_experts_that_a_token_is_sent_to(name):
    model = mixture(name)
    model.config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(TOKENS)
    counted = counter.get_total_flops() / TOKENS.numel()
    assert flops_per_token(model, TOKENS.shape[1]) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("share", [0.4, None])
def test_one_budget_over_experts_and_the_neurons_inside_them_is_met(share):
    model = mixture("qwen2_moe", num_experts=16)
    shape, draw = shape_of(model), torch.Generator().manual_seed(0)
    scores = {
        name: [torch.rand(size, generator=draw) for size in units_shapes(shape, name)] for name in ("experts", "mlp")
    }
    budget = units_to_keep(shape, 0.3, structure="mlp+experts", experts_share=share, scores=scores)
    kept = best_units(budget, scores, "uniform")
    if share:
        assert [len(layer) for layer in kept["experts"]] == [13, 0, 13]
    for layer in (0, 2):  # every expert that stays keeps its own best
        best = scores["mlp"][layer][kept["experts"][layer]].topk(kept["mlp"][layer].shape[1]).indices
        assert torch.equal(best.sort().values, kept["mlp"][layer])
    cut(model, kept)
    step = 8 * shape.parameters["mlp"] * 2  # neurons of each expert of two layers
    assert abs(shape.total * 0.7 - count_parameters(model)) <= step / 2


@pytest.mark.parametrize("worth", [0.3, 30.0, 3000.0])
def test_without_a_share_what_goes_has_the_lowest_scores_together(worth):
    """Of all numbers of experts, by brute force: from experts worth little to experts worth much."""
    shape, draw = shape_of(mixture("mixtral", num_local_experts=16)), torch.Generator().manual_seed(0)
    scores = {
        name: [torch.rand(size, generator=draw) for size in units_shapes(shape, name)] for name in ("experts", "mlp")
    }
    scores["experts"] = [worth * layer for layer in scores["experts"]]
    found = best_units(units_to_keep(shape, 0.3, structure="mlp+experts", scores=scores), scores, "uniform")
    lost = {}
    for gone in range(14):
        neuron = shape.parameters["mlp"] // 16 * (16 - gone)
        rest = 0.3 * shape.total - 3 * gone * shape.parameters["experts"]
        keep = {"experts": 3 * (16 - gone), "mlp": 3 * 48 - rest / neuron}
        if -4 * 3 * neuron <= rest <= 3 * 40 * neuron:
            kept = best_units(Budget(0.3, keep, 8), scores, "uniform")
            lost[gone] = -sum(layer[stay].sum() for layer, stay in zip(scores["experts"], kept["experts"], strict=True))
            for layer, stay, neurons in zip(scores["mlp"], kept["experts"], kept["mlp"], strict=True):
                lost[gone] += layer[stay].sum() - layer[stay].gather(1, neurons).sum()
    assert len(lost) > 3
    assert len(found["experts"][0]) == 16 - min(lost, key=lost.get)
    assert (min(lost, key=lost.get) == 0) == (worth > 1000)


def test_every_group_loses_its_worst_experts():
    shape = shape_of(mixture("deepseek_v3"))
    budget = units_to_keep(shape, shape.parameters["experts"] * 2 / shape.total, structure="experts")
    scores = {"experts": [torch.zeros(0), *[torch.arange(8.0)] * 2]}
    kept = best_units(budget, scores, "uniform")["experts"]
    assert [layer.tolist() for layer in kept] == [[], [1, 2, 3, 5, 6, 7], [1, 2, 3, 5, 6, 7]]


def test_a_group_keeps_as_many_experts_as_its_own_score_is_made_of():
    shape = shape_of(mixture("deepseek_v3", topk_group=2, num_experts_per_tok=2))
    assert shape.mixture.fewest == 2


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("qwen3_moe", {"ratio": 0.9, "structure": "experts"}, r"leaves at least 9 of 24 experts .* sent to 3 .* 0\.4"),
        ("deepseek_v3", {"ratio": 0.9, "structure": "experts"}, r"leaves at least 12 of 16 experts"),
        ("qwen3_moe", {"ratio": 0.1, "allocation": "global"}, r"allocation 'global': .* one number for all layers"),
        (
            "qwen3_moe",
            {"ratio": 0.1, "structure": "mlp+attention"},
            r"attention is cut alone. Set it to .* mlp\+experts",
        ),
        (
            "qwen3_moe",
            {"ratio": 0.9, "structure": "mlp+experts"},
            r"takes .* can remove .* largest ratio that allows is 0\.56",
        ),
        (
            "qwen3_moe",
            {"ratio": 0.01, "structure": "mlp+experts"},
            r"takes 860 .* can remove .*, and no fewer than 7,008",
        ),
        (
            "qwen3_moe",
            {"ratio": 0.6, "structure": "mlp+experts", "experts_share": 0.9},
            r"sent to 3 of a layer\). The largest experts_share that allows is 0\.67",
        ),
        (
            "qwen3_moe",
            {"ratio": 0.3, "structure": "mlp+experts", "experts_share": 0.05},
            r"none would go. Set an experts_share above 0\.",
        ),
        (
            "qwen3_moe",
            {"ratio": 0.6, "structure": "mlp+experts", "experts_share": 0.2},
            r"they can give .* Set a larger experts_share, or remove less",
        ),
        (
            "qwen3_moe",
            {"ratio": 0.2, "structure": "mlp+experts", "experts_share": 0.99},
            r"none would go. Set a smaller experts_share, or structure 'experts'",
        ),
        ("deepseek_v3", {"ratio": 0.1, "structure": "mlp+experts"}, r"one width for routed and shared"),
        ("qwen3_moe", {"ratio": 0.3, "structure": "mlp+experts", "round_to": 1}, r"round_to 1: .* Set it to 8"),
        ("qwen3_moe", {"ratio": 0.3, "structure": "mlp+experts", "criterion": "reap"}, r"'reap' does not rank neurons"),
        ("qwen3_moe", {"ratio": 0.1, "round_to": 1}, r"round_to 1: .* Set it to 8 or more"),
        (
            "qwen3_moe",
            {"ratio": 0.1, "refit": "trained"},
            r"refit 'trained': .*'least_squares' and 'sequential' refit what loses neurons",
        ),
        ("qwen3_moe", {"ratio": 0.1, "criterion": "reap"}, r"criterion 'reap' does not rank neurons inside experts"),
        (
            "qwen3_moe",
            {"ratio": 0.1, "criterion": "obs"},
            r"neurons inside experts, .* Those that do: ent",
        ),
        ("qwen3_moe", {"ratio": 0.1, "structure": "experts", "criterion": "wanda"}, r"does not rank experts"),
        ("deepseek_v3", {"ratio": 0.1}, r"one width for routed and shared experts.* Cut experts\."),
        ("gpt_oss", {"ratio": 0.1, "structure": "attention"}, r"learned sink. Cut experts or mlp\."),
        ("llama", {"ratio": 0.1, "structure": "experts", "criterion": "reap"}, r"has no experts: it is dense. Cut mlp"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_is_scored(name, cut, message, tmp_path):
    (mixture(name) if name in MIXTURES else make(name)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        check(tmp_path, [{"structure": "mlp", "criterion": "entropy", "refit": "none"} | cut])


def test_the_largest_ratio_that_a_refusal_names_is_met(tmp_path):
    mixture("qwen3_moe").save_pretrained(tmp_path)
    method = {"structure": "experts", "criterion": "reap", "refit": "none"}
    with pytest.raises(UserError) as refused:
        check(tmp_path, [{"ratio": 0.9, **method}])
    largest = float(re.search(r"largest ratio that allows is (0\.\d+)", str(refused.value))[1])
    check(tmp_path, [{"ratio": largest, **method}])
    budget = units_to_keep(shape_on_disk(tmp_path), largest, structure="experts")
    kept = best_units(budget, {"experts": [torch.rand(8)] * 3}, "uniform")["experts"]
    assert [len(layer) for layer in kept] == [3, 3, 3]


def test_what_only_a_model_shows_is_refused_too():
    with pytest.raises(UserError, match="criterion 'reap' ranks experts, and 'llama' models have none"):
        unit_scores(make("llama"), TOKENS, ["reap"])
    with pytest.raises(UserError, match="No other refit goes with one"):
        refit(mixture("qwen3_moe"), {}, TOKENS, "least_squares", 0.1)
    unknown = AutoConfig.for_model("phimoe")
    with pytest.raises(UserError, match=r"'phimoe' is a mixture of experts that hfprune does not know. .*: mixtral, "):
        check_config(unknown, "me")


@pytest.mark.parametrize(
    ("name", "structure", "criterion", "method"),
    [
        ("qwen3_moe", "experts", "reap", "none"),
        ("gpt_oss", "mlp", "flap", "least_squares"),
        ("mixtral", "mlp+experts", "fisher_token", "least_squares"),
    ],
)
def test_a_cut_goes_the_whole_way_and_its_files_are_those_of_the_authors(
    name, structure, criterion, method, texts, tmp_path
):
    model = mixture(name)
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    scores = unit_scores(load_model(tmp_path / "dense", "float32"), TOKENS, [criterion])[criterion]
    calibration = {"criterion": criterion, "samples": 6, "length": 32, "seed": 0, "text": "words"}
    asked = {"ratio": 0.2, "structure": structure, "refit": method}
    asked |= {"experts_share": 0.5} if structure == "mlp+experts" else {}
    out, done = run_prune(tmp_path / "dense", tmp_path, texts, scores, calibration=calibration, **asked)
    written = json.loads((out / "pruning.json").read_text())
    assert written["reload"]["max_difference"] < 1e-4
    assert not written["reload"]["trust_remote_code"]
    assert abs(done["ratio_achieved"] - 0.2) < 0.07  # whole experts, or eight neurons of each
    kept = {name: [torch.tensor(layer) for layer in layers] for name, layers in written["kept"].items()}
    if method != "none":
        tokens = sample_sequences(make_tokenizer(), model.config, texts, 6, 32, 0)
        refit(model, kept, tokens, method, RIDGE)
    silent = {"experts": masked_router, "mlp": silenced_neurons}
    removed = without_both(model, kept) if len(kept) > 1 else silent[structure](model, kept[structure])
    expected = logits(removed)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-4)
    before, after = (set(load_file(next(folder.glob("*.safetensors")))) for folder in (tmp_path / "dense", out))
    assert after < before if "experts" in kept else after == before


def test_a_plan_counts_the_experts_that_a_token_is_sent_to(experiment, tmp_path):
    model = mixture("qwen3_moe")
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    asked = experiment | {"store": str(tmp_path / "store"), "model": {"path": str(tmp_path / "dense")}, "ratios": [0.2]}
    methods = ["REAP", "Expert frequency", {"mine": {"criterion": "flap", "refit": "least_squares"}}]
    methods += ["hfprune-best-stock", "ShortGPT"]
    methods += [{"deep": {"criterion": "greedy_kl", "structure": "layers", "refit": "sequential"}}]
    lines = report(parse(Experiment, asked | {"methods": methods}, "test"), "cpu", 0.4, None)
    idle = 3 * 5 * 3 * 32 * 24  # layers, experts that a token is not sent to, matrices
    total = count_parameters(model)
    assert f"{total:,} parameters ({total - idle:,} of them for a token), float32" in lines
    trained = [{"mine": {"criterion": "fisher_token", "refit": "trained"}}]
    with pytest.raises(UserError, match="refit 'trained': of a mixture of experts, 'least_squares' and 'sequential'"):
        report(parse(Experiment, asked | {"methods": trained}, "test"), "cpu", 0.4, None)


def test_layers_beside_the_model_do_not_count_for_a_budget(tmp_path):
    """Of DeepSeek-V3 and GLM-4.5, a further layer predicts the token after the next; transformers leaves it out."""
    model = mixture("glm4_moe")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    further = {
        name.replace("layers.2.", "layers.3."): tensor for name, tensor in tensors.items() if "layers.2." in name
    }
    save_file(tensors | {name: tensor.clone() for name, tensor in further.items()}, tmp_path / "model.safetensors")
    assert shape_on_disk(tmp_path) == shape_of(model)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "minimax"])
def test_a_forward_pass_keeps_no_more_than_is_estimated(name):
    model = mixture(name)
    tokens = torch.arange(8 * CHUNK).view(8, -1) % 320
    assert 0 < bytes_kept(model, tokens) < graph_bytes(model, tokens.numel())


def test_what_is_shown_of_a_cut_leaves_dense_layers_out():
    assert kept_shapes("experts", [[], [0, 1], [2, 5]]) == {1: (2,), 2: (2,)}
    assert kept_shapes("mlp", [[], [[0, 1, 4], [2, 5, 6]]]) == {1: (2, 3)}
    assert kept_shapes("mlp", [[0, 1], []]) == {0: (2,), 1: (0,)}, "of a dense model"

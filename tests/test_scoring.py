"""Scores against an independent float64 computation, and what must not change them."""

import gc
import signal
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfprune.data.sampling import sample_sequences
from hfprune.errors import UserError
from hfprune.models.activations import graph_bytes
from hfprune.models.head import Head
from hfprune.models.loading import load_model, load_tokenizer
from hfprune.models.norms import fused_norms
from hfprune.models.units import PARTS, parts
from hfprune.pruning.criteria import CRITERIA, TOP_K, GradientCriterion, Moments, race_times, ranks
from hfprune.pruning.greedy import one_by_one
from hfprune.pruning.head import LOGITS_PER_CHUNK, generator, hidden_gradient, positions_of
from hfprune.pruning.recorder import Sums, times
from hfprune.pruning.scoring import add_up, finish, shard_range, tokens_per_batch, unit_scores
from hfprune.runtime import matmul
from hfprune.runtime.signals import Stopped
from tests.conftest import FAMILIES, make_model, save_checkpoint, save_dense, sentences, write_lines

WEIGHT_FORMS = ["llm_pruner_element_1", "llm_pruner_element_2", "llm_pruner_vector"]
INTACT = [name for name, criterion in CRITERIA.items() if ranks(name, "mlp", False) and not criterion.light_cut]
GRADIENT = [name for name, criterion in CRITERIA.items() if isinstance(criterion, GradientCriterion)]


def tokens(count=6, length=20):
    torch.manual_seed(3)
    return torch.randint(0, 320, (count, length))


def loss(name, logits, sequence, number, seed, dense=None):
    """S, summed over the positions of one sequence, by its definition."""
    log_p = torch.log_softmax(logits, -1)
    if name == "entropy_top_k":
        log_p = torch.log_softmax(logits.topk(TOP_K, -1).values, -1)
    if name.startswith("entropy"):
        return -(log_p.exp() * log_p).sum()
    if name == "cross_entropy":
        return -log_p[:-1].gather(-1, sequence[1:, None]).sum()
    if name == "self_distillation":
        divergence = torch.nn.functional.kl_div(log_p, torch.softmax(dense / 0.2, -1), reduction="sum")
        return 0.6 * -log_p[:-1].gather(-1, sequence[1:, None]).sum() + 0.4 * divergence
    uniforms = torch.rand(len(sequence), generator=generator(seed, 0, number))
    labels = (log_p.detach() - race_times(uniforms, log_p.shape[-1]).log()).argmax(-1, keepdim=True)
    return log_p.gather(-1, labels).sum()


PRODUCT_SUMS = {
    "absolute": lambda products: products.abs().sum(0),
    "square": lambda products: products.square().sum(0),
    "square_of_sum": lambda products: products.sum(0).square(),
}


def scores_by_autograd(name, model, sequences, seed=0, silent=(), kind="mlp"):
    """The formula with nothing of the engine: float64, autograd through the whole model, one sequence at a time."""
    model = model.double()
    totals = 0
    groups = model.config.num_key_value_heads
    for number, sequence in enumerate(sequences):
        dense = model(sequence[None]).logits[0]
        seen = []

        def silence(_module, inputs, cut):
            h = inputs[0].clone()
            h[..., cut] = 0
            return (h,)

        def remember(_module, inputs, seen=seen):
            h = inputs[0].clone()
            h = h if h.requires_grad else h.detach().requires_grad_()
            h.retain_grad()
            seen.append(h)
            return (h,)

        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(partial(silence, cut=cut))
            for layer, cut in zip(model.model.layers, silent, strict=False)
        ]
        for layer in model.model.layers:
            output = layer.mlp.down_proj if kind == "mlp" else layer.self_attn.o_proj
            hooks.append(output.register_forward_pre_hook(remember))
        loss(name, model(sequence[None]).logits[0], sequence, number, seed, dense).backward()
        for hook in hooks:
            hook.remove()
        summed = PRODUCT_SUMS[CRITERIA[name].products]
        products = [(h * h.grad)[0].detach() for h in seen]
        if kind == "attention":  # a group's query heads stand side by side
            products = [each.view(len(sequence), groups, -1).sum(-1) for each in products]
        totals = totals + torch.stack([summed(each) for each in products])
    return totals / sequences.numel()


def scores_by_weights(name, model, sequences, kind):
    """LLM-Pruner's form: float64, the gradients of all weights, every unit's rows and columns by themselves."""
    model = model.double()
    scores = []
    for layer in model.model.layers:
        if kind == "mlp":
            rows = [(layer.mlp.gate_proj, 1), (layer.mlp.up_proj, 1)]
            output, columns, units = layer.mlp.down_proj, 1, 48
        else:
            block = layer.self_attn
            rows = [(block.q_proj, 16), (block.k_proj, 8), (block.v_proj, 8)]
            output, columns, units = block.o_proj, 16, 2
        weights = [linear.weight.requires_grad_() for linear in (*(linear for linear, _ in rows), output)]
        by_sequence = [
            torch.autograd.grad(loss("cross_entropy", model(sequence[None]).logits[0], sequence, 0, 0), weights)
            for sequence in sequences
        ]
        saliences = [
            torch.stack([weight.detach() * gradient for gradient in gradients])
            for weight, gradients in zip(weights, zip(*by_sequence, strict=True), strict=True)
        ]
        for weight in weights:
            weight.requires_grad_(False)
        sizes = [*(size for _, size in rows), columns]
        saliences[-1] = saliences[-1].mT
        of_layer = []
        for unit in range(units):
            own = [each[:, unit * size : (unit + 1) * size] for each, size in zip(saliences, sizes, strict=True)]
            if name == "llm_pruner_element_1":
                of_layer.append(sum(each.sum(0).abs().sum() for each in own))
            elif name == "llm_pruner_element_2":
                of_layer.append(sum(each.square().sum() for each in own))
            else:
                of_layer.append(sum(each.sum((0, 2)).abs().sum() for each in own))
        scores.append(torch.stack(of_layer))
    return torch.stack(scores) / sequences.numel()


def flat(scores):
    """All layers of all parts."""
    return [layer for kind in PARTS for layer in scores[kind]]


def assert_close(found, right, tolerance=1e-5):
    """Layers of one part, or of all parts."""
    found, right = (flat(scores) if isinstance(scores, dict) else scores for scores in (found, right))
    for layer, (ours, expected) in enumerate(zip(found, right, strict=True)):
        error = ((ours.double() - expected).norm() / expected.norm()).item()
        assert error < tolerance, f"layer {layer}: relative error {error:.1e}"


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_entropy_scores_equal_float64_autograd(family, tied, kind):
    ours = unit_scores(make_model(family, tie_word_embeddings=tied), tokens(), ["entropy"])["entropy"][kind]
    expected = scores_by_autograd("entropy", make_model(family, tie_word_embeddings=tied), tokens(), kind=kind)
    assert_close(ours, expected)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize(
    "name", [name for name in GRADIENT if name in INTACT and CRITERIA[name].products in PRODUCT_SUMS]
)
def test_scores_of_all_criteria_at_once_equal_float64_autograd(name, kind):
    ours = unit_scores(make_model(), tokens(), INTACT, seed=4)
    assert_close(ours[name][kind], scores_by_autograd(name, make_model(), tokens(), seed=4, kind=kind))


@pytest.mark.parametrize("memory", ["enough", "short"])
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("name", WEIGHT_FORMS)
def test_scores_by_weights_equal_those_of_the_gradients_of_all_weights(name, kind, memory, monkeypatch):
    if memory == "short":
        monkeypatch.setattr("hfprune.runtime.memory.free_bytes", lambda _device: 1)
    ours = unit_scores(make_model(), tokens(), ["entropy", *WEIGHT_FORMS], batch=3)[name][kind]
    assert_close(ours, scores_by_weights(name, make_model(), tokens(), kind))


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize(("name", "by_row"), [("llm_pruner_element_1", False), ("llm_pruner_vector", True)])
def test_scores_by_weights_equal_torch_prunings_own(name, by_row):
    """LLM-Pruner is built on that package, whose group importance is of the same form."""
    import torch_pruning

    ours = unit_scores(make_model(), tokens(), [name])[name]["mlp"]
    model = make_model().requires_grad_(True)
    model.config.use_cache = False
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=tokens(1), output_transform=lambda output: output.logits
    )
    (-torch.log_softmax(model(tokens()).logits[:, :-1], -1).gather(-1, tokens()[:, 1:, None]).sum()).backward()
    importance = torch_pruning.importance.GroupTaylorImportance(
        group_reduction="sum", normalizer=None, multivariable=by_row
    )
    for layer, scores in zip(model.model.layers, ours, strict=True):
        neurons = list(range(48))
        group = graph.get_pruning_group(layer.mlp.gate_proj, torch_pruning.prune_linear_out_channels, neurons)
        torch.testing.assert_close(scores, importance(group).detach() / 120, rtol=1e-4, atol=1e-7)


def test_pairs_of_fisher_information_add_up_to_what_single_units_and_whole_layers_have():
    model = make_model()
    sums = add_up(model, tokens(), ["fisher_pairs", "fisher_token"], 0, 1, None, None)
    for kind in PARTS:
        for pairs, single in zip(sums.layers("fisher_pairs", kind), sums.layers("fisher_token", kind), strict=True):
            torch.testing.assert_close(pairs.diagonal(), single, rtol=1e-5, atol=0)
            assert torch.linalg.eigvalsh(pairs).min() > -1e-5 * single.max()
    (layer, *_) = unit_scores(model, tokens(), ["fisher_pairs"])["fisher_pairs"]["mlp"]
    torch.testing.assert_close(layer, one_by_one(sums.layers("fisher_pairs", "mlp")[0] / 120))


@pytest.mark.parametrize("family", FAMILIES)
def test_self_distillation_equals_float64_autograd_on_the_lightly_cut_model(family):
    first = unit_scores(make_model(family), tokens(), ["cross_entropy"])["cross_entropy"]["mlp"]
    ours = unit_scores(make_model(family), tokens(), ["self_distillation"], light_cut=first)["self_distillation"]
    silent = [[int(layer.argmin())] for layer in first]  # 2.5 % of 48 neurons
    for kind in PARTS:
        model = make_model(family)
        assert_close(ours[kind], scores_by_autograd("self_distillation", model, tokens(), silent=silent, kind=kind))
    assert all(layer[cut].item() == 0 for layer, (cut,) in zip(ours["mlp"], silent, strict=True))


@pytest.mark.parametrize("kind", PARTS)
def test_static_scores_rest_on_the_activations_of_the_intact_model(kind):
    model = make_model()
    layer, seen = model.model.layers[2], []
    output = layer.mlp.down_proj if kind == "mlp" else layer.self_attn.o_proj
    hook = output.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(tokens())
    hook.remove()
    norms = seen[0].flatten(0, 1).norm(dim=0) * output.weight.abs().sum(0)
    expected = {"wanda": norms if kind == "mlp" else norms.view(2, 16).sum(1)}
    by_unit = seen[0].double().unflatten(-1, (-1, 1 if kind == "mlp" else 16))  # (sequences, length, units, columns)
    expected["sequence_norms"] = by_unit.norm(dim=(1, 3)).sum(0).float()
    for name, scores in unit_scores(model, tokens(), [*expected], batch=4).items():
        torch.testing.assert_close(scores[kind][2], expected[name], rtol=1e-5, atol=0)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN on this machine")
@pytest.mark.parametrize("memory", ["resident", "short", "streamed"])
def test_products_of_bfloat16_are_those_of_gradients_not_those_of_activations_and_sums(memory, tmp_path, monkeypatch):
    if memory == "short":
        monkeypatch.setattr("hfprune.runtime.memory.free_bytes", lambda _device: 1)
    model = load_model(save_dense(tmp_path / "model"), "float32", "streamed" if memory == "streamed" else "resident")
    rounded, product = [], matmul._rounded_product
    monkeypatch.setattr(matmul, "_rounded_product", lambda a, *rest: (rounded.append(len(a)), product(a, *rest))[1])
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: True)
    names = ["entropy", "fisher_pairs", "llm_pruner_vector", "wanda", "obs"]
    ours = unit_scores(model, tokens(), names, products="auto", batch=3)
    assert set(rounded) == {60}, "gradients of 3 x 20 tokens; a sum over tokens has a unit in each row"
    exact = unit_scores(model, tokens(), names, batch=3)
    for name in names:
        for one, other in zip(ours[name]["mlp"], exact[name]["mlp"], strict=True):
            assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.8, name  # pairs are chosen one by one
            assert one.equal(other) == (name in ("wanda", "obs")), name


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_scores_do_not_depend_on_the_batch(batch):
    some, whole = (unit_scores(make_model(), tokens(), INTACT, batch=size) for size in (batch, 6))
    for name in INTACT:
        assert_close(some[name], whole[name])
        for a, b in zip(some[name]["mlp"], whole[name]["mlp"], strict=True):
            assert a.argsort()[-24:].sort().values.equal(b.argsort()[-24:].sort().values), name


def test_more_draws_come_closer_to_the_expectation():
    def fisher(seed, draws):
        return unit_scores(make_model(), tokens(), ["fisher_token"], seed=seed, draws=draws)["fisher_token"]["mlp"][0]

    expectation = fisher(seed=99, draws=400)
    errors = [(fisher(seed=0, draws=draws) - expectation).norm() / expectation.norm() for draws in (1, 40)]
    assert errors[1] < 0.5 * errors[0]


def test_one_backward_pass_serves_all_criteria_of_one_gradient(monkeypatch):
    passes = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **kw: (passes.append(1), backward(*args, **kw)))
    unit_scores(make_model(), tokens(), INTACT, batch=6)
    assert len(passes) == 4  # entropy, entropy_top_k, cross_entropy, and one for both of Fisher's
    passes.clear()
    unit_scores(make_model(), tokens(), ["wanda", "random"], batch=6)
    assert not passes


def test_the_output_projection_in_chunks_changes_nothing(monkeypatch):
    torch.manual_seed(4)
    hidden, head = torch.randn(2, 9, 32), Head(torch.randn(320, 32))
    positions, dense = positions_of(tokens(2, 9), 0, 0, 0, torch.device("cpu")), torch.randn(2, 9, 32)
    for name in GRADIENT:
        monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 10**6)
        whole = hidden_gradient(hidden, head, CRITERIA[name].logit_gradient, positions, dense)
        monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 4 * 320)
        parts = hidden_gradient(hidden, head, CRITERIA[name].logit_gradient, positions, dense)
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_computed_anew_where_memory_is_short_give_the_same_scores(family, monkeypatch):
    model, forwards = make_model(family), []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: forwards.append(1))
    kept = unit_scores(model, tokens(), INTACT, draws=2)
    assert len(forwards) == 1
    monkeypatch.setattr("hfprune.runtime.memory.free_bytes", lambda _device: 1)
    anew = unit_scores(model, tokens(), INTACT, draws=2)
    assert len(forwards) == 1 + 1 + 5  # a forward pass, and one again in each backward pass
    for name in INTACT:
        assert_close(anew[name], kept[name], 1e-6)


def test_layers_computed_anew_leave_less_to_keep(monkeypatch):
    def kept():
        held = {}

        def pack(tensor):
            held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unit_scores(make_model(), tokens(), ["entropy"])
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    before = kept()
    assert before - 2**17 < graph_bytes(make_model(), tokens().numel()), "an upper bound, weights aside"
    monkeypatch.setattr("hfprune.runtime.memory.free_bytes", lambda _device: 1)
    assert kept() < 0.7 * before


def test_layers_computed_anew_leave_no_activations_behind(monkeypatch):
    """Neither the activations of all layers until the backward pass, nor the old graph during the next forward pass."""
    monkeypatch.setattr("hfprune.runtime.memory.free_bytes", lambda _device: 1)
    model, held = make_model(), []
    width = model.config.intermediate_size

    def activations():
        gc.collect()
        alive = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape[-1:] == (width,)]
        return {each.untyped_storage().data_ptr() for each in alive if each.dim() == 3}

    before = activations()  # of other tests in this process
    # When all layers have run forward.
    model.model.norm.register_forward_hook(lambda *_: held.append(len(activations() - before)))
    unit_scores(model, tokens(), ["entropy"], batch=3)
    assert len(held) == 2
    assert max(held) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_weights_offloaded_by_accelerate_give_the_same_scores(tied, tmp_path):
    folder = save_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu" if tied else "disk"}
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "off")
    assert spread.model.layers[1].mlp.down_proj.weight.is_meta

    def in_memory():
        return [name for name, weight in spread.named_parameters() if not weight.is_meta]

    before = in_memory()
    found = unit_scores(spread.eval().requires_grad_(False), tokens(), INTACT)
    unit_scores(spread, tokens(), ["entropy"])
    assert in_memory() == before, "offloaded weights are put away again after the last backward pass"
    whole = unit_scores(load_model(folder, "float32"), tokens(), INTACT)
    for name in INTACT:
        assert_close(found[name], whole[name], 1e-6)


@pytest.mark.parametrize("shards", [1, 2, 4, 6])
def test_shards_add_up_to_what_one_job_scores(shards, monkeypatch):
    monkeypatch.setattr("hfprune.pruning.scoring.TOKENS_PER_BATCH", 20)
    model, sequences = make_model(), tokens()
    whole = add_up(model, sequences, INTACT, 0, 2, None, None)
    parts = [shard_range(6, 20, number, shards) for number in range(shards)]
    assert [number for part in parts for number in part] == list(range(6))
    merged = Sums()
    for part in parts:
        for name, tensor in add_up(model, sequences, INTACT, 0, 2, None, None, part).tensors.items():
            merged.add(name, tensor)
    for name in INTACT:
        found, right = (finish(name, sums, 120, 0, 2, model) for sums in (merged, whole))
        assert all(a.equal(b) for a, b in zip(flat(found), flat(right), strict=True)), name


@pytest.mark.parametrize("name", ["llm_pruner_element_1", "fisher_pairs", "obs"])
def test_what_shards_store_of_a_criterion_is_all_that_it_needs(name, tmp_path):
    model, sums = make_model(), Sums()
    for number, share in enumerate((range(3), range(3, 6))):
        part = add_up(model, tokens(), [name, "entropy", "wanda"], 0, 1, None, None, share).of(name)
        part.save(tmp_path / f"{number}.safetensors")
        sums.load(tmp_path / f"{number}.safetensors")
    assert_close(finish(name, sums, 120, 0, 1, model), unit_scores(model, tokens(), [name])[name])
    assert not any(key.startswith("entropy") for key in sums.tensors)


def test_a_shard_holds_whole_batches_where_there_are_enough():
    assert [len(shard_range(32, 256, number, 3)) for number in range(3)] == [8, 12, 12]
    assert [len(shard_range(6, 32, number, 3)) for number in range(3)] == [2, 2, 2]


def test_no_parameter_receives_a_gradient():
    model = make_model()
    unit_scores(model, tokens(), ["entropy"])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_bfloat16_sums_do_not_stall():
    """A bfloat16 sum of equal terms stalls at 256 of them; ours is float32 or better."""
    many = tokens(1, 8).repeat(600, 1)
    total, once = (
        unit_scores(make_model().bfloat16(), some, ["entropy"], batch=4)["entropy"]["mlp"] for some in (many, many[:4])
    )
    assert_close(total, once, 1e-4)


def test_a_pass_that_was_cut_short_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = unit_scores(make_model(), tokens(), INTACT, batch=2)
    monkeypatch.setattr("hfprune.pruning.scoring.SECONDS_BETWEEN_SAVES", 0)
    model, calls = make_model(), []

    def fail_at_the_third_batch(_module, _args, _kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.register_forward_pre_hook(fail_at_the_third_batch, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        unit_scores(model, tokens(), INTACT, batch=2, resume=tmp_path / "resume")
    hook.remove()
    calls.clear()
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    resumed = unit_scores(model, tokens(), INTACT, batch=2, resume=tmp_path / "resume")
    assert len(calls) == 1
    for name in INTACT:
        assert all(a.equal(b) for a, b in zip(flat(resumed[name]), flat(whole[name]), strict=True)), name


def test_sigterm_ends_the_batch_and_keeps_what_is_summed(tmp_path):
    whole = unit_scores(make_model(), tokens(), INTACT, batch=2)
    model, calls = make_model(), []

    def terminate_in_the_second_batch(*_):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)

    model.model.register_forward_pre_hook(terminate_in_the_second_batch)
    with pytest.raises(Stopped, match="the sums over 4 of 6 sequences are kept"):
        unit_scores(model, tokens(), INTACT, batch=2, resume=tmp_path / "resume")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = unit_scores(model, tokens(), INTACT, batch=2, resume=tmp_path / "resume")
    assert len(calls) == 3
    for name in INTACT:
        assert all(a.equal(b) for a, b in zip(flat(resumed[name]), flat(whole[name]), strict=True)), name


@pytest.mark.parametrize(
    ("criteria", "draws"), [(["entropy", "fisher_token"], 3), (["entropy", "cross_entropy", "fisher_token"], 1)]
)
def test_a_pass_over_other_criteria_or_draws_does_not_go_on_with_partial_sums(criteria, draws, tmp_path, monkeypatch):
    monkeypatch.setattr("hfprune.pruning.scoring.SECONDS_BETWEEN_SAVES", 0)
    unit_scores(make_model(), tokens(), ["entropy", "fisher_token"], batch=2, resume=tmp_path / "resume")
    found = unit_scores(make_model(), tokens(), criteria, draws=draws, batch=2, resume=tmp_path / "resume")
    fresh = unit_scores(make_model(), tokens(), criteria, draws=draws, batch=2)
    for name in criteria:
        assert all(a.equal(b) for a, b in zip(flat(found[name]), flat(fresh[name]), strict=True)), name


@pytest.mark.parametrize("silent", ["down_proj", "up_proj"])
def test_a_layer_that_writes_nothing_is_named_and_scores_zero(silent, capsys):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.get_submodule(silent).weight.zero_()
    names = [*INTACT] if silent == "up_proj" else ["entropy"]
    scores = unit_scores(model, tokens(), names)
    assert "layer 1, mlp: all scores by entropy are zero: its units go first" in capsys.readouterr().err
    assert not scores["entropy"]["mlp"][1].any()
    assert scores["entropy"]["mlp"][0].all()


def test_scores_that_are_zero_in_all_layers_are_refused():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(UserError, match="mlp: all scores by entropy are zero, in all layers"):
        unit_scores(model, tokens(), ["entropy"])


def test_scores_that_are_not_finite_name_the_layer():
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5] = float("inf")
    with pytest.raises(UserError, match="layer 0: scores by entropy are not finite"):
        unit_scores(model, tokens(), ["entropy"])


def test_sequences_are_the_same_for_a_seed_and_differ_between_seeds(checkpoint, texts):
    tokenizer = load_tokenizer(checkpoint)
    drawn = [sample_sequences(tokenizer, make_model().config, texts, 4, 16, seed) for seed in (0, 0, 1)]
    assert drawn[0].shape == (4, 16)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_sequence_is_a_stretch_of_one_document(checkpoint, texts):
    tokenizer = load_tokenizer(checkpoint)
    documents = [tokenizer(sentences(i, 150), add_special_tokens=False)["input_ids"] for i in range(12)]
    found = sample_sequences(tokenizer, make_model().config, texts, 12, 16, seed=5).tolist()
    homes = [
        [i for i, ids in enumerate(documents) if any(ids[k : k + 16] == row for k in range(len(ids)))] for row in found
    ]
    assert sorted(home for (home,) in homes) == list(range(12))
    begins = [documents[home][:16] == row for (home,), row in zip(homes, found, strict=True)]
    assert not all(begins), "every stretch begins where its document begins"


def test_too_little_text_says_how_much_there_is(checkpoint, tmp_path):
    write_lines(tmp_path / "documents.jsonl", [{"text": sentences(1, 150)}, {"text": "short"}])
    with pytest.raises(UserError, match=r"documents\.jsonl: only 1 of its 2 documents have 32 tokens, and 2"):
        sample_sequences(load_tokenizer(checkpoint), make_model().config, tmp_path, 2, 32, 0)


def test_another_models_tokenizer_is_refused(checkpoint, texts):
    with pytest.raises(UserError, match="the tokenizer is another model's"):
        sample_sequences(load_tokenizer(checkpoint), make_model(vocab_size=200).config, texts, 4, 16, 0)


def test_scores_that_are_not_finite_stop_at_the_first_batch():
    model, batches = make_model(), []
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0] = float("inf")
    model.register_forward_hook(lambda *_: batches.append(1))
    model.model.register_forward_hook(lambda *_: batches.append(1))
    with pytest.raises(UserError, match="are not finite"):
        unit_scores(model, tokens(), ["entropy"], batch=1)
    assert len(batches) == 1


@pytest.mark.parametrize(
    ("family", "is_fused"), [("llama", True), ("qwen3", True), ("gemma3_text", False), ("gpt2", False)]
)
def test_norms_in_one_step_give_the_same_scores_and_are_put_back(family, is_fused):
    model = make_model(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.add_(torch.linspace(0, 1, len(weight)))
    scores = unit_scores(model, tokens(), ["entropy", "fisher_token"])
    with fused_norms(model):
        assert any("forward" in module.__dict__ for module in model.modules()) == is_fused
        fused = unit_scores(model, tokens(), ["entropy", "fisher_token"])
    assert not any("forward" in module.__dict__ for module in model.modules())
    for name, whole in scores.items():
        assert_close(fused[name], whole, 1e-4)


def test_a_norm_that_is_another_function_stays_as_it_is():
    model = make_model()
    model.model.norm.variance_epsilon = 0.5
    module = model.model.norm
    plain = type(module).forward
    try:
        type(module).forward = lambda self, states: 2 * plain(self, states)
        with fused_norms(model):
            assert not any("forward" in module.__dict__ for module in model.modules())
    finally:
        type(module).forward = plain


@pytest.mark.parametrize("name", ["magnitude", "wanda", "flap", "flap_standardized", "spectral", "ppm_activation"])
def test_criteria_make_no_float64_copy_of_a_matrix(name, monkeypatch):
    model = make_model(intermediate_size=512)
    (part, *_), criterion = parts(model, "mlp"), CRITERIA[name]
    moments = Moments(9, torch.rand(512).double(), 9 + torch.rand(512).double())

    def score_and_largest():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            scores = criterion.score(part, moments, None)
        return scores, max(event.self_cpu_memory_usage for event in profiler.events())

    whole, _ = score_and_largest()
    monkeypatch.setattr("hfprune.pruning.criteria.VALUES_PER_CHUNK", 32 * 30)
    scores, largest = score_and_largest()
    torch.testing.assert_close(scores, whole)
    assert 0 < largest < 8 * 512 * 32 / 4


def test_products_of_half_precision_have_the_range_of_float32():
    large = torch.full((1, 2, 3), 60000.0)
    assert times(large.half(), large.half()).isfinite().all()
    a, b = torch.randn(2, 1, 50, 4).bfloat16()
    assert times(a, b).dtype == torch.bfloat16
    assert (times(a, b).float() / (a.float() * b.float()) - 1).abs().max() <= 2**-8


@pytest.mark.parametrize(
    ("free", "expected", "of_layer"),
    [(0, 1024, 1024), (2400, 1200, 3600), (8000, 4000, 4096), (2**40, 32768, 4096)],
    ids=["none", "little", "some", "much"],
)
@pytest.mark.parametrize("criteria", [["entropy"], ["obs", "fisher_pairs"]], ids=["small sums", "large sums"])
def test_a_gpu_takes_as_many_tokens_as_half_of_what_its_memory_leaves(free, expected, of_layer, criteria, monkeypatch):
    model = make_model()
    assert tokens_per_batch(model, criteria) == 1024, "a CPU is no faster with more"
    sums = sum(each.nbytes for each in add_up(model, tokens(), criteria, 0, 1, None, None).tensors.values())
    monkeypatch.setattr("hfprune.pruning.scoring.device_of", lambda _model: torch.device("cuda"))
    monkeypatch.setattr("hfprune.pruning.scoring.free_bytes", lambda _device: free * graph_bytes(model, 1) + sums)
    assert tokens_per_batch(model, criteria) == expected
    with monkeypatch.context() as patch:
        patch.setattr("hfprune.pruning.scoring.is_streamed", lambda _model: True)
        assert tokens_per_batch(model, criteria) == of_layer, "each of its three layers for itself"
    model.config._attn_implementation = "eager"
    assert tokens_per_batch(model, criteria) == 1024


@pytest.mark.parametrize("saves", [0, 120], ids=["saved", "not saved"])
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_batch_that_does_not_fit_is_halved(memory, saves, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hfprune.pruning.scoring.SECONDS_BETWEEN_SAVES", saves)
    model = load_model(save_dense(tmp_path / "model"), "float32", memory)
    whole = unit_scores(model, tokens(11), INTACT, draws=2)
    rows = []

    def run_out(module, inputs):
        rows.append(inputs[0].shape[0])
        if rows[-1] > 3 and len(rows) > 1:  # the first batch of the model in memory has added all its sums
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.model.layers[1].mlp.register_forward_pre_hook(run_out)
    capsys.readouterr()
    some = unit_scores(model, tokens(11), INTACT, draws=2, batch=4, resume=tmp_path / "resume")
    assert capsys.readouterr().out.count("out of memory: again, with 2 sequences at a time") == 1
    assert max(rows[2:]) == 2
    for name in INTACT:
        assert_close(some[name], flat(whole[name]), 1e-4)  # FLAP standardises what nearly cancels


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("a fault")])
def test_one_sequence_that_does_not_fit_and_any_other_error_end_the_pass(error):
    model, rows = make_model(), []

    def fail(_module, inputs):
        rows.append(inputs[0].shape[0])
        raise error

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=str(error)):
        unit_scores(model, tokens(), ["entropy"])
    assert rows == ([6, 3, 1] if isinstance(error, torch.OutOfMemoryError) else [6])

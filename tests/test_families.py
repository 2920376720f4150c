"""Every family: its description agrees with its own class, and what is cut is the model with those units silent."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfprune import api
from hfprune.cli.families import ANY, table
from hfprune.errors import UserError
from hfprune.evaluation.shared_prefix import Line, Tree, forward, trees
from hfprune.models import checkpoint, modeling_per_layer
from hfprune.models.activations import CHUNK, graph_bytes
from hfprune.models.families import FAMILIES, REFUSED, layout_for, layout_of
from hfprune.models.integrity import check
from hfprune.models.loading import check_config, count_parameters, load_model
from hfprune.models.run_part import run_part
from hfprune.models.units import PARTS, layers_of, parts
from hfprune.pruning.budget import shape_of, shape_on_disk, units_to_keep
from hfprune.pruning.refit import refit
from hfprune.pruning.scoring import unit_scores
from hfprune.pruning.surgery import cut
from hfprune.recovery.training import METHODS
from tests.conftest import REPOSITORY, make_tokenizer
from tests.test_surgery import masked, run_prune

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.15,
}  # fmt: skip
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
# What a family's config has instead of, or beside, `SHAPE`. None: no such key.
OTHERS = {
    "falcon": {"head_dim": None, "ffn_hidden_size": 48, "num_key_value_heads": None},
    "opt": {"head_dim": None, "num_key_value_heads": None, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"head_dim": None, "num_key_value_heads": None, "n_inner": 48},
    "gpt_neox": {"head_dim": None, "num_key_value_heads": None},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.5},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_implementation": "eager"},
    "gemma3_text": {"final_logit_softcapping": 4.0},
    "cohere": {"logit_scale": 0.4, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.4},
    "ministral": {"sliding_window": 8},
    "exaone4": {"sliding_window": 8},
    "olmo3": {"sliding_window": 8},
    "mpt": {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None, "max_seq_len": 512},
    "bloom": {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None},
    "qwen3_5_text": HYBRID,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "head_dim": None, "block_multiple_of": 1},
}
DENSE = {name: family for name, family in FAMILIES.items() if not layout_for({"model_type": name, **ANY}).mixture}
CASES = [(name, {}) for name in DENSE]
CASES += [(name, keys) for name, family in DENSE.items() for keys in family.variants.values()]
CASES += [("gpt_neox", {"use_parallel_residual": False}), ("stablelm", {"use_parallel_residual": True})]
CASES += [("falcon", {"multi_query": False}), ("cohere", {"use_qk_norm": False})]
IDS = ["-".join([name, *(f"{key}={value}" for key, value in keys.items())]) for name, keys in CASES]
CUTTABLE = [
    pytest.param(name, keys, part, id=f"{case}-{part}")
    for case, (name, keys) in zip(IDS, CASES, strict=True)
    for part in PARTS
    if not layout_for({"model_type": name, **ANY, **keys}).block(part).refused
]
TOKENS = torch.arange(24).view(2, 12)


def make(name, **keys):
    """A random float32 model of a family's own class, whose norms and biases are no ones and zeros."""
    torch.manual_seed(0)
    if keys.get("new_decoder_architecture"):
        keys["num_kv_heads"] = 2
    values = {key: value for key, value in (SHAPE | OTHERS.get(name, {}) | keys).items() if value is not None}
    implementation = values.pop("attn_implementation", None)
    config = AutoConfig.for_model(name, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
        if parameter.ndim > 1 and 0 < parameter.std() < 0.1:  # of a family with an initialisation of its own
            parameter.data *= 0.15 / parameter.std()
    return model.eval().requires_grad_(False)


def some(model, part, share=0.6):
    """A random choice of the part's units, another number in each layer."""
    torch.manual_seed(1)
    kept = []
    for number, each in enumerate(parts(model, part)):
        count = min(each.units, round(share * each.units) + (number == 1))
        kept.append(torch.randperm(each.units)[:count].sort().values)
    return {part: kept}


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(("name", "keys"), CASES, ids=IDS)
def test_the_description_computes_what_the_familys_class_does(name, keys):
    """Part by part, as the layout says, the model gives its own logits."""
    from hfprune.models.head import head_of
    from hfprune.models.walk import enter, exit_norm

    model = make(name, **keys)
    layout = layout_of(model)
    states, arguments = enter(model, TOKENS)
    for layer, own in zip(layers_of(model), arguments, strict=True):
        entered = states
        for part in ("attention", "mlp"):
            reads = entered if layout.parallel else states
            with torch.no_grad():
                states = states + run_part(layout, model.config, layer, part, own, reads).written
    with head_of(model) as head, torch.no_grad():
        found = head.logits(exit_norm(model)(states))
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)


def assert_auto_model_builds(model):
    """The class that the checkpoint names for AutoModel makes all layers as wide as they are."""
    base = getattr(modeling_per_layer, model.config.auto_map["AutoModel"].removeprefix("modeling_per_layer."))
    with torch.device("meta"):
        made = base._from_config(copy.deepcopy(model.config))
    shapes, expected = ({name: p.shape for name, p in each.named_parameters()} for each in (made, model.base_model))
    assert shapes == expected


@pytest.mark.parametrize(("name", "keys", "part"), CUTTABLE)
def test_what_is_cut_saved_and_reloaded_is_the_model_with_those_units_silent(name, keys, part, tmp_path):
    model = make(name, **keys)
    kept = some(model, part)
    expected, before = logits(masked(model, kept)), logits(model)
    small = copy.deepcopy(model)
    cut(small, kept)
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2
    small.save_pretrained(tmp_path)
    assert_auto_model_builds(small)
    again = load_model(tmp_path, "float32")
    assert torch.equal(logits(again), logits(small))
    assert count_parameters(again) == count_parameters(small)
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    cached, whole = (
        again.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=use, **greedy) for use in (True, False)
    )
    assert torch.equal(cached, whole)


@pytest.mark.parametrize(("name", "keys", "part"), CUTTABLE)
def test_equal_widths_make_a_plain_checkpoint_where_the_stock_class_can_hold_them(name, keys, part, tmp_path):
    model = make(name, **keys)
    kept = {part: [torch.arange(each.units // 2) for each in parts(model, part)]}
    expected = logits(masked(model, kept))
    cut(model, kept)
    is_plain = type(model).__module__.startswith("transformers.")
    assert is_plain == layout_of(model).block(part).is_free
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True) if is_plain else None
    torch.testing.assert_close(logits(stock or load_model(tmp_path, "float32")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "keys"), CASES, ids=IDS)
def test_scores_equal_float64_autograd_through_the_whole_model(name, keys):
    tokens = TOKENS[:, :8]
    ours = unit_scores(make(name, **keys), tokens, ["entropy", "wanda"])
    model, seen = make(name, **keys).double(), {}
    for part in PARTS:
        for number, each in enumerate(parts(model, part)):

            def remember(_module, inputs, key=(part, number)):
                seen[key] = inputs[0].clone() if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
                seen[key].retain_grad()
                return (seen[key],)

            each.output.register_forward_pre_hook(remember)
    totals = {}
    for sequence in tokens:
        log_p = model(sequence[None]).logits.double().log_softmax(-1)
        (-(log_p.exp() * log_p).sum()).backward()
        for key, h in seen.items():
            units = parts(model, key[0])[key[1]].units
            products = (h * h.grad).view(len(sequence), units, -1).sum(-1)
            totals[key] = totals.get(key, 0) + products.abs().sum(0) / tokens.numel()
    for (part, number), expected in totals.items():
        error = (ours["entropy"][part][number].double() - expected).norm() / expected.norm()
        assert error < 1e-4, (part, number)
        assert ours["wanda"][part][number].any()


@pytest.mark.parametrize(("name", "keys", "part"), CUTTABLE)
def test_a_refit_brings_the_model_nearer_to_the_dense_one(name, keys, part):
    model = make(name, **keys)
    kept, text = some(model, part), torch.randint(320, (40, 16), generator=torch.Generator().manual_seed(0))
    held_out = torch.randint(320, (20, 16), generator=torch.Generator().manual_seed(1))
    dense = logits(model, held_out).log_softmax(-1)
    kl = {}
    for method in ("none", "least_squares", "sequential"):
        small = copy.deepcopy(model)
        if method != "none":
            refit(small, kept, text, method, 0.1)
        cut(small, kept)
        kl[method] = (dense.exp() * (dense - logits(small, held_out).log_softmax(-1))).sum(-1).mean().item()
    assert kl["least_squares"] < kl["none"]
    assert kl["sequential"] < kl["none"]


@pytest.mark.parametrize(("name", "keys"), CASES, ids=IDS)
def test_a_budget_is_the_same_from_the_files_as_from_the_model(name, keys, tmp_path):
    model = make(name, **keys)
    model.save_pretrained(tmp_path)
    assert shape_on_disk(tmp_path) == shape_of(model)


@pytest.mark.parametrize("name", ["olmo2", "falcon"])
def test_a_part_that_cannot_be_cut_is_refused_with_what_can_be(name):
    with pytest.raises(UserError, match=r"structure 'attention': .* Cut mlp\."):
        units_to_keep(shape_of(make(name)), 0.1, structure="attention")
    assert units_to_keep(shape_of(make(name)), 0.1).keep


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_without_units_is_refused_with_another_that_has_them(name):
    with pytest.raises(UserError, match=r"me: model_type .* is not supported: .* can be pruned\."):
        check_config(AutoConfig.for_model(name), "me")


def test_the_class_with_widths_per_layer_knows_the_modules_of_every_family():
    for name, keys in CASES:
        layout = layout_for({"model_type": name, **ANY, **keys})
        for part in PARTS:
            block = layout.block(part)
            assert {rows.path for rows in block.rows} <= set(modeling_per_layer.ROWS[part])
            assert block.output in modeling_per_layer.COLUMNS[part]
            assert set(block.per_head) <= set(modeling_per_layer.HEADS)
        assert layout.mlp.size in modeling_per_layer.NEURONS or not layout.mlp.is_free


def test_the_table_in_the_docs_is_that_of_the_registry():
    assert table() in (REPOSITORY / "docs/families.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "keys"), CASES, ids=IDS)
def test_texts_with_a_common_beginning_get_the_likelihoods_of_each_alone(name, keys):
    model, draw = make(name, **keys), torch.Generator().manual_seed(0)
    beginning = torch.randint(2, 320, (14,), generator=draw).tolist()
    texts = sorted(beginning + torch.randint(2, 320, (more,), generator=draw).tolist() for more in (3, 5, 4))
    lines = [Line(number, tuple(text[:-1]), tuple(text[-2:]), "") for number, text in enumerate(texts)]
    batch = [Tree(lines)] if layout_of(model).branches else trees(lines, model)
    found = [likelihood for likelihood, _ in forward(model, batch)]
    for line, likelihood in zip(lines, found, strict=True):
        log_p = logits(model, torch.tensor([line.tokens]))[0, -2:].log_softmax(-1)
        expected = sum(log_p[i, token].item() for i, token in enumerate(line.targets))
        assert likelihood == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("name", "keys"), CASES, ids=IDS)
def test_packed_documents_see_one_another_only_where_the_layout_says_so(name, keys):
    model, ids = make(name, **keys), TOKENS.flatten()[None]
    together = model(ids, position_ids=torch.arange(12).repeat(2)[None], use_cache=False).logits.view(2, 12, -1)
    assert layout_of(model).keeps_documents_apart == bool((together - logits(model)).abs().max() < 1e-4)


def bytes_kept(model, tokens):
    """What a forward pass keeps for the backward pass, beside the weights."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _kept = model.base_model(tokens, use_cache=False)
    for parameter in model.parameters():
        held.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(held.values())


@pytest.mark.parametrize(("name", "keys"), CASES, ids=IDS)
def test_a_forward_pass_keeps_no_more_than_is_estimated(name, keys):
    model = make(name, **keys)
    tokens = torch.arange(8 * (CHUNK if layout_of(model).attention.others else 24)).view(8, -1) % 320
    assert 0 < bytes_kept(model, tokens) < graph_bytes(model, tokens.numel())


SCALED = ["llama", "granite", "gemma2", "cohere", "smollm3", "starcoder2", "nemotron", "phi", "gpt_neox", "gpt2"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", SCALED)
def test_a_trained_scale_of_the_embeddings_folds_into_the_weights(name, tied):
    model, finish = METHODS["norms"](make(name, tie_word_embeddings=tied))
    scale = model.get_input_embeddings().scale
    scale.data += 0.3 * torch.randn(scale.shape, generator=torch.Generator().manual_seed(0))
    before = logits(model)
    torch.testing.assert_close(logits(finish(model, None)), before, rtol=1e-4, atol=1e-4)


def test_a_family_that_is_not_declared_is_treated_as_the_one_that_it_is_like(capsys):
    assert "ministral3" not in FAMILIES
    model = make("ministral3")
    check_config(model.config, "me")
    kept = some(model, "mlp")
    expected = logits(masked(model, kept))
    assert "named, and compute, as those of 'llama'" in capsys.readouterr().err
    cut(model, kept)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_names_alone_do_not_make_a_family(capsys):
    model = make("granite")  # has the modules of a Llama
    model.config.model_type = "unheard-of"
    assert layout_of(model) == FAMILIES["granite"].layout
    other = make("llama")
    other.config.model_type = "unheard-of"
    forward = other.model.layers[1].mlp.forward
    other.model.layers[1].forward = lambda states, **_: states + 2 * forward(states)
    with pytest.raises(UserError, match="they compute something else than those of 'llama'"):
        layout_of(other)


# One for each way of saving: transposed, without a module, fused, norms of heads, a cap, buffers, heads of fixed size,
# layers of several kinds, MLPs whose width no stock config can state.
@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3", "cohere", "gemma2", "apertus", "gpt_neox", "lfm2", "bloom"])
def test_a_cut_with_widths_per_layer_is_refitted_and_proven_in_a_fresh_process(name, texts, tmp_path):
    make(name).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    scores = unit_scores(load_model(tmp_path / "dense", "float32"), TOKENS, ["fisher_token"])["fisher_token"]
    asked = {"ratio": 0.2, "structure": "mlp+attention", "attention_share": 0.4, "allocation": "global"}
    if layout_for({"model_type": name, **ANY}).attention.refused:
        asked |= {"structure": "mlp", "attention_share": None}
    out, done = run_prune(tmp_path / "dense", tmp_path, texts, scores, refit="sequential", **asked)
    written = json.loads((out / "pruning.json").read_text())
    assert written["reload"]["trust_remote_code"]
    assert written["reload"]["max_difference"] < 1e-4
    assert abs(done["ratio_achieved"] - 0.2) < 0.01
    check(out, "the checkpoint")  # as a download of it would be


@pytest.mark.parametrize("name", ["falcon", "gpt2", "phi3"])
def test_the_python_interface_takes_linear_layers_of_every_class(name):
    api.check_model(make(name))


@pytest.mark.parametrize(("name", "cut_parts"), [("phi3", PARTS), ("bloom", ["mlp"])])
def test_padding_makes_a_model_of_the_stock_class_again(name, cut_parts):
    """Also one with fused rows, and one whose class knows a single width."""
    model = make(name)
    kept, stock = {part: units for each in cut_parts for part, units in some(model, each).items()}, type(model)
    expected = logits(masked(model, kept))
    cut(model, kept)
    checkpoint.pad(model)
    assert type(model) is stock
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)

"""The pruned checkpoint: exact, of the asked size, and loadable by anyone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hfprune.allocation import allocate
from hfprune.budget import neurons_to_keep
from hfprune.config import PruneParameters
from hfprune.errors import UserError
from hfprune.layout import PRUNING, SCORES, layer_name
from hfprune.models import count_parameters, load_model
from hfprune.surgery import cut, prune
from tests.conftest import FAMILIES, make_model, save_checkpoint


def random_scores(seed=0, layers=3, neurons=48):
    torch.manual_seed(seed)
    return [torch.rand(neurons) for _ in range(layers)]


CALIBRATION = {"criterion": "entropy", "samples": 6, "length": 32, "seed": 0, "text": "words"}
SOURCE = {"name": "tiny", "content": "0"}


def save_scores(folder):
    folder.mkdir(parents=True)
    save_file({layer_name(i): layer for i, layer in enumerate(random_scores())}, folder / SCORES)
    return folder


def prune_into(out, model, scores, text=None, **asked):
    asked = PruneParameters(**({"dtype": "float32"} | asked))
    return prune(out, model, scores, text, SOURCE, CALIBRATION, **asked.model_dump())


def run_prune(model, folder, text=None, **asked):
    scores, out = save_scores(folder / "scores"), folder / "pruned"
    out.mkdir()
    return out, prune_into(out, model, scores, text, **asked)


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in FAMILIES), ("llama", {"mlp_bias": True})])
def test_reloaded_by_stock_code_it_is_the_intact_model_with_those_neurons_silent(family, changes, tmp_path):
    dense = save_checkpoint(tmp_path / "dense", family, **changes)
    out, _ = run_prune(dense, tmp_path, ratio=0.15)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out)(torch.arange(24).view(2, 12)).logits
    kept = json.loads((out / PRUNING).read_text())["kept"]

    masked = load_model(dense, "float32")
    for layer, stays in zip(masked.model.layers, kept, strict=True):
        mask = torch.zeros(48)
        mask[stays] = 1
        layer.mlp.down_proj.register_forward_pre_hook(lambda _module, inputs, mask=mask: (inputs[0] * mask,))
    with torch.no_grad():
        expected = masked(torch.arange(24).view(2, 12)).logits
    assert (found - expected).abs().max() < 1e-4
    assert (load_model(dense, "float32")(torch.arange(24).view(2, 12)).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.2, 0.25])
def test_the_share_removed_is_within_half_a_neuron_per_layer(ratio, tied):
    model = make_model(tie_word_embeddings=tied)
    before = count_parameters(model)
    cut(model, allocate("uniform", random_scores(), neurons_to_keep(model, ratio), 1))
    half_a_neuron_per_layer = 3 * 3 * 32 / 2 / before
    assert abs(1 - count_parameters(model) / before - ratio) <= half_a_neuron_per_layer + 1e-12


def test_what_was_done_stands_beside_the_weights_with_the_tokenizer_and_all(checkpoint, tmp_path):
    out, done = run_prune(checkpoint, tmp_path, ratio=0.1)
    before, after = (count_parameters(load_model(folder, "float32")) for folder in (checkpoint, out))
    written = json.loads((out / PRUNING).read_text())
    assert {name: written[name] for name in done} == done
    assert written["parameters"] == after
    assert written["parameters_dense"] == before
    assert written["ratio_achieved"] == pytest.approx(1 - after / before, abs=1e-12)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert json.loads((out / "config.json").read_text())["intermediate_size"] < 48


PER_NEURON = 3 * 32  # parameters of a neuron of the tiny model


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("budget", ["ratio", "ratio_of_mlp", "target_parameters"])
def test_a_budget_is_met_to_the_nearest_width(budget, round_to, allocation):
    model = make_model()
    before = count_parameters(model)
    asked = {
        "ratio": {"ratio": 0.2},
        "ratio_of_mlp": {"ratio": 0.45, "ratio_of": "mlp"},
        "target_parameters": {"target_parameters": before - 50 * PER_NEURON - 11},
    }[budget]
    removed = {
        "ratio": 0.2 * before / PER_NEURON,
        "ratio_of_mlp": 0.45 * 144,
        "target_parameters": 50 + 11 / PER_NEURON,
    }
    keep = neurons_to_keep(model, **asked, round_to=round_to, allocation=allocation)
    widths = [len(layer) for layer in allocate(allocation, random_scores(), keep, round_to)]
    assert keep == pytest.approx(144 - removed[budget])
    assert all(width % round_to == 0 for width in widths)
    step = round_to * (3 if allocation == "uniform" else 1)  # uniform widths move together
    assert abs(sum(widths) - keep) <= step / 2
    assert len(set(widths)) == 1 or allocation == "global"


@pytest.mark.parametrize("asked", [{"ratio": 0.45, "ratio_of": "mlp"}, {"target_parameters": 24_000}], ids=str)
def test_both_shares_on_record_are_of_all_parameters(asked, checkpoint, tmp_path):
    before = count_parameters(load_model(checkpoint, "float32"))
    _, done = run_prune(checkpoint, tmp_path, **asked, round_to=8, allocation="global")
    removed = 0.45 * 144 * PER_NEURON if "ratio" in asked else before - 24_000
    assert done["ratio"] == pytest.approx(removed / before)
    assert done["ratio_achieved"] == pytest.approx(1 - done["parameters"] / before)
    assert abs(done["ratio_achieved"] - done["ratio"]) <= 4 * PER_NEURON / before


@pytest.mark.parametrize("ratio_of", ["all", "mlp"])
@pytest.mark.parametrize(
    ("allocation", "round_to", "fewest"), [("uniform", 1, 3), ("uniform", 8, 24), ("global", 1, 15)]
)
def test_an_impossible_ratio_is_refused_with_the_largest_possible_one(allocation, round_to, fewest, ratio_of):
    model, words = make_model(), {"ratio_of": ratio_of, "allocation": allocation, "round_to": round_to}
    said = f"ratio 0.99 of {ratio_of} parameters.*largest ratio that this model's MLPs allow is 0[.][0-9]+"
    with pytest.raises(UserError, match=said) as refused:
        neurons_to_keep(model, 0.99, **words)
    largest = float(str(refused.value).split()[-1].rstrip("."))
    assert neurons_to_keep(model, largest, **words) == pytest.approx(fewest, abs=0.1)


def test_an_impossible_target_is_refused_with_the_smallest_possible_one():
    model = make_model()
    with pytest.raises(
        UserError, match=r"target_parameters 1000.*smallest target_parameters that .* is [0-9]+"
    ) as refused:
        neurons_to_keep(model, target_parameters=1000)
    assert neurons_to_keep(model, target_parameters=int(str(refused.value).split()[-1].rstrip("."))) == 3
    with pytest.raises(UserError, match="the target has to be smaller"):
        neurons_to_keep(model, target_parameters=count_parameters(model))


def test_widths_too_small_for_the_step_are_refused():
    with pytest.raises(UserError, match="round_to 64: a layer has only 48 neurons"):
        neurons_to_keep(make_model(), 0.1, round_to=64)


@pytest.mark.parametrize("refit", ["bias", "least_squares", "sequential"])
def test_a_refit_is_on_record_and_reads_the_sequences_of_the_scores(refit, texts, tmp_path):
    dense = save_checkpoint(tmp_path / "dense", mlp_bias=True)
    out, done = run_prune(dense, tmp_path, text=texts, ratio=0.2, refit=refit, ridge=0.2)
    plain, _ = run_prune(dense, tmp_path / "plain", ratio=0.2)
    solved = {"ridge": 0.2, "starved_layers": []} if refit != "bias" else {}
    report = json.loads((out / PRUNING).read_text())
    assert report["kept"] == json.loads((plain / PRUNING).read_text())["kept"]
    for record in (done, report):
        assert {name: record.get(name) for name in ("refit", "refit_tokens", *solved)} == {
            "refit": refit, "refit_tokens": 6 * 32, **solved
        }  # fmt: skip
        assert ("ridge" in record) == (refit != "bias")
    weights, before = (load_file(folder / "model.safetensors") for folder in (out, plain))
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    part = "bias" if refit == "bias" else "weight"
    assert changed == {f"model.layers.{layer}.mlp.down_proj.{part}" for layer in range(3)}


def test_cutting_nothing_changes_nothing():
    model, tokens = make_model(), torch.arange(10)[None]
    before = model(tokens).logits
    cut(model, [torch.arange(48)] * 3)
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral"}, "'mixtral' is a mixture of experts; experts are not supported yet"),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is a mixture of experts; experts are not supported yet"),
        ({"model_type": "phi"}, "its blocks may not have the MLP .* Supported families: llama, mistral, qwen2, qwen3"),
        ({"model_type": "llama", "final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0: capped logits"),
    ],
)
def test_what_would_be_scored_or_cut_wrongly_is_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        load_model(tmp_path, "float32")


def test_an_unsupported_family_is_refused_by_name_with_the_list(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config.json: model_type 'gpt2' is not supported.*llama, mistral, qwen2"):
        load_model(tmp_path, "float32")

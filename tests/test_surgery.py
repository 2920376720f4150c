"""The pruned checkpoint: exact, of the asked size, and loadable by anyone."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hfprune.allocation import uniform
from hfprune.errors import UserError
from hfprune.layout import PRUNING, SCORES, layer_name
from hfprune.models import count_parameters, load_model
from hfprune.surgery import cut, neurons_to_remove, prune
from tests.conftest import FAMILIES, make_model, save_checkpoint


def random_scores(seed=0, layers=3, neurons=48):
    torch.manual_seed(seed)
    return [torch.rand(neurons) for _ in range(layers)]


def save_scores(folder):
    folder.mkdir(parents=True)
    save_file({layer_name(i): layer for i, layer in enumerate(random_scores())}, folder / SCORES)
    return folder


def run_prune(model, folder, ratio, dtype="float32", pad=False):
    made, out = save_scores(folder / "scores"), folder / "pruned"
    out.mkdir()
    source = {"name": "tiny", "content": "0"}
    calibration = {"criterion": "entropy", "samples": 6, "length": 32, "seed": 0, "text": "words"}
    return out, prune(out, model, made, source, calibration, ratio, dtype, pad)


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in FAMILIES), ("llama", {"mlp_bias": True})])
def test_reloaded_by_stock_code_it_is_the_intact_model_with_those_neurons_silent(family, changes, tmp_path):
    dense = save_checkpoint(tmp_path / "dense", family, **changes)
    out, _ = run_prune(dense, tmp_path, 0.15)
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
    cut(model, uniform(random_scores(), neurons_to_remove(model, ratio)))
    half_a_neuron_per_layer = 3 * 3 * 32 / 2 / before
    assert abs(1 - count_parameters(model) / before - ratio) <= half_a_neuron_per_layer + 1e-12


def test_what_was_done_stands_beside_the_weights_with_the_tokenizer_and_all(checkpoint, tmp_path):
    out, done = run_prune(checkpoint, tmp_path, 0.1)
    before, after = (count_parameters(load_model(folder, "float32")) for folder in (checkpoint, out))
    written = json.loads((out / PRUNING).read_text())
    assert written["parameters"] == done["parameters"] == after
    assert written["parameters_dense"] == before
    assert written["ratio_achieved"] == pytest.approx(1 - after / before, abs=1e-12)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert json.loads((out / "config.json").read_text())["intermediate_size"] < 48


def test_an_impossible_ratio_is_refused_with_the_largest_possible_one():
    model = make_model()
    with pytest.raises(UserError, match=r"largest ratio that this model's MLPs allow is (0[.][0-9]+)") as refused:
        neurons_to_remove(model, 0.9)
    largest = float(str(refused.value).split()[-1].rstrip("."))
    assert neurons_to_remove(model, largest) == 47


def test_uniform_keeps_the_best_of_every_layer():
    scores = [torch.tensor([0.1, 0.9, 0.5, 0.5]), torch.tensor([4.0, 3.0, 2.0, 1.0])]
    assert [kept.tolist() for kept in uniform(scores, 2)] == [[1, 2], [0, 1]]


def test_cutting_nothing_changes_nothing():
    model, tokens = make_model(), torch.arange(10)[None]
    before = model(tokens).logits
    cut(model, [torch.arange(48)] * 3)
    assert torch.equal(model(tokens).logits, before)


def test_an_unsupported_family_is_refused_by_name_with_the_list(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config.json: model_type 'gpt2' is not supported.*llama, mistral, qwen2"):
        load_model(tmp_path, "float32")

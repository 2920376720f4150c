"""The pruned checkpoint: exact, of the asked size, and loadable by anyone."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfprune.allocation import uniform
from hfprune.errors import UserError
from hfprune.layout import PRUNING, SCORES, layer_name
from hfprune.models import count_parameters, load_model
from hfprune.surgery import cut, neurons_to_remove, prune
from tests.conftest import FAMILIES, make_model, save_checkpoint

# A fresh process with nothing of ours in it.
RELOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
tokens = torch.arange(24).view(2, 12)
with torch.no_grad():
    save_file({"logits": model(tokens).logits}, sys.argv[2])
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (2, 16)
"""


def random_scores(seed=0, layers=3, neurons=48):
    torch.manual_seed(seed)
    return [torch.rand(neurons) for _ in range(layers)]


def run_prune(model, folder, ratio, scores=None, dtype="float32", pad=False):
    made = folder / "scores"
    made.mkdir(parents=True)
    save_file({layer_name(i): layer for i, layer in enumerate(scores or random_scores())}, made / SCORES)
    out = folder / "pruned"
    out.mkdir()
    source = {"name": "tiny", "content": "0"}
    calibration = {"criterion": "entropy", "samples": 6, "length": 32, "seed": 0, "text": "words"}
    return out, prune(out, model, made, source, calibration, ratio, dtype, pad)


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in FAMILIES), ("llama", {"mlp_bias": True})])
def test_reloaded_in_a_fresh_process_it_is_the_intact_model_with_those_neurons_silent(family, changes, tmp_path):
    dense = save_checkpoint(tmp_path / "dense", family, **changes)
    out, _ = run_prune(dense, tmp_path, 0.15)
    subprocess.run([sys.executable, "-c", RELOAD, out, tmp_path / "logits"], check=True, cwd=tmp_path)
    kept = json.loads((out / PRUNING).read_text())["kept"]

    masked = load_model(dense, "float32")
    for layer, stays in zip(masked.model.layers, kept, strict=True):
        mask = torch.zeros(48)
        mask[stays] = 1
        layer.mlp.down_proj.register_forward_pre_hook(lambda _module, inputs, mask=mask: (inputs[0] * mask,))
    with torch.no_grad():
        expected = masked(torch.arange(24).view(2, 12)).logits
    difference = (load_file(tmp_path / "logits")["logits"] - expected).abs().max().item()
    assert difference < 1e-4
    assert (load_model(dense, "float32")(torch.arange(24).view(2, 12)).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.2, 0.25])
def test_the_share_removed_is_within_half_a_neuron_per_layer(ratio, tied, tmp_path):
    dense = save_checkpoint(tmp_path / "dense", tie_word_embeddings=tied)
    out, done = run_prune(dense, tmp_path, ratio)
    before, after = (count_parameters(load_model(folder, "float32")) for folder in (dense, out))
    half_a_neuron_per_layer = 3 * 3 * 32 / 2 / before
    assert done["ratio_achieved"] == pytest.approx(1 - after / before, abs=1e-12)
    assert abs(done["ratio_achieved"] - ratio) <= half_a_neuron_per_layer + 1e-12
    assert json.loads((out / PRUNING).read_text())["parameters"] == after


def test_tokenizer_chat_template_and_generation_config_come_along(checkpoint, tmp_path):
    out, _ = run_prune(checkpoint, tmp_path, 0.1)
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

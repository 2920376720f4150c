"""Language models inside models that read images: taken out, pruned, put back, reloaded."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.models.checkpoint import is_tied
from hfprune.models.loading import check_family, load_model
from hfprune.models.units import parts
from hfprune.pruning.surgery import cut
from tests.conftest import make_tokenizer
from tests.test_families import HYBRID, SHAPE, logits

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
WHOLE = {  # the language model, and what reads images
    "gemma3": ({"model_type": "gemma3_text"}, VISION),
    "llava": ({"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}),
    "mistral3": ({"model_type": "mistral"}, VISION | {"model_type": "pixtral", "head_dim": 8}),
    "smolvlm": ({"model_type": "llama"}, VISION),
    "idefics3": ({"model_type": "llama"}, VISION),
    "internvl": ({"model_type": "qwen2"}, VISION | {"image_size": [28, 28], "patch_size": [14, 14]}),
    "qwen3_5": ({"model_type": "qwen3_5_text", **HYBRID}, {"depth": 1, "hidden_size": 16, "num_heads": 2}),
    "lfm2_vl": ({"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]}, VISION),
}


def write(name, folder):
    """A random checkpoint with a tokenizer, and a file of the part that reads images."""
    torch.manual_seed(0)
    text, vision = WHOLE[name]
    extra = {"out_hidden_size": SHAPE["hidden_size"]} if name == "qwen3_5" else {}
    config = AutoConfig.for_model(name, text_config=SHAPE | text, vision_config=vision | extra)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def images_part(folder):
    """The weights beside the language model."""
    state = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    return {
        key: weight
        for key, weight in state.items()
        if not {"language_model", "text_model", "lm_head"} & set(key.split("."))
    }


@pytest.mark.parametrize("name", WHOLE)
def test_a_language_model_is_taken_out_pruned_and_put_back(name, tmp_path, capsys):
    folders = [tmp_path / part for part in ("whole", "text", "small", "again")]
    whole, text, small, again = map(str, folders)
    write(name, folders[0])
    assert main(["unwrap", "--model", whole, "--output", text]) == 0
    check_family(folders[1])
    model = load_model(folders[1], "float32")
    before = logits(AutoModelForImageTextToText.from_pretrained(whole))
    assert torch.equal(logits(model), before)
    width = parts(model, "mlp")[0].units
    cut(model, {"mlp": [torch.arange(width // 2)] * 3})
    model.config.tie_word_embeddings = is_tied(model)
    model.save_pretrained(small)
    assert main(["rewrap", "--model", whole, "--text", small, "--output", again]) == 0
    assert "again: reloaded; logits differ by 0 " in capsys.readouterr().out
    rebuilt = AutoModelForImageTextToText.from_pretrained(again)
    assert torch.equal(logits(rebuilt), logits(AutoModelForCausalLM.from_pretrained(small)))
    assert (logits(rebuilt) - before).abs().max() > 1e-2
    assert rebuilt.config.get_text_config().intermediate_size == width // 2
    kept, expected = images_part(again), images_part(whole)
    assert kept.keys() == expected.keys() and expected
    assert all(torch.equal(kept[key], weight) for key, weight in expected.items())
    assert {"tokenizer.json", "preprocessor_config.json"} <= {file.name for file in folders[3].iterdir()}


def test_a_language_model_that_does_not_fit_is_not_put_back(tmp_path, capsys):
    write("llava", tmp_path / "whole")
    words = ["rewrap", "--model", str(tmp_path / "whole"), "--text", str(tmp_path / "text"), "--output"]
    assert main(["unwrap", "--model", str(tmp_path / "whole"), "--output", str(tmp_path / "text")]) == 0
    model = load_model(tmp_path / "text", "float32")
    cut(model, {"mlp": [torch.arange(width) for width in (48, 40, 48)]})
    model.save_pretrained(tmp_path / "text")
    capsys.readouterr()
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "layers of this language model differ in width" in capsys.readouterr().err
    config = json.loads((tmp_path / "text" / "config.json").read_text()) | {"vocab_size": 300, "per_layer_config": None}
    (tmp_path / "text" / "config.json").write_text(json.dumps(config))
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "vocab_size 300: the language model to be replaced has 320" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma3", r"Take it out with `hfprune unwrap`.*'gemma3_text', which can be pruned"),
        ("qwen2_vl", r"'qwen2_vl_text', which is not supported: supported are llama"),
        ("gemma3n", r"'gemma3n_text', which is not supported: its last layers use the keys"),
    ],
)
def test_a_model_that_reads_images_is_refused_with_what_to_do(name, message, tmp_path):
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model_type '{name}' wraps a language model in another.*{message}"):
        check_family(tmp_path)


def test_a_model_without_images_is_not_unwrapped(tmp_path, capsys):
    assert main(["unwrap", "--model", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "no model that reads images and text" in capsys.readouterr().err

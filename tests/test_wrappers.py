"""Language models inside models that read images: taken out, pruned, put back, reloaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.models.checkpoint import is_tied
from hfprune.models.loading import check_family, load_model
from hfprune.models.units import parts
from hfprune.pruning.budget import shape_of
from hfprune.pruning.order import kept_without, steps_of
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
    shape = shape_of(model)
    cut(model, kept_without(shape, steps_of(shape, "layers")[:1]))
    model.config.tie_word_embeddings = is_tied(model)
    model.save_pretrained(small)
    assert main(["rewrap", "--model", whole, "--text", small, "--output", again]) == 0
    assert "again: reloaded; logits differ by 0 " in capsys.readouterr().out
    rebuilt = AutoModelForImageTextToText.from_pretrained(again)
    assert torch.equal(logits(rebuilt), logits(AutoModelForCausalLM.from_pretrained(small)))
    assert (logits(rebuilt) - before).abs().max() > 1e-2
    text_config = rebuilt.config.get_text_config()
    assert (text_config.intermediate_size, text_config.num_hidden_layers) == (width // 2, 2)
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


def changed_tensor(folder, ending, change):
    """Replace the first tensor of `folder` whose name has this ending, by `change(tensor)`; None leaves it out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(ending))
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed}), file, {"format": "pt"})


@pytest.fixture(scope="module")
def taken_out(tmp_path_factory):
    """A whole model, and its language model."""
    folder = tmp_path_factory.mktemp("taken_out")
    write("llava", folder / "whole")
    assert main(["unwrap", "--model", str(folder / "whole"), "--output", str(folder / "text")]) == 0
    return folder


@pytest.fixture
def both(taken_out, tmp_path):
    """Copies of these two, to change."""
    return shutil.copytree(taken_out, tmp_path / "both")


def rewrapped(folder):
    """The status of putting the language model back."""
    return main(["rewrap", "--model", f"{folder}/whole", "--text", f"{folder}/text", "--output", f"{folder}/again"])


@pytest.mark.parametrize(
    ("part", "ending", "change", "message"),
    [
        ("whole", "class_embedding", lambda _: None, "which no file has; transformers would take random numbers"),
        ("text", "mlp.up_proj.weight", lambda _: None, "which no file has; transformers would take random numbers"),
        ("text", "mlp.up_proj.weight", lambda weight: weight * float("nan"), "values that are NaN or infinite"),
        ("whole", "mlp.up_proj.weight", lambda weight: weight.to(torch.float8_e4m3fn), "is F8_E4M3: quantised"),
    ],
)
def test_weights_that_are_not_whole_are_not_put_back(part, ending, change, message, both, capsys):
    changed_tensor(both / part, ending, change)
    assert rewrapped(both) == 2
    error = capsys.readouterr().err
    assert f"{both / part}: " in error and message in error
    assert not (both / "again").exists()


def test_a_file_that_is_cut_short_is_not_put_back(both, capsys):
    file = both / "text" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert rewrapped(both) == 2
    assert f"{both}/text: model.safetensors: cut short" in capsys.readouterr().err


@pytest.mark.parametrize("place", [(), ("text_config",)])
def test_a_quantised_model_is_not_unwrapped(place, both, capsys):
    config = json.loads((both / "whole" / "config.json").read_text())
    holder = config[place[0]] if place else config
    holder["quantization_config"] = {"quant_method": "fp8"}
    (both / "whole" / "config.json").write_text(json.dumps(config))
    assert main(["unwrap", "--model", str(both / "whole"), "--output", str(both / "again")]) == 2
    assert "whole/config.json: quantization_config: the weights are quantised (fp8)" in capsys.readouterr().err


def test_a_language_model_takes_the_type_of_the_whole(both, capsys):
    """A float32 cut of a bfloat16 model goes back in bfloat16; a number beyond float16 does not go into float16."""
    for kind in (torch.bfloat16, torch.float16):
        AutoModelForImageTextToText.from_pretrained(both / "whole", dtype=kind).save_pretrained(both / "whole")
        if kind == torch.float16:
            shutil.rmtree(both / "again")
            changed_tensor(both / "text", "mlp.up_proj.weight", lambda weight: weight.fill_(1e6))
        assert rewrapped(both) == (0 if kind == torch.bfloat16 else 2)
    out, error = capsys.readouterr()
    assert "again: reloaded; logits differ by 0 " in out
    assert f"{both / 'text'}: holds numbers beyond those of float16, the type of {both / 'whole'}" in error


def test_a_cut_made_by_the_stages_is_known_as_the_wholes(taken_out, tmp_path, data, command, capsys):
    model = command("download", "model", "--path", taken_out / "text")
    text = command("download", "text", "--path", data / "calibration.jsonl")
    scores = command("score", "--model", model, "--text", text, "--samples", 6, "--length", 32)
    pruned = command("prune", "--model", model, "--scores", scores, "--ratio", 0.2)
    again = tmp_path / "again"
    assert main(["rewrap", "--model", f"{taken_out}/whole", "--text", str(pruned), "--output", str(again)]) == 0
    assert "taken_out_of" in (pruned / "config.json").read_text()
    assert "taken_out_of" not in (again / "config.json").read_text(), "it is whole"


def test_another_whole_of_the_same_shape_does_not_take_the_language_model(both, capsys):
    """One weight of the part that reads images differs; or nobody knows whose language model it is."""

    def turn_one(weight):
        weight[3, 5] *= -1
        return weight

    changed_tensor(both / "whole", "fc1.weight", turn_one)
    assert rewrapped(both) == 2
    told = f"{both}/text: not a language model that `hfprune unwrap` took out of {both}/whole: "
    assert f"{told}came from another model. Name the model" in capsys.readouterr().err
    config = json.loads((both / "text" / "config.json").read_text())
    del config["taken_out_of"]
    (both / "text" / "config.json").write_text(json.dumps(config))
    assert rewrapped(both) == 2
    assert f"{told}config.json has no 'taken_out_of'. Name the model" in capsys.readouterr().err
    assert not (both / "again").exists()


def test_a_larger_language_model_is_no_cut(both, capsys):
    config = json.loads((both / "text" / "config.json").read_text())
    (both / "text" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    assert rewrapped(both) == 2
    assert f"{both / 'text'}: num_hidden_layers 9: the language model to be replaced has 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("none", "none/config.json: cannot be read: No such file or directory. Name the folder of a checkpoint."),
        (
            "text",
            "text: no model that reads images and text: model_type 'llama' has no other parts. Prune it as it is.",
        ),
    ],
)
def test_what_is_no_whole_model_is_not_unwrapped(model, message, taken_out, tmp_path, capsys):
    assert main(["unwrap", "--model", str(taken_out / model), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err

"""A checkpoint written as GGUF is the same model to llama.cpp, or is not kept."""

import json
import re
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfprune.errors import UserError
from hfprune.models.loading import load_model
from hfprune.pruning.surgery import cut
from hfprune.sharing import llama_cpp
from hfprune.sharing.gguf import write_gguf
from hfprune.sharing.gguf_identity import Identity, identity_of
from hfprune.sharing.gguf_proof import TOLERANCES, Expected, expected, prove
from hfprune.sharing.widths import width_warning
from tests.conftest import FAMILIES, make_model, make_tokenizer, save_dense

IDENTITY = Identity("Tiny", "pruned-20", 30_000, {"name": "Tiny"})
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
SHAPES = {  # neurons, key-value groups
    "one": ((64, 64, 64), (4, 4, 4)),
    "heads": ((64, 64, 64), (2, 2, 2)),  # one width, fewer heads
    "layers": ((64, 96, 33), (4, 2, 3)),
}
ARCHITECTURES = {
    "llama": {"one": "llama", "heads": "llama", "layers": "deci"},
    "mistral": {"one": "llama", "heads": "llama", "layers": "deci"},
    "qwen2": {"one": "qwen2", "heads": "deci", "layers": "deci"},
    "qwen3": {"one": "qwen3", "heads": "qwen3", "layers": "openelm"},
}
CASES = [
    (family, tied, shape)
    for family in FAMILIES
    for tied in (True, False)
    for shape in SHAPES
    if (family, tied, shape) != ("qwen3", False, "layers")
]


def save_cut(folder: Path, family: str = "llama", shape: str = "one", **changes) -> Path:
    """A pruned checkpoint with a tokenizer."""
    dense = save_dense(folder / "dense", family, **(SHAPE | changes))
    model = load_model(dense, "float32")
    neurons, groups = ([torch.arange(count) for count in counts] for counts in SHAPES[shape])
    cut(model, {"mlp": neurons, "attention": groups})
    model.save_pretrained(folder / "cut")
    make_tokenizer().save_pretrained(folder / "cut")
    return folder / "cut"


def written(folder: Path, kind: str = "f32") -> tuple[Path, dict]:
    """The checkpoint's GGUF file and what is said of it."""
    file = folder / f"tiny-{kind}.gguf"
    return file, write_gguf(folder, file, kind, IDENTITY)


def proven(folder: Path, kind: str = "f32", tolerance: float = 1e-4) -> dict:
    """The proof of the checkpoint's GGUF file, and its details."""
    file, details = written(folder, kind)
    return details | prove(file, expected(folder), tolerance)


@pytest.mark.parametrize(("family", "tied", "shape"), CASES)
def test_llama_cpp_reads_every_family_and_shape(family, tied, shape, tmp_path):
    proof = proven(save_cut(tmp_path, family, shape, tie_word_embeddings=tied))
    assert proof["architecture"] == ARCHITECTURES[family][shape]
    assert proof["max_difference"] < 1e-4
    assert proof["prompts"] > 2


def test_a_qwen3_with_widths_per_layer_and_its_own_head_is_refused(tmp_path):
    with pytest.raises(UserError, match="no architecture for a Qwen3 whose layers differ"):
        written(save_cut(tmp_path, "qwen3", "layers", tie_word_embeddings=False))


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_smaller_types_are_near_and_rows_that_are_no_blocks_are_half_precision(kind, tmp_path):
    folder = save_cut(tmp_path, "llama", "layers")
    proof = proven(folder, kind, TOLERANCES[kind])
    assert proof["max_difference"] > 1e-5
    assert sorted(proof["not_quantised"]) == (
        ["blk.2.attn_output.weight", "blk.2.ffn_down.weight"] if kind == "q8_0" else []
    )
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(folder / f"tiny-{kind}.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == kind.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.2.ffn_down.weight"] == {"q8_0": "F16"}.get(kind, kind.upper())


ROPES = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_is_kept(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    proven(save_cut(tmp_path, "llama", "layers", head_dim=16, rope_parameters=rope))


def test_rope_scaling_that_llama_cpp_does_not_have_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserError, match=r"config.json: rope_type 'dynamic' cannot be written .* default, linear, yarn"):
        written(save_cut(tmp_path, rope_parameters=rope))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("without", ["mlp", "self_attn"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_part_that_was_removed_whole_adds_nothing(family, without, layer, tmp_path):
    """The checkpoint has no tensors of it; the same model with zeros at its end says what is right."""
    folder = save_cut(tmp_path, family, "layers", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    prefix, last = f"model.layers.{layer}.{without}", {"mlp": "down_proj", "self_attn": "o_proj"}[without]
    weights[f"{prefix}.{last}.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    right = expected(folder)
    save_file(
        {name: weight for name, weight in weights.items() if not name.startswith(prefix)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    names = {"mlp": ("intermediate_size",), "self_attn": ("num_attention_heads", "num_key_value_heads")}[without]
    config["per_layer_config"].setdefault(str(layer), {}).update(dict.fromkeys(names, 0))
    (folder / "config.json").write_text(json.dumps(config))
    file, details = written(folder)
    assert prove(file, right, 1e-4)["max_difference"] < 1e-4
    assert details["architecture"] == {"llama": "deci", "qwen3": "openelm"}[family]


def make_sentencepiece_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A BPE over pieces with bytes as a fallback, as Llama 2's."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{number:02X}>" for number in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "n"), ("▁", "a"), ("▁a", "n"), ("▁", "an"), ("i", "n")]
    for merge in merges:
        vocabulary.setdefault("".join(merge), len(vocabulary))
    assert len(vocabulary) <= size
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=False)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=False
    )


def test_a_sentencepiece_tokenizer_splits_alike(tmp_path):
    folder = save_cut(tmp_path, "llama", "layers", bos_token_id=1, eos_token_id=2)
    make_sentencepiece_tokenizer(320).save_pretrained(folder)
    proven(folder)


def test_an_unknown_tokenizer_is_refused(tmp_path):
    folder = save_cut(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"pre_tokenizer is none of those that llama.cpp is known to have"):
        written(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json: missing"):
        written(folder)


def test_a_value_that_half_precision_does_not_hold_is_refused(tmp_path):
    folder = save_cut(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight: values up to 1e\+06 do not fit .* --type bf16"):
        written(folder, "f16")


def change_token(right: Expected) -> Expected:
    return Expected([[7, *right.tokens[0]], *right.tokens[1:]], right.prompts, right.log_probabilities)


def change_prediction(right: Expected) -> Expected:
    return Expected(right.tokens, right.prompts, right.log_probabilities + 0.01)


def change_one_prediction(right: Expected) -> Expected:
    changed = right.log_probabilities.clone()
    changed[1, changed[1].argmax()] += 0.0005
    return Expected(right.tokens, right.prompts, changed)


def change_likeliest(right: Expected) -> Expected:
    changed = right.log_probabilities.clone()
    changed[0, changed[0].argmin()] = 1.0
    return Expected(right.tokens, right.prompts, changed)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A GGUF file, and what its checkpoint does."""
    folder = save_cut(tmp_path_factory.mktemp("one"))
    return written(folder)[0], expected(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_token, "it splits 'The capital of France is' into"),
        (change_prediction, "after prompt 0 log-probabilities differ by 0.01, tolerance 0.0001"),
        (change_one_prediction, r"after prompt 1 log-probabilities differ by 0.0005\d*, tolerance 0.0001"),
        (change_likeliest, "after prompt 0 token .* is the likeliest, but not among its 20 likeliest"),
    ],
)
def test_a_file_that_llama_cpp_reads_otherwise_is_refused(change, message, one):
    file, right = one
    with pytest.raises(UserError, match=message):
        prove(file, change(right), 1e-4)


def test_llama_cpps_sum_of_probabilities_may_be_a_little_off(one):
    file, right = one
    moved = Expected(right.tokens, right.prompts, right.log_probabilities + 0.0005)
    assert prove(file, moved, 1e-4)["max_difference"] < 1e-4


def test_a_file_that_llama_cpp_does_not_load_is_refused(one, tmp_path):
    short = tmp_path / "short.gguf"
    short.write_bytes(one[0].read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"short.gguf: llama.cpp does not read it .* does not load it: "):
        prove(short, one[1], 1e-4)


def test_the_header_says_what_the_model_is(tmp_path):
    folder = save_cut(tmp_path)
    source = {"name": "Tiny-1B.Q4_1", "hub": "someone/Tiny-1B", "license": "other", "license_name": "tiny-licence"}
    keys = ("criterion", "ratio", "parameters", "parameters_dense", "units_dense")
    step = dict.fromkeys(keys, 1) | {"ratio_achieved": 0.1996, "kept": {}, "source": source}
    (folder / "pruning.json").write_text(json.dumps(step))
    identity = identity_of(folder, source)
    assert identity.file_name("q8_0") == "Tiny-1B-115K-pruned-20-v1.0-Q8_0.gguf"
    write_gguf(folder, tmp_path / "x.gguf", "q8_0", identity)
    header = {key: field.contents() for key, field in GGUFReader(tmp_path / "x.gguf").fields.items()}
    expected_values = {
        "general.name": "Tiny-1B pruned-20", "general.basename": "Tiny-1B", "general.finetune": "pruned-20",
        "general.size_label": "115K", "general.license": "other", "general.license.name": "tiny-licence",
        "general.base_model.count": 1, "general.base_model.0.name": "Tiny-1B",
        "general.base_model.0.organization": "someone",
        "general.base_model.0.repo_url": "https://huggingface.co/someone/Tiny-1B", "general.quantized_by": "hfprune",
        "general.file_type": 7, "tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.pre": "gpt-2",
    }  # fmt: skip
    assert {key: header.get(key) for key in expected_values} == expected_values


@pytest.mark.parametrize(
    ("neurons", "heads", "kinds", "message"),
    [
        (64, 8, ("q8_0", "f16"), ""),
        (256, 32, ("q4_k_m",), ""),
        (64, 8, ("f16", "q4_k_m"), r"6 of 6 matrices .* no multiple of 256: .* for Q4_K Q5_0, 0.0 MB more"),
        (65, 8, (), r"3 of 6 matrices .* no multiple of 32: .* in Q8_0 0.0 MB more"),
        (65, 5, ("f16",), r"6 of 6 matrices .* no multiple of 32: "),
    ],
)
def test_widths_that_cost_are_told(neurons, heads, kinds, message, tmp_path):
    shape = {"intermediate_size": neurons, "num_attention_heads": heads, "num_key_value_heads": heads}
    make_model("qwen3", **(SHAPE | shape)).save_pretrained(tmp_path)
    said = width_warning(tmp_path, kinds)
    assert re.search(message, said) if message else said == ""


def test_what_a_width_costs_is_the_difference_in_size(tmp_path):
    """Of 65 columns, 96 would be stored in Q8_0: 102 bytes a row instead of 130."""
    make_model("llama", **(SHAPE | {"intermediate_size": 65, "hidden_size": 8192})).save_pretrained(tmp_path)
    assert f" {3 * 8192 * (130 - 102) / 1e6:.1f} MB more" in width_warning(tmp_path, ())


def test_without_llama_cpp_nothing_is_written(monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install xllamacpp"):
        llama_cpp.check_installed()

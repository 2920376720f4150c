"""A GGUF file gives the model that was written, or is refused: nothing that changes the model is dropped."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfprune.data import download
from hfprune.errors import UserError
from hfprune.store.filenames import is_companion
from tests.conftest import make_model, make_tokenizer, sentences
from tests.gguf_files import write_gguf

TOKENS = torch.arange(256)[None] % 320


def taken(file, folder):
    folder.mkdir()
    download.model(folder, {"path": file}, None)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def refused(file, tmp_path):
    (tmp_path / "work").mkdir()
    with pytest.raises(UserError) as error:
        download.model(tmp_path / "work", {"path": file}, None)
    assert str(error.value).startswith(f"path {file}: ")
    assert str(tmp_path / "work") not in str(error.value)
    return str(error.value)


def biased(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    ("family", "architecture", "changes"),
    [
        ("llama", "llama", {}),
        ("llama", "llama", {"tie_word_embeddings": True, "rms_norm_eps": 0.01}),
        ("llama", "llama", {"head_dim": 16, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", "llama", {"sliding_window": None}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"head_dim": 16}),
        ("qwen3", "qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_every_family_gives_the_logits_of_the_model_that_was_written(family, architecture, changes, tmp_path):
    model = biased(make_model(family, **changes))
    file = write_gguf(tmp_path / "mistral.gguf", model, architecture)
    made = taken(file, tmp_path / "made")
    assert (made(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4
    assert made.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert (made.config.bos_token_id, made.config.eos_token_id) == (0, 1)
    assert made.config.max_position_embeddings == 512
    text = sentences(3, 9)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "made").decode(
            AutoTokenizer.from_pretrained(tmp_path / "made")(text)["input_ids"]
        )
        == text
    )


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
IN_HEADER = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}


@pytest.mark.parametrize(
    ("family", "parameters", "keys"),
    [
        ("llama", LINEAR, IN_HEADER | {"rope.scaling.type": "linear"}),
        ("llama", LINEAR, {"rope.scaling.factor": 4.0}),  # llama.cpp takes a factor alone so
        ("llama", LINEAR, {"rope.scale_linear": 4.0}),
        ("qwen3", LINEAR, IN_HEADER | {"rope.scaling.type": "linear"}),
        ("llama", YARN, IN_HEADER | {"rope.scaling.type": "yarn"}),
        ("qwen2", YARN, IN_HEADER | {"rope.scaling.type": "yarn", "rope.scaling.finetuned": True}),
        (
            "qwen3",
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
            IN_HEADER
            | {"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        ),
        ("llama", {"rope_type": "default", "rope_theta": 10000.0}, {"rope.scaling.type": "none"}),
    ],
)
def test_rope_scaling_of_the_header_is_kept(family, parameters, keys, tmp_path):
    model = make_model(family, rope_parameters=parameters)
    made = taken(write_gguf(tmp_path / "x.gguf", model, family, keys), tmp_path / "made")
    assert (made(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4
    assert made.config.rope_parameters["rope_type"] == parameters["rope_type"]


@pytest.mark.parametrize(
    ("head", "theta", "ours"),
    [
        (8, 10000.0, (8.0, 1.0, 4.0, 64)),
        (64, 500000.0, (32.0, 1.0, 4.0, 8192)),
        (64, 10000.0, (5.5, 1.3, 7.0, 300)),  # of nobody's: the ramp itself has to tell
    ],
)
def test_llama3s_scaling_comes_back_out_of_its_tensor(head, theta, ours, tmp_path):
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    model = make_model(
        head_dim=head,
        rope_parameters=dict(zip(names, ours, strict=True)) | {"rope_type": "llama3", "rope_theta": theta},
    )
    plain = 1 / theta ** (np.arange(0, head, 2) / head)
    divisors = plain / model.model.rotary_emb.inv_freq.numpy()
    made = taken(write_gguf(tmp_path / "x.gguf", model, tensors={"rope_freqs.weight": divisors}), tmp_path / "made")
    assert made.config.rope_parameters["rope_type"] == "llama3"
    assert torch.allclose(made.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert (made(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": ("blk.1.ffn_down.weight",)}, "blk.1.ffn_down.weight is missing"),
        ({"without": ("token_embd.weight",)}, "token_embd.weight is missing"),
        ({"without": ("attention.head_count_kv",)}, "the header lacks llama.attention.head_count_kv"),
        ({"keys": {"block_count": 4}}, "blk.3.attn_k.weight, blk.3.attn_norm.weight, blk.3.attn_output.weight and 6"),
        ({"keys": {"block_count": 2}}, "it holds blk.2.attn_k.weight, blk.2.attn_norm.weight"),
        ({"keys": {"feed_forward_length": 64}}, "blk.0.ffn_gate.weight is (48, 32), the header asks for (64, 32)"),
        ({"keys": {"vocab_size": 400}}, "(320, 32), the header asks for (400, 32)"),
        ({"keys": {"feed_forward_length": [48, 40, 48]}}, "differs from layer to layer"),
        ({"keys": {"expert_count": 8}}, "a mixture of 8 experts"),
        ({"keys": {"attention.sliding_window": 64}}, "llama.attention.sliding_window = 64 is not read here"),
        ({"keys": {"logit_scale": 8.0}}, "llama.logit_scale = 8.0 is not read here"),
        ({"keys": {"rope.dimension_count": 4}}, "llama.rope.dimension_count = 4, heads have 8"),
        ({"keys": {"rope.scaling.type": "longrope"}}, "rope.scaling.type = 'longrope'"),
        ({"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, "rope.scaling.type = 'yarn'"),
        ({"keys": {"attention.head_count": 3}}, "the header makes no model"),
        ({"keys": {"context_length": "512"}}, "llama.context_length = '512': expected a number"),
        ({"keys": {"rope.scaling.factor": "4"}}, "llama.rope.scaling.factor = '4': expected a number"),
        ({"keys": {"attention.layer_norm_rms_epsilon": float("nan")}}, "rms_epsilon = nan: expected a number"),
        ({"keys": {"attention.layer_norm_rms_epsilon": 0.0}}, "rms_norm_eps = 0.0: expected a number above"),
        ({"without": ("tokenizer.ggml.merges",)}, "the header lacks tokenizer.ggml.merges, which make the tokens"),
        ({"general": {"tokenizer.ggml.pre": "deepseek-llm"}}, "tokenizer.ggml.pre = 'deepseek-llm': transformers does"),
        (
            {"general": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False}},
            "add_space_prefix = False is not read",
        ),
        ({"general": {"tokenizer.chat_template.../../x": "{{ a }}"}}, "'../../x' is no name for a chat template"),
        ({"keys": {"rope.freq_base": 0.0}}, "rope.freq_base = 0.0"),
        ({"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 0.0}}, "is no RoPE scaling of type 'yarn'"),
        ({"keys": {"rope.scaling.yarn_attn_factor": 2.0}}, "yarn_attn_factor = 2.0 is not read here"),
        ({"tensors": {"rope_factors_long.weight": np.ones(4)}}, "it holds rope_factors_long.weight"),
        ({"tensors": {"rope_freqs.weight": np.array([1, 3, 2, 8])}}, "rope_freqs.weight is not of llama3's"),
        ({"tensors": {"rope_freqs.weight": np.ones(8)}}, "rope_freqs.weight has shape (8,), expected (4,)"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(32)}}, "blk.0.attn_k.bias"),
        ({"architecture": "gemma2"}, "architecture 'gemma2' is not supported. Supported ones: llama, qwen2, qwen3"),
        ({"tokenizer": False}, "no tokenizer that transformers can read in it"),
    ],
)  # fmt: skip
def test_what_would_be_dropped_or_invented_is_refused(changes, message, tmp_path):
    assert message in refused(write_gguf(tmp_path / "x.gguf", make_model(), **changes), tmp_path)


def test_all_chat_templates_of_a_gguf_file_are_kept(tmp_path):
    names = {"": "{{ messages }}", ".tool_use": "{{ tools }}", ".rag": "{{ documents }}"}
    general = {f"tokenizer.chat_template{name}": template for name, template in names.items()}
    taken(write_gguf(tmp_path / "x.gguf", make_model(), general=general), tmp_path / "made")
    expected = {name.removeprefix(".") or "default": template for name, template in names.items()}
    assert AutoTokenizer.from_pretrained(tmp_path / "made").chat_template == expected
    assert all(map(is_companion, ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")))
    assert (tmp_path / "made" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ documents }}"


@pytest.mark.parametrize("flags", [(), ("add_bos_token",), ("add_eos_token",), ("add_bos_token", "add_eos_token")])
def test_the_tokenizer_is_the_headers_whatever_lies_beside_the_file(flags, checkpoint, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    other["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    general = {f"tokenizer.ggml.{flag}": flag in flags for flag in ("add_bos_token", "add_eos_token")}
    taken(write_gguf(tmp_path / "x.gguf", make_model(), general=general), tmp_path / "made")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "made")(sentences(3, 9))["input_ids"]
    own = make_tokenizer()(sentences(3, 9))["input_ids"]
    assert tokens == [0] * ("add_bos_token" in flags) + own + [1] * ("add_eos_token" in flags)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.9])
def test_a_file_that_is_cut_short_is_refused(share, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", make_model())
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert "cut short, or not GGUF" in refused(file, tmp_path)


def test_nan_in_a_gguf_file_is_found(tmp_path):
    model = make_model()
    model.model.layers[1].mlp.down_proj.weight[3, 5] = float("inf")
    said = refused(write_gguf(tmp_path / "x.gguf", model), tmp_path)
    assert "tensor model.layers.1.mlp.down_proj.weight holds 1 of 1,536 values that are NaN or infinite" in said

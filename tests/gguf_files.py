"""GGUF files of tiny models, written with the `gguf` package as llama.cpp's converter writes them."""

import functools
import json
from pathlib import Path

import gguf
import numpy as np

from tests.conftest import make_tokenizer

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(
    file: Path, model, architecture="llama", keys=None, tensors=None, without=(), tokenizer=True, general=None
) -> Path:
    """The model as a GGUF file.

    Args:
        file: where to write.
        model: of a supported family.
        architecture: what the header calls it.
        keys: of the header beside those that every file has, without the architecture's name before them.
        tensors: beside the model's.
        without: tensors and keys that are left out.
        tokenizer: whether it has one.
        general: keys of the header by their whole names, of the tokenizer's too.
    """
    config, state = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(file), architecture)
    header = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
    }  # fmt: skip
    header = {f"{architecture}.{key}": value for key, value in (header | (keys or {})).items() if key not in without}
    for key, value in (header | (_tokenizer(config.vocab_size) if tokenizer else {}) | (general or {})).items():
        if key not in without:
            add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, list: writer.add_array}
            add.get(type(value), writer.add_uint32)(key, value)
    for name, value in ({_named(name): _laid_out(name, value, config, architecture) for name, value in state.items()}
                        | (tensors or {})).items():  # fmt: skip
        if name not in without and not (name == "output.weight" and config.tie_word_embeddings):
            writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _tokenizer(size: int) -> dict:
    bpe = _bpe()
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    keys = {
        "model": "gpt2", "pre": "default", "tokens": tokens,
        "token_type": [3 if token in ("<s>", "</s>") else 1 for token in tokens],
        "merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in bpe["merges"]],
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@functools.cache
def _bpe() -> dict:
    return json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]


def _named(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{PARTS[inner]}.{kind}"


def _laid_out(name: str, value: np.ndarray, config, architecture: str) -> np.ndarray:
    """Llama's queries and keys with the halves of a head interleaved, as llama.cpp wants them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture != "llama" or heads is None:
        return value
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)

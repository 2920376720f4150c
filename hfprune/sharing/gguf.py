"""A checkpoint as one GGUF file, for llama.cpp and the programs built on it.

The architectures `llama`, `qwen2` and `qwen3` of llama.cpp have one width for all layers. A checkpoint whose layers differ
becomes another architecture with the same computation: `deci` (Llama's, with or without biases, rotary dimensions in
Llama's order) or `openelm` (Qwen3's, with query, key and value rows fused, and without an output projection).

One tensor is in memory at a time, so the model may be larger than memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from hfprune.errors import UserError
from hfprune.runtime.progress import progress
from hfprune.sharing.gguf_vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0")
BLOCK = 32  # columns that share one scale in Q8_0
LARGEST_HALF = 65504.0
ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")

# Our name of a layer's tensor -> llama.cpp's.
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ATTENTION = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")


@dataclass(frozen=True)
class Layout:
    """What of a checkpoint decides how llama.cpp has to read it.

    Attributes:
        architecture: llama.cpp's name.
        widths: neurons of each layer.
        heads, groups: query heads and key-value heads of each layer.
        head_dim: dimension of a head.
    """

    architecture: str
    widths: list[int]
    heads: list[int]
    groups: list[int]
    head_dim: int

    @property
    def permutes(self) -> bool:
        """Whether query and key rows stand in Llama's original order: rotary pairs side by side."""
        return self.architecture in ("llama", "deci")

    @property
    def fuses(self) -> bool:
        """Whether query, key and value rows are one tensor."""
        return self.architecture == "openelm"


def write_gguf(folder: Path, output: Path, kind: str, about: Callable[["GGUFWriter"], None]) -> dict[str, Any]:
    """Write the checkpoint in `folder` as the GGUF file `output`.

    Args:
        folder: a checkpoint of one of the supported families, plain or with widths per layer.
        output: the file to write. It appears whole or not at all.
        kind: a name in `TYPES`. Norms and biases are always float32. With `q8_0`, a matrix whose row length is no
            multiple of 32 is float16, as llama.cpp's own quantizer writes it.
        about: adds the metadata that says what the model is (name, licence, base model).

    Returns:
        `architecture`, `type`, `bytes`, and `not_quantised`: names of the matrices that `q8_0` left in float16.

    Raises:
        UserError: llama.cpp has no architecture, RoPE scaling or tokenizer for this checkpoint, or a value does not fit
            the type.
    """
    from gguf import GGUFWriter

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    layout = layout_of(config, folder)
    vocabulary = read_vocabulary(folder, config.vocab_size)
    partial = output.with_name(f".{output.name}.partial")
    writer = GGUFWriter(partial, layout.architecture)
    try:
        about(writer)
        _add_shape(writer, config, layout, folder)
        _add_vocabulary(writer, vocabulary)
        _add_type(writer, kind)
        tensors = list(_tensors(folder, config, layout))
        unquantised = [name for name, shape, _ in tensors if kind == "q8_0" and _is_matrix(shape) and shape[-1] % BLOCK]
        for name, shape, _ in tensors:
            _announce(writer, name, shape, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape, read in progress(tensors, "gguf", len(tensors), "tensor"):
            writer.write_tensor_data(_encoded(read(), name, shape, kind))
        writer.close()
        partial.replace(output)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    size = output.stat().st_size
    return {"architecture": layout.architecture, "type": kind, "bytes": size, "not_quantised": unquantised}


def layout_of(config: PreTrainedConfig, folder: Path) -> Layout:
    """How llama.cpp has to read a checkpoint.

    Raises:
        UserError: it cannot.
    """
    family, count = config.model_type, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_group = config.num_attention_heads // config.num_key_value_heads
    widths = list(getattr(config, "intermediate_sizes", None) or [config.intermediate_size] * count)
    groups = list(getattr(config, "key_value_heads", None) or [config.num_key_value_heads] * count)
    heads = [per_group * number for number in groups]
    alike = len(set(widths)) == len(set(groups)) == 1
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise UserError(f"{folder}: model_type {family!r} cannot be written as GGUF yet.")
    if alike and not (family == "qwen2" and heads[0] * head_dim != config.hidden_size):
        return Layout({"mistral": "llama"}.get(family, family), widths, heads, groups, head_dim)
    if family == "qwen3":
        if not config.tie_word_embeddings:
            raise UserError(
                f"{folder}: llama.cpp has no architecture for a Qwen3 whose layers differ and whose output projection "
                "is not the embedding. Prune with `allocation: uniform`, or with `pad: true`."
            )
        return Layout("openelm", widths, heads, groups, head_dim)
    return Layout("deci", widths, heads, groups, head_dim)


def _add_shape(writer: "GGUFWriter", config: PreTrainedConfig, layout: Layout, folder: Path) -> None:
    def one_or_all(values: list[int]) -> Any:
        return values[0] if len(set(values)) == 1 else values

    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window:  # llama.cpp's architecture attends to everything: right as long as nothing lies outside the window
        context = min(context, window)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(one_or_all(layout.widths))
    writer.add_head_count(one_or_all(layout.heads))
    writer.add_head_count_kv(one_or_all(layout.groups))
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(layout.head_dim)
    _add_rope(writer, config, layout, folder)


def _add_rope(writer: "GGUFWriter", config: PreTrainedConfig, layout: Layout, folder: Path) -> None:
    from gguf import RopeScalingType

    rope = config.rope_parameters
    scaling = rope.get("rope_type", "default")
    if scaling not in ROPE_SCALINGS or (scaling == "llama3" and layout.architecture not in ("llama", "deci")):
        raise UserError(f"{folder / 'config.json'}: RoPE scaling {scaling!r} cannot be written as GGUF.")
    writer.add_rope_freq_base(rope["rope_theta"])
    if scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(scaling))
        writer.add_rope_scaling_factor(rope["factor"])
    if scaling == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)


def _add_vocabulary(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.adds_space is not None:
        writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _add_type(writer: "GGUFWriter", kind: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType[f"MOSTLY_{kind.upper()}"])


Read = Callable[[], Tensor]


def _tensors(folder: Path, config: PreTrainedConfig, layout: Layout) -> Iterator[tuple[str, tuple[int, ...], Read]]:
    """llama.cpp's name, the shape, and how to read each tensor."""
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dictionary)
                files[name], shapes[name] = file, tuple(stored.get_slice(name).get_shape())

    def read(name: str) -> Tensor:
        with safe_open(files[name], "pt") as stored:
            return stored.get_tensor(name)

    def plain(ours: str, theirs: str) -> tuple[str, tuple[int, ...], Read]:
        return theirs, shapes[ours], lambda: read(ours)

    yield plain("model.embed_tokens.weight", "token_embd.weight")
    yield plain("model.norm.weight", "output_norm.weight")
    if not config.tie_word_embeddings:
        yield plain("lm_head.weight", "output.weight")
    if config.rope_parameters.get("rope_type") == "llama3":
        factors = _frequency_factors(config, layout.head_dim)
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        names = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
        for name in names:
            module, _, suffix = name.rpartition(".")
            if module not in NAMES:
                raise UserError(
                    f"{files[prefix + name]}: {prefix}{name}: no tensor of this name in llama.cpp's format."
                )
            if layout.fuses and name in ATTENTION:
                continue
            theirs, shape, load = plain(prefix + name, f"blk.{layer}.{NAMES[module]}.{suffix}")
            if layout.permutes and module in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = (layout.heads if module.endswith("q_proj") else layout.groups)[layer]
                load = _permuted(load, heads)
            yield theirs, shape, load
        if layout.fuses:
            sizes = [shapes[prefix + name] for name in ATTENTION]
            fused = (sum(size[0] for size in sizes), sizes[0][1])
            yield (
                f"blk.{layer}.attn_qkv.weight",
                fused,
                lambda prefix=prefix: torch.cat([read(prefix + name) for name in ATTENTION]),
            )


def _permuted(read: Read, heads: int) -> Read:
    """Rows of heads from the two halves of a rotary pair apart (ours) to side by side (llama.cpp's `llama`)."""

    def load() -> Tensor:
        rows = read()
        return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    return load


def _frequency_factors(config: PreTrainedConfig, head_dim: int) -> Tensor:
    """By how much Llama 3's RoPE scaling divides each frequency, (head_dim / 2,) float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    base = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2).double() / head_dim)
    return (base / scaled.double()).float()


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1


def _stored_as(shape: tuple[int, ...], kind: str) -> str:
    """The type that a tensor of this shape gets."""
    if not _is_matrix(shape):
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % BLOCK else kind


def _announce(writer: "GGUFWriter", name: str, shape: tuple[int, ...], kind: str) -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    stored = GGMLQuantizationType[_stored_as(shape, kind).upper()]
    block, size = GGML_QUANT_SIZES[stored]
    count = int(np.prod(shape))
    if stored in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        writer.add_tensor_info(name, shape, np.dtype(np.float32 if size == 4 else np.float16), count * size)
    else:
        row_bytes = shape[-1] // block * size
        writer.add_tensor_info(name, (*shape[:-1], row_bytes), np.dtype(np.uint8), count // block * size, stored)


def _encoded(tensor: Tensor, name: str, shape: tuple[int, ...], kind: str) -> Any:
    """A tensor as the bytes that llama.cpp reads, a numpy array.

    Raises:
        UserError: a value is too large for float16.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    stored = _stored_as(shape, kind)
    values = tensor.float().contiguous()
    if stored == "f16" and values.abs().max() > LARGEST_HALF:
        raise UserError(f"{name}: values up to {values.abs().max():.3g} do not fit float16. Take `--type bf16`.")
    if stored == "f32":
        return values.numpy()
    if stored == "f16":
        return values.half().numpy()
    return quantize(values.numpy(), GGMLQuantizationType[stored.upper()])

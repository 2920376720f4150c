"""A checkpoint as one GGUF file, for llama.cpp and the programs built on it.

The architectures `llama`, `qwen2` and `qwen3` of llama.cpp have one width for all layers. A checkpoint whose layers
differ becomes another architecture with the same computation: `deci` (Llama's, with or without biases, rotary
dimensions in Llama's order) or `openelm` (Qwen3's, with query, key and value rows fused, and no output projection).

One tensor is in memory at a time, so the model may be larger than memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from hfprune.errors import UserError
from hfprune.models.widths import read_config, widths_of
from hfprune.runtime.progress import progress
from hfprune.sharing.gguf_identity import Identity
from hfprune.sharing.gguf_vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BLOCK = 32  # columns that share one scale in Q8_0
LARGEST_HALF = 65504.0
ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")
# llama.cpp leaves out a layer's attention too where its MLP has no neurons: one block of zeros stands for none.
NO_NEURONS = BLOCK

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
FUSED = ("attn_q.weight", "attn_k.weight", "attn_v.weight")


@dataclass(frozen=True)
class Layout:
    """How llama.cpp has to read a checkpoint.

    Attributes:
        architecture: llama.cpp's name.
        neurons: of each layer in the file.
        groups: key-value heads of each layer in the file.
        per_group: query heads that read one key-value head.
        head_dim: dimension of a head.
    """

    architecture: str
    neurons: list[int]
    groups: list[int]
    per_group: int
    head_dim: int

    @property
    def permutes(self) -> bool:
        """Whether query and key rows stand in Llama's original order: rotary pairs side by side."""
        return self.architecture in ("llama", "deci")

    @property
    def fuses(self) -> bool:
        """Whether query, key and value rows are one tensor."""
        return self.architecture == "openelm"


@dataclass(frozen=True)
class FileTensor:
    """A tensor to write: its name in the file, its shape, and a function that gives its values."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def stored_as(self, kind: str) -> str:
        """Its type in a file of type `kind`. With `q8_0`, rows that are no whole blocks are float16."""
        if len(self.shape) == 1:
            return "f32"
        return "f16" if kind == "q8_0" and self.shape[-1] % BLOCK else kind


def write_gguf(folder: Path, output: Path, kind: str, identity: Identity) -> dict[str, Any]:
    """Write the checkpoint in `folder` as the GGUF file `output`.

    Args:
        folder: a checkpoint of one of `FAMILIES`, plain or with widths per layer.
        output: the file to write.
        kind: "f32", "f16", "bf16" or "q8_0", of matrices. Norms and biases are always float32. With `q8_0`, a matrix
            whose row length is no multiple of 32 is float16, as llama.cpp's own quantizer writes it.
        identity: what the header says about the model.

    Returns:
        `architecture`, and `not_quantised`: the names of the matrices that `q8_0` left in float16.

    Raises:
        UserError: llama.cpp has no architecture, RoPE scaling or tokenizer for this checkpoint, or a value does not fit
            the type.
    """
    from gguf import GGUFWriter

    config = read_config(folder)
    layout = layout_of(config, folder)
    vocabulary = read_vocabulary(folder, config.vocab_size)
    writer = GGUFWriter(output, layout.architecture)
    try:
        identity.describe(writer)
        _add_shape(writer, config, layout, folder)
        _add_vocabulary(writer, vocabulary)
        _add_type(writer, kind)
        tensors = list(_tensors(Weights(folder), config, layout))
        for tensor in tensors:
            _announce(writer, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in progress(tensors, "gguf", len(tensors), "tensor"):
            writer.write_tensor_data(_encoded(tensor, kind))
    finally:
        writer.close()
    odd = [tensor.name for tensor in tensors if kind == "q8_0" and tensor.stored_as(kind) == "f16"]
    return {"architecture": layout.architecture, "not_quantised": odd}


def layout_of(config: PreTrainedConfig, folder: Path) -> Layout:
    """How llama.cpp has to read a checkpoint.

    Raises:
        UserError: it cannot.
    """
    family, widths = config.model_type, widths_of(config)
    if family not in FAMILIES:
        raise UserError(
            f"{folder}: model_type {family!r} cannot be written as GGUF. Those that can: {', '.join(FAMILIES)}."
        )
    heads = widths.groups[0] * widths.per_group
    if widths.alike and not (family == "qwen2" and heads * widths.head_dim != config.hidden_size):
        return Layout(
            {"mistral": "llama"}.get(family, family), widths.neurons, widths.groups, widths.per_group, widths.head_dim
        )
    if family == "qwen3" and not config.tie_word_embeddings:
        raise UserError(
            f"{folder}: llama.cpp has no architecture for a Qwen3 whose layers differ and whose output projection is "
            "not the embedding. Prune with `allocation: uniform`, or with `pad: true`."
        )
    architecture = "openelm" if family == "qwen3" else "deci"
    neurons = [count or NO_NEURONS for count in widths.neurons]
    # llama.cpp takes the dimension of a head from layer 0, and `openelm` always computes attention.
    groups = [count or int(number == 0 or architecture == "openelm") for number, count in enumerate(widths.groups)]
    return Layout(architecture, neurons, groups, widths.per_group, widths.head_dim)


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
    writer.add_feed_forward_length(one_or_all(layout.neurons))
    writer.add_head_count(one_or_all([layout.per_group * count for count in layout.groups]))
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
    if scaling not in ROPE_SCALINGS or (scaling == "llama3" and not layout.permutes):
        raise UserError(
            f"{folder / 'config.json'}: rope_type {scaling!r} cannot be written as GGUF for architecture "
            f"{layout.architecture}. Those that can: default, linear, yarn, and of Llama and Mistral llama3."
        )
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


class Weights:
    """The tensors of a checkpoint's safetensors files, read one at a time.

    Attributes:
        shapes: by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a dictionary)
                    self._files[name], self.shapes[name] = file, tuple(stored.get_slice(name).get_shape())

    def tensor(self, name: str, name_in_file: str) -> FileTensor:
        """A tensor as it is."""
        return FileTensor(name_in_file, self.shapes[name], lambda: self._read(name))

    def _read(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as stored:
            return stored.get_tensor(name)


def _tensors(weights: Weights, config: PreTrainedConfig, layout: Layout) -> Iterator[FileTensor]:
    """All tensors of the file."""
    yield weights.tensor("model.embed_tokens.weight", "token_embd.weight")
    yield weights.tensor("model.norm.weight", "output_norm.weight")
    if not config.tie_word_embeddings:
        yield weights.tensor("lm_head.weight", "output.weight")
    if config.rope_parameters.get("rope_type") == "llama3":
        factors = _frequency_factors(config, layout.head_dim)
        yield FileTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    for number in range(config.num_hidden_layers):
        tensors = {tensor.name: tensor for tensor in _layer(weights, number, config.hidden_size, layout)}
        if layout.fuses:
            parts = [tensors.pop(name) for name in FUSED]
            shape = (sum(part.shape[0] for part in parts), config.hidden_size)
            tensors["attn_qkv.weight"] = FileTensor("attn_qkv.weight", shape, _concatenated(parts))
        for tensor in tensors.values():
            yield FileTensor(f"blk.{number}.{tensor.name}", tensor.shape, tensor.read)


def _layer(weights: Weights, number: int, hidden: int, layout: Layout) -> Iterator[FileTensor]:
    """The tensors of a layer, without its prefix. Zeros stand for parts that were removed whole."""
    prefix, groups, widths = f"model.layers.{number}.", layout.groups[number], (hidden, layout.neurons[number])
    heads = {"self_attn.q_proj": layout.per_group * groups, "self_attn.k_proj": groups}
    names = [name for name in weights.shapes if name.startswith(prefix) and 0 not in weights.shapes[name]]
    for name in names:
        module, _, suffix = name.removeprefix(prefix).rpartition(".")
        if module not in NAMES:
            raise UserError(f"{weights.folder}: {name}: llama.cpp's format has no tensor of this name.")
        if groups == 0 and module == "input_layernorm":
            continue
        tensor = weights.tensor(name, f"{NAMES[module]}.{suffix}")
        yield _permuted(tensor, heads[module]) if layout.permutes and module in heads else tensor
    if f"{prefix}mlp.up_proj.weight" not in names:
        yield _constant("ffn_gate.weight", widths[::-1])
        yield _constant("ffn_up.weight", widths[::-1])
        yield _constant("ffn_down.weight", widths)
    if groups and f"{prefix}self_attn.q_proj.weight" not in names:
        keys, queries = groups * layout.head_dim, layout.per_group * groups * layout.head_dim
        yield _constant("attn_q.weight", (queries, hidden))
        yield _constant("attn_k.weight", (keys, hidden))
        yield _constant("attn_v.weight", (keys, hidden))
        yield _constant("attn_output.weight", (hidden, queries))
        if layout.fuses:
            yield _constant("attn_q_norm.weight", (layout.head_dim,))
            yield _constant("attn_k_norm.weight", (layout.head_dim,))


def _constant(name: str, shape: tuple[int, ...]) -> FileTensor:
    return FileTensor(name, shape, lambda: torch.zeros(shape))


def _concatenated(parts: list[FileTensor]) -> Callable[[], Tensor]:
    return lambda: torch.cat([part.read() for part in parts])


def _permuted(tensor: FileTensor, heads: int) -> FileTensor:
    """Rows of heads from the two halves of a rotary pair apart (ours) to side by side (llama.cpp's `llama`)."""

    def read() -> Tensor:
        rows = tensor.read()
        return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    return FileTensor(tensor.name, tensor.shape, read)


def _frequency_factors(config: PreTrainedConfig, head_dim: int) -> Tensor:
    """By how much Llama 3's RoPE scaling divides each frequency, (head_dim / 2,) float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    base = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2).double() / head_dim)
    return (base / scaled.double()).float()


def _announce(writer: "GGUFWriter", tensor: FileTensor, kind: str) -> None:
    """Write a tensor's entry in the header."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    stored = GGMLQuantizationType[tensor.stored_as(kind).upper()]
    block, size = GGML_QUANT_SIZES[stored]
    count = int(np.prod(tensor.shape))
    if stored in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = np.dtype(np.float32 if size == 4 else np.float16)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, count * size)
    else:
        shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), count // block * size, stored)


def _encoded(tensor: FileTensor, kind: str) -> Any:
    """A tensor as the bytes that llama.cpp reads, a numpy array.

    Raises:
        UserError: a value is too large for float16.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    stored, values = tensor.stored_as(kind), tensor.read().float().contiguous()
    if stored == "f16" and values.abs().max() > LARGEST_HALF:
        raise UserError(f"{tensor.name}: values up to {values.abs().max():.3g} do not fit float16. Take --type bf16.")
    if stored == "f32":
        return values.numpy()
    if stored == "f16":
        return values.half().numpy()
    return quantize(values.numpy(), GGMLQuantizationType[stored.upper()])

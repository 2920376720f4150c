"""Conversion of a GGUF file into a plain float32 checkpoint.

transformers dequantises the tensors and builds the tokenizer. The config is built here, because transformers ignores
RoPE scaling, the head size of Qwen and special tokens in the header and uses defaults instead. Keys and tensors that
are not known here are refused, so that nothing that changes the model or its tokens is dropped.
"""

import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hfprune.errors import UserError
from hfprune.models.config_json import state_rope_for_older_readers
from hfprune.models.integrity import first_few

FAMILIES = ("llama", "qwen2", "qwen3")  # GGUF stores a Mistral as a Llama
REQUIRED = {  # key of the header -> key of config.json
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
KNOWN = {
    *REQUIRED, "vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
# Keys that do not change the model if they have this value (None: any).
WITHOUT_EFFECT = {
    "rope.scaling.finetuned": None, "tensor_data_layout": None, "expert_count": 0, "expert_used_count": None,
    "attention.causal": True, "use_parallel_residual": False, "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}  # fmt: skip
TEXTS = ("rope.scaling.type", "tensor_data_layout")  # keys of text; all others are numbers
# Ways to split a text before BPE merges, by llama.cpp's names. transformers knows those of its own table, and takes
# GPT-2's for all others: right for those that split like GPT-2, and for those that also part digits, which no merge of
# theirs joins again.
GPT2_SPLITS = ("default", "gpt-2", "mpt", "olmo", "smollm", "starcoder", "refact", "command-r", "codeshell")
TEMPLATE = "tokenizer.chat_template"  # the default one; others have a name after it
BIASES = {"attention": "attn_q", "mlp": "ffn_gate"}  # a part has biases if this tensor has one
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
FREQUENCIES = "rope_freqs.weight"  # the divisor of every frequency in llama3's scaling
ROUNDING = 1e-5  # relative difference of frequencies that counts as rounding


def dequantise(file: Path, folder: Path, where: str) -> dict[str, Any]:
    """Write the model in a GGUF file into `folder` as a plain float32 checkpoint, with its tokenizer.

    Args:
        file: the GGUF file.
        folder: where to write.
        where: the user's name for the file.

    Returns:
        The values of the header, by key.

    Raises:
        UserError: the file is cut short, of an unsupported family, or holds unknown keys or tensors.
    """
    try:
        reader = GGUFReader(file)
        header = {key: field.contents() for key, field in reader.fields.items()}
        shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    except Exception as error:  # of any class: the reader uses the bytes as numbers and offsets, unchecked
        raise UserError(
            f"{where}: cut short, or not GGUF ({type(error).__name__}: {_line(error)}). Get the file again."
        ) from None
    config = _config(header, shapes, where)
    templates = _chat_templates(header, where)
    _check_tokenizer(header, where)
    if FREQUENCIES in shapes:
        (divisors,) = (tensor.data for tensor in reader.tensors if tensor.name == FREQUENCIES)
        _restore_llama3(config, torch.from_numpy(divisors.astype("float32").flatten()), where)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _check_tensors(model, shapes, where)
    with tempfile.TemporaryDirectory() as alone:  # transformers would take a tokenizer that lies beside the file
        link = Path(alone) / "model.gguf"
        link.symlink_to(file.absolute())
        source = {"pretrained_model_name_or_path": alone, "gguf_file": link.name, "trust_remote_code": False}
        _save(source, config, templates, folder, where)
    return header


def _save(
    source: dict[str, Any], config: PreTrainedConfig, templates: dict[str, str], folder: Path, where: str
) -> None:
    """Write model and tokenizer, loaded by transformers, into `folder`."""
    plain = GgufConfig(dequantize=True)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            **source, config=config, quantization_config=plain, dtype=torch.float32
        )
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"{where}: cannot be dequantised: {_line(error)}. Take it in another type, such as Q8_0 or F16."
        ) from None
    # The saved model is plain. With these two attributes, transformers would take it for a quantised one.
    network.hf_quantizer = None
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    network.save_pretrained(folder)
    state_rope_for_older_readers(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        if templates:
            tokenizer.chat_template = templates
        tokenizer.save_pretrained(folder)
    except Exception as error:  # of any class: the header has no tokenizer, or one of an unknown kind
        raise UserError(f"{where}: no tokenizer that transformers can read in it: {_line(error)}") from None


def _chat_templates(header: dict[str, Any], where: str) -> dict[str, str]:
    """The chat templates by name, if there are others than the default one; transformers reads only that.

    Raises:
        UserError: a name cannot be that of a file, which it becomes.
    """
    templates = {
        key.removeprefix(TEMPLATE).removeprefix(".") or "default": value
        for key, value in header.items()
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")
    }
    if odd := [name for name in templates if not re.fullmatch(r"[\w-]+", name, re.ASCII)]:
        raise UserError(
            f"{where}: {TEMPLATE}.{odd[0]}: {odd[0]!r} is no name for a chat template: letters, digits, _ and - alone."
        )
    return templates if set(templates) - {"default"} else {}


def _check_tokenizer(header: dict[str, Any], where: str) -> None:
    """Refuse a tokenizer for which transformers would give other tokens than the model's, without a word.

    Raises:
        UserError: it has no merges, or splits or begins texts in another way.
    """
    remedy = "Take the checkpoint in safetensors that it was made from."
    kind, split = (header.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2" and "tokenizer.ggml.merges" not in header:
        raise UserError(f"{where}: the header lacks tokenizer.ggml.merges, which make the tokens. {remedy}")
    if kind == "gpt2" and split not in (None, *GPT2_SPLITS, *GGUF_PRE_TOKENIZER_SPLITS):
        raise UserError(
            f"{where}: tokenizer.ggml.pre = {split!r}: transformers does not know this way to split a text. {remedy}"
        )
    if kind == "llama" and header.get("tokenizer.ggml.add_space_prefix") is False:
        raise UserError(f"{where}: tokenizer.ggml.add_space_prefix = False is not read by transformers. {remedy}")


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _config(header: dict[str, Any], shapes: dict[str, tuple[int, ...]], where: str) -> PreTrainedConfig:
    """The config of the model in the file.

    Raises:
        UserError: the header is of an unsupported family, lacks a key, or has an unknown one.
    """
    if header.get("split.count", 0) > 1:
        raise UserError(f"{where}: one of {header['split.count']} parts. Join them first: `llama-gguf-split --merge`.")
    kind = header.get("general.architecture")
    if kind not in FAMILIES:
        raise UserError(f"{where}: architecture {kind!r} is not supported. Supported ones: {', '.join(FAMILIES)}.")
    own = {key.removeprefix(f"{kind}."): value for key, value in header.items() if key.startswith(f"{kind}.")}
    if own.get("expert_count"):
        raise UserError(f"{where}: a mixture of {own['expert_count']} experts; experts are not supported yet.")
    for key, value in own.items():
        if key in KNOWN:
            continue
        if key not in WITHOUT_EFFECT or WITHOUT_EFFECT[key] not in (None, value):
            raise UserError(
                f"{where}: {kind}.{key} = {value!r} is not read here, and may change the model. Take the checkpoint in "
                "safetensors that it was made from."
            )
    if absent := [f"{kind}.{key}" for key in REQUIRED if key not in own]:
        raise UserError(
            f"{where}: the header lacks {first_few(absent)}. Get the file again, or convert the model anew."
        )
    for key in REQUIRED:
        if isinstance(own[key], list):
            raise UserError(f"{where}: {kind}.{key} differs from layer to layer, which is not supported.")
    for key, value in own.items():
        if key not in TEXTS and not (isinstance(value, int | float) and math.isfinite(value)):
            raise UserError(
                f"{where}: {kind}.{key} = {value!r}: expected a number. Get the file again, or convert the model anew."
            )
    size = own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, size) != size:
            raise UserError(f"{where}: {kind}.{key} = {own[key]}, heads have {size}: not supported.")
    if "token_embd.weight" not in shapes:
        raise UserError(f"{where}: token_embd.weight is missing. Get the file again.")
    rows = shapes["token_embd.weight"][0]
    biases = {f"{part}_bias": f"blk.0.{name}.bias" in shapes for part, name in BIASES.items()}
    values = {name: own[key] for key, name in REQUIRED.items()} | {
        "vocab_size": own.get("vocab_size", rows),
        "head_dim": size,
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope_parameters(own, where) | {"rope_theta": own.get("rope.freq_base", 10000.0)},
        **{name: header.get(f"tokenizer.ggml.{key}") for name, key in TOKENS.items()},
        **({} if kind == "qwen2" else biases if kind == "llama" else {"attention_bias": biases["attention_bias"]}),
    }
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # any: values of wrong types, or ones that do not go together
        said = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(f"{where}: the header makes no model: {said} Get the file again, or convert anew.") from None


def _rope_parameters(own: dict[str, Any], where: str) -> dict[str, Any]:
    """RoPE scaling in the form of config.json, except llama3's, which a tensor holds.

    Raises:
        UserError: this kind of scaling is not supported.
    """
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    kind = own.get("rope.scaling.type", "linear")
    if own.get("rope.freq_base", 1.0) <= 0 or factor < 0 or (kind == "yarn" and factor < 1):
        raise UserError(
            f"{where}: rope.freq_base = {own.get('rope.freq_base', 10000.0)} with rope.scaling.factor = {factor} is no "
            f"RoPE scaling of type {kind!r}. Get the file again, or convert the model anew."
        )
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and "rope.scaling.original_context_length" in own:
        betas = {name: own.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": own["rope.scaling.original_context_length"],
            **{name: value for name, value in betas.items() if value is not None},
        }
    raise UserError(
        f"{where}: rope.scaling.type = {kind!r}: of the kinds of RoPE scaling only linear, yarn (with "
        "rope.scaling.original_context_length) and llama3's can be read from GGUF. Take the checkpoint in safetensors "
        "that it was made from."
    )


def _restore_llama3(config: PreTrainedConfig, divisors: torch.Tensor, where: str) -> None:
    """Set the parameters of llama3's RoPE scaling that lead to these divisors of the frequencies, in place.

    Args:
        config: of the model, without scaling.
        divisors: (head_dim / 2,) float32, the tensor `FREQUENCIES`.
        where: the user's name for the file.

    Raises:
        UserError: no parameters lead to them: they are of another kind of scaling.
    """
    theta = config.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if divisors.shape != plain.shape or not bool((divisors > 0).all()):
        raise UserError(f"{where}: {FREQUENCIES} has shape {tuple(divisors.shape)}, expected {tuple(plain.shape)}.")
    if config.rope_parameters["rope_type"] != "default":
        raise UserError(f"{where}: both {FREQUENCIES} and rope.scaling.type scale RoPE: which is meant is not known.")
    if bool((divisors == 1).all()):
        return
    for candidate in _llama3_candidates(plain, divisors):
        config.rope_parameters = candidate | {"rope_type": "llama3", "rope_theta": theta}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
        if torch.allclose(plain / divisors, scaled, rtol=ROUNDING, atol=0.0):
            return
    raise UserError(
        f"{where}: {FREQUENCIES} is not of llama3's RoPE scaling, the only one that is read from such a tensor. Take "
        "the checkpoint in safetensors that it was made from."
    )


def _llama3_candidates(plain: torch.Tensor, divisors: torch.Tensor) -> Iterator[dict[str, float]]:
    """Parameters that may lead to the divisors: first Llama's own with several lengths, then a fit to the divisors.

    A frequency of `turns` per position is unchanged if length * turns is above the high factor, and divided if it is
    below the low one. In between, the two are mixed by (length * turns - low) / (high - low). So only the ratios of
    length, low and high matter.
    """
    factor = divisors.max().item()
    factor = round(factor) if abs(factor - round(factor)) < ROUNDING * factor else factor
    for length in (8192, *(2**power for power in range(4, 21))):
        yield {
            "factor": float(factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
    turns = plain.double() / (2 * math.pi)
    mixed = (1 / divisors.double() - 1 / factor) / (1 - 1 / factor)
    ramp = (mixed > ROUNDING) & (mixed < 1 - ROUNDING)
    if ramp.sum() < 2:
        return
    rows = torch.stack([turns[ramp], torch.ones_like(turns[ramp])], dim=1)
    slope, start = torch.linalg.lstsq(rows, mixed[ramp, None]).solution.flatten().tolist()
    length = 8192  # arbitrary, since only ratios matter
    yield {
        "factor": float(factor),
        "low_freq_factor": -start * length / slope,
        "high_freq_factor": (1 - start) * length / slope,
        "original_max_position_embeddings": length,
    }


def _check_tensors(model: torch.nn.Module, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Compare the file's tensors with those of the model, which is on the meta device.

    Raises:
        UserError: a tensor is missing, of the wrong shape, or superfluous.
    """
    state = model.state_dict()
    names = get_gguf_hf_weights_map(model, TensorProcessor())
    expected = {name: tuple(state[inner].shape) for name, inner in names.items() if inner in state}
    if model.config.tie_word_embeddings:
        expected.pop("output.weight", None)
    remedy = "Get the file again, or convert the model anew."
    if missing := sorted(expected.keys() - shapes.keys()):
        raise UserError(f"{where}: {first_few(missing)} is missing; transformers would take random numbers. {remedy}")
    if wrong := [name for name, shape in expected.items() if shapes[name] != shape]:
        name = wrong[0]
        raise UserError(f"{where}: {name} is {shapes[name]}, the header asks for {expected[name]}. {remedy}")
    if surplus := sorted(shapes.keys() - expected.keys() - {FREQUENCIES}):
        raise UserError(
            f"{where}: it holds {first_few(surplus)}, which a {model.config.model_type} of this header does not have: "
            "they would be dropped. Take the checkpoint in safetensors that it was made from."
        )

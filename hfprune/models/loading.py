"""Loading and running checkpoints of the supported families, and counting their parameters, FLOPs and bytes."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import align_module_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import build_glob_alternation
from transformers.pytorch_utils import Conv1D

from hfprune.errors import UserError
from hfprune.models.activations import bytes_beside_weights
from hfprune.models.config_json import check_values, read_json
from hfprune.models.families import EXPERTS, FAMILIES, layout_for, layout_of, refusal
from hfprune.models.mixtures import all_experts, experts_in
from hfprune.models.modeling_per_layer import per_layer
from hfprune.models.streamed import device_of, in_memory, place_in_files, refuse_overflow, weight_files
from hfprune.models.units import Part, layers_of, part_of
from hfprune.models.widths import check_overrides, read_config
from hfprune.runtime.memory import available_bytes
from hfprune.store.keys import versions

QUANTISED = ("quantization_config", "compression_config", "quantization")  # keys in config.json of quantised models
SENTENCEPIECE = ("sentencepiece", "protobuf")  # libraries with which transformers reads tokenizer.model
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # no network, and no code from a checkpoint
LINEAR = (nn.Linear, Conv1D)  # classes of linear layers in models of transformers
PREFILL = 256  # tokens of the sequence for which FLOPs are counted and time is measured

transformers.utils.logging.disable_progress_bar()


def device() -> torch.device:
    """The device that models run on: the first visible GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_family(folder: Path, where: str = "") -> PreTrainedConfig:
    """The config of the checkpoint in `folder`; refuses a model that hfprune cannot prune.

    Args:
        folder: of the checkpoint.
        where: the name of `config.json` in messages; by default its path.

    Raises:
        UserError: `config.json` cannot be read, or scoring or surgery would be wrong for the model.
    """
    where = where or str(folder / "config.json")
    values = unquantised(folder, where)
    check_values(values, where)
    kind = values["model_type"]
    if "text_config" in values and kind not in FAMILIES:
        _refuse_wrapper(folder, kind, where)
    try:
        config = read_config(folder)
    except Exception as error:  # of any class: an unknown model_type, values of wrong types, custom code
        raise UserError(
            f"{where}: not a checkpoint that transformers can read: {_reason(error, folder, where)}"
        ) from None
    check_config(config, where)
    return config


def unquantised(folder: Path, where: str) -> dict[str, Any]:
    """The keys and values of a checkpoint's `config.json`.

    Raises:
        UserError: it cannot be read, names no model_type, or says that the weights are quantised.
    """
    try:
        values = read_json(folder / "config.json")
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}. Name the folder of a checkpoint.") from None
    except ValueError as error:
        raise UserError(f"{where}: cannot be read as JSON: {_reason(error, folder, where)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"{where}: names no model_type. Supported families: {', '.join(FAMILIES)}.")
    inside = values.get("text_config")
    for key, holder in product(QUANTISED, (values, inside if isinstance(inside, dict) else {})):
        if method := holder.get(key):
            name = method.get("quant_method", key) if isinstance(method, dict) else method
            raise UserError(
                f"{where}: {key}: the weights are quantised ({name}). Take the original checkpoint that they were made "
                "from, in float32, bfloat16 or float16; its model card names it."
            )
    return values


def _refuse_wrapper(folder: Path, kind: str, where: str) -> None:
    """Refuse a model with a language model inside, and say whether that one can be taken out and pruned."""
    wraps = f"{where}: model_type {kind!r} wraps a language model in another, such as one that reads images."
    try:
        config = read_config(folder).get_text_config()
    except Exception:  # of any class: an unknown model_type, values of wrong types
        raise UserError(f"{wraps} transformers cannot read it. Take the language model alone.") from None
    if config.model_type in FAMILIES and not refusal(config):
        raise UserError(
            f"{wraps} Take it out with `hfprune unwrap`, prune it, and put it back with `hfprune rewrap`: "
            f"docs/families.md. It is of model_type {config.model_type!r}, which can be pruned."
        )
    reason = refusal(config) or f"supported are {', '.join(FAMILIES)}."
    raise UserError(f"{wraps} That one is of model_type {config.model_type!r}, which is not supported: {reason}")


def check_config(config: PreTrainedConfig, where: str) -> None:
    """Refuse a model that scoring or surgery would get wrong.

    Args:
        config: the model's.
        where: its name in messages.

    Raises:
        UserError: it is such a model.
    """
    if reason := refusal(config):
        raise UserError(f"{where}: model_type {config.model_type!r} is not supported: {reason}")
    check_overrides(config, where)
    if config.model_type not in FAMILIES and any(getattr(config, name, None) for name in EXPERTS):
        known = [name for name in FAMILIES if layout_for({"model_type": name, "num_attention_heads": 1}).mixture]
        raise UserError(
            f"{where}: model_type {config.model_type!r} is a mixture of experts that hfprune does not know. Supported: "
            f"{', '.join(known)}."
        )
    causal = ("ForCausalLM", "LMHeadModel", "Model")  # endings of language models' names
    if others := [name for name in config.architectures or [] if not name.endswith(causal)]:
        raise UserError(
            f"{where}: architectures {others[0]!r} is no language model, so that there are no predictions to keep. "
            "Take the language model (...ForCausalLM) that it was made from."
        )
    if config.model_type in FAMILIES:
        return
    try:
        with torch.device("meta"):
            layout_of(AutoModelForCausalLM.from_config(config))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # of any class, whatever building this model raises
        raise UserError(
            f"{where}: transformers makes no language model of model_type {config.model_type!r}: "
            f"{str(error).partition(chr(10))[0]}. Supported families: {', '.join(FAMILIES)}."
        ) from None


def model_class(config: PreTrainedConfig) -> Any:
    """The class that builds a config's model: one of this package's if widths differ between layers."""
    if config.is_heterogeneous:
        return per_layer(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    return AutoModelForCausalLM


def load_model(folder: Path, dtype: str, memory: str = "resident", spread: bool = True) -> PreTrainedModel:
    """Load the checkpoint in `folder` for inference, without gradients.

    A resident model is placed on the first GPU if it fits. A larger one is spread over all visible GPUs and then the
    CPU's memory, from where weights are copied layer by layer as they are needed. Without a GPU it is on the CPU. A
    streamed model's weights stay in the files, see `models.streamed`; it computes on the first GPU, or else the CPU.

    A model with different widths per layer is built by this package's own class: code in the folder never runs.

    Args:
        folder: a checkpoint of one of `FAMILIES`.
        dtype: "float32", "bfloat16", "float16", or "auto" for that of the checkpoint.
        memory: "resident", "streamed", or "auto": resident if the weights fit into memory.
        spread: allow several devices; if False, a resident model that does not fit the first GPU is on the CPU.
    """
    config = check_family(folder)
    kind = _dtype(folder, config, dtype)
    shape = shape_only(config, kind)
    size, beside = _bytes(shape), bytes_beside_weights(shape)
    if memory == "streamed" or (memory == "auto" and not _fits(size, beside, spread)):
        place_in_files(shape, weight_files(folder), device())
        return shape
    placement = _placement(beside) if spread else {}
    model = model_class(config).from_pretrained(folder, config=config, dtype=dtype, **LOCAL, **placement)
    for name, parameter in model.named_parameters() if dtype == "float16" else ():
        if not parameter.is_meta:  # not offloaded
            refuse_overflow(name, parameter, folder)
    if not spread and torch.cuda.is_available() and _fits(size, beside, spread):
        model = model.to(device())
    return model.eval().requires_grad_(False)


def shape_only(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config with its parameters on the meta device: shapes without values."""
    built_by = model_class(config)
    build = built_by.from_config if built_by is AutoModelForCausalLM else built_by._from_config
    with init_empty_weights(include_buffers=False):  # buffers, such as rotary frequencies, are in no file
        model = build(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()  # building on the meta device breaks it
    if plan := model._get_dtype_plan(dtype):  # by which `from_pretrained` keeps some in float32, such as corrections
        named, _, _ = build_glob_alternation([*plan])
        for name, values in (*model.named_parameters(), *model.named_buffers()):
            values.data = values.data.float() if named.search(name) else values.data
    return model.eval().requires_grad_(False)


def _dtype(folder: Path, config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """The type that a model is loaded in, as transformers chooses it."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if config.dtype is not None:
        return config.dtype
    with safe_open(weight_files(folder)[0], "pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype


def _fits(size: int, beside: int, spread: bool) -> bool:
    """Whether so many bytes of weights fit into the memory of the GPUs (of the first, without `spread`) or the CPU.

    Args:
        size: bytes of the weights.
        beside: bytes of each device that stay free of them.
        spread: see `load_model`.
    """
    if not torch.cuda.is_available():
        return size + beside < available_bytes()
    gpus = range(torch.cuda.device_count() if spread else 1)
    return size < sum(torch.cuda.mem_get_info(gpu)[0] - beside for gpu in gpus)


def _placement(beside: int) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    free = {gpu: torch.cuda.mem_get_info(gpu)[0] - beside for gpu in range(torch.cuda.device_count())}
    limits = {gpu: max(0, size) for gpu, size in free.items()} | {"cpu": available_bytes()}
    return {"device_map": "sequential", "max_memory": limits}


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def load_tokenizer(folder: Path, where: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint in `folder`; `where` is its name in messages, by default the path.

    Raises:
        UserError: there is none that transformers can load without custom code.
    """
    where = where or str(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as error:  # the tokenizers library raises this class
        has_only_model = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
        if has_only_model and (absent := [name for name in SENTENCEPIECE if name not in versions(SENTENCEPIECE)]):
            raise UserError(
                f"{where}: its tokenizer is tokenizer.model, of SentencePiece, which needs {' and '.join(absent)}: "
                "`pip install sentencepiece protobuf`."
            ) from None
        raise UserError(
            f"{where}: no tokenizer that transformers {transformers.__version__} can read: "
            f"{_reason(error, folder, where)}"
        ) from None


def _reason(error: Exception, folder: Path, where: str) -> str:
    if "custom code" in str(error):  # transformers' message would tell the user to switch it on
        return "it comes with code of its own, which never runs here."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1  # such a line only says which part of the config
    return " ".join(lines[:count] or [type(error).__name__]).replace(str(folder), where)


def set_linear(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Replace the weights of a linear layer; shapes (out, in) and (out,) may be new."""
    conv = isinstance(linear, Conv1D)  # GPT-2's, which holds (in, out)
    linear.weight = nn.Parameter((weight.T if conv else weight).contiguous(), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    if conv:
        linear.nf, linear.nx = weight.shape
    else:
        linear.out_features, linear.in_features = weight.shape


def count_parameters(model: PreTrainedModel) -> int:
    """Number of parameters, tied embeddings counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def active_parameters(model: PreTrainedModel) -> int:
    """Number of parameters that a token meets: of a mixture of experts, without those that it is not sent to."""
    return count_parameters(model) - sum(experts.idle_parameters for experts in all_experts(model))


def flops_per_token(model: PreTrainedModel, length: int) -> int:
    """Floating-point operations per token of a forward pass over a sequence of `length` tokens.

    Every weight of a linear layer, including the output projection, counts 2: a product and a sum. Attention counts 4
    per head dimension and token of the sequence: 2 for the scores and 2 for the sum of values, without the causal mask.
    Norms, activations, softmax and embedding lookups do not count. `torch.utils.flop_counter` counts the same. Of a
    mixture of experts, those count that a token is sent to; of linear attention and convolutions the linear layers.
    """
    inside = sum(map(_linear_flops, layers_of(model)))
    return _linear_flops(model) - inside + sum(flops_of_layers(model, length))


def flops_of_layers(model: PreTrainedModel, length: int) -> list[int]:
    """Of each layer, its share of `flops_per_token`."""
    flops = []
    for number, layer in enumerate(layers_of(model)):
        experts, attention = experts_in(model, number), part_of(model, "attention", number)
        routed = 2 * experts.active_parameters if experts else 0
        attending = 2 * (attention.width + _scored(model, attention)) * length if attention.attends else 0
        flops.append(_linear_flops(layer) + routed + attending)
    return flops


def _linear_flops(module: nn.Module) -> int:
    """Floating-point operations for one token of the linear layers in a module."""
    return sum(2 * linear.weight.numel() for linear in module.modules() if isinstance(linear, LINEAR))


def _scored(model: PreTrainedModel, part: Part) -> int:
    """Numbers of a token's queries, all heads together: with MLA another count than that of the output's columns."""
    config = model.config
    if not getattr(config, "kv_lora_rank", None):
        return part.width
    return config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)


def weight_bytes(folder: Path) -> int:
    """Size of a checkpoint's weights on disk, in bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def final_hidden(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(batch, length) tokens -> (batch, length, hidden) final hidden states."""
    return model.base_model(input_ids=tokens.to(device_of(model)), use_cache=False).last_hidden_state


@contextmanager
def weights_in_memory(*modules: nn.Module) -> Iterator[None]:
    """Keep the modules' weights in memory for the block, also if they are streamed or accelerate has offloaded them."""
    with in_memory(*modules), ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield

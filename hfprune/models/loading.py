"""Loading checkpoints of the families that are supported, running them, and counting what they hold."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hfprune.errors import UserError
from hfprune.models.modeling_per_layer import CLASSES
from hfprune.runtime.memory import available_bytes
from hfprune.store.keys import versions

# `model_type`s whose blocks are model.layers[i].mlp = down_proj(act(gate_proj(x)) * up_proj(x)).
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
QUANTISED = ("quantization_config", "compression_config", "quantization")  # keys of config.json that say so
SENTENCEPIECE = ("sentencepiece", "protobuf")  # what transformers reads tokenizer.model with
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # nothing is fetched, no code of a checkpoint's runs
PREFILL = 256  # tokens of the sequence that efficiency is counted and timed on

# On every GPU so much stays free of weights: what scoring 1024 tokens of a 7B model takes (docs/scoring.md).
BYTES_BESIDE_WEIGHTS = 3 * 2**30

transformers.utils.logging.disable_progress_bar()


def device() -> torch.device:
    """Where models compute: the first GPU that this process sees, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_family(folder: Path, named: str = "") -> PreTrainedConfig:
    """The config of the checkpoint in `folder`, which must be one that can be pruned here.

    Args:
        folder: of the checkpoint.
        named: what messages call its `config.json`; by default its path.

    Raises:
        UserError: no readable `config.json`, or a model that scoring or surgery would get wrong.
    """
    file = folder / "config.json"
    named = named or str(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{named}: cannot be read as JSON: {_reason(error, folder, named)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"{named}: names no model_type. Supported families: {', '.join(FAMILIES)}.")
    for key in QUANTISED:
        if method := values.get(key):
            how = method.get("quant_method", key) if isinstance(method, dict) else method
            raise UserError(
                f"{named}: {key}: the weights are quantised ({how}). Take the original checkpoint that they were made "
                "from, in float32, bfloat16 or float16; its model card names it."
            )
    kind = values["model_type"]
    if "text_config" in values and kind not in FAMILIES:
        raise UserError(
            f"{named}: model_type {kind!r} wraps a language model in another, such as one that reads images. Take the "
            f"language model alone. Supported families: {', '.join(FAMILIES)}."
        )
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:  # any: an unknown model_type, values of wrong types, code of its own
        raise UserError(
            f"{named}: not a checkpoint that transformers can read: {_reason(error, folder, named)}"
        ) from None
    check_config(config, named)
    return config


def check_config(config: PreTrainedConfig, named: str) -> None:
    """Refuse a model that scoring or surgery would get wrong.

    Args:
        config: the model's.
        named: what messages call it.

    Raises:
        UserError: it is such a model.
    """
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(
            f"{named}: model_type {config.model_type!r} is a mixture of experts; experts are not supported yet."
        )
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{named}: model_type {config.model_type!r} is not supported: its blocks may not have the MLP "
            f"down_proj(act(gate_proj(x)) * up_proj(x)). Supported families: {', '.join(FAMILIES)}."
        )
    if others := [name for name in config.architectures or [] if not name.endswith(("ForCausalLM", "Model"))]:
        raise UserError(
            f"{named}: architectures {others[0]!r} is no language model, so that there are no predictions to keep. "
            "Take the language model (...ForCausalLM) that it was made from."
        )
    if getattr(config, "final_logit_softcapping", None):
        raise UserError(
            f"{named}: final_logit_softcapping = {config.final_logit_softcapping}: capped logits are not supported."
        )


def model_class(config: PreTrainedConfig) -> Any:
    """What builds the model of a config: a class of this package's where layers have widths of their own."""
    return CLASSES[config.model_type] if hasattr(config, "intermediate_sizes") else AutoModelForCausalLM


def load_model(folder: Path, dtype: str, spread: bool = True) -> PreTrainedModel:
    """The checkpoint in `folder`, for inference; no parameter asks for a gradient.

    It stands on the first GPU where it fits; a larger one spreads over the GPUs that this process sees and then over
    the CPU's memory, from where a layer's weights come when it computes. Without a GPU it stands on the CPU.

    One with a width per layer is built by this package's own class: code in the folder never runs.

    Args:
        folder: a checkpoint of one of `FAMILIES`.
        dtype: "float32", "bfloat16", "float16", or "auto" for what the checkpoint says.
        spread: whether several places may share it; else it stands on the CPU where one GPU does not hold it.
    """
    config = check_family(folder)
    model = model_class(config).from_pretrained(folder, dtype=dtype, **LOCAL, **(_placement() if spread else {}))
    if not spread and torch.cuda.is_available() and _bytes(model) < torch.cuda.mem_get_info()[0] - BYTES_BESIDE_WEIGHTS:
        model = model.to(device())
    return model.eval().requires_grad_(False)


def _placement() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    free = {gpu: torch.cuda.mem_get_info(gpu)[0] - BYTES_BESIDE_WEIGHTS for gpu in range(torch.cuda.device_count())}
    room = {place: max(0, size) for place, size in free.items()} | {"cpu": available_bytes()}
    return {"device_map": "sequential", "max_memory": room}


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def load_tokenizer(folder: Path, named: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer beside the checkpoint in `folder`, which messages call `named`; by default by its path.

    Raises:
        UserError: there is none, or none that transformers can make without code of its own.
    """
    named = named or str(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as error:  # any: the tokenizers library raises it bare
        alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
        if alone and (absent := [name for name in SENTENCEPIECE if name not in versions(SENTENCEPIECE)]):
            raise UserError(
                f"{named}: its tokenizer is tokenizer.model, of SentencePiece, which needs {' and '.join(absent)}: "
                "`pip install sentencepiece protobuf`."
            ) from None
        raise UserError(
            f"{named}: no tokenizer that transformers {transformers.__version__} can read: "
            f"{_reason(error, folder, named)}"
        ) from None


def _reason(error: Exception, folder: Path, named: str) -> str:
    if "custom code" in str(error):  # transformers would have it switched on
        return "it comes with code of its own, which never runs here."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1  # such a line only says which part of the config
    return " ".join(lines[:count] or [type(error).__name__]).replace(str(folder), named)


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer other weights, of another shape: (out, in) and (out,)."""
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    linear.out_features, linear.in_features = weight.shape


def count_parameters(model: PreTrainedModel) -> int:
    """All parameters of the model, tied embeddings counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: PreTrainedModel, length: int) -> int:
    """Floating-point operations of a forward pass over a sequence of `length` tokens, divided by its tokens.

    2 (a product and a sum) for each weight of each linear layer, the output projection among them; and 4 for each
    dimension of each attention head and each token of the sequence: 2 for the scores, 2 for the sum of values, counted
    without the causal mask. Norms, activations, softmax and embedding lookups are not counted. This is what
    `torch.utils.flop_counter` counts.
    """
    linear = sum(2 * each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))
    heads = sum(layer.self_attn.q_proj.out_features for layer in model.model.layers)
    return linear + 4 * heads * length


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """(..., hidden) final hidden states and (vocabulary, hidden) output projection -> float32 logits."""
    return (hidden @ head.T).float()


def final_hidden(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(batch, length) tokens -> (batch, length, hidden) final hidden states."""
    return model.model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state


@contextmanager
def weights_in_memory(*modules: nn.Module) -> Iterator[None]:
    """Have the modules' own weights in memory, where accelerate has offloaded them."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield

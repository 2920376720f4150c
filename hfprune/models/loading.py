"""Loading checkpoints of the families that are supported, running them, and counting what they hold."""

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

# `model_type`s whose blocks are model.layers[i].mlp = down_proj(act(gate_proj(x)) * up_proj(x)).
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # nothing is fetched, no code of a checkpoint's runs
PREFILL = 256  # tokens of the sequence that efficiency is counted and timed on

# On every GPU so much stays free of weights: what scoring 1024 tokens of a 7B model takes (docs/scoring.md).
BYTES_BESIDE_WEIGHTS = 3 * 2**30

transformers.utils.logging.disable_progress_bar()


def device() -> torch.device:
    """Where models compute: the first GPU that this process sees, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_family(folder: Path) -> PreTrainedConfig:
    """The config of the checkpoint in `folder`, which must be one that can be pruned here.

    Raises:
        UserError: no readable `config.json`, or a model that scoring or surgery would get wrong.
    """
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: not a checkpoint that transformers can read: {_reason(error)}") from None
    file = folder / "config.json"
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(
            f"{file}: model_type {config.model_type!r} is a mixture of experts; experts are not supported yet."
        )
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{file}: model_type {config.model_type!r} is not supported: its blocks may not have the MLP "
            f"down_proj(act(gate_proj(x)) * up_proj(x)). Supported families: {', '.join(FAMILIES)}."
        )
    if getattr(config, "final_logit_softcapping", None):
        raise UserError(
            f"{file}: final_logit_softcapping = {config.final_logit_softcapping}: capped logits are not supported."
        )
    return config


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
    made_by = CLASSES[config.model_type] if hasattr(config, "intermediate_sizes") else AutoModelForCausalLM
    model = made_by.from_pretrained(folder, dtype=dtype, **LOCAL, **(_placement() if spread else {}))
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


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the checkpoint in `folder`.

    Raises:
        UserError: there is none, or none that transformers can make without code of its own.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no tokenizer that transformers can read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if "custom code" in str(error):  # transformers would have it switched on
        return "it comes with code of its own, which never runs here."
    return str(error).partition("\n")[0]


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer other weights, of another shape: (out, in) and (out,)."""
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    linear.out_features, linear.in_features = weight.shape


def count_parameters(model: PreTrainedModel) -> int:
    """All parameters of the model, tied embeddings counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: PreTrainedModel) -> int:
    """Floating-point operations of a forward pass over one sequence of `PREFILL` tokens, divided by its tokens.

    2 (a product and a sum) for each weight of each linear layer, the output projection among them; and 4 for each
    dimension of each attention head and each token of the sequence: 2 for the scores, 2 for the sum of values, counted
    without the causal mask. Norms, activations, softmax and embedding lookups are not counted. This is what
    `torch.utils.flop_counter` counts.
    """
    linear = sum(2 * each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))
    heads = sum(layer.self_attn.q_proj.out_features for layer in model.model.layers)
    return linear + 4 * heads * PREFILL


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
def at_hand(*modules: nn.Module) -> Iterator[None]:
    """Have the modules' own weights in memory, where accelerate has offloaded them."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield

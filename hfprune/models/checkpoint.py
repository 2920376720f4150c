"""From a cut model to a checkpoint that loads: widths, files, and the proof that it reloads.

Layers that are alike make a plain checkpoint of the stock class. Layers of several widths make one of the classes of
`modeling_per_layer`, whose file goes into the folder; `pad` makes them alike again, with zeros.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad as pad_with_zeros
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from hfprune.errors import UserError
from hfprune.models.files import model_files
from hfprune.models.loading import count_parameters, set_linear
from hfprune.models.modeling_per_layer import CLASSES
from hfprune.models.units import PARTS, parts
from hfprune.store.filenames import MANIFEST, is_companion

# What a fresh process does with the folder: nothing of hfprune in it, only what anyone with transformers has.
RELOAD = """\
import json, sys
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder, expected, device, trust = sys.argv[1:]
expected = load_file(expected, device=device)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust == "True").to(device)
tokens = expected["tokens"]
with torch.no_grad():
    logits = model(tokens).logits
prompt = tokens[:, :8]
model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8)  # not the checkpoint's
written = model.generate(prompt, attention_mask=torch.ones_like(prompt))
print(json.dumps({
    "dtype": str(logits.dtype).removeprefix("torch."),
    "max_difference": (logits.float() - expected["logits"].float()).abs().max().item(),
    "parameters": sum(parameter.numel() for parameter in model.parameters()),
    "generated": written.shape[1] - prompt.shape[1],
    "tokenizer": type(tokenizer).__name__,
    "transformers": transformers.__version__,
}))
"""
GENERATED = 8  # tokens, by RELOAD


@dataclass(frozen=True)
class Expected:
    """What a reloaded checkpoint has to give.

    Attributes:
        tokens: (2, 32) int64, spread over the vocabulary.
        logits: (2, 32, vocabulary) of those tokens, in the model's dtype.
        parameters: how many the model has.
        own_class: whether it is one of `modeling_per_layer`.
        device: where it was.
    """

    tokens: Tensor
    logits: Tensor
    parameters: int
    own_class: bool
    device: str

    @property
    def tolerance(self) -> float:
        """How far reloaded logits may be off.

        The weights are the same bits, but memory layout may change the order of a sum: 1e-4, or where the dtype is
        coarser, two units in the last place of the largest logit.
        """
        return max(1e-4, 2 * torch.finfo(self.logits.dtype).eps * self.logits.abs().max().item())


def declare_widths(model: PreTrainedModel) -> None:
    """Make the config and the class of `model` say the widths of its layers, in place.

    Where all layers are alike: the family's stock class. Otherwise, or where the stock class does not take that number
    of heads (Llama's wants one that divides the hidden size): its class of `modeling_per_layer`, with lists of widths.
    """
    config = model.config
    widths, groups = ([part.units for part in parts(model, name)] for name in PARTS)
    for name in ("intermediate_sizes", "key_value_heads", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    config.intermediate_size = max(widths)
    for layer, width in zip(model.model.layers, widths, strict=True):
        layer.mlp.intermediate_size = width
    if len(set(widths)) == len(set(groups)) == 1 and stock_takes(model, groups[0]):
        for name, value in heads(model, groups[0]).items():
            setattr(config, name, value)
        model.__class__ = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    else:
        config.intermediate_sizes, config.key_value_heads = widths, groups
        model.__class__ = CLASSES[config.model_type]  # differs from the stock class in how it is built, not in state


def heads(model: PreTrainedModel, groups: int) -> dict[str, int]:
    """What has to change in a stock config for so many key-value groups in every layer."""
    config, attention = model.config, model.model.layers[0].self_attn
    if groups == config.num_key_value_heads:
        return {}
    counts = {"num_key_value_heads": groups, "num_attention_heads": groups * attention.num_key_value_groups}
    return counts | {"head_dim": attention.head_dim}  # else it would follow from the number of heads


def stock_takes(model: PreTrainedModel, groups: int) -> bool:
    """Whether the family's stock config takes so many key-value groups in every layer."""
    try:
        type(model.config).from_dict(model.config.to_dict() | heads(model, groups))
    except (ValueError, StrictDataclassError):
        return False
    return True


@torch.no_grad()
def pad(model: PreTrainedModel) -> int:
    """Make all layers of `model` as wide as the widest, in place, with units of zeros, which add exactly nothing.

    The checkpoint then loads wherever the family does, and saves nothing of what narrower layers saved. Where the stock
    class does not take that number of heads, attention becomes wider still.

    Returns:
        How many parameters that are zero it added.
    """
    before = count_parameters(model)
    for name in PARTS:
        found = parts(model, name)
        wanted = max(part.units for part in found)
        while name == "attention" and not stock_takes(model, wanted):
            wanted += 1
        for part in found:
            missing = wanted - part.units
            for linear in part.inputs:
                rows = missing * linear.out_features // part.units
                bias = None if linear.bias is None else pad_with_zeros(linear.bias, (0, rows))
                set_linear(linear, pad_with_zeros(linear.weight, (0, 0, 0, rows)), bias)
            output = part.output
            set_linear(output, pad_with_zeros(output.weight, (0, missing * part.columns)), output.bias)
    declare_widths(model)
    return count_parameters(model) - before


@torch.no_grad()
def write(model: PreTrainedModel, folder: Path, source: Path) -> Expected:
    """Save `model` into `folder`, with what stands beside the weights in `source`, the checkpoint it was cut from.

    Weights in the model's dtype, in shards where they are large (transformers' default); the config says what is in the
    file. Returns what `prove` needs; drop the model before, so that memory holds one copy at a time.
    """
    model.config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.generation_config = GenerationConfig()  # saving would judge, and rewrite, the source's
    tokens = torch.linspace(0, model.config.vocab_size - 1, 64).long().view(2, 32)
    logits = model(tokens.to(model.device)).logits.cpu()
    model.save_pretrained(folder)
    (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
    for name in _companions(source):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return Expected(
        tokens, logits, count_parameters(model), hasattr(model.config, "intermediate_sizes"), str(model.device)
    )


def _companions(folder: Path) -> list[str]:
    """The companions in a checkpoint's folder; of an artifact's, those that its manifest has."""
    manifest = folder / MANIFEST
    names = json.loads(manifest.read_text(encoding="utf-8"))["files"] if manifest.is_file() else model_files(folder)
    return sorted(filter(is_companion, names))


def prove(folder: Path, expected: Expected) -> dict[str, Any]:
    """Load the checkpoint in `folder` in a fresh process, offline and without hfprune, and compare.

    `AutoModelForCausalLM` and `AutoTokenizer` load it (`trust_remote_code` only for a class of our own), logits are
    compared, parameters counted, 8 tokens generated.

    Returns:
        `max_difference` of the logits, `tolerance`, `dtype`, `parameters`, `generated` tokens, `trust_remote_code`,
        `tokenizer` class and version of `transformers`.

    Raises:
        UserError: it does not load, or is not the model that was saved.
    """
    gc.collect()  # the model that was saved
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "expected.safetensors"
        save_file({"tokens": expected.tokens, "logits": expected.logits}, record)
        done = subprocess.run(
            [sys.executable, "-P", "-c", RELOAD, folder, record, expected.device, str(expected.own_class)],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise _not_proven(folder, f"it does not load: {said[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    dtype = str(expected.logits.dtype).removeprefix("torch.")
    for name, saved in (("parameters", expected.parameters), ("dtype", dtype), ("generated", GENERATED)):
        if found[name] != saved:
            raise _not_proven(folder, f"{name} {found[name]}, saved with {saved}")
    if not found["max_difference"] <= expected.tolerance:  # nan is not
        raise _not_proven(
            folder, f"logits differ by up to {found['max_difference']:.3g}, tolerance {expected.tolerance:.3g}"
        )
    return found | {"tolerance": expected.tolerance, "trust_remote_code": expected.own_class}


def _not_proven(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder}: reloaded in a fresh process, the checkpoint is not the model that was saved: {what}. It is not "
        "kept. If the disk and the memory are sound, the model does not survive `save_pretrained`; please report it."
    )

"""Saving a pruned model as a checkpoint: declare its widths, write its files, check that it reloads.

If all layers have the same width, the checkpoint is of the family's stock class. Otherwise it is of a class in
`modeling_per_layer`, and that file is saved with it; `pad` makes the widths equal again with zeros.
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
from torch import Tensor, nn
from torch.nn.functional import pad as pad_with_zeros
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hfprune.errors import UserError
from hfprune.models.config_json import state_rope_for_older_readers
from hfprune.models.families import experts_key, head_size, heads_of, layout_of, queries_of
from hfprune.models.files import model_files
from hfprune.models.head import head_of
from hfprune.models.loading import count_parameters, set_linear
from hfprune.models.mixtures import all_experts
from hfprune.models.modeling_per_layer import count_heads, per_layer
from hfprune.models.streamed import device_of, in_memory, is_streamed
from hfprune.models.units import PARTS, Part, layers_of, matrix, parts
from hfprune.models.walk import enter, entrance, exit_norm, run_layer
from hfprune.models.widths import forget_widths, state_widths
from hfprune.store.filenames import MANIFEST, is_companion

# Run in a fresh process on the saved folder: without hfprune, only with transformers, as any user would.
RELOAD = """\
import json, sys
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

def shapes(module):
    return {name: parameter.shape for name, parameter in module.named_parameters()}

folder, expected, device, trust, placement = sys.argv[1:]
expected = load_file(expected, device=device)
tokenizer = AutoTokenizer.from_pretrained(folder)
placement = json.loads(placement)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust == "True", **placement)
model = model if placement else model.to(device)
parameters = sum(parameter.numel() for parameter in model.parameters())
with torch.device("meta"):  # as vLLM builds it
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    base = AutoModel.from_config(config, trust_remote_code=trust == "True")
tokens = expected["tokens"]
with torch.no_grad():
    logits = model(tokens).logits
prompt = tokens[:, :8]
model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8)  # not the checkpoint's
written = model.generate(prompt, attention_mask=torch.ones_like(prompt))
print(json.dumps({
    "dtype": str(logits.dtype).removeprefix("torch."),
    "max_difference": (logits.float() - expected["logits"].float()).abs().max().item(),
    "parameters": parameters,
    "auto_model": shapes(base) == shapes(model.base_model),
    "generated": written.shape[1] - prompt.shape[1],
    "tokenizer": type(tokenizer).__name__,
    "transformers": transformers.__version__,
}))
"""
GENERATED = 8  # tokens that RELOAD generates
BYTES_PER_FILE = 2**28  # of weights, at least: they are in memory until it is written


@dataclass(frozen=True)
class Expected:
    """What a reloaded checkpoint must compute.

    Attributes:
        tokens: (2, 32) int64, spread over the vocabulary.
        logits: (2, 32, vocabulary) for those tokens, in the model's dtype.
        parameters: number of the model's parameters.
        own_class: whether the model's class is one of `modeling_per_layer`.
        device: the device that computed the logits.
        streamed: whether the weights did not fit into memory: then they are not all loaded at once either.
    """

    tokens: Tensor
    logits: Tensor
    parameters: int
    own_class: bool
    device: str
    streamed: bool = False

    @property
    def tolerance(self) -> float:
        """Largest difference of the reloaded logits that is accepted.

        The weights are identical, but their layout in memory may change the order of a sum. So it is 1e-4, or two
        units in the last place of the largest logit if that is more.
        """
        return max(1e-4, 2 * torch.finfo(self.logits.dtype).eps * self.logits.abs().max().item())


def declare_widths(model: PreTrainedModel) -> None:
    """Set the class and the config of `model` according to the widths of its layers, in place.

    If all layers have the same width: the family's stock class. Otherwise, or if the stock class does not accept the
    number of heads (Llama's must divide the hidden size): a class of `modeling_per_layer`, and the config states
    each layer's widths.
    """
    config, layout = model.config, layout_of(model)
    vars(config).pop("auto_map", None)
    if layout.mixture:
        _declare_experts(model)
        return
    mlps, attention = (parts(model, name) for name in PARTS)
    widths, groups = ([part.units for part in layers] for layers in (mlps, attention))
    forget_widths(config)
    if layout.mlp.is_free:
        for key, value in ((layout.mlp.size, max(widths)), *layout.mlp.settings):
            setattr(config, key, value)
    for part in mlps:
        if hasattr(part.block, "intermediate_size"):
            part.block.intermediate_size = part.units
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    alike = len(set(widths)) == len(set(groups)) == 1
    if alike and fixed_width(model) in (None, widths[0]) and stock_accepts(model, groups[0]):
        for name, value in head_counts(model, groups[0]).items():
            setattr(config, name, value)
        model.__class__ = stock
    else:
        is_whole = layout.attention.refused and 0 not in groups
        state_widths(config, layout, widths, None if is_whole else groups)
        model.__class__ = per_layer(stock)  # differs from the stock class in its constructor, not in state
        base = per_layer(type(model.base_model))
        config.auto_map = {"AutoModel": f"modeling_per_layer.{base.__name__}"}  # saving adds AutoModelForCausalLM


def _declare_experts(model: PreTrainedModel) -> None:
    """`declare_widths` of a mixture of experts, all layers of which keep the same."""
    config, layout, experts = model.config, layout_of(model), next(all_experts(model))
    setattr(config, experts_key(config), experts.count)
    setattr(config, layout.mixture.size, experts.width)
    for name, value in head_counts(model, parts(model, "attention")[0].units).items():
        setattr(config, name, value)


def head_counts(model: PreTrainedModel, groups: int) -> dict[str, int]:
    """The values that a stock config needs for `groups` key-value groups in every layer; empty if none change."""
    config, queries = model.config, queries_of(model.config, layout_of(model))
    if layout_of(model).attention.refused or groups * queries == heads_of(config):
        return {}
    counts = {"num_key_value_heads": groups, "num_attention_heads": groups * queries}
    return counts | {"head_dim": head_size(config)}  # else it would follow from the number of heads


def fixed_width(model: PreTrainedModel) -> int | None:
    """The number of neurons that the stock class gives every MLP; None if its config says how many."""
    mlp = layout_of(model).mlp
    return None if mlp.is_free else mlp.size * model.config.hidden_size


def stock_accepts(model: PreTrainedModel, groups: int) -> bool:
    """Whether the family's stock config accepts `groups` key-value groups in every layer."""
    counts = head_counts(model, groups)
    if counts and layout_of(model).attention.size != "heads":
        return False
    try:
        type(model.config).from_dict(model.config.to_dict() | counts | {"per_layer_config": None})
    except (ValueError, StrictDataclassError):
        return False
    return True


@torch.no_grad()
def pad(model: PreTrainedModel) -> int:
    """Widen all layers of `model` to the widest, in place. The added units are zeros and do not change the output.

    The checkpoint then loads wherever its family does, but the narrower layers no longer save anything. If the stock
    class does not accept that number of heads, attention is widened further.

    Returns:
        The number of zeros added.
    """
    if layout_of(model).mixture:
        return 0  # all of its layers have one width
    before = count_parameters(model)
    for name in PARTS:
        layers = parts(model, name)
        width = (name == "mlp" and fixed_width(model)) or max(part.units for part in layers)
        while name == "attention" and not stock_accepts(model, width):
            width += 1
        for part in layers:
            pad_part(part, width)
    declare_widths(model)
    return count_parameters(model) - before


def pad_part(part: Part, units: int) -> None:
    """Widen a part to so many units with zeros."""
    missing = units - part.units
    if not missing:
        return
    for number, linear in enumerate(part.inputs):
        blocks = [
            (slice(first, first + size * part.units), size * missing) for first, size in part.blocks_of_rows(number)
        ]
        weight = torch.cat([pad_with_zeros(matrix(linear)[rows], (0, 0, 0, new)) for rows, new in blocks])
        bias = linear.bias
        if bias is not None:
            bias = torch.cat([pad_with_zeros(bias[rows], (0, new)) for rows, new in blocks])
        set_linear(linear, weight, bias)
    for norm in part.per_head:
        heads = len(norm.weight) // part.units * missing
        norm.weight = nn.Parameter(pad_with_zeros(norm.weight, (0, 0, 0, heads), value=1.0), False)
    output = part.output
    set_linear(output, pad_with_zeros(matrix(output), (0, missing * part.columns)), output.bias)
    if part.name == "attention":
        count_heads(part.block, units, part.units)


@torch.no_grad()
def write(model: PreTrainedModel, folder: Path, source: Path) -> Expected:
    """Save `model` into `folder`, with the tokenizer and other companions of `source`, the checkpoint it is cut from.

    Weights keep the model's dtype; large ones are sharded as transformers does by default. Returns what `prove` needs.
    Delete the model before you call that, so that memory holds one copy at a time.
    """
    model.config.tie_word_embeddings = is_tied(model)
    tokens = probe(model.config)
    logits = model(tokens.to(model.device)).logits.cpu()
    _save(model, folder, source)
    return Expected(tokens, logits, count_parameters(model), _is_own_class(model), str(model.device))


def _save(model: PreTrainedModel, folder: Path, source: Path, **options: Any) -> None:
    """Save a model with `options` of `save_pretrained`, and copy the companions of `source`."""
    model.generation_config = GenerationConfig()  # saving would check and rewrite the source's
    model.save_pretrained(folder, **options)
    state_rope_for_older_readers(folder)
    (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
    for name in _companions(source):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output projection is the embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _is_own_class(model: PreTrainedModel) -> bool:
    return model.config.is_heterogeneous


def probe(config: PreTrainedConfig) -> Tensor:
    """(2, 32) int64 tokens, spread over the vocabulary."""
    return torch.linspace(0, config.vocab_size - 1, 64).long().view(2, 32)


class LayerWriter:
    """Writes a model that is cut layer by layer, and computes what the written checkpoint must.

    Args:
        folder: where to write.
        model: the model that is cut, streamed or in memory.
        final: its shape after the cut, see `loading.shape_only`.
        source: the checkpoint that it is cut from.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, final: PreTrainedModel, source: Path) -> None:
        self.folder, self.model, self.final = folder, model, final
        _save(final, folder, source, state_dict={})  # config and code
        self.tokens = probe(final.config)
        self.tensors: dict[str, Tensor] = {}
        self.files: dict[Path, dict[str, int]] = {}  # names and bytes of what each holds
        with in_memory(*entrance(model)):
            self.states, self.arguments = enter(model, self.tokens)
        self.names = {module: name for name, module in final.named_modules()}

    @torch.no_grad()
    def add(self, number: int, place: int) -> None:
        """Write a layer, whose weights are in memory and cut. `place` is its number after the cut."""
        layer = layers_of(self.model)[number]
        self.states = run_layer(layer, self.states, self.arguments[number])
        self._write(self.names[layers_of(self.final)[place]], layer)

    @torch.no_grad()
    def finish(self) -> Expected:
        """Write what is outside the layers. Returns what `prove` needs."""
        norm, head = exit_norm(self.model), self.model.get_output_embeddings()
        with in_memory(norm), head_of(self.model) as whole_head:
            logits = whole_head.logits(norm(self.states)).to(self.states.dtype).cpu()
        inside = {module for layer in layers_of(self.model) for module in layer.modules()}
        for name, module in self.model.named_modules():
            if module not in inside and module._parameters and not (module is head and is_tied(self.model)):
                with in_memory(module):
                    self._write(name, module)
        self._flush()
        self._name_files()
        streamed, device = is_streamed(self.model), str(device_of(self.model))
        return Expected(self.tokens, logits, count_parameters(self.final), _is_own_class(self.final), device, streamed)

    def _write(self, prefix: str, module: nn.Module) -> None:
        """Write the parameters of a module; they are kept until there are enough for a file."""
        tensors = {f"{prefix}.{name}": values.cpu().contiguous() for name, values in module.state_dict().items()}
        # Of experts, files hold other tensors than the model: those that their authors published.
        stored = revert_weight_conversion(self.model, tensors) if layout_of(self.model).mixture else tensors
        self.tensors |= {name: values.contiguous() for name, values in stored.items()}
        if sum(tensor.nbytes for tensor in self.tensors.values()) >= BYTES_PER_FILE:
            self._flush()

    def _flush(self) -> None:
        if self.tensors:
            file = self.folder / f"{len(self.files)}.partial"
            save_file(self.tensors, file, metadata={"format": "pt"})
            self.files[file] = {name: tensor.nbytes for name, tensor in self.tensors.items()}
            self.tensors = {}

    def _name_files(self) -> None:
        """Give the files the names by which transformers finds them: one alone, or several with an index."""
        if len(self.files) == 1:
            next(iter(self.files)).rename(self.folder / SAFE_WEIGHTS_NAME)
            return
        sizes, place = {}, {}
        for number, (file, tensors) in enumerate(self.files.items(), 1):
            name = f"model-{number:05}-of-{len(self.files):05}.safetensors"
            file.rename(self.folder / name)
            sizes |= tensors
            place |= dict.fromkeys(tensors, name)
        totals = {"total_parameters": count_parameters(self.final), "total_size": sum(sizes.values())}
        index = json.dumps({"metadata": totals, "weight_map": dict(sorted(place.items()))}, indent=2)
        (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index + "\n", encoding="utf-8")


def _companions(folder: Path) -> list[str]:
    """The companions in a checkpoint's folder; of an artifact, only those in its manifest."""
    manifest = folder / MANIFEST
    names = json.loads(manifest.read_text(encoding="utf-8"))["files"] if manifest.is_file() else model_files(folder)
    return sorted(filter(is_companion, names))


def prove(folder: Path, expected: Expected) -> dict[str, Any]:
    """Reload the checkpoint in `folder` in a fresh process, offline and without hfprune, and compare it.

    `AutoModelForCausalLM` and `AutoTokenizer` load it, and `AutoModel.from_config` builds a model of the same shapes
    (`trust_remote_code` only for a class of ours). The process compares logits, counts parameters and generates 8
    tokens.

    Returns:
        `max_difference` of the logits, `tolerance`, `dtype`, `parameters`, `generated` tokens, `trust_remote_code`,
        `auto_model` (true), `tokenizer` class and version of `transformers`.

    Raises:
        UserError: it does not load, or differs from the saved model.
    """
    gc.collect()  # frees the saved model
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "expected.safetensors"
        save_file({"tokens": expected.tokens, "logits": expected.logits}, file)
        process = subprocess.run(
            [
                *(sys.executable, "-P", "-c", RELOAD, folder, file, expected.device, str(expected.own_class)),
                json.dumps({"device_map": {"": "disk"}, "offload_folder": scratch} if expected.streamed else {}),
            ],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch},
            capture_output=True,
            text=True,
        )
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        raise _not_proven(folder, f"it does not load: {lines[-1] if lines else f'exit status {process.returncode}'}")
    reloaded = json.loads(process.stdout.splitlines()[-1])
    dtype = str(expected.logits.dtype).removeprefix("torch.")
    proof = {"parameters": expected.parameters, "dtype": dtype, "generated": GENERATED, "auto_model": True}
    for name, saved in proof.items():
        if reloaded[name] != saved:
            raise _not_proven(folder, f"{name} {reloaded[name]}, saved with {saved}")
    if not reloaded["max_difference"] <= expected.tolerance:  # also if it is nan
        raise _not_proven(
            folder, f"logits differ by up to {reloaded['max_difference']:.3g}, tolerance {expected.tolerance:.3g}"
        )
    return reloaded | {"tolerance": expected.tolerance, "trust_remote_code": expected.own_class}


def _not_proven(folder: Path, difference: str) -> UserError:
    return UserError(
        f"{folder}: reloaded in a fresh process, the checkpoint is not the model that was saved: {difference}. It is "
        "not kept. If disk and memory are sound, the model does not survive `save_pretrained`; please report it."
    )

"""Models that are larger than memory: their weights stay in the checkpoint's files.

Such a model is transformers' own, with parameters on the meta device, which have shapes and no values. `in_memory` puts
the weights of some modules in place for a block, and `in_turn` those of one group of modules after another, while a
thread reads the next group. For a model that is in memory already both do nothing, so code that walks a model layer
by layer is the same for both kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from hfprune.errors import UserError

Values = dict[nn.Parameter, Tensor]
Make = Callable[[list[Tensor]], Tensor]  # the values of a parameter, from the tensors that stand in files


@dataclass(frozen=True)
class Stored:
    """Where the values of a parameter stand, and how the model computes with them.

    Attributes:
        name: of the parameter.
        tensors: the safetensors file and the name of each tensor that its values are made of. It is one, but for
            experts, each of which has tensors of its own.
        make: makes the values.
        dtype, device: of the model's arithmetic.
    """

    name: str
    tensors: tuple[tuple[Path, str], ...]
    make: Make
    dtype: torch.dtype
    device: torch.device

    def read(self) -> Tensor:
        """The values, in new memory. The files are open only meanwhile, so that their pages do not stay mapped.

        Raises:
            UserError: a file is missing or damaged, or float16 turns values into infinities.
        """
        opened, pieces = {}, []
        with ExitStack() as stack:
            for file, name in self.tensors:
                try:
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(file, "pt"))
                    pieces.append(opened[file].get_tensor(name))
                except (OSError, SafetensorError) as error:
                    raise UserError(
                        f"{file}: {name} cannot be read: {error}. The file is missing or damaged: put it back and run "
                        "again. What is finished is kept."
                    ) from None
            values = self.make(pieces).to(self.device, self.dtype, copy=len(pieces) == 1)
        if self.dtype == torch.float16:
            refuse_overflow(self.name, values, self.tensors[0][0])
        return values


def refuse_overflow(name: str, values: Tensor, where: Path) -> None:
    """Refuse weights that float16 turned into infinities.

    Raises:
        UserError: with the tensor's name.
    """
    if not bool(values.isfinite().all()):
        raise UserError(
            f"{where}: tensor {name} holds numbers beyond those of float16: they would become infinite. Set `dtype` to "
            "bfloat16 or float32."
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint that transformers loads: one, or those that an index names."""
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return [folder / name for name in dict.fromkeys(index["weight_map"].values())]


def place_in_files(model: PreTrainedModel, files: Sequence[Path], device: torch.device) -> None:
    """Tell each parameter of `model`, on the meta device, where its values stand.

    Args:
        model: built from the checkpoint's config; tied weights are one parameter.
        files: the checkpoint's safetensors files.
        device: where to compute.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    places: dict[str, Path] = {}
    shapes: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                places[name] = file
                shapes[name] = torch.empty(tensors.get_slice(name).get_shape(), device="meta")
    sources = _sources(model, shapes)

    def stored(name: str, like: Tensor) -> Stored:
        names, make = sources[name]
        return Stored(name, tuple((places[each], each) for each in names), make, like.dtype, device)

    for name, parameter in model.named_parameters():
        names, make = sources.get(name, ((), None))
        shape = list(make([shapes[each] for each in names]).shape) if names else None
        if shape != list(parameter.shape):
            held = f"shape {shape}" if names else f"not in {files[0].parent}"
            raise UserError(
                f"{name}: {held}, expected shape {list(parameter.shape)}: its weights cannot be read layer by layer. "
                "Set `memory: resident`."
            )
        parameter.stored = stored(name, parameter)
    model.streams_to = device
    for path, module in model.named_modules():
        for buffer, values in module._buffers.items():
            name = f"{path}.{buffer}" if path else buffer
            module._buffers[buffer] = stored(name, values).read() if name in sources else values.to(device)


def _sources(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, tuple[list[str], Make]]:
    """By name in the model, the stored tensors that a parameter or buffer is made of, and how: as transformers does.

    Args:
        model: may have its parameters on the meta device.
        stored: names of tensors in files.
    """
    conversions, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    pieces: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(stored, key=dot_natural_key):  # experts by their numbers
        for rules in ((renamings, converters), ((), ())):
            target, pattern = rename_source_key(name, *rules, model.base_model_prefix, state)
            if target in state:
                pieces.setdefault(target, []).append((name, pattern))
                break
    sources: dict[str, tuple[list[str], Make]] = {}
    for target, of_target in pieces.items():
        names, patterns = map(list, zip(*of_target, strict=True))
        is_whole = patterns[0] is None
        make = itemgetter(0) if is_whole else partial(_make, by_pattern[patterns[0]], patterns, target, model.config)
        sources[target] = names, make
    return sources


def _make(
    converter: WeightConverter, patterns: Sequence[str], name: str, config: PreTrainedConfig, tensors: Sequence[Tensor]
) -> Tensor:
    """The values of a parameter that a converter of transformers makes of several tensors, which match its patterns."""
    converter = deepcopy(converter)
    for pattern, tensor in zip(patterns, tensors, strict=True):
        converter.add_tensor(name, name, pattern, tensor)
    made = converter.convert(name, config=config)[name]
    return made[0] if isinstance(made, list) else made


def is_streamed(model: PreTrainedModel) -> bool:
    """Whether the model's weights stay in files."""
    return hasattr(model, "streams_to")


def memory_of(model: PreTrainedModel) -> str:
    """Where the weights are, as records have it: "streamed" or "resident"."""
    return "streamed" if is_streamed(model) else "resident"


def device_of(model: PreTrainedModel) -> torch.device:
    """The device on which a model computes."""
    return model.streams_to if is_streamed(model) else model.device


@contextmanager
def in_memory(*modules: nn.Module, values: Values | None = None) -> Iterator[None]:
    """Keep the modules' weights in memory for the block.

    Changes to them are lost at its end, but a layer that was cut keeps its shape.

    Args:
        modules: of a model in memory, or of one whose weights stand in files.
        values: those that have been read already.
    """
    values = dict(values or {})
    placed: list[tuple[nn.Module, str, nn.Parameter]] = []
    for owner in {owner: None for module in modules for owner in module.modules()}:
        for name, parameter in owner._parameters.items():
            if hasattr(parameter, "stored"):
                if parameter not in values:
                    values[parameter] = parameter.stored.read()
                placed.append((owner, name, parameter))
                owner._parameters[name] = nn.Parameter(values[parameter], requires_grad=False)
    try:
        yield
    finally:
        for owner, name, parameter in placed:
            now = owner._parameters[name]
            if now is None:  # a bias that is gone
                continue
            is_whole = now.shape == parameter.shape
            owner._parameters[name] = parameter if is_whole else nn.Parameter(now.to("meta"), requires_grad=False)


def in_turn(groups: Sequence[Sequence[nn.Module]]) -> Iterator[int]:
    """Iterate over groups of modules with the weights of one in memory, while a thread reads those of the next.

    Yields:
        The number of the group whose weights are in memory.
    """
    with ThreadPoolExecutor(1) as reader:
        reading = [reader.submit(_read, group) for group in groups[:1]]
        for number, group in enumerate(groups):
            values = reading.pop().result()
            reading += [reader.submit(_read, following) for following in groups[number + 1 : number + 2]]
            with in_memory(*group, values=values):
                del values
                yield number


def _read(modules: Sequence[nn.Module]) -> Values:
    """The values of those parameters of the modules that stand in files."""
    parameters = {parameter: None for module in modules for parameter in module.parameters()}
    return {parameter: parameter.stored.read() for parameter in parameters if hasattr(parameter, "stored")}

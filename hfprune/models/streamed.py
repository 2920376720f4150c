"""Models that are larger than memory: their weights stay in the checkpoint's files.

Such a model is transformers' own, with parameters on the meta device, which have shapes and no values. `in_memory` puts
the weights of some modules in place for a block, and `in_turn` those of one group of modules after another, while a
thread reads the next group. For a model that is in memory already both do nothing, so code that walks a model layer
by layer is the same for both kinds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.errors import UserError

Values = dict[nn.Parameter, Tensor]


@dataclass(frozen=True)
class Stored:
    """Where the values of a parameter stand, and how the model computes with them.

    Attributes:
        file: a safetensors file.
        name: the tensor's name in it.
        dtype, device: of the model's arithmetic.
    """

    file: Path
    name: str
    dtype: torch.dtype
    device: torch.device

    def read(self) -> Tensor:
        """The values, in new memory. The file is open only meanwhile, so that its pages do not stay mapped.

        Raises:
            UserError: the file is missing or damaged, or float16 turns values into infinities.
        """
        try:
            with safe_open(self.file, "pt") as tensors:
                values = tensors.get_tensor(self.name).to(self.device, self.dtype, copy=True)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.file}: {self.name} cannot be read: {error}. The file is missing or damaged: put it back and "
                "run again. What is finished is kept."
            ) from None
        if self.dtype == torch.float16:
            refuse_overflow(self.name, values, self.file)
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
    shapes: dict[str, tuple[Path, list[int]]] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            shapes |= {name: (file, tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    for name, parameter in model.named_parameters():
        # A checkpoint of the model without its output projection has names without the prefix.
        stored = name if name in shapes else name.removeprefix(f"{model.base_model_prefix}.")
        file, shape = shapes.get(stored, (None, None))
        if shape != list(parameter.shape):
            held = f"shape {shape}" if file else f"not in {files[0].parent}"
            raise UserError(
                f"{stored}: {held}, expected shape {list(parameter.shape)}: its weights cannot be read layer by layer. "
                "Set `memory: resident`."
            )
        parameter.stored = Stored(file, stored, parameter.dtype, device)
    model.streams_to = device
    for module in model.modules():
        for buffer, values in module._buffers.items():
            module._buffers[buffer] = values.to(device)


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

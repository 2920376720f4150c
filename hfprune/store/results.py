"""Publishing of results: all files of a command appear, or none does.

A command writes its results into scratch folders. When all are complete, `publish` moves them to their places, the
provenance records first. So a command that fails leaves the earlier results as they were, and two runs at once do not
mix. If a run is killed between two files, the sha256 in the record shows which file is not of that run.
"""

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hfprune.errors import UserError
from hfprune.store.artifacts import Artifact, full_disk
from hfprune.store.provenance import RECORDS, record_file, reference, write_records

SCRATCH_NAME = re.compile(r"\.aside-(?P<host>.+)-(?P<process>\d+)-[^-]+")


@contextmanager
def publish(sources: Sequence[Artifact | Path] | None = None) -> Iterator["ScratchFolders"]:
    """Give scratch folders to write results into. They are published when the block ends, or removed if it fails.

    Args:
        sources: the artifacts and files that all results are made from; every result's record names them. Read them
            inside the block: none may change before its end. Without sources there are no records.

    Raises:
        UserError: a place cannot be written, the disk is full, or a source has changed.
    """
    references = [reference(source) for source in sources or ()]
    scratch = ScratchFolders()
    try:
        yield scratch
        for source, before in zip(sources or (), references, strict=True):
            if reference(source) != before:
                raise UserError(f"{source}: has changed while it was read, by another run. Run again.")
        if sources is not None:
            scratch.write_records(references)
        scratch.move()
    except Exception as error:
        if (refusal := scratch.refusal(error)) is None:
            raise
        raise refusal from None
    finally:
        scratch.remove()


class ScratchFolders:
    """Scratch folders for results. Each is inside the final folder of its files, so that both are on one disk.

    Attributes:
        places: the paths of the published results, without their records.
    """

    def __init__(self) -> None:
        self.places: list[Path] = []
        self._scratch: dict[Path, Path] = {}  # final folder -> scratch folder
        self._place = Path()  # of the result being written

    def folder(self, place: Path) -> Path:
        """The scratch folder for files of the folder `place`, which is created if it does not exist."""
        self._place = place
        return self._inside(place)

    def path(self, place: Path) -> Path:
        """The scratch path for the file or folder `place`."""
        self._place = place
        if place.is_symlink() or place.exists() > (
            place.is_file() or place.is_dir()
        ):  # as /dev/stdout and /dev/null are
            raise UserError(f"{place}: a link or a device, which a result would replace. Name a file of its own.")
        return self._inside(place.parent) / place.name

    def _inside(self, folder: Path) -> Path:
        if folder not in self._scratch:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(".aside-*"):
                if _is_abandoned(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            name = f".aside-{platform.node()}-{os.getpid()}-"
            self._scratch[folder] = Path(tempfile.mkdtemp(prefix=name, dir=folder))
        return self._scratch[folder]

    def write_records(self, references: Sequence[dict[str, str]]) -> None:
        """Write the provenance record of each result."""
        for folder, scratch in self._scratch.items():
            write_records(scratch, folder, references)

    def move(self) -> None:
        """Move everything to its place, the records before any result."""
        pairs = [(path, folder / path.name) for folder, scratch in self._scratch.items() for path in scratch.iterdir()]
        for path, place in sorted(pairs, key=lambda pair: (pair[1].name != RECORDS, pair)):
            self._place = place
            _move(path, place)
            if place.name != RECORDS:
                self.places.append(place)

    def remove(self) -> None:
        """Remove the scratch folders and all that was not moved."""
        for scratch in self._scratch.values():
            shutil.rmtree(scratch, ignore_errors=True)

    def refusal(self, error: Exception) -> UserError | None:
        """The message for an error of writing; None for any other error."""
        disk = next((path for path in (self._place, *self._place.parents) if path.is_dir()), Path())
        if reason := full_disk(error, disk):
            return UserError(f"{self._place}: {reason}. Free space there and run again.")
        if not isinstance(error, OSError) or error.filename is None:
            return None
        path = Path(os.fsdecode(error.filename))
        if not self._place.is_relative_to(path) and not any(map(SCRATCH_NAME.fullmatch, path.parts)):
            return None
        return UserError(f"{self._place}: cannot be written ({error.strerror}). Fix that, or name another place.")


def withdraw(place: Path) -> None:
    """Remove a result and its record, if they exist."""
    with suppress(FileNotFoundError, NotADirectoryError):
        place.unlink()
        record_file(place).unlink()


def _move(path: Path, place: Path) -> None:
    """Move a file or a folder; if the target folder has content, file by file."""
    if path.is_dir() and place.is_dir() and any(place.iterdir()):
        for inner in sorted(path.iterdir()):
            _move(inner, place / inner.name)
    else:
        path.replace(place)


def _is_abandoned(name: str) -> bool:
    """Whether the process of a scratch folder ran on this machine and has ended."""
    owner = SCRATCH_NAME.fullmatch(name)
    if owner is None or owner["host"] != platform.node():
        return False
    try:
        os.kill(int(owner["process"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False

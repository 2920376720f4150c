"""Result files, whole or not at all.

A command writes its results aside, and `written` moves them to their places when the last one is whole, the records of
how they were made first. So a command that fails leaves what was there before, and of two runs at once each writes by
itself. Where one is killed between two files, a file that is not of its record's run shows by the sha256 in the record.
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
from hfprune.store.artifacts import Artifact, no_room
from hfprune.store.provenance import RECORDS, record, record_file, reference

SCRATCH = re.compile(r"\.aside-(?P<host>.+)-(?P<process>\d+)-[^-]+")  # a scratch folder's name


@contextmanager
def written(sources: Sequence[Artifact | Path] | None = None) -> Iterator["Aside"]:
    """Where to write results, which stand in their places when the block ends, and leave no trace where it fails.

    Args:
        sources: the artifacts and files that all of them are made from, which each result's record names. Read them
            within the block: none may change while it lasts. Without sources there are no records.

    Raises:
        UserError: a place cannot be written, the disk is full, or a source has changed meanwhile.
    """
    before = [reference(source) for source in sources or ()]
    aside = Aside()
    try:
        yield aside
        for source, made_from in zip(sources or (), before, strict=True):
            if reference(source) != made_from:
                raise UserError(f"{source}: has changed while it was read, by another run. Run again.")
        if sources is not None:
            aside.record(before)
        aside.move()
    except Exception as error:
        if (refusal := aside.refusal(error)) is None:
            raise
        raise refusal from None
    finally:
        aside.remove()


class Aside:
    """Scratch folders, each inside the folder that its content will stand in, for that is on the same disk.

    Attributes:
        places: the results' paths once they stand there; without their records.
    """

    def __init__(self) -> None:
        self.places: list[Path] = []
        self._scratch: dict[Path, Path] = {}  # by the folder that it stands in
        self._place = Path()  # what is being written

    def folder(self, place: Path) -> Path:
        """The empty folder to write into what will stand in the folder `place`, which is made where there is none."""
        self._place = place
        return self._inside(place)

    def path(self, place: Path) -> Path:
        """Where to write the one file, or to make the one folder, that will stand at `place`."""
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
                if _is_left(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            name = f".aside-{platform.node()}-{os.getpid()}-"
            self._scratch[folder] = Path(tempfile.mkdtemp(prefix=name, dir=folder))
        return self._scratch[folder]

    def record(self, made_from: Sequence[dict[str, str]]) -> None:
        """Write a record of each result beside it."""
        for folder, scratch in self._scratch.items():
            record(scratch, folder, made_from)

    def move(self) -> None:
        """Move everything to its place, the records before any result."""
        pairs = [(path, folder / path.name) for folder, found in self._scratch.items() for path in found.iterdir()]
        for path, place in sorted(pairs, key=lambda pair: (pair[1].name != RECORDS, pair)):
            self._place = place
            _move(path, place)
            if place.name != RECORDS:
                self.places.append(place)

    def remove(self) -> None:
        """Remove the scratch folders with what was not moved."""
        for scratch in self._scratch.values():
            shutil.rmtree(scratch, ignore_errors=True)

    def refusal(self, error: Exception) -> UserError | None:
        """What to say of an error in writing; None where it is one of something else."""
        disk = next((path for path in (self._place, *self._place.parents) if path.is_dir()), Path())
        if room := no_room(error, disk):
            return UserError(f"{self._place}: {room}. Free space there and run again.")
        if not isinstance(error, OSError) or error.filename is None:
            return None
        path = Path(os.fsdecode(error.filename))
        if not self._place.is_relative_to(path) and not any(map(SCRATCH.fullmatch, path.parts)):
            return None
        return UserError(f"{self._place}: cannot be written ({error.strerror}). Mend that, or name another place.")


def withdraw(place: Path) -> None:
    """Remove a result and its record, where there is one."""
    with suppress(FileNotFoundError, NotADirectoryError):
        place.unlink()
        record_file(place).unlink()


def _move(path: Path, place: Path) -> None:
    """Move a file, or a folder: into one that is there, file by file."""
    if path.is_dir() and place.is_dir() and any(place.iterdir()):
        for inner in sorted(path.iterdir()):
            _move(inner, place / inner.name)
    else:
        path.replace(place)


def _is_left(name: str) -> bool:
    """Whether a scratch folder is of a process of this machine that was killed."""
    made_by = SCRATCH.fullmatch(name)
    if made_by is None or made_by["host"] != platform.node():
        return False
    try:
        os.kill(int(made_by["process"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False

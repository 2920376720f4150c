"""Artifacts by hash: what a result is made from decides its name.

An artifact is a folder `STORE/<stage>/<key>/` with files and a `manifest.json`. The key is a digest of everything
that determines the content, so whoever asks for the same thing finds the same folder, whichever experiment,
checkout or user made it. A folder appears in its place at once, complete, or not at all; and it goes so too.

What is made in a store gets the permissions of the store's own folder: whoever may write the one may write, replace
and remove the other, whatever the umask of its maker.
"""

import errno
import functools
import json
import os
import platform
import re
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hfprune.errors import UserError
from hfprune.store.filenames import MANIFEST, REFUSED, RESUME
from hfprune.store.keys import PACKAGE, Recipe, file_sha256, versions

WORK = ".work"  # a folder of the store: what is being made
LEFTOVER = re.compile("(?P<stage>.+)-(?P<key>[0-9a-f]{16})(-.*)?")  # a folder in there
FULL = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)}
ALMOST_FULL = 2**20  # bytes free: where no more are, a library's own error is put down to it


@dataclass(frozen=True)
class Artifact:
    """An artifact that was found complete and unchanged: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """The artifact's key."""
        return self.manifest["key"]

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters it was made with."""
        return self.manifest["parameters"]


class DamagedError(UserError):
    """A file of an artifact differs from what the manifest says."""


def read(path: Path, *names: str) -> Artifact:
    """Open the artifact at `path` (its folder or its manifest) and verify every file of it.

    Where files are named, only these: whoever reads no others need not wait for weights, which may take minutes.

    Raises:
        DamagedError: a file differs from what the manifest says. The artifact is set aside (its manifest renamed), so
            that the next run makes it again.
        UserError: there is no artifact, or this user may not read it.
    """
    folder = path.parent if path.name == MANIFEST else path
    with _reading(folder):
        return _verified(folder, names)


def _verified(folder: Path, names: Collection[str]) -> Artifact:
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        hint = "it was refused earlier; " if (folder / REFUSED).exists() else ""
        raise UserError(f"{folder}: no artifact here ({hint}no {MANIFEST}). Run the stage that makes it first.")
    if manifest_file.stat().st_mtime > time.time():  # by a clock that was ahead; Snakemake would refuse what follows
        with suppress(OSError):
            os.utime(manifest_file)
    content = manifest_file.read_bytes()
    refuse = functools.partial(_refuse, manifest_file, content)
    try:
        manifest = json.loads(content)
        recipe = Recipe(**{name: manifest[name] for name in Recipe.__dataclass_fields__})
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(manifest_file, f"not a manifest ({type(error).__name__}: {error})") from None
    if not recipe.key == manifest.get("key") == folder.resolve().name:
        raise refuse(manifest_file, f"its content has key {recipe.key}, it says {manifest.get('key')}: edited or moved")
    for name in names or files:
        file = folder / name
        if name not in files:
            raise refuse(file, "the manifest does not have it")
        size, digest = files[name]
        if not file.is_file():
            raise refuse(file, "missing")
        if file.stat().st_size != size:
            raise refuse(file, f"{file.stat().st_size:,} bytes, the manifest says {size:,}")
        if (found := file_sha256(file)) != digest:
            raise refuse(file, f"sha256 {found[:16]}..., the manifest says {digest[:16]}...")
    return Artifact(folder, manifest)


def _refuse(manifest: Path, content: bytes, file: Path, reason: str) -> DamagedError:
    remedy = "The artifact is set aside; the next run makes it again."
    try:
        if manifest.read_bytes() == content:  # else another process has made the artifact again meanwhile
            manifest.replace(manifest.with_name(REFUSED))
    except FileNotFoundError:
        pass  # another process has set it aside
    except OSError as error:
        remedy = f"It could not be set aside ({error.strerror}): remove {manifest.parent} and run again."
    return DamagedError(f"{file}: refused: {reason}. {remedy}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What keeps this user from reading in a store, in words."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be read ({error.strerror}). Whoever owns it, or the folder that it "
            "stands in or links to, can let you read it."
        ) from None


class FullDiskError(UserError):
    """A disk, or a user's share of it, has no room for what was to be written."""


class Store:
    """A folder of artifacts, shared by whoever can reach it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, recipe: Recipe) -> Path:
        """Where the artifact of `recipe` is or will be."""
        return self.root / recipe.stage / recipe.key

    def has(self, stage: str, key: str) -> bool:
        """Whether the store has this artifact.

        Raises:
            UserError: this user may not look.
        """
        file = self.root / stage / key / MANIFEST
        with _reading(file):
            return file.is_file()

    def manifest(self, stage: str, key: str) -> dict[str, Any]:
        """What an artifact's manifest says; its files are not looked at.

        Raises:
            UserError: the store does not have it.
        """
        if not self.has(stage, key):
            raise UserError(f"{self.root / stage / key}: not in the store; run the stage that makes it first.")
        file = self.root / stage / key / MANIFEST
        with _reading(file):
            return json.loads(file.read_text(encoding="utf-8"))

    def make(self, recipe: Recipe, produce: Callable[[Path], dict[str, Any] | None]) -> Artifact:
        """The artifact of `recipe`: the one in the store if it is there and whole, else made by `produce`.

        Args:
            recipe: what to make.
            produce: writes the artifact's files into the empty folder that it is given, and may return details
                for the manifest. Its sub-folder `.resume` survives a killed attempt and is not published.

        Raises:
            UserError: from `produce`, or the store cannot be read or written.
        """
        if (made := self._find(recipe)) is not None:
            return made
        with self._writing(), self._locked(recipe.stage, recipe.key) as lock:
            if not lock.is_locked:
                print(f"{recipe.stage} {recipe.key}: another process is making it; waiting for it", file=sys.stderr)
                lock.acquire()
            if (made := self._find(recipe)) is not None:  # made by another process since
                return made
            return self._produce(recipe, produce)

    def offer(self, recipe: Recipe, produce: Callable[[Path], dict[str, Any] | None]) -> None:
        """`make` what comes out beside something else, unless another process is making it.

        Two that each hold what the other waits for would wait forever.
        """
        with self._writing(), self._locked(recipe.stage, recipe.key) as lock:
            if lock.is_locked and self._find(recipe) is None:
                self._produce(recipe, produce)

    def remove(self, stage: str, key: str, folder: Path) -> bool:
        """Remove an artifact's folder, or a leftover of its making; False where a process makes it just now.

        Raises:
            UserError: the store cannot be written.
        """
        with self._writing(), self._locked(stage, key) as lock:
            if lock.is_locked:
                self._take_out(stage, key, folder)
            return lock.is_locked

    def leftovers(self) -> list[tuple[str, str, Path]]:
        """Stage, key and folder of the attempts to make artifacts, or to remove them, at work or killed."""
        found = [(LEFTOVER.fullmatch(path.name), path) for path in sorted(self._work.glob("*")) if path.is_dir()]
        return [(match["stage"], match["key"], path) for match, path in found if match]

    @property
    def _work(self) -> Path:
        return self.root / WORK

    def _find(self, recipe: Recipe) -> Artifact | None:
        if not self.has(recipe.stage, recipe.key):
            return None
        try:
            found = read(self.folder(recipe))
        except DamagedError as error:
            print(f"{error} Making it again now.", file=sys.stderr)
            return None
        print(f"{recipe.stage} {recipe.key}: in the store already, verified", file=sys.stderr)
        return found

    def _produce(self, recipe: Recipe, produce: Callable[[Path], dict[str, Any] | None]) -> Artifact:
        # One of each user's own: what another's killed attempt has left may not be this user's to read or remove.
        work = self._work / f"{recipe.stage}-{recipe.key}-{os.getuid()}"
        self._make_folder(work)
        for leftover in work.iterdir():
            if leftover.name != RESUME:
                _remove(leftover)
        started = time.monotonic()
        details = produce(work) or {}
        seconds = time.monotonic() - started
        _remove(work / RESUME)
        files = sorted(path for path in work.rglob("*") if path.is_file())
        manifest = recipe.as_dict() | {
            "key": recipe.key,
            "files": {
                file.relative_to(work).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
                for file in files
            },
            "details": details,
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory(),
            **circumstances(),
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in work.rglob("*"):
            if not path.is_symlink():  # safetensors writes 0600, which shuts a shared store's other users out
                path.chmod(self._mode if path.is_dir() else self._mode & 0o666)
        folder = self.folder(recipe)
        self._make_folder(folder.parent)
        self._take_out(recipe.stage, recipe.key, folder)  # remains of a refused artifact
        work.rename(folder)
        return Artifact(folder, manifest)

    def _take_out(self, stage: str, key: str, folder: Path) -> None:
        """Remove a folder; it vanishes at once, so that a reader finds an artifact whole or not at all."""
        aside = self._work / f"{stage}-{key}-removed"
        _remove(aside)
        with suppress(FileNotFoundError):
            folder.rename(aside)
        _remove(aside)

    @property
    def _mode(self) -> int:
        return stat.S_IMODE(self.root.stat().st_mode)

    def _make_folder(self, folder: Path) -> None:
        with _no_umask():
            folder.mkdir(mode=self._mode, exist_ok=True)

    @contextmanager
    def _locked(self, stage: str, key: str) -> Iterator[Any]:
        """The lock on making an artifact, held unless another process holds it; it dies with its process."""
        from filelock import FileLock, Timeout

        self.root.mkdir(parents=True, exist_ok=True)
        self._make_folder(self._work)
        lock = FileLock(self._work / f"{stage}-{key}.lock", mode=0o666)
        try:
            with suppress(Timeout), _no_umask():
                lock.acquire(timeout=0)
            yield lock
        finally:
            lock.release()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What keeps this user from writing into the store, in words."""
        try:
            yield
        except FullDiskError:  # of an artifact that was made on the way to this one
            raise
        except Exception as error:
            remedy = "or set another folder by `store:` in the config or by HFPRUNE_STORE."
            full = _says_full(error)
            if isinstance(error, OSError) and not full and str(error.filename or "").startswith(str(self.root)):
                raise UserError(
                    f"{error.filename}: cannot write to the store ({error.strerror}). Mend its permissions, {remedy}"
                ) from None
            if room := no_room(error, self.root):
                raise FullDiskError(
                    f"{self.root}: {room}. What was finished is kept. "
                    f"Free space (`hfprune store prune` shows what no experiment uses), run again, {remedy}"
                ) from None
            raise


def no_room(error: Exception, folder: Path) -> str:
    """What to say of an error in writing into `folder` that comes of a full disk; empty where it does not.

    Libraries hide the system's error: where almost nothing is free, whatever fails is put down to that.
    """
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    if not _says_full(error) and (free >= ALMOST_FULL or isinstance(error, UserError)):
        return ""
    reason = str(error).strip().partition("\n")[0]
    return f"no room on the disk, {free:,} bytes are free ({type(error).__name__}: {reason})"


def _says_full(error: BaseException | None) -> bool:
    """Whether an error comes of a full disk or a used-up quota; libraries wrap the system's error, or only quote it."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL.values()):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@functools.cache
def _git_commit() -> str | None:
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def circumstances() -> dict[str, Any]:
    """By what, where and when this process makes what it makes: what a record says beside what determined it."""
    return {
        "versions": versions() | {"python": platform.python_version()},
        "git_commit": _git_commit(),
        "command": sys.argv,
        "host": platform.node(),
        "device": device_name(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    """The GPU this process computes on, or else the CPU's model."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def peak_memory() -> int:
    """Peak bytes of this process: of its GPU memory where it computes on one, else of its resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

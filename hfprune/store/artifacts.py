"""The artifact store: each result is stored under a hash of its inputs and reused.

An artifact is a folder `STORE/<stage>/<key>/` with files and a `manifest.json`. The key is a digest of everything
that determines the content, so the same inputs lead to the same folder, whichever experiment, checkout or user made
it. A folder appears complete or not at all, and disappears the same way.

Artifacts get the permissions of the store's own folder, whatever the umask: whoever may write to the store may also
replace and remove what others have put there.
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

WORK = ".work"  # a folder in the store, for artifacts in the making
LEFTOVER = re.compile("(?P<stage>.+)-(?P<key>[0-9a-f]{16})(-.*)?")  # the name of a folder in `WORK`
FULL_DISK = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)}
ALMOST_FULL = 2**20  # bytes: with less free space, any error is taken for a full disk


@dataclass(frozen=True)
class Artifact:
    """A verified artifact: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        """The artifact's key."""
        return self.manifest["key"]

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of its stage."""
        return self.manifest["parameters"]


class DamagedError(UserError):
    """A file of an artifact differs from what the manifest says."""


def read(path: Path, *names: str) -> Artifact:
    """Open the artifact at `path` (its folder or its manifest) and verify its files.

    Args:
        path: the artifact.
        names: the files to verify; all of them by default. Large weights take minutes: name the files that you read.

    Raises:
        DamagedError: a file differs from the manifest. The artifact is set aside (its manifest is renamed), so that
            the next run makes it again.
        UserError: there is no artifact, or this user may not read it.
    """
    folder = path.parent if path.name == MANIFEST else path
    with _read_errors(folder):
        return _verified(folder, names)


def _verified(folder: Path, names: Collection[str]) -> Artifact:
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        hint = "it was refused earlier; " if (folder / REFUSED).exists() else ""
        raise UserError(f"{folder}: no artifact here ({hint}no {MANIFEST}). Run the stage that makes it first.")
    if manifest_file.stat().st_mtime > time.time():  # written by a clock that was ahead: Snakemake would refuse it
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
        if (actual := file_sha256(file)) != digest:
            raise refuse(file, f"sha256 {actual[:16]}..., the manifest says {digest[:16]}...")
    return Artifact(folder, manifest)


def _refuse(manifest: Path, content: bytes, file: Path, reason: str) -> DamagedError:
    remedy = "The artifact is set aside; the next run makes it again."
    try:
        if manifest.read_bytes() == content:  # else another process has made the artifact again
            manifest.replace(manifest.with_name(REFUSED))
    except FileNotFoundError:
        pass  # another process has set it aside
    except OSError as error:
        remedy = f"It could not be set aside ({error.strerror}): remove {manifest.parent} and run again."
    return DamagedError(f"{file}: refused: {reason}. {remedy}")


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn an error of reading the store into a message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be read ({error.strerror}). Ask the owner of the file, of its folder or "
            "of what it links to for permission."
        ) from None


class FullDiskError(UserError):
    """The disk or the user's quota is full."""


class Store:
    """A folder of artifacts, shared by all who can reach it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, recipe: Recipe) -> Path:
        """The folder that the artifact of `recipe` has or will have."""
        return self.root / recipe.stage / recipe.key

    def has(self, stage: str, key: str) -> bool:
        """Whether the store has this artifact.

        Raises:
            UserError: this user may not read the folder.
        """
        file = self.root / stage / key / MANIFEST
        with _read_errors(file):
            return file.is_file()

    def manifest(self, stage: str, key: str) -> dict[str, Any]:
        """The manifest of an artifact. Its files are not verified.

        Raises:
            UserError: the store does not have it.
        """
        if not self.has(stage, key):
            raise UserError(f"{self.root / stage / key}: not in the store; run the stage that makes it first.")
        file = self.root / stage / key / MANIFEST
        with _read_errors(file):
            return json.loads(file.read_text(encoding="utf-8"))

    def make(self, recipe: Recipe, produce: Callable[[Path], dict[str, Any] | None]) -> Artifact:
        """Return the artifact of `recipe`. If the store has none, or a damaged one, `produce` makes it.

        Args:
            recipe: what determines the artifact.
            produce: writes the artifact's files into an empty folder, its argument, and may return details for the
                manifest. The sub-folder `.resume` survives a killed attempt and is not published.

        Raises:
            UserError: from `produce`, or the store cannot be read or written.
        """
        if (artifact := self._stored(recipe)) is not None:
            return artifact
        with self._write_errors(), self._locked(recipe.stage, recipe.key) as lock:
            if not lock.is_locked:
                print(f"{recipe.stage} {recipe.key}: another process is making it; waiting for it", file=sys.stderr)
                lock.acquire()
            if (artifact := self._stored(recipe)) is not None:  # another process has made it since
                return artifact
            return self._produce(recipe, produce)

    def make_unless_locked(self, recipe: Recipe, produce: Callable[[Path], dict[str, Any] | None]) -> None:
        """`make`, but skip the artifact if another process is making it.

        For a by-product, made while the lock of the main artifact is held. To wait for a second lock could be a
        deadlock: another process may hold that one and wait for the first.
        """
        with self._write_errors(), self._locked(recipe.stage, recipe.key) as lock:
            if lock.is_locked and self._stored(recipe) is None:
                self._produce(recipe, produce)

    def remove(self, stage: str, key: str, folder: Path) -> bool:
        """Remove an artifact's folder, or a leftover of an attempt. False if a process is making the artifact.

        Raises:
            UserError: the store cannot be written.
        """
        with self._write_errors(), self._locked(stage, key) as lock:
            if lock.is_locked:
                self._remove_folder(stage, key, folder)
            return lock.is_locked

    def leftovers(self) -> list[tuple[str, str, Path]]:
        """Stage, key and folder of every attempt to make or remove an artifact, running or killed."""
        folders = [path for path in sorted(self._work.glob("*")) if path.is_dir()]
        matches = [(LEFTOVER.fullmatch(folder.name), folder) for folder in folders]
        return [(match["stage"], match["key"], folder) for match, folder in matches if match]

    @property
    def _work(self) -> Path:
        return self.root / WORK

    def _stored(self, recipe: Recipe) -> Artifact | None:
        """The artifact, if the store has it undamaged."""
        if not self.has(recipe.stage, recipe.key):
            return None
        try:
            artifact = read(self.folder(recipe))
        except DamagedError as error:
            print(f"{error} Making it again now.", file=sys.stderr)
            return None
        print(f"{recipe.stage} {recipe.key}: in the store already, verified", file=sys.stderr)
        return artifact

    def _produce(self, recipe: Recipe, produce: Callable[[Path], dict[str, Any] | None]) -> Artifact:
        # One folder per user: this user may not be allowed to read or remove the leftovers of another.
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
            **environment(),
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in work.rglob("*"):
            if not path.is_symlink():  # safetensors writes 0600: nobody else could read it
                path.chmod(self._mode if path.is_dir() else self._mode & 0o666)
        folder = self.folder(recipe)
        self._make_folder(folder.parent)
        self._remove_folder(recipe.stage, recipe.key, folder)  # a refused artifact
        work.rename(folder)
        return Artifact(folder, manifest)

    def _remove_folder(self, stage: str, key: str, folder: Path) -> None:
        """Rename a folder, then delete it, so that readers see a whole artifact or none."""
        trash = self._work / f"{stage}-{key}-removed"
        _remove(trash)
        with suppress(FileNotFoundError):
            folder.rename(trash)
        _remove(trash)

    @property
    def _mode(self) -> int:
        return stat.S_IMODE(self.root.stat().st_mode)

    def _make_folder(self, folder: Path) -> None:
        with _no_umask():
            folder.mkdir(mode=self._mode, exist_ok=True)

    @contextmanager
    def _locked(self, stage: str, key: str) -> Iterator[Any]:
        """The lock on making an artifact. It is acquired unless another process holds it, and ends with its process."""
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
    def _write_errors(self) -> Iterator[None]:
        """Turn an error of writing into the store into a message."""
        try:
            yield
        except FullDiskError:  # from a by-product of this artifact
            raise
        except Exception as error:
            remedy = "or set another folder by `store:` in the config or by HFPRUNE_STORE."
            is_full = _is_full_disk(error)
            if isinstance(error, OSError) and not is_full and str(error.filename or "").startswith(str(self.root)):
                raise UserError(
                    f"{error.filename}: cannot write to the store ({error.strerror}). Fix its permissions, {remedy}"
                ) from None
            if reason := full_disk(error, self.root):
                raise FullDiskError(
                    f"{self.root}: {reason}. Finished artifacts are kept. "
                    f"Free space (`hfprune store prune` shows what no experiment uses), run again, {remedy}"
                ) from None
            raise


def full_disk(error: Exception, folder: Path) -> str:
    """The message, if an error of writing into `folder` is due to a full disk; else empty.

    Some libraries hide the system's error, so with almost no free space any error counts as one of a full disk.
    """
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    if not _is_full_disk(error) and (free >= ALMOST_FULL or isinstance(error, UserError)):
        return ""
    reason = str(error).strip().partition("\n")[0]
    return f"no room on the disk, {free:,} bytes are free ({type(error).__name__}: {reason})"


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error is due to a full disk or quota. Libraries wrap the system's error, or only quote its text."""
    while error is not None:
        if getattr(error, "errno", None) in FULL_DISK or any(text in str(error) for text in FULL_DISK.values()):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _no_umask() -> Iterator[None]:
    umask = os.umask(0)
    try:
        yield
    finally:
        os.umask(umask)


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


def environment() -> dict[str, Any]:
    """Versions, command, host, device and time of this process. Records state them; keys do not depend on them."""
    return {
        "versions": versions() | {"python": platform.python_version()},
        "git_commit": _git_commit(),
        "command": sys.argv,
        "host": platform.node(),
        "device": device_name(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    """The GPU that this process computes on, or else the CPU's model."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        cpu = None
    return f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores"


def peak_memory() -> int:
    """Peak memory of this process in bytes: of the GPU if it uses one, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

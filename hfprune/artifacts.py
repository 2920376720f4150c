"""Artifacts by hash: what a result is made from decides its name.

An artifact is a folder `STORE/<stage>/<key>/` with files and a `manifest.json`. The key is a digest of everything
that determines the content, so whoever asks for the same thing finds the same folder, whichever experiment,
checkout or user made it. A folder appears in its place at once, complete, or not at all.
"""

import ast
import errno
import functools
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hfprune.errors import UserError
from hfprune.layout import MANIFEST, REFUSED, RESUME

PACKAGE = Path(__file__).parent
LIBRARIES = (
    "torch", "transformers", "safetensors", "gguf", "huggingface_hub", "datasets", "lm_eval", "peft", "numpy",
    "pandas", "matplotlib", "snakemake",
)  # fmt: skip


def canonical(value: Any) -> str:
    """JSON with one spelling for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256(data: str) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(data.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_digest(module: str) -> str:
    """Digest of the code that `module` runs: itself and every module of this package that it imports, in turn.

    Comments, docstrings and layout do not count, so that a better comment never costs a rerun.
    """
    code: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in code:
            continue
        tree = ast.parse(_module_file(name).read_text(encoding="utf-8"))
        _strip_docstrings(tree)
        code[name] = ast.unparse(tree)
        pending += _package_imports(tree)
    return sha256(canonical(code))


def _module_file(name: str) -> Path:
    return PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")


def _strip_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]


def _package_imports(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            names += [f"{PACKAGE.name}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return [name for name in names if name.startswith(f"{PACKAGE.name}.") and _module_file(name).exists()]


def versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Installed versions of `libraries`, without importing them; those not installed are left out."""
    found = {}
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Recipe:
    """Everything that determines an artifact's content.

    Attributes:
        stage: the stage that makes it; the name of its folder in the store.
        parameters: what that stage reads of the experiment, and nothing else (JSON values).
        inputs: the keys of the artifacts that it is made from, by the name under which the stage knows them.
        code: digest of the code that the stage runs, `code_digest`.
        libraries: versions of the libraries that do its arithmetic.
    """

    stage: str
    parameters: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    libraries: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            "stage": self.stage,
            "parameters": dict(self.parameters),
            "inputs": dict(self.inputs),
            "code": self.code,
            "libraries": dict(self.libraries),
        }

    @functools.cached_property
    def key(self) -> str:
        """First 16 hex digits of the sha256 of the canonical JSON of all fields."""
        return sha256(canonical(self.as_dict()))[:16]


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


def read(path: Path) -> Artifact:
    """Open the artifact at `path` (its folder or its manifest) and verify every file of it.

    Raises:
        UserError: there is no artifact, or a file differs from what the manifest says. Then the artifact is set
            aside (its manifest renamed), so that the next run makes it again.
    """
    folder = path.parent if path.name == MANIFEST else path
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        hint = "it was refused earlier; " if (folder / REFUSED).exists() else ""
        raise UserError(f"{folder}: no artifact here ({hint}no {MANIFEST}). Run the stage that makes it first.")
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        recipe = Recipe(**{name: manifest[name] for name in Recipe.__dataclass_fields__})
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refuse(folder, manifest_file, f"not a manifest ({type(error).__name__}: {error})") from None
    if not recipe.key == manifest.get("key") == folder.resolve().name:
        raise _refuse(
            folder, manifest_file, f"its content has key {recipe.key}, it says {manifest.get('key')}: edited or moved"
        )
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise _refuse(folder, file, "missing")
        if file.stat().st_size != size:
            raise _refuse(folder, file, f"{file.stat().st_size:,} bytes, the manifest says {size:,}")
        if (found := file_sha256(file)) != digest:
            raise _refuse(folder, file, f"sha256 {found[:16]}..., the manifest says {digest[:16]}...")
    return Artifact(folder, manifest)


def _refuse(folder: Path, file: Path, reason: str) -> UserError:
    try:
        (folder / MANIFEST).replace(folder / REFUSED)
        remedy = "The artifact is set aside; the next run makes it again."
    except OSError as error:
        remedy = f"It could not be set aside ({error.strerror}): remove {folder} and run again."
    return UserError(f"{file}: refused: {reason}. {remedy}")


class Store:
    """A folder of artifacts, shared by whoever can reach it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, recipe: Recipe) -> Path:
        """Where the artifact of `recipe` is or will be."""
        return self.root / recipe.stage / recipe.key

    def has(self, stage: str, key: str) -> bool:
        """Whether the store has this artifact."""
        return (self.root / stage / key / MANIFEST).is_file()

    def manifest(self, stage: str, key: str) -> dict[str, Any]:
        """What an artifact's manifest says; its files are not looked at.

        Raises:
            UserError: the store does not have it.
        """
        if not self.has(stage, key):
            raise UserError(f"{self.root / stage / key}: not in the store; run the stage that makes it first.")
        return json.loads((self.root / stage / key / MANIFEST).read_text(encoding="utf-8"))

    def make(self, recipe: Recipe, produce: Callable[[Path], dict[str, Any] | None]) -> Artifact:
        """The artifact of `recipe`: the one in the store if it is there and whole, else made by `produce`.

        Args:
            recipe: what to make.
            produce: writes the artifact's files into the empty folder that it is given, and may return details
                for the manifest. Its sub-folder `.resume` survives a killed attempt and is not published.

        Raises:
            UserError: from `produce`, or the store cannot be written.
        """
        if (made := self._find(recipe)) is not None:
            return made
        work = self.root / ".work" / f"{recipe.stage}-{recipe.key}"
        try:
            work.mkdir(parents=True, exist_ok=True)
            with _lock(work.with_suffix(".lock"), recipe):
                if (made := self._find(recipe)) is not None:  # another process made it while this one waited
                    return made
                return self._produce(recipe, produce, work)
        except OSError as error:
            if error.errno != errno.ENOSPC and not str(error.filename or "").startswith(str(self.root)):
                raise
            raise UserError(
                f"{error.filename or work}: cannot write to the store ({error.strerror}). Free space, mend its "
                "permissions, or set another folder by `store:` in the config or by HFPRUNE_STORE."
            ) from None

    def _find(self, recipe: Recipe) -> Artifact | None:
        folder = self.folder(recipe)
        if not (folder / MANIFEST).is_file():
            return None
        try:
            found = read(folder)
        except UserError as error:
            print(f"{error} Making it again now.", file=sys.stderr)
            return None
        print(f"{recipe.stage} {recipe.key}: in the store already, verified", file=sys.stderr)
        return found

    def _produce(self, recipe: Recipe, produce: Callable[[Path], dict[str, Any] | None], work: Path) -> Artifact:
        for leftover in work.iterdir():
            if leftover.name != RESUME:
                _remove(leftover)
        started = time.monotonic()
        details = produce(work) or {}
        seconds = time.monotonic() - started
        _remove(work / RESUME)
        files = sorted(path for path in work.rglob("*") if path.is_file())
        mask = os.umask(0)
        os.umask(mask)
        for file in files:
            if not file.is_symlink():  # safetensors writes 0600, which shuts a shared store's other users out
                file.chmod(0o666 & ~mask)
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
        folder = self.folder(recipe)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and any(folder.iterdir()):  # remains of a refused artifact
            shutil.rmtree(folder)
        work.rename(folder)
        return Artifact(folder, manifest)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lock(path: Path, recipe: Recipe):
    """A lock that dies with its process; says so when another process holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, mode=0o666)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"{recipe.stage} {recipe.key}: another process is making it; waiting for it", file=sys.stderr)
        return lock.acquire()


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

"""Keys: what a result is made from decides its name.

A key is a digest of the stage's parameters, of the keys of its inputs, of the code that the stage runs and of the
versions of the libraries that do its arithmetic.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
HELP = ("description", "examples")  # arguments that only people read, of these calls
DECLARING = ("Field", "Input", "Stage")
OUTSIDE_KEY = "outside_key"  # a decorator, see `stages.declaration`
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

    Every form of import is followed, inside functions too, and the `__init__` files of the sub-packages on the way.
    Comments, docstrings, layout and help texts (`description=` and `examples=` of a declaration) do not count, so that
    a better word never costs a rerun; nor do functions that are marked `outside_key`. The package's own `__init__`
    counts as text; its imports are not followed: it offers the Python interface, which no stage uses.

    Raises:
        UnresolvedImportError: an import of this package leads to nothing, or is made by a name that only running the
            code would tell.
    """
    code: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in code:
            continue
        tree = ast.parse(_module_file(name).read_text(encoding="utf-8"))
        _strip(tree)
        code[name] = ast.unparse(tree)
        if name != PACKAGE.name:
            pending += _package_imports(name, tree)
    return sha256(canonical(code))


class UnresolvedImportError(ImportError):
    """An import inside the package of which the digest cannot tell what code it runs."""


def _module_file(name: str) -> Path:
    """The file of a module or of a package's `__init__`.

    Raises:
        UnresolvedImportError: there is none.
    """
    path = PACKAGE.joinpath(*name.split(".")[1:])
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    raise UnresolvedImportError(f"{name}: no such module in {PACKAGE}")


def _strip(tree: ast.Module) -> None:
    """Take out what no artifact's content depends on."""
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.Module):
            node.body = [each for each in node.body if not _is_outside_key(each)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in DECLARING:
            node.keywords = [each for each in node.keywords if each.arg not in HELP]


def _is_outside_key(node: ast.stmt) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(isinstance(each, ast.Name) and each.id == OUTSIDE_KEY for each in decorators)


def _package_imports(module: str, tree: ast.Module) -> list[str]:
    """The package's modules that a module imports, each with the packages that it stands in."""
    names: set[str] = set()
    for node in ast.walk(tree):
        for name in _imported(module, node):
            parts = name.split(".")
            names.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return sorted(names)


def _imported(module: str, node: ast.AST) -> Iterator[str]:
    """The package's modules that one statement or call names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if _is_ours(alias.name))
    elif isinstance(node, ast.ImportFrom):
        source = _absolute(module, node)
        if _is_ours(source):
            yield from (_member(module, source, alias.name) for alias in node.names)
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__"):
            argument = node.args[0] if node.args else None
            if room := _room(argument):
                yield from room
                return
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                raise UnresolvedImportError(
                    f"{module}, line {node.lineno}: {ast.unparse(node)}: only running it tells what it imports; "
                    "write an import statement."
                )
            if _is_ours(argument.value):
                yield argument.value


def _room(argument: ast.expr | None) -> list[str]:
    """Of an import by f"hfprune.room.{name}": all modules of that room."""
    match argument:
        case ast.JoinedStr(values=[ast.Constant(value=start), ast.FormattedValue()]) if _is_ours(start):
            folder = PACKAGE.joinpath(*start.rstrip(".").split(".")[1:])
            if start.endswith(".") and folder != PACKAGE and (folder / "__init__.py").is_file():
                return [start + file.stem for file in sorted(folder.glob("*.py")) if file.stem != "__init__"]
    return []


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == PACKAGE.name


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that `from ... import` names, also where dots stand for the packages around it."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    is_package = _module_file(module).name == "__init__.py"
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _member(module: str, source: str, name: str) -> str:
    """`source.name` where that is a module, or else `source`, which then defines the name.

    Raises:
        UnresolvedImportError: it does not.
    """
    file = _module_file(source)
    if file.name == "__init__.py":
        try:
            _module_file(f"{source}.{name}")
        except UnresolvedImportError:
            pass
        else:
            return f"{source}.{name}"
    if source == PACKAGE.name or (name != "*" and name not in _defined(file)):
        raise UnresolvedImportError(f"{module}: from {source} import {name}: {file} defines no such name")
    return source


def _defined(file: Path) -> set[str]:
    """The names that a module binds anywhere at its top level, also by import."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
                continue
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.alias):
                found.add((node.asname or node.name).partition(".")[0])
            pending.append(node)
    return found


def versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Installed versions of `libraries`, without importing them; those not installed are left out."""
    return {library: found for library in libraries if (found := _version(library))}


@functools.cache  # each reads a file, and every recipe names some
def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


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

"""Keys: the hashes that artifacts are stored under.

A key is a digest of the stage's parameters, the keys of its inputs, the code that the stage runs and the versions of
the libraries that compute.
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
DECLARATIONS = ("Field", "Input", "Stage")  # calls whose arguments `HELP` are only for people
HELP = ("description", "examples")
IMPORTERS = ("import_module", "__import__")
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
    """Digest of the code that `module` runs: its own and that of all modules of this package that it imports, in turn.

    Every form of import is followed, also inside functions, and the `__init__` files of sub-packages. Comments,
    docstrings, layout and help texts (`description=` and `examples=` of a declaration) do not count, so a better word
    never costs a rerun. Functions that are marked `outside_key` do not count either. The imports in the package's own
    `__init__` are not followed: they are the Python interface, which no stage uses.

    Raises:
        UnresolvedImportError: an imported module of this package does not exist, or its name is only known at run time.
    """
    code: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in code:
            continue
        code[name], imports = _parsed(_module_file(name).read_text(encoding="utf-8"))
        if name != PACKAGE.name:
            pending += _package_imports(name, imports)
    return sha256(canonical(code))


class UnresolvedImportError(ImportError):
    """An import of this package whose code cannot be determined without running it."""


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


@functools.cache  # most stages run most modules, and every start of Snakemake asks for all of them
def _parsed(text: str) -> tuple[str, list[ast.AST]]:
    """What a module's text runs, see `code_digest`; and its imports: statements, and calls that import."""
    tree = ast.parse(text)
    _strip(tree)
    imports = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Call) and _called(node) in IMPORTERS)
    ]
    return ast.unparse(tree), imports


def _strip(tree: ast.Module) -> None:
    """Remove all that no artifact's content depends on."""
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.Module):
            node.body = [statement for statement in node.body if not _is_outside_key(statement)]
        elif isinstance(node, ast.Call) and _called(node) in DECLARATIONS:
            node.keywords = [keyword for keyword in node.keywords if keyword.arg not in HELP]


def _called(call: ast.Call) -> str:
    """The last word of the name that is called; empty if it is no name."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _is_outside_key(node: ast.stmt) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(isinstance(decorator, ast.Name) and decorator.id == OUTSIDE_KEY for decorator in decorators)


def _package_imports(module: str, imports: list[ast.AST]) -> list[str]:
    """The package's modules that a module imports, and the packages around them."""
    names: set[str] = set()
    for node in imports:
        for name in _imported(module, node):
            parts = name.split(".")
            names.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return sorted(names)


def _imported(module: str, node: ast.AST) -> Iterator[str]:
    """The package's modules that one of the imports of `_parsed` names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if _is_ours(alias.name))
    elif isinstance(node, ast.ImportFrom):
        source = _absolute(module, node)
        if _is_ours(source):
            yield from (_member(module, source, alias.name) for alias in node.names)
    elif isinstance(node, ast.Call):
        argument = node.args[0] if node.args else None
        if modules := _package_modules(argument):
            yield from modules
            return
        if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
            raise UnresolvedImportError(
                f"{module}, line {node.lineno}: {ast.unparse(node)}: only running it tells what it imports; "
                "write an import statement."
            )
        if _is_ours(argument.value):
            yield argument.value


def _package_modules(argument: ast.expr | None) -> list[str]:
    """For an import by f"hfprune.package.{name}": all modules of that sub-package."""
    match argument:
        case ast.JoinedStr(values=[ast.Constant(value=start), ast.FormattedValue()]) if _is_ours(start):
            folder = PACKAGE.joinpath(*start.rstrip(".").split(".")[1:])
            if start.endswith(".") and folder != PACKAGE and (folder / "__init__.py").is_file():
                return [start + file.stem for file in sorted(folder.glob("*.py")) if file.stem != "__init__"]
    return []


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == PACKAGE.name


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The full name of the module in `from ... import`, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    is_package = _module_file(module).name == "__init__.py"
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _member(module: str, source: str, name: str) -> str:
    """`source.name` if that is a module, else `source`, which must define the name.

    Raises:
        UnresolvedImportError: it does not define it.
    """
    file = _module_file(source)
    if file.name == "__init__.py":
        try:
            _module_file(f"{source}.{name}")
        except UnresolvedImportError:
            pass
        else:
            return f"{source}.{name}"
    if source == PACKAGE.name or (name != "*" and name not in _defined(file.read_text(encoding="utf-8"))):
        raise UnresolvedImportError(f"{module}: from {source} import {name}: {file} defines no such name")
    return source


@functools.cache
def _defined(text: str) -> set[str]:
    """The names that a module's text defines or imports at its top level."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
                continue
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.alias):
                names.add((node.asname or node.name).partition(".")[0])
            pending.append(node)
    return names


def versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Versions of those `libraries` that are installed; none is imported."""
    return {library: version for library in libraries if (version := _version(library))}


@functools.cache  # reads a file, and every recipe needs it
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
        parameters: the settings that the stage reads, and no others (JSON values).
        inputs: the keys of its input artifacts, by the stage's names for them.
        code: digest of the code that the stage runs, `code_digest`.
        libraries: versions of the libraries that compute.
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

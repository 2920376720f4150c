"""Provenance: how a result was made, from which artifacts, back to the downloaded sources.

A command that writes results also writes a record of each file, in the folder `.provenance` beside it: the file's
sha256, its sources and the command. The sources are traced further by the manifests in the store.
"""

import csv
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfprune.errors import UserError
from hfprune.store.artifacts import Artifact, Store, environment
from hfprune.store.filenames import MANIFEST
from hfprune.store.keys import Recipe, code_digest, file_sha256

RECORDS = ".provenance"
RECORD_KEYS = {"sha256", "made_from", "code", "versions", "git_commit", "command", "host", "device", "time"}
KEY = re.compile("[0-9a-f]{4,16}")
MAX_VALUES = 8  # values of a column, or keys, that an error lists


def write_records(scratch: Path, folder: Path, sources: Sequence[Mapping[str, str]]) -> None:
    """Write a record of each file in `scratch`. Files and records will then move to `folder`.

    Args:
        scratch: the folder of the files; the records go there too.
        folder: their final place, to which the paths of sources are made relative.
        sources: the `reference` of each artifact and file that all files are made from.
    """
    made_from = [
        source | ({"file": _relative(source["file"], folder)} if "file" in source else {}) for source in sources
    ]
    common = {"made_from": made_from, "code": code_digest("hfprune.cli"), **environment()}
    for path in sorted(path for path in scratch.iterdir() if path.is_file()):
        record = {"sha256": file_sha256(path), **common}
        record_file(path).parent.mkdir(exist_ok=True)
        record_file(path).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def record_file(path: Path) -> Path:
    """The file that holds a result's record."""
    return path.parent / RECORDS / f"{path.name}.json"


def reference(source: Artifact | Path) -> dict[str, str]:
    """How a record names a source: an artifact's stage and key, or a file's path and sha256 (empty if it is absent)."""
    if isinstance(source, Artifact):
        return {"stage": source.manifest["stage"], "key": source.key}
    return {"file": str(source.resolve()), "sha256": file_sha256(source) if source.is_file() else ""}


def _relative(file: str, folder: Path) -> str:
    """A file's path relative to a folder, so that both can be moved together."""
    return Path(os.path.relpath(file, folder.resolve())).as_posix()


def _read_record(path: Path) -> dict[str, Any]:
    """A file's record; empty if there is none."""
    file = record_file(path)
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if missing := RECORD_KEYS - set(record):
            raise ValueError(f"without {', '.join(sorted(missing))}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not a record of how {path.name} was made ({error}): make {path.name} anew.") from None
    return record


@dataclass(frozen=True)
class Node:
    """A result or an artifact, and its sources.

    Attributes:
        name: a file's path, or an artifact's stage and key.
        path: the file, or the artifact's manifest.
        record: its record or its manifest; empty if there is none.
        sources: what it was made from, by role.
        notes: for the reader, such as that the file is missing or was edited.
    """

    name: str
    path: Path
    record: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, "Node"] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_artifact(self) -> bool:
        """Whether it is an artifact of the store, not a file of results."""
        return self.path.name == MANIFEST


class ProvenanceGraph:
    """Traces results back to their sources, by records and manifests."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._artifacts: dict[str, Node] = {}

    def trace(self, result: str, where: Sequence[str] = ()) -> Node:
        """The graph of a result and its sources.

        Args:
            result: a file of results; an artifact's folder or a file in it; or the first digits of a key.
            where: conditions COLUMN=VALUE that select rows of a csv; the column `key` of a row names its artifact.

        Raises:
            UserError: there is no such result, or no record of it.
        """
        path = Path(result)
        folder = path if path.is_dir() else path.parent
        if where:
            return self._rows(path, where)
        if (folder / MANIFEST).is_file():
            self.store = Store(folder.resolve().parent.parent)
            return self._artifact(folder.resolve().name)
        if path.is_file():
            if not record_file(path).is_file():
                raise UserError(
                    f"{path}: no record of how it was made (no {record_file(path)}). Results of `hfprune` have one "
                    "beside them; make it anew, or copy the record along with the file."
                )
            return self._file(path)
        if not KEY.fullmatch(result):
            raise UserError(
                f"{result}: no such file or artifact. Give a file of results, an artifact's folder, or a key's first "
                "digits (4 to 16 of 0-9, a-f)."
            )
        keys = sorted({manifest.parent.name for manifest in self.store.root.glob(f"*/{result}*/{MANIFEST}")})
        if len(keys) != 1:
            matches = f"{len(keys)} artifacts: {', '.join(keys[:MAX_VALUES])}; give more digits" if keys else "none"
            raise UserError(f"{result}: key of {matches} in {self.store.root}. --store names another store.")
        return self._artifact(keys[0])

    def _rows(self, path: Path, where: Sequence[str]) -> Node:
        """Rows of a csv, with the artifacts that they name as sources."""
        try:
            with path.open(encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines))
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{path}: cannot be read as csv: {error}.") from None
        if not rows or "key" not in rows[0]:
            raise UserError(f"{path}: no csv whose rows name their artifact in a column `key`, as metrics.csv does.")
        for condition in where:
            column, _, value = condition.partition("=")
            if column not in rows[0]:
                raise UserError(f"--where {condition}: {path} has no such column; it has {', '.join(rows[0])}.")
            selected = [row for row in rows if row[column] == value]
            if not selected:
                values = list(dict.fromkeys(row[column] for row in rows))
                more = ", ..." if len(values) > MAX_VALUES else ""
                raise UserError(
                    f"--where {condition}: no row; there {column} is {', '.join(values[:MAX_VALUES])}{more}."
                )
            rows = selected
        file = self._file(path)
        row_notes = tuple(f"{row.get('metric', 'row')} = {row.get('value', row)} of {row['key']}" for row in rows)
        sources = {f"of {key}": self._artifact(key) for key in dict.fromkeys(row["key"] for row in rows)}
        return Node(f"{path} where {' '.join(where)}", path, file.record, sources, (*file.notes, *row_notes))

    def _file(self, path: Path, used_sha256: str | None = None) -> Node:
        """A file of results or of published values; `used_sha256` is what it had when another result read it."""
        if not path.is_file():
            return Node(str(path), path, notes=("not there",))
        sha256, record, notes = file_sha256(path), _read_record(path), []
        if record and record["sha256"] != sha256:
            notes.append(
                f"edited since: it was made with sha256 {record['sha256']} (or the run that made it, or another at the "
                "same time, was cut short: make it anew)"
            )
        if used_sha256 not in (None, sha256):
            notes.append(f"changed since it was read here: then it had sha256 {used_sha256}")
        sources = {}
        for number, source in enumerate(record.get("made_from", ()), start=1):
            if "file" in source:
                sources[str(number)] = self._file(_short(path.parent / source["file"]), source["sha256"])
            else:
                sources[str(number)] = self._artifact(source["key"], source["stage"])
        return Node(str(path), path, {**record, "sha256": sha256}, sources, tuple(notes))

    def _artifact(self, key: str, stage: str = "artifact") -> Node:
        if key not in self._artifacts:
            self._artifacts[key] = self._read(key, stage)
        return self._artifacts[key]

    def _read(self, key: str, stage: str) -> Node:
        path = next(self.store.root.glob(f"*/{key}/{MANIFEST}"), None)
        if path is None:
            missing = f"not in {self.store.root}: removed since, or made in another store"
            return Node(f"{stage} {key}", self.store.root / stage / key / MANIFEST, notes=(missing,))
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            is_unchanged = Recipe(**{name: manifest[name] for name in Recipe.__dataclass_fields__}).key == key
            sources = {role: self._artifact(source) for role, source in manifest["inputs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            is_unchanged, manifest, sources = False, {}, {}
        notes = () if is_unchanged else ("its manifest was edited since: what it says does not give this key",)
        return Node(f"{path.parent.parent.name} {key}", path, manifest, sources, notes)


def _short(path: Path) -> Path:
    """The path without `..`, relative to the current folder if it is below it."""
    folder, absolute = Path.cwd(), path.resolve()
    return absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute


def as_text(root: Node) -> str:
    """The graph as an indented text: the sources of a node stand below it, and each node is described once."""
    return "\n".join(_lines(root, "", "", set()))


def _lines(node: Node, role: str, indent: str, described: set[str]) -> Iterator[str]:
    title = f"{indent}{role}{node.name}"
    if node.name in described:
        yield f"{title} (see above)"
        return
    described.add(node.name)
    yield title
    for line in (*node.notes, *_facts(node)):
        yield f"{indent}  | {line}"
    for name, source in node.sources.items():
        yield from _lines(source, f"{name}: " if node.is_artifact else "", f"{indent}  ", described)


def _facts(node: Node) -> Iterator[str]:
    record = node.record
    if "sha256" in record:
        yield f"sha256 {record['sha256']}"
    if record.get("parameters"):
        yield f"parameters: {_as_words(record['parameters'])}"
    if node.is_artifact and record and not node.sources:  # a download
        yield f"found: {_as_words(record['details'])}"
        for name, file in record["files"].items():
            yield f"{name}: sha256 {file['sha256']}"
    if "command" in record:
        libraries = [f"{name} {version}" for name, version in record.get("libraries", record["versions"]).items()]
        yield ", ".join([f"code {record['code'][:16]} of commit {record['git_commit'] or 'unknown'}", *libraries])
        yield f"command: {command_line(record)}"
        duration = f", {record['seconds']} s" if "seconds" in record else ""
        yield f"made {record['time']} on {record['host']} ({record['device']}){duration}"


def _as_words(values: Mapping[str, Any]) -> str:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return ", ".join(f"{name}: {text}" for name, text in texts.items())


def command_line(record: Mapping[str, Any]) -> str:
    """The command line that a record or a manifest states."""
    return shlex.join(["hfprune", *record["command"][1:]])

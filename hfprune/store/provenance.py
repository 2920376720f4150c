"""How a result came to be: the artifacts that it rests on, back to their sources.

A command that writes results leaves a record of each file in the folder `.provenance` beside it: the file's sha256,
what it was made from, and by what. From there the manifests of the store lead on.
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
from hfprune.store.artifacts import Artifact, Store, circumstances
from hfprune.store.filenames import MANIFEST
from hfprune.store.keys import Recipe, code_digest, file_sha256

RECORDS = ".provenance"
SAID = {"sha256", "made_from", "code", "versions", "git_commit", "command", "host", "device", "time"}  # in a record
KEY = re.compile("[0-9a-f]{4,16}")
SHOWN = 8  # values of a column that an error names


def record(made: Path, folder: Path, made_from: Sequence[Mapping[str, str]]) -> None:
    """Leave a record of each file in the folder `made`, which is going to stand in `folder`.

    Args:
        made: where the files are; the records go there too.
        folder: where both will stand.
        made_from: `reference` of each artifact and file that all of them are made from.
    """
    ways = [each | ({"file": _way(each["file"], folder)} if "file" in each else {}) for each in made_from]
    common = {"made_from": ways, "code": code_digest("hfprune.cli"), **circumstances()}
    for path in sorted(path for path in made.iterdir() if path.is_file()):
        said = {"sha256": file_sha256(path), **common}
        record_file(path).parent.mkdir(exist_ok=True)
        record_file(path).write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def record_file(path: Path) -> Path:
    """Where a result's record is."""
    return path.parent / RECORDS / f"{path.name}.json"


def reference(source: Artifact | Path) -> dict[str, str]:
    """What a record says of a source: an artifact's stage and key, a file's path and sha256 (empty: not there)."""
    if isinstance(source, Artifact):
        return {"stage": source.manifest["stage"], "key": source.key}
    return {"file": str(source.resolve()), "sha256": file_sha256(source) if source.is_file() else ""}


def _way(file: str, folder: Path) -> str:
    """From a folder to a file: so they can move together."""
    return Path(os.path.relpath(file, folder.resolve())).as_posix()


def _said_of(path: Path) -> dict[str, Any]:
    """A file's record; empty where there is none."""
    file = record_file(path)
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if missing := SAID - set(said):
            raise ValueError(f"without {', '.join(sorted(missing))}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not a record of how {path.name} was made ({error}): make {path.name} anew.") from None
    return said


@dataclass(frozen=True)
class Node:
    """A result or an artifact, and what it was made from.

    Attributes:
        name: a file's path, or an artifact's stage and key.
        path: the file, or the artifact's manifest.
        said: its record or its manifest; empty where there is none.
        sources: what it was made from, by what it served as.
        notes: what to know of it: that it is gone, or no longer what it was.
    """

    name: str
    path: Path
    said: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, "Node"] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_artifact(self) -> bool:
        """Whether it is of the store."""
        return self.path.name == MANIFEST


class Trail:
    """What leads back from a result, as far as records and manifests go."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._artifacts: dict[str, Node] = {}

    def of(self, result: str, where: Sequence[str] = ()) -> Node:
        """The way back from a result.

        Args:
            result: a file of results; an artifact's folder, manifest or other file; or its key, or how that begins.
            where: COLUMN=VALUE, which of a csv's rows are meant, by their column `key`.

        Raises:
            UserError: there is no such result, or nothing is known of how it was made.
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
        found = sorted({manifest.parent.name for manifest in self.store.root.glob(f"*/{result}*/{MANIFEST}")})
        if len(found) != 1:
            among = f"{len(found)} artifacts: {', '.join(found[:SHOWN])}; give more digits" if found else "none"
            raise UserError(f"{result}: key of {among} in {self.store.root}. --store names another store.")
        return self._artifact(found[0])

    def _rows(self, path: Path, where: Sequence[str]) -> Node:
        """Rows of a csv, and the artifacts that they name."""
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
            chosen = [row for row in rows if row[column] == value]
            if not chosen:
                there = list(dict.fromkeys(row[column] for row in rows))
                more = ", ..." if len(there) > SHOWN else ""
                raise UserError(f"--where {condition}: no row; there {column} is {', '.join(there[:SHOWN])}{more}.")
            rows = chosen
        file = self._file(path)
        values = tuple(f"{row.get('metric', 'row')} = {row.get('value', row)} of {row['key']}" for row in rows)
        sources = {f"of {key}": self._artifact(key) for key in dict.fromkeys(row["key"] for row in rows)}
        return Node(f"{path} where {' '.join(where)}", path, file.said, sources, (*file.notes, *values))

    def _file(self, path: Path, used: str | None = None) -> Node:
        """A file of results or of published values; `used` is its sha256 when something was made from it."""
        if not path.is_file():
            return Node(str(path), path, notes=("not there",))
        found, said, notes = file_sha256(path), _said_of(path), []
        if said and said["sha256"] != found:
            notes.append(
                f"edited since: it was made with sha256 {said['sha256']} (or the run that made it, or another at the "
                "same time, was cut short: make it anew)"
            )
        if used not in (None, found):
            notes.append(f"changed since it was read here: then it had sha256 {used}")
        sources = {}
        for number, each in enumerate(said.get("made_from", ()), start=1):
            if "file" in each:
                sources[str(number)] = self._file(_short(path.parent / each["file"]), each["sha256"])
            else:
                sources[str(number)] = self._artifact(each["key"], each["stage"])
        return Node(str(path), path, {**said, "sha256": found}, sources, tuple(notes))

    def _artifact(self, key: str, stage: str = "artifact") -> Node:
        if key not in self._artifacts:
            self._artifacts[key] = self._read(key, stage)
        return self._artifacts[key]

    def _read(self, key: str, stage: str) -> Node:
        manifest = next(self.store.root.glob(f"*/{key}/{MANIFEST}"), None)
        if manifest is None:
            missing = f"not in {self.store.root}: removed since, or made in another store"
            return Node(f"{stage} {key}", self.store.root / stage / key / MANIFEST, notes=(missing,))
        try:
            said = json.loads(manifest.read_text(encoding="utf-8"))
            is_whole = Recipe(**{name: said[name] for name in Recipe.__dataclass_fields__}).key == key
            sources = {role: self._artifact(source) for role, source in said["inputs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            is_whole, said, sources = False, {}, {}
        notes = () if is_whole else ("its manifest was edited since: what it says does not give this key",)
        return Node(f"{manifest.parent.parent.name} {key}", manifest, said, sources, notes)


def _short(path: Path) -> Path:
    """A path without the way up and down again, relative where it is below the current folder."""
    here, there = Path.cwd(), path.resolve()
    return there.relative_to(here) if there.is_relative_to(here) else there


def text(root: Node) -> str:
    """The way back for people: what each was made from stands indented below it, and nothing is said twice."""
    return "\n".join(_lines(root, "", "", set()))


def _lines(node: Node, role: str, indent: str, seen: set[str]) -> Iterator[str]:
    title = f"{indent}{role}{node.name}"
    if node.name in seen:
        yield f"{title} (see above)"
        return
    seen.add(node.name)
    yield title
    for line in (*node.notes, *_facts(node)):
        yield f"{indent}  | {line}"
    for name, source in node.sources.items():
        yield from _lines(source, f"{name}: " if node.is_artifact else "", f"{indent}  ", seen)


def _facts(node: Node) -> Iterator[str]:
    said = node.said
    if "sha256" in said:
        yield f"sha256 {said['sha256']}"
    if said.get("parameters"):
        yield f"parameters: {_words(said['parameters'])}"
    if node.is_artifact and said and not node.sources:  # a source: what was found there
        yield f"found: {_words(said['details'])}"
        for name, file in said["files"].items():
            yield f"{name}: sha256 {file['sha256']}"
    if "command" in said:
        libraries = [f"{name} {version}" for name, version in said.get("libraries", said["versions"]).items()]
        yield ", ".join([f"code {said['code'][:16]} of commit {said['git_commit'] or 'unknown'}", *libraries])
        yield f"command: {command(said)}"
        took = f", {said['seconds']} s" if "seconds" in said else ""
        yield f"made {said['time']} on {said['host']} ({said['device']}){took}"


def _words(values: Mapping[str, Any]) -> str:
    said = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return ", ".join(f"{name}: {value}" for name, value in said.items())


def command(said: Mapping[str, Any]) -> str:
    """The command line of a record or a manifest."""
    return shlex.join(["hfprune", *said["command"][1:]])

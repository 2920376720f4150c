"""What a store holds: what each artifact is, how big, which experiments use it, what could go."""

import json
import re
import stat
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune.errors import UserError
from hfprune.experiment.plan import Plan
from hfprune.runtime.progress import progress
from hfprune.stages.registry import STAGES
from hfprune.stages.run import recipe
from hfprune.stages.wheel import WHEEL, WheelParameters
from hfprune.store.artifacts import Store, read
from hfprune.store.filenames import MANIFEST

KEY = re.compile("[0-9a-f]{16}")
COLUMNS = ("stage", "key", "what", "made from", "size", "seconds", "made", "used by")
NUMERIC = ("size", "seconds")
TELLING = (
    "criterion", "ratio", "target_parameters", "structure", "allocation", "refit", "method", "loss", "shard", "seed",
    "limit", "samples", "length", "dtype",
)  # fmt: skip  # parameters, the first to be read first

Users = Mapping[tuple[str, str], list[str]]  # stage and key -> the experiments that use it


@dataclass(frozen=True)
class Entry:
    """A folder of the store: an artifact, or what a killed or refused one has left.

    Attributes:
        stage, key: of what it is, or was to be.
        folder: where it is.
        kind: "artifact"; "unfinished", in the work folder; or "refused".
        bytes: what its files take; a link takes none.
        what: an artifact in a few words, or what is wrong with its manifest.
        made_from: the keys of its inputs.
        content: the bytes of its files, those that are linked to among them.
        seconds: how long it took to make.
        time: when it was made.
    """

    stage: str
    key: str
    folder: Path
    kind: str
    bytes: int
    what: str
    made_from: tuple[str, ...] = ()
    content: int = 0
    seconds: float | None = None
    time: str = "-"


def entries(store: Store) -> list[Entry]:
    """All artifacts in the store, by stage, and then the leftovers.

    Raises:
        UserError: there is no store.
    """
    if not store.root.is_dir():
        raise UserError(f"{store.root}: no such folder. Name the store by --store or HFPRUNE_STORE.")
    folders = [(stage, path.name, path) for stage in STAGES for path in sorted(store.root.glob(f"{stage}/*"))]
    found = [_entry(*each) for each in folders if KEY.fullmatch(each[1])]
    left = [
        Entry(*each, "unfinished", _bytes(each[2]), "unfinished") for each in store.leftovers() if each[0] in STAGES
    ]
    return sorted([*found, *left], key=lambda each: each.kind)


def _entry(stage: str, key: str, folder: Path) -> Entry:
    size = _bytes(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_from, seconds = tuple(map(str, manifest["inputs"].values())), float(manifest["seconds"])
        content = sum(file["bytes"] for file in manifest["files"].values())
        what, time = _what(manifest), str(manifest["time"])
        return Entry(stage, key, folder, "artifact", size, what, made_from, content, seconds, time)
    except FileNotFoundError:
        return Entry(stage, key, folder, "refused", size, "damaged, set aside")
    except OSError as error:
        return Entry(stage, key, folder, "artifact", size, f"cannot be read ({error.strerror})")
    except (ValueError, KeyError, TypeError, AttributeError):
        return Entry(stage, key, folder, "artifact", size, "its manifest is damaged")


def _what(manifest: Mapping[str, Any]) -> str:
    parameters = manifest["parameters"]
    name = manifest["details"].get("name") or parameters.get("name") or parameters.get("wheel")
    said = [f"{key} {parameters[key]}" for key in TELLING if parameters.get(key) not in (None, "none")]
    return textwrap.shorten(name or ", ".join(said or manifest["inputs"]), 56, placeholder="...")


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            found = path.lstat()
        except OSError:  # gone just now, or another user's own
            continue
        total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def users(plans: Iterable[Plan], store: Store) -> Users:
    """The experiments that use each artifact, made or not."""
    found: dict[tuple[str, str], list[str]] = {}
    for plan in plans:
        for each in _used(plan, store):
            found.setdefault(each, []).append(plan.experiment.experiment)
    return found


def _used(plan: Plan, store: Store) -> set[tuple[str, str]]:
    found = set()
    for job in plan.needed:
        made = job.recipe
        if made.stage == "shard":
            continue  # not by itself: only until its scores are there
        found.add((made.stage, made.key))
        if made.stage == "score" and not store.has("score", made.key):
            found |= {("shard", shard.key) for shard in job.inputs.get("shards", [])}
        if made.stage == "evaluate":  # the tables read its tasks' results, one an artifact
            found |= {("evaluate-task", key) for name, key in made.inputs.items() if name != "model"}
        if "wheel" in made.parameters:
            found.add(("wheel", recipe(WHEEL, WheelParameters(wheel=made.parameters["wheel"]), {}).key))
    return found


def unused(found: Sequence[Entry], used: Users) -> list[Entry]:
    """Of all entries those that no experiment uses, and the leftovers from which none can go on."""
    there = {(each.stage, each.key) for each in found if each.kind == "artifact"}

    def is_of_use(entry: Entry) -> bool:
        name = (entry.stage, entry.key)
        return name in used and (entry.kind == "artifact" or (entry.kind == "unfinished" and name not in there))

    return [each for each in found if not is_of_use(each)]


def verify(found: Sequence[Entry]) -> list[str]:
    """Verify every file of the artifacts among the entries; of each that is damaged, what is wrong."""
    wrong = []
    artifacts = [each for each in found if each.kind == "artifact"]
    total = sum(each.content for each in artifacts)
    for entry in progress(artifacts, "verify", total, "B", lambda each: each.content):
        try:
            read(entry.folder)
        except UserError as error:
            wrong.append(str(error))
    return wrong


def listing(found: Sequence[Entry], used: Users) -> str:
    """The entries as a table for people, and what they take together."""
    rows = [COLUMNS, *(_row(entry, used) for entry in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if name in NUMERIC else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    artifacts = sum(each.kind == "artifact" for each in found)
    total = f"{artifacts} artifacts, {len(found) - artifacts} leftovers: {human(sum(each.bytes for each in found))}"
    return "\n".join([*lines, total])


def _row(entry: Entry, used: Users) -> tuple[str, ...]:
    return (
        entry.stage,
        entry.key,
        entry.what,
        " ".join(entry.made_from) or "-",
        human(entry.bytes),
        "-" if entry.seconds is None else f"{entry.seconds:,.0f}",
        entry.time,
        ", ".join(used.get((entry.stage, entry.key), [])) or "-",
    )


def human(size: int) -> str:
    """Bytes in the largest unit that they fill."""
    power = min(4, (max(size, 1).bit_length() - 1) // 10)
    return f"{size / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"

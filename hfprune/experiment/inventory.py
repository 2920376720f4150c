"""The contents of a store: every artifact, its size, the experiments that use it, and the artifacts that none uses."""

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
SUMMARY = (
    "criterion", "ratio", "target_parameters", "structure", "allocation", "refit", "method", "loss", "share", "select",
    "shard", "seed", "limit", "samples", "length", "dtype",
)  # fmt: skip  # parameters to show for an artifact, the most important first

Users = Mapping[tuple[str, str], list[str]]  # (stage, key) -> names of the experiments that use the artifact


@dataclass(frozen=True)
class Entry:
    """A folder of the store: an artifact, or the remains of a killed or damaged one.

    Attributes:
        stage, key: stage and key of the artifact, or of the one that was to be made.
        folder: path of the folder.
        kind: "artifact"; "unfinished", in the work folder; or "refused".
        bytes: size of its files; links count as 0.
        what: summary of the artifact, or the fault in its manifest.
        made_from: keys of its inputs.
        content: size of its files, linked files included.
        seconds: time that it took to make.
        time: time of day when it was made.
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
    artifacts = [_entry(stage, key, folder) for stage, key, folder in folders if KEY.fullmatch(key)]
    leftovers = [
        Entry(stage, key, folder, "unfinished", _bytes(folder), "unfinished")
        for stage, key, folder in store.leftovers()
        if stage in STAGES
    ]
    return sorted([*artifacts, *leftovers], key=lambda entry: entry.kind)


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
    settings = [f"{key} {parameters[key]}" for key in SUMMARY if parameters.get(key) not in (None, "none")]
    return textwrap.shorten(name or ", ".join(settings or manifest["inputs"]), 56, placeholder="...")


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except OSError:  # just removed, or private to another user
            continue
        total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def users(plans: Iterable[Plan], store: Store) -> Users:
    """The experiments that use each artifact, whether or not it is in the store yet."""
    experiments: dict[tuple[str, str], list[str]] = {}
    for plan in plans:
        for artifact in _used(plan, store):
            experiments.setdefault(artifact, []).append(plan.experiment.experiment)
    return experiments


def _used(plan: Plan, store: Store) -> set[tuple[str, str]]:
    used = set()
    for job in plan.needed:
        job_recipe = job.recipe
        if job_recipe.stage == "shard":
            continue  # a shard is used only until its scores are made, see below
        used.add((job_recipe.stage, job_recipe.key))
        if job_recipe.stage == "score" and not store.has("score", job_recipe.key):
            used |= {("shard", shard.key) for shard in job.inputs.get("shards", [])}
        if job_recipe.stage == "evaluate":  # the tables read the artifacts of the single tasks
            used |= {("evaluate-task", key) for name, key in job_recipe.inputs.items() if name != "model"}
        if "wheel" in job_recipe.parameters:
            used.add(("wheel", recipe(WHEEL, WheelParameters(wheel=job_recipe.parameters["wheel"]), {}).key))
    return used


def unused(entries: Sequence[Entry], used: Users) -> list[Entry]:
    """The entries that no experiment uses, and the leftovers from which no run can continue."""
    finished = {(entry.stage, entry.key) for entry in entries if entry.kind == "artifact"}

    def is_useful(entry: Entry) -> bool:
        name = (entry.stage, entry.key)
        return name in used and (entry.kind == "artifact" or (entry.kind == "unfinished" and name not in finished))

    return [entry for entry in entries if not is_useful(entry)]


def verify(entries: Sequence[Entry]) -> list[str]:
    """Verify every file of the artifacts among the entries. Returns a message for each damaged artifact."""
    messages = []
    artifacts = [entry for entry in entries if entry.kind == "artifact"]
    total = sum(entry.content for entry in artifacts)
    for entry in progress(artifacts, "verify", total, "B", lambda entry: entry.content):
        try:
            read(entry.folder)
        except UserError as error:
            messages.append(str(error))
    return messages


def listing(entries: Sequence[Entry], used: Users) -> str:
    """The entries as a table for display, with their total size."""
    rows = [COLUMNS, *(_row(entry, used) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if name in NUMERIC else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    artifacts = sum(entry.kind == "artifact" for entry in entries)
    size = human(sum(entry.bytes for entry in entries))
    total = f"{artifacts} artifacts, {len(entries) - artifacts} leftovers: {size}"
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
    """A size in bytes, in the largest unit that gives at least 1."""
    power = min(4, (max(size, 1).bit_length() - 1) // 10)
    return f"{size / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"

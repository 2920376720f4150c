"""Provenance as an RO-Crate: JSON-LD that other tools read, by the profile Process Run Crate."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rocrate.model import ContextEntity
from rocrate.rocrate import ROCrate

from hfprune.store.keys import file_sha256
from hfprune.store.provenance import Node, command_line

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
LICENCE = "None of its own; the licences of its models and texts apply."


def write(root: Node, folder: Path) -> Path:
    """Write the crate of a result into `folder` and return the path of its metadata.

    The crate holds result files and the manifests of artifacts. A manifest lists the sha256 of the artifact's files;
    the files themselves, such as weights, stay in the store.
    """
    crate = ROCrate(version="1.1")  # that of the profile
    crate.name = root.name
    crate.description = f"{root.name}, and how it was made."
    crate.root_dataset["license"] = LICENCE
    crate.root_dataset["conformsTo"] = _add(crate, PROFILE, "CreativeWork", name="Process Run Crate", version="0.5")
    entities: dict[Path, ContextEntity] = {}
    actions = []
    for node in _sources_first(root, set()):
        entities[node.path] = result = _entity(crate, node)
        if "command" in node.record:
            sources = [entities[source.path] for source in node.sources.values()]
            actions.append(_action(crate, node, result, sources))
    crate.root_dataset["mentions"] = actions
    crate.write(folder)
    return folder / "ro-crate-metadata.json"


def _sources_first(node: Node, seen: set[Path]) -> Iterator[Node]:
    if node.path not in seen:
        seen.add(node.path)
        for source in node.sources.values():
            yield from _sources_first(source, seen)
        yield node


def _entity(crate: ROCrate, node: Node) -> ContextEntity:
    """A result file or an artifact's manifest; if the file is missing, an entity without it."""
    properties = {"name": node.name} | ({"description": "; ".join(node.notes)} if node.notes else {})
    if not node.path.is_file():
        return _add(crate, f"#{_id(node)}", "CreativeWork", **properties)
    place = f"{_id(node)}.json" if node.is_artifact else _id(node)
    return crate.add_file(node.path, place, properties=properties | {"sha256": file_sha256(node.path)})


def _id(node: Node) -> str:
    """A result's folder and name, or an artifact's stage and key."""
    folder, name = (node.path.parent if node.is_artifact else node.path).parts[-2:]
    return f"{'artifacts' if node.is_artifact else 'results'}/{folder}/{name}"


def _action(crate: ROCrate, node: Node, result: ContextEntity, sources: list[ContextEntity]) -> ContextEntity:
    """The command that made `result`: its sources and parameters, when and where it ran."""
    record, action = node.record, f"#make-{_id(node)}"
    parameters = [
        _add(crate, f"{action}-{name}", "PropertyValue", name=name, value=_plain(value))
        for name, value in record.get("parameters", {}).items()
    ]
    end = datetime.fromisoformat(record["time"])
    properties = {
        "name": f"make {node.name}",
        "description": f"{command_line(record)}\non {record['host']} ({record['device']})",
        "startTime": (end - timedelta(seconds=record.get("seconds", 0))).isoformat(timespec="seconds"),
        "endTime": record["time"],
    }
    return crate.add_action(_software(crate, record), action, [*sources, *parameters], result, properties)


def _plain(value: Any) -> str | int | float | bool:
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def _software(crate: ROCrate, record: Mapping[str, Any]) -> ContextEntity:
    """The code that ran, by its digest, and its libraries."""
    libraries = [
        _add(crate, f"#{name}-{version}", "SoftwareApplication", name=name, softwareVersion=version)
        for name, version in record["versions"].items()
    ]
    return _add(
        crate,
        f"#code-{record['code']}-{record['git_commit']}",
        "SoftwareApplication",
        name=" ".join(["hfprune", *record["command"][1:2]]),  # the subcommand
        softwareVersion=record["git_commit"] or "not of a checkout",
        identifier=record["code"],
        softwareRequirements=libraries,
    )


def _add(crate: ROCrate, address: str, kind: str, /, **properties: Any) -> ContextEntity:
    return crate.add(ContextEntity(crate, address, properties={"@type": kind, **properties}))

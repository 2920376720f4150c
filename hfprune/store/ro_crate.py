"""How a result came to be as an RO-Crate: JSON-LD that other tools read, by the profile Process Run Crate."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rocrate.model import ContextEntity
from rocrate.rocrate import ROCrate

from hfprune.store.keys import file_sha256
from hfprune.store.provenance import Node, command

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
LICENCE = "None of its own; those of the models and texts that it was made from apply."


def write(root: Node, folder: Path) -> Path:
    """Write the crate of a result into `folder`; its metadata's path.

    It holds the results on the way and the manifests of artifacts, which say the sha256 of every file of theirs; the
    files themselves, weights among them, stay in the store.
    """
    crate = ROCrate(version="1.1")  # that of the profile
    crate.name = root.name
    crate.description = f"{root.name}, and how it came to be."
    crate.root_dataset["license"] = LICENCE
    crate.root_dataset["conformsTo"] = _add(crate, PROFILE, "CreativeWork", name="Process Run Crate", version="0.5")
    entities: dict[Path, ContextEntity] = {}
    actions = []
    for node in _sources_first(root, set()):
        entities[node.path] = made = _entity(crate, node)
        if "command" in node.said:
            sources = [entities[source.path] for source in node.sources.values()]
            actions.append(_action(crate, node, made, sources))
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
    """A result, or an artifact's manifest; what is gone is only spoken of."""
    about = {"name": node.name} | ({"description": "; ".join(node.notes)} if node.notes else {})
    if not node.path.is_file():
        return _add(crate, f"#{_id(node)}", "CreativeWork", **about)
    place = f"{_id(node)}.json" if node.is_artifact else _id(node)
    return crate.add_file(node.path, place, properties=about | {"sha256": file_sha256(node.path)})


def _id(node: Node) -> str:
    """A result's folder and name, an artifact's stage and key."""
    folder, name = (node.path.parent if node.is_artifact else node.path).parts[-2:]
    return f"{'artifacts' if node.is_artifact else 'results'}/{folder}/{name}"


def _action(crate: ROCrate, node: Node, made: ContextEntity, sources: list[ContextEntity]) -> ContextEntity:
    """What made it: from what, with which parameters, by which command, when and where."""
    said, name = node.said, f"#make-{_id(node)}"
    parameters = [
        _add(crate, f"{name}-{each}", "PropertyValue", name=each, value=_plain(value))
        for each, value in said.get("parameters", {}).items()
    ]
    end = datetime.fromisoformat(said["time"])
    about = {
        "name": f"make {node.name}",
        "description": f"{command(said)}\non {said['host']} ({said['device']})",
        "startTime": (end - timedelta(seconds=said.get("seconds", 0))).isoformat(timespec="seconds"),
        "endTime": said["time"],
    }
    return crate.add_action(_tool(crate, said), name, [*sources, *parameters], made, about)


def _plain(value: Any) -> str | int | float | bool:
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def _tool(crate: ROCrate, said: Mapping[str, Any]) -> ContextEntity:
    """The code that ran, by its digest, with the libraries that it ran on."""
    libraries = [
        _add(crate, f"#{name}-{version}", "SoftwareApplication", name=name, softwareVersion=version)
        for name, version in said["versions"].items()
    ]
    about = {"name": f"hfprune {said['command'][1]}", "softwareVersion": said["git_commit"] or "not of a checkout"}
    code = f"#code-{said['code']}-{said['git_commit']}"
    return _add(crate, code, "SoftwareApplication", **about, identifier=said["code"], softwareRequirements=libraries)


def _add(crate: ROCrate, address: str, kind: str, /, **properties: Any) -> ContextEntity:
    return crate.add(ContextEntity(crate, address, properties={"@type": kind, **properties}))

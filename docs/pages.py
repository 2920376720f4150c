"""What the site of the documentation has beside the pages of this folder; mkdocs.yml calls this.

The start page is the README. The reference is made from the code. Files outside of this folder that pages link to are
copied, so that the site needs no other place.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")
MERMAID = re.compile(r"^## [^\n]+\n+```mermaid\n.*?^```\n+", re.MULTILINE | re.DOTALL)  # its script is elsewhere
COPIES = "files"  # folder of the site, of copies


def on_files(files: Files, config: Mapping[str, Any]) -> Files:
    """Add the pages that are made here, and copies of the files that pages link to."""
    made = {
        "index.md": MERMAID.sub("", _local((ROOT / "README.md").read_text(encoding="utf-8"), ROOT)),
        "reference/config.md": config_reference(),
        "reference/commands.md": command_reference(),
        "reference/python.md": python_reference(),
    }
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    pages = [(DOCS, path.read_text(encoding="utf-8")) for path in DOCS.glob("*.md")]
    pages.append((ROOT, (ROOT / "README.md").read_text(encoding="utf-8")))
    linked = {(folder / link).resolve() for folder, text in pages for link in LINK.findall(text)}
    for path in sorted(linked):
        if path.is_file() and not path.is_relative_to(DOCS) and path != ROOT / "README.md":
            files.append(File.generated(config, _copy(path), content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page of docs/, its links to files outside turned to their copies."""
    return markdown if page.file.generated_by else _local(markdown, DOCS)


def _local(markdown: str, folder: Path) -> str:
    """A page's text for the site, whose pages stand in docs/.

    Args:
        markdown: the text.
        folder: where the page stands.
    """

    def place(link: re.Match[str]) -> str:
        path = (folder / link[1]).resolve()
        if path.is_relative_to(DOCS):
            return path.relative_to(DOCS).as_posix()
        return "index.md" if path == ROOT / "README.md" else _copy(path)

    folders = re.compile(r"\[([^]]+)\]\((?![a-z]+:|#)([^)#\s]+)\)")
    markdown = folders.sub(lambda link: link[1] if (folder / link[2]).is_dir() else link[0], markdown)
    return LINK.sub(place, markdown)


def _copy(path: Path) -> str:
    """Where the copy of a file stands. Markdown is shown as it is written."""
    name = path.relative_to(ROOT).as_posix()
    return f"{COPIES}/{name}.txt" if path.suffix == ".md" else f"{COPIES}/{name}"


def config_reference() -> str:
    """Every key of a config, section by section, from the schema."""
    from hfprune.experiment.schema import Experiment

    schema = Experiment.model_json_schema()
    lines = ["# Config", "", "*Which keys may a config have?*", ""]
    lines += ["Made from `workflow/schemas/config.schema.json`, which editors that know JSON schemas read.", ""]
    for title, section in {"Experiment": schema, **schema["$defs"]}.items():
        lines += [f"## {title}", "", section.get("description", "").partition("\n\n")[0], ""]
        lines += ["| key | value | default | |", "| --- | --- | --- | --- |"]
        for key, field in section.get("properties", {}).items():
            default = "required" if key in section.get("required", []) else _default(field.get("default"))
            cells = [f"`{key}`", _kind(field), default, field.get("description", "")]
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _default(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`" if not isinstance(value, dict) else ""


def _kind(field: Mapping[str, Any]) -> str:
    """What a field takes, in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in field:
            kinds = dict.fromkeys(_kind(one) for one in field[several] if one.get("type") != "null")
            return " or ".join(kinds)
    if "enum" in field or "const" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}" if "items" in field else "list"
    if field.get("type") == "object":
        inner = next(iter(field.get("patternProperties", {}).values()), field.get("additionalProperties"))
        return f"names, each with {_kind(inner)}" if isinstance(inner, dict) else "keys and values"
    bounds = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
    limits = [f"{words} {field[name]}" for name, words in bounds.items() if name in field]
    return ", ".join([field.get("type", "anything"), *limits])


def command_reference() -> str:
    """The help of every command."""
    from hfprune import cli

    lines = ["# Commands", "", "*What does each command take?*", "", "`hfprune COMMAND --help` prints the same.", ""]
    for parser in _parsers(cli._parser()):
        lines += [f"## {parser.prog}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def _parsers(parser: Any) -> Iterator[Any]:
    """The parsers of all commands under a parser."""
    for action in parser._actions:
        for below in (action.choices or {}).values() if hasattr(action, "add_parser") else ():
            yield from _parsers(below)
            if not any(hasattr(further, "add_parser") for further in below._actions):
                yield below


def python_reference() -> str:
    """The directive of mkdocstrings for the functions of the package."""
    import hfprune

    head = "# Python\n\n*What do the functions take and return?*\n\n[In Python](../python.md) is the guide.\n\n"
    return f"{head}::: hfprune.api\n    options:\n      members: {json.dumps(hfprune.__all__)}\n"

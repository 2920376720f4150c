"""Pages of the report: a table or a figure with its title and caption, and what every result was made from.

A page is one HTML file that needs no other: figures, and the data of tables to download, stand in it.
"""

import base64
import csv
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune.errors import UserError

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; margin: 1.5rem; }
h1 { font-size: 1.25rem; margin: 0 0 1rem; }
p { max-width: 50rem; }
a { color: #0072B2; }
svg { max-width: 100%; height: auto; }
pre { background: #f8fafc; padding: 1rem; font-size: 13px; }
table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; font-size: 12.5px; }
th { position: sticky; top: 0; background: white; border-bottom: 1px solid; text-align: left; vertical-align: bottom; }
th, td { padding: .25rem .6rem .25rem 0; max-width: 24rem; overflow-wrap: break-word; }
td { vertical-align: top; font-variant-numeric: tabular-nums; }
.number { text-align: right; }
td.number { white-space: nowrap; }
tbody tr:hover { background: #f1f5f9; }
"""
# Browsers open no page of 2 MiB and more out of another (as a data URL, a third longer than it is).
SHOWN = 200  # rows of a table, at most
EMBEDDED = 900_000  # bytes of a file to download, at most
DIGEST = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{24,48}\b")  # of which 16 digits are enough, as in keys
FRACTION = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?%?≈?( ?±.*|\s*\[.*\])?")


def page(title: str, caption: str, files: Sequence[Path]) -> str:
    """The page of a result.

    Args:
        title: what it is.
        caption: what a reader must know to read it.
        files: of one result: a figure (svg); a table (csv), which is shown as people read it where it is also there as
            md; or a text (yaml).

    Raises:
        UserError: a file is of none of these kinds.
    """
    by_suffix = {file.suffix: file for file in files}
    if unknown := set(by_suffix) - {".svg", ".csv", ".md", ".yaml"}:
        raise UserError(f"{by_suffix[unknown.pop()]}: a page shows svg, csv, md or yaml.")
    if ".svg" in by_suffix:
        drawn = by_suffix[".svg"].read_text(encoding="utf-8")
        shown = drawn[drawn.index("<svg") :]  # without the declarations of a file of its own
    elif ".yaml" in by_suffix:
        shown = f"<pre>{html.escape(by_suffix['.yaml'].read_text(encoding='utf-8'))}</pre>"
    else:
        head, *body = _printed(by_suffix[".md"]) if ".md" in by_suffix else _rows(by_suffix[".csv"])
        shown = _table([head, *body[:SHOWN]])
        shown += f"<p>The first {SHOWN} of {len(body):,} rows.</p>" if len(body) > SHOWN else ""
        shown += _notes(by_suffix[".md"]) if ".md" in by_suffix else ""
    links = "".join(_download(file) for suffix, file in by_suffix.items() if suffix in (".csv", ".yaml"))
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{shown}\n"
        f"<p>{html.escape(caption)}</p>{links}</body></html>\n"
    )


def _download(file: Path) -> str:
    if file.stat().st_size > EMBEDDED:
        return f"<p>All of it is in {file.parent.name}/{file.name}, too large to stand here.</p>"
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<p>Download: <a download="{file.name}" href="data:text/plain;base64,{data}">{file.name}</a></p>'


def _rows(file: Path) -> list[list[str]]:
    """The rows of a csv, numbers with few digits."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [[html.escape(_short(cell)) for cell in row] for row in csv.reader(lines)]


def _short(cell: str) -> str:
    if not FRACTION.fullmatch(cell) or cell.isdecimal():
        return cell
    value = float(cell)
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def _printed(file: Path) -> list[list[str]]:
    """The rows of a table of Markdown, without the line under its head."""
    text = file.read_text(encoding="utf-8")
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if "|" in line]
    if len(lines) < 2:
        raise UserError(f"{file}: no table of Markdown.")
    del lines[1]
    return [[_emphasised(html.escape(cell.strip())) for cell in line] for line in lines]


def _emphasised(cell: str) -> str:
    return re.sub(r"\*(.+?)\*", r"<i>\1</i>", re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", cell))


def _notes(file: Path) -> str:
    """What is said below a table of Markdown."""
    below = file.read_text(encoding="utf-8").rpartition("|\n")[2]
    return "".join(f"<p>{html.escape(line)}</p>" for line in below.splitlines() if line)


def _table(rows: Iterable[Sequence[str]]) -> str:
    head, *body = rows
    numeric = [
        all(NUMBER.fullmatch(re.sub("</?[bi]>", "", cell)) for cell in column if cell)
        for column in zip(*body, strict=True)
    ] or [False] * len(head)

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="number">{cell}</{tag}>' if number else f"<{tag}>{cell}</{tag}>"
            for cell, number in zip(cells, numeric, strict=True)
        )

    lines = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in body)
    return f"<table><thead><tr>{line(head, 'th')}</tr></thead><tbody>\n{lines}\n</tbody></table>"


def list_artifacts(manifests: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write what every artifact was made from, and the versions that made them, into `folder`; the files' paths.

    `artifacts.csv` has one artifact a row, in the order given; `versions.csv` one version of a library, and how many
    of the artifacts it made.
    """
    made = [
        {
            "stage": each["stage"],
            "key": each["key"],
            "parameters": _words(each["parameters"]),
            "made from": _words(each["inputs"]),
            "code": each["code"][:16],
            "bytes": sum(file["bytes"] for file in each["files"].values()),
            "seconds": each["seconds"],
            "peak memory (MiB)": round(each["peak_memory_bytes"] / 2**20),
            "device": each["device"],
            "host": each["host"],
            "time": each["time"],
            "git commit": DIGEST.sub(r"\1", each["git_commit"] or ""),
        }
        for each in manifests
    ]
    counted = Counter(item for each in manifests for item in each["versions"].items())
    versions = [
        {"library": library, "version": version, "artifacts": count}
        for (library, version), count in sorted(counted.items())
    ]
    return [_write(rows, folder / f"{name}.csv") for name, rows in (("artifacts", made), ("versions", versions))]


def _words(values: Mapping[str, Any]) -> str:
    said = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return DIGEST.sub(r"\1", ", ".join(f"{name}: {value}" for name, value in said.items()))


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path

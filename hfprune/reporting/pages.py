"""Pages of the report: a table or a figure with its title and caption, and what every result was made from.

A page is one HTML file that needs no other: it holds the figure, or the table with its data to download.
"""

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment
from markdown_it import MarkdownIt
from markupsafe import Markup

from hfprune.errors import UserError

# Browsers refuse a page of 2 MiB or more inside another (as a data URL, which is a third longer than the page).
MOST_ROWS = 200  # of a table that is shown
MOST_BYTES = 900_000  # of a file to download
DIGEST = re.compile(r"\b([0-9a-f]{16})[0-9a-f]{24,48}\b")  # pages show 16 digits, as keys have
TEMPLATES = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
PAGE = TEMPLATES.from_string("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
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
.number, [style="text-align:right"] { text-align: right; }
td.number, td[style="text-align:right"] { white-space: nowrap; }
tbody tr:hover { background: #f1f5f9; }
</style></head>
<body><h1>{{ title }}</h1>
{{ content }}
<p>{{ caption }}</p>
{% for file in files if file.suffix in (".csv", ".yaml") %}
{% if file.stat().st_size > MOST_BYTES %}
<p>All of it is in {{ file.parent.name }}/{{ file.name }}, which is too large for this page.</p>
{% else %}
<p>Download: <a download="{{ file.name }}" href="data:text/plain;base64,{{ base64(file.read_bytes()) }}">\
{{ file.name }}</a></p>
{% endif %}
{% endfor %}
</body></html>
""")
TABLE = TEMPLATES.from_string("""\
<table><thead><tr>
{% for name in table.columns %}<th{{ classes[name] }}>{{ name }}</th>{% endfor %}
</tr></thead><tbody>
{% for row in rows %}
<tr>{% for name in table.columns %}<td{{ classes[name] }}>{{ short(row[name]) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
{% if table | length > rows | length %}<p>The first {{ rows | length }} of {{ "{:,}".format(table | length) }} rows.</p>
{% endif %}
""")


def page(title: str, caption: str, files: Sequence[Path]) -> str:
    """The page of a result.

    Args:
        title: what it is.
        caption: what a reader must know to read it.
        files: of one result: a figure (svg), with what it shows (txt); a table (csv), shown as its Markdown if that is
            here too (md); or a text (yaml).

    Raises:
        UserError: a file is of none of these kinds.
    """
    by_suffix = {file.suffix: file for file in files}
    finding = by_suffix.pop(".txt", None) if ".svg" in by_suffix else None
    if unknown := set(by_suffix) - {".svg", ".csv", ".md", ".yaml"}:
        raise UserError(f"{by_suffix[unknown.pop()]}: a page shows svg, csv, md or yaml.")
    if ".svg" in by_suffix:
        svg = by_suffix[".svg"].read_text(encoding="utf-8")
        content = Markup(svg[svg.index("<svg") :])  # without the declarations of a file of its own
    elif ".yaml" in by_suffix:
        content = Markup("<pre>{}</pre>").format(by_suffix[".yaml"].read_text(encoding="utf-8"))
    else:
        content = _sheet(by_suffix[".md"]) if ".md" in by_suffix else _table(by_suffix[".csv"])
    if finding:
        caption = f"{finding.read_text(encoding='utf-8').strip()} {caption}"
    return PAGE.render(
        title=title, caption=caption, content=content, files=files, MOST_BYTES=MOST_BYTES,
        base64=lambda data: base64.b64encode(data).decode(),
    )  # fmt: skip


def _table(file: Path) -> Markup:
    """The first rows of a csv, numbers with few digits."""
    # Keys and digests may look like numbers; only an empty cell is a missing one.
    texts = {"key": str, "code": str, "git commit": str}
    table = pd.read_csv(file, dtype=texts, dtype_backend="numpy_nullable", keep_default_na=False, na_values=[""])
    is_number = {name: pd.api.types.is_numeric_dtype(column) for name, column in table.items()}
    classes = {name: Markup(' class="number"' if number else "") for name, number in is_number.items()}
    rows = table.head(MOST_ROWS).to_dict("records")
    return Markup(TABLE.render(table=table, rows=rows, classes=classes, short=_short))


def _short(value: Any) -> Any:
    if pd.isna(value):
        return ""
    if not isinstance(value, float):
        return value
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"


def _sheet(file: Path) -> Markup:
    """The table of a sheet's Markdown and the notes below it; the page has a caption of its own."""
    lines = file.read_text(encoding="utf-8").splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith("|")), None)
    if start is None:
        raise UserError(f"{file}: no table of Markdown.")
    table = list(takewhile(lambda line: line.startswith("|"), lines[start:]))
    head, rows, notes = table[:2], table[2:], lines[start + len(table) :]
    count = [f"The first {MOST_ROWS} of {len(rows):,} rows.", ""] if len(rows) > MOST_ROWS else []
    shown = [*head, *rows[:MOST_ROWS], "", *count, *notes]
    return Markup(MarkdownIt("commonmark", {"html": False}).enable("table").render("\n".join(shown)))


def list_artifacts(manifests: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write what every artifact was made from, and by which versions of libraries, into `folder`; the files' paths.

    `artifacts.csv` has one artifact a row, in the order of `manifests`; `versions.csv` one version of a library, and
    how many of the artifacts it made.
    """
    artifacts = [
        {
            "stage": manifest["stage"],
            "key": manifest["key"],
            "parameters": _words(manifest["parameters"]),
            "made from": _words(manifest["inputs"]),
            "code": manifest["code"][:16],
            "bytes": sum(file["bytes"] for file in manifest["files"].values()),
            "seconds": manifest["seconds"],
            "peak memory (MiB)": round(manifest["peak_memory_bytes"] / 2**20),
            "device": manifest["device"],
            "host": manifest["host"],
            "time": manifest["time"],
            "git commit": DIGEST.sub(r"\1", manifest["git_commit"] or ""),
        }
        for manifest in manifests
    ]
    counts = Counter(item for manifest in manifests for item in manifest["versions"].items())
    versions = [
        {"library": library, "version": version, "artifacts": count}
        for (library, version), count in sorted(counts.items())
    ]
    paths = []
    for name, rows in (("artifacts", artifacts), ("versions", versions)):
        paths.append(folder / f"{name}.csv")
        pd.DataFrame(rows).to_csv(paths[-1], index=False)
    return paths


def _words(values: Mapping[str, Any]) -> str:
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return DIGEST.sub(r"\1", ", ".join(f"{name}: {value}" for name, value in words.items()))

"""Reading the records of a local file: JSON lines, JSON, CSV, Parquet and plain text, also gzipped.

A path is never a pattern. Nothing is guessed: `NA` is text, a blank cell of a CSV is None, and fields that are not
needed are not checked. Files are streamed, except JSON arrays, which are read whole.
"""

import codecs
import csv
import gzip
import io
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from hfprune.errors import UserError
from hfprune.store.filenames import DOCUMENTS

Row = tuple[str, dict[str, Any]]  # a record's place in the file, for messages; its fields
# Byte order marks and their encodings. UTF-32 comes first, for its marks begin like those of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
RANDOM = {"random": True}  # the only record of a text of random tokens
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character; an error if the other half is missing
NUMBERS: dict[re.Pattern, Callable[[str], Any]] = {
    re.compile(r"-?(0|[1-9]\d*)", re.ASCII): int,
    re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", re.ASCII): float,
    re.compile(r"True|False"): {"True": True, "False": False}.__getitem__,
}


def read(file: Path, name: str, fields: Collection[str] | None = None) -> Iterator[Row]:
    """The records of a file, in order.

    Args:
        file: the suffix determines the format.
        name: the file's name in messages.
        fields: the required fields; others may be omitted. None: all fields, and columns of a CSV are converted if all
            their cells are integers, numbers, or True or False.

    Raises:
        UserError: the file cannot be read, or a record of it, with the line or row.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    is_gzipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if is_gzipped else suffixes)[-1:]
    if not kind or kind[0] not in READERS:
        raise UserError(f"{name}: cannot read {file.name!r}; known: {', '.join(READERS)}, also .gz.")
    try:
        with gzip.open(file) if is_gzipped else file.open("rb") as opened:
            yield from READERS[kind[0]](opened, name, fields)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name}: cut short, or not gzip: {error}. Get the file again.") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}.") from None


def read_records(folder: Path, name: str = DOCUMENTS) -> list[dict[str, Any]]:
    """The records of a download. Those of a text all have `text`, or all `instruction` and `response`.

    Those of a mixture also have `source`, the number of their text, from 0.
    """
    with (folder / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def decoded(file: Path) -> str:
    """The content of a text file, without a byte order mark.

    Raises:
        UserError: it is not UTF-8 (nor, by its mark, UTF-16 or UTF-32), with the line and the byte.
    """
    with io.BytesIO(file.read_bytes()) as content, text(content, str(file)) as lines:  # /dev/stdin cannot seek
        return lines.read()


@contextmanager
def text(opened: BinaryIO, name: str, newline: str | None = None) -> Iterator[TextIO]:
    """Open a binary file as text, without a byte order mark.

    Raises:
        UserError: as for `decoded`.
    """
    start = opened.read(4)
    opened.seek(0)
    encoding = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), "utf-8-sig")
    try:
        yield io.TextIOWrapper(opened, encoding=encoding, newline=newline)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: {_undecodable(opened, encoding, error)}") from None


def _undecodable(opened: BinaryIO, encoding: str, error: UnicodeDecodeError) -> str:
    """Which byte is wrong. The decoder only knows its place in a chunk, so the lines are decoded one by one."""
    if encoding == "utf-8-sig":
        opened.seek(0)
        for number, line in enumerate(opened, 1):
            try:
                line.decode()
            except UnicodeDecodeError as line_error:
                byte = line_error.start
                return (
                    f"line {number}, byte {byte + 1}: {line[byte]:#04x} is not UTF-8. Save the file as UTF-8, such as "
                    "by `iconv -f latin1 -t utf-8`."
                )
    return f"its byte order mark says {encoding.upper()}, but it is not: {error.reason}. Get the file again."


def _json(opened: BinaryIO, name: str, fields: Collection[str] | None) -> Iterator[Row]:
    """One object per line, or one array of objects."""
    with text(opened, name) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if line.lstrip().startswith("["):
                records = _parsed(line + lines.read(), name, number)
                for index, record in enumerate(records, 1):
                    place = f"record {index}"
                    yield place, _record(record, fields, f"{name}: {place}")
                return
            place = f"line {number}"
            yield place, _record(_parsed(line, name, number), fields, f"{name}: {place}")


def _parsed(content: str, name: str, number: int) -> Any:
    """The JSON value of a text that begins in line `number`."""
    try:
        value = json.loads(content, object_pairs_hook=Record)
        if SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise UserError(
            f"{name}: line {line}, column {error.colno}: cannot be read: not JSON, or cut short: {error.msg}. Expected "
            "an object in every line, or one array of objects."
        ) from None
    except UnicodeEncodeError:
        raise UserError(f"{name}: line {number}: half a character: an escape of a surrogate, alone.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: line {number}: cannot be read: {error}.") from None


class Record(dict):
    """A JSON object, and the names that stand in it more than once. As for any JSON reader, the last one counts."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs] if len(self) < len(pairs) else []
        self.repeated = {name for name in names if names.count(name) > 1}


def _record(value: Any, fields: Collection[str] | None, where: str) -> dict[str, Any]:
    """Refuse what is no object, or has a field that is read twice: which one is meant is not known."""
    if not isinstance(value, Record):
        raise UserError(f"{where}: holds {type(value).__name__}; expected an object with fields, {{...}}.")
    if repeated := sorted(value.repeated if fields is None else value.repeated & set(fields)):
        raise UserError(f"{where}: field {repeated[0]!r} stands there twice. Keep one.")
    return value


def _csv(opened: BinaryIO, name: str, fields: Collection[str] | None) -> Iterator[Row]:
    rows = _cells(opened, name, fields)
    if fields is not None:
        return rows
    table = list(rows)
    for column in table[0][1] if table else ():
        cells = {row[column] for _, row in table} - {None}
        convert = next((convert for pattern, convert in NUMBERS.items() if all(map(pattern.fullmatch, cells))), str)
        for _, row in table:
            if row[column] is not None:
                row[column] = convert(row[column])
    return iter(table)


def _cells(opened: BinaryIO, name: str, fields: Collection[str] | None) -> Iterator[Row]:
    """Rows with cells as text, by the names in the first row; a blank cell is None."""
    csv.field_size_limit(sys.maxsize)
    with text(opened, name, newline="") as lines:
        rows = csv.reader(lines, strict=True)
        line = 1  # the first line of a row, which may have several
        try:
            header = next(rows, [])
            _refuse_repeated(header, fields, f"{name}: line 1")
            line = rows.line_num + 1
            for cells in rows:
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"{name}: line {line}: {len(cells)} cells, but {len(header)} columns. Put a cell that holds a "
                        "comma into quotes."
                    )
                if cells:
                    yield f"line {line}", {key: cell or None for key, cell in zip(header, cells, strict=True)}
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError(f"{name}: line {line}: cannot be read: cut short, or not CSV: {error}.") from None


def _refuse_repeated(columns: list[str], fields: Collection[str] | None, where: str) -> None:
    """Refuse a table in which two columns have one name, if that name is wanted."""
    for field in columns if fields is None else fields:
        if columns.count(field) > 1:
            raise UserError(f"{where}: two columns are called {field!r}. Rename one.")


def _parquet(opened: BinaryIO, name: str, fields: Collection[str] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:
        if isinstance(opened, gzip.GzipFile):  # Parquet stores column by column, so the reader must seek
            shutil.copyfileobj(opened, unpacked)
            opened = unpacked
        try:
            table = pyarrow.parquet.ParquetFile(opened)
            names = table.schema_arrow.names
            _refuse_repeated(names, fields, name)
            has_fields = set(fields or ()) <= set(names)
            batches = table.iter_batches(1024, columns=list(fields) if fields and has_fields else None)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            number = 0
            for number, row in enumerate(rows, 1):
                yield f"row {number}", row
        except UnicodeDecodeError as error:  # Parquet's own writers do not look
            raise UserError(
                f"{name}: after row {number}: a text is not UTF-8 ({error.reason}: {error.object[error.start]:#04x}). "
                "Write the file anew from text in UTF-8."
            ) from None
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{name}: cannot be read: cut short, or not Parquet: {str(error).splitlines()[0]} Get the file again."
            ) from None


def _text(opened: BinaryIO, name: str, fields: Collection[str] | None) -> Iterator[Row]:
    """One document per line; blank lines only separate them."""
    with text(opened, name) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            yield f"line {number}", {"text": line.removesuffix("\n")}


READERS: dict[str, Callable[[BinaryIO, str, Collection[str] | None], Iterator[Row]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}

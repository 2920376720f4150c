"""Tables for people: one sheet, written as csv, Markdown and LaTeX."""

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

NOT_WORSE = "≈"  # after a value that cannot be told from the best one
BEST = f"Bold: the best of its size; {NOT_WORSE}: not distinguishable from it (5 %, Holm)."
MARKDOWN = re.compile(r"[\\`*|<\[]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is only that


@dataclass(frozen=True)
class Cell:
    """A value with its 95 % interval; NaN if it has none.

    Attributes:
        value, low, high: in the column's unit.
        best: the best of its group of rows.
        tied: not the best, but not distinguishable from it.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    best: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        heads: what the row is, a text for each of the sheet's heads.
        cells: by column title.
        published: values of others, not measured here.
    """

    heads: Sequence[str]
    cells: Mapping[str, Cell]
    published: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        caption: what it shows, a sentence or two.
        heads: titles of the columns that say what a row is. Rows of the same first head are a group.
        digits: titles of the columns of values, with their digits after the decimal point.
        rows: in order.
        notes: further sentences, below.
    """

    caption: str
    heads: Sequence[str]
    digits: Mapping[str, int]
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write `name`.csv (full precision), .md and .tex into `folder`; their paths."""
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(self._records())
        (folder / f"{name}.md").write_text(self._markdown(), encoding="utf-8")
        (folder / f"{name}.tex").write_text(self._latex(), encoding="utf-8")
        return [folder / f"{name}.{suffix}" for suffix in ("csv", "md", "tex")]

    def _records(self) -> Iterator[list]:
        parts = ("", " low", " high")
        yield [*self.heads, "source", *(f"{column}{part}" for column in self.digits for part in parts)]
        for row in self.rows:
            numbers = []
            for column in self.digits:
                cell = row.cells.get(column, Cell(math.nan))
                numbers += ["" if math.isnan(number) else number for number in (cell.value, cell.low, cell.high)]
            yield [*row.heads, "published" if row.published else "here", *numbers]

    def _markdown(self) -> str:
        lines = [self.caption, "", _piped([_marked(title) for title in (*self.heads, *self.digits)])]
        lines.append(_piped(["---"] * len(self.heads) + ["--:"] * len(self.digits)))
        for row in self.rows:
            heads = [f"*{_marked(head)}*" if row.published and head else _marked(head) for head in row.heads]
            lines.append(_piped([*heads, *self._numbers(row, "**{}**", "±", NOT_WORSE)]))
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])

    def _latex(self) -> str:
        titles = [*self.heads, *self.digits]
        rows = [[*row.heads, *self._numbers(row, r"\textbf{{{}}}", r"$\pm$", r"$^\approx$")] for row in self.rows]
        style = pd.DataFrame(rows, columns=titles).style.hide(axis="index")
        style = style.format(escape="latex", subset=list(self.heads)).format_index(escape="latex", axis="columns")
        style = style.apply(lambda _: pd.DataFrame(self._commands(), columns=titles), axis=None)
        tabular = style.to_latex(column_format="l" * len(self.heads) + "r" * len(self.digits), hrules=True)
        notes = [rf"\par\footnotesize {escaped(note)}" for note in self.notes]
        return "\n".join(
            [r"\begin{table}", rf"\caption{{{escaped(self.caption)}}}", tabular.rstrip(), *notes, r"\end{table}", ""]
        )

    def _commands(self) -> Iterator[list[str]]:
        """The LaTeX commands before each cell, as the Styler reads them: a rule above a group, italics if published."""
        group = self.rows[0].heads[0] if self.rows else None
        for row in self.rows:
            commands = ["textit:--rwrap" if row.published and head else "" for head in row.heads]
            if row.heads[0] != group:
                group = row.heads[0]
                commands[0] = f"midrule:;{commands[0]}"
            yield [*commands, *[""] * len(self.digits)]

    def _numbers(self, row: Row, bold: str, plus_minus: str, tied: str) -> Iterator[str]:
        for column, digits in self.digits.items():
            cell = row.cells.get(column, Cell(math.nan))
            if math.isnan(cell.value):
                yield ""
                continue
            text = f"{cell.value:.{digits}f}"
            text = (bold.format(text) if cell.best else text) + (tied if cell.tied else "")
            half = (cell.high - cell.low) / 2
            yield text if math.isnan(half) else f"{text} {plus_minus}{half:.{digits}f}"


def escaped(text: str) -> str:
    """A text in LaTeX: the Styler escapes cells alone, so this is a table of one; `±` and `≈` become formulas."""
    style = pd.DataFrame([text]).style.hide(axis="index").hide(axis="columns").format(escape="latex")
    return style.to_string().removesuffix("\n").replace("±", r"$\pm$").replace(NOT_WORSE, r"$\approx$")


def _marked(text: str) -> str:
    """A text in Markdown that reads as it is."""
    return MARKDOWN.sub(r"\\\g<0>", text)


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

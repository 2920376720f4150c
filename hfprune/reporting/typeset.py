"""Tables as people read them: one sheet, written as csv, Markdown and LaTeX."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NOT_WORSE = "≈"  # behind a value that cannot be told from the best one


@dataclass(frozen=True)
class Cell:
    """A value with its 95 % interval, NaN where there is none.

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
        heads: what it is, one text for each of the sheet's heads.
        cells: by column.
        published: a value of someone else's, not made here.
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
        digits: titles of the columns of values, with their digits behind the point.
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
                numbers += ["" if math.isnan(each) else each for each in (cell.value, cell.low, cell.high)]
            yield [*row.heads, "published" if row.published else "here", *numbers]

    def _markdown(self) -> str:
        lines = [self.caption, "", _piped([*self.heads, *self.digits])]
        lines.append(_piped(["---"] * len(self.heads) + ["--:"] * len(self.digits)))
        for row in self.rows:
            heads = [f"*{head}*" if row.published and head else head for head in row.heads]
            lines.append(_piped([*heads, *self._texts(row, "**{}**", "±", NOT_WORSE)]))
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])

    def _latex(self) -> str:
        lines = [r"\begin{table}", rf"\caption{{{escaped(self.caption)}}}"]
        lines += [rf"\begin{{tabular}}{{{'l' * len(self.heads)}{'r' * len(self.digits)}}}", r"\toprule"]
        lines.append(_joined([escaped(title) for title in (*self.heads, *self.digits)]))
        group = None
        for row in self.rows:
            if row.heads[0] != group:
                lines.append(r"\midrule")
                group = row.heads[0]
            heads = [rf"\textit{{{escaped(head)}}}" if row.published else escaped(head) for head in row.heads]
            lines.append(_joined([*heads, *self._texts(row, r"\textbf{{{}}}", r"$\pm$", r"$^\approx$")]))
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\footnotesize {escaped(note)}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}", ""])

    def _texts(self, row: Row, bold: str, plus_minus: str, tied: str) -> Iterator[str]:
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
    """Text as LaTeX needs it."""
    return text.replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$").replace(NOT_WORSE, r"$\approx$")


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _joined(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cells)} \\"

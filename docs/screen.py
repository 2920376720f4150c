"""The picture of a run's screen: `make run 2>&1 | tee screen.txt`, then `python docs/screen.py < screen.txt`.

It has the first minutes until the first table, and the end. It needs rich, which is in the environment of `make env`.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

PICTURE = Path(__file__).parent / "images" / "screen.svg"
WIDTH = 112  # characters
LAST_STEPS = 3
FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # rich names fonts of a server; readers have one of their own


def main() -> None:
    """Read the screen's text from stdin, and write the picture; what the shell says before and after it is left out."""
    lines = sys.stdin.read().splitlines()
    lines = lines[next(number for number, line in enumerate(lines) if line.endswith(" to do:")) :]
    table = next(number for number, line in enumerate(lines) if line.startswith("  Model"))
    until = table + lines[table:].index("") + 1
    done, log = (
        next(number for number, line in enumerate(lines) if line.startswith(words))
        for words in ("Done: ", "Commands and details: ")
    )
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for line in ["$ make run", *lines[:until], "...", *lines[done - LAST_STEPS : log + 1]]:
        console.print(line, markup=False, highlight=False, no_wrap=True, overflow="ellipsis")
    picture = console.export_svg(title="hfprune", theme=MONOKAI, unique_id="screen")
    PICTURE.write_text(FONT.sub("", picture), encoding="utf-8")


if __name__ == "__main__":
    main()

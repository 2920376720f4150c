"""How far long work is: one bar, that also reads well in a log file."""

import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm


def progress(items: Iterable, what: str, total: int, unit: str) -> Iterator:
    """Iterate over `items`, showing `what`, the share done, the rate in `unit`s and the time left on stderr."""
    pace = 0.5 if sys.stderr.isatty() else 5.0  # seconds between updates; a log needs few
    return iter(tqdm(items, desc=what, total=total, unit=unit, mininterval=pace, dynamic_ncols=True))

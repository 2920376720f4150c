"""How far long work is: one bar, that also reads well in a log file."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm


def progress(items: Iterable, what: str, total: int, unit: str, size: Callable[[Any], int] | None = None) -> Iterator:
    """Iterate over `items`, showing `what`, the share done, the rate in `unit`s and the time left on stderr.

    Args:
        items: the work.
        what: its name.
        total: how many units there are.
        unit: what is counted.
        size: the units in an item; 1 unless given.
    """
    pace = 0.5 if sys.stderr.isatty() else 5.0  # seconds between updates; a log needs few
    unit_scale = size is not None  # thousands as k
    with tqdm(desc=what, total=total, unit=unit, unit_scale=unit_scale, mininterval=pace, dynamic_ncols=True) as bar:
        for item in items:
            yield item
            bar.update(size(item) if size else 1)

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
    with bar(what, total, unit, unit_scale=size is not None) as shown:  # thousands as k
        for item in items:
            yield item
            shown.update(size(item) if size else 1)


def bar(what: str, total: int, unit: str, **options: Any) -> tqdm:
    """The bar that `progress` shows, for work that somebody else iterates over; `options` are tqdm's."""
    pace = 0.5 if sys.stderr.isatty() else 5.0  # seconds between updates; a log needs few
    return tqdm(desc=what, total=total, unit=unit, mininterval=pace, dynamic_ncols=True, **options)

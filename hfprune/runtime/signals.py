"""A time limit's SIGTERM: long work ends the step that it is at, saves what is done, and leaves.

SLURM sends SIGTERM when a job's time is up or the job is cancelled, and SIGKILL half a minute later. A stage that has
nothing to save before its end dies of it at once, as any process.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 128 + signal.SIGTERM  # of the process that has left, as shells say it


class Stopped(BaseException):
    """Work was left because of SIGTERM; the message says what is saved. No `except Exception` may swallow it."""


class Noted:
    """Whether SIGTERM has come.

    Attributes:
        stop: it has: save, and raise `Stopped`.
    """

    def __init__(self) -> None:
        self.stop = False


@contextmanager
def noting() -> Iterator[Noted]:
    """Within it SIGTERM is noted, for the work to look at when it can be left, and ends nothing by itself."""
    noted = Noted()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield noted
        return

    def note(*_: object) -> None:
        noted.stop = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)

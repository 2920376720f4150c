"""SIGTERM at a time limit: long work finishes its step, saves what is done, and ends.

SLURM sends SIGTERM when a job's time is up or the job is cancelled, and SIGKILL half a minute later. A stage that has
nothing to save before its end does not use this: the signal ends it at once, like any process.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 128 + signal.SIGTERM  # exit status of the process, as shells report it


class Stopped(BaseException):
    """SIGTERM ended the work; the message says what is saved. `except Exception` must not swallow it."""


class Sigterm:
    """Whether SIGTERM has arrived.

    Attributes:
        received: it has. The work must save and raise `Stopped`.
    """

    def __init__(self) -> None:
        self.received = False


@contextmanager
def sigterm_deferred() -> Iterator[Sigterm]:
    """A context in which SIGTERM only sets `received`. The work looks at it whenever it can stop.

    A context around this one is told when this one ends.
    """
    sigterm = Sigterm()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield sigterm
        return

    def note(*_: object) -> None:
        sigterm.received = True

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield sigterm
    finally:
        signal.signal(signal.SIGTERM, previous)
        if sigterm.received and callable(previous):
            previous(signal.SIGTERM, None)

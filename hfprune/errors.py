"""The exception for mistakes that the user can fix."""

import re
from pathlib import Path

# The beginning of a `UserError` message as `cli.main` prints it. A stopped job is not one: run again, it goes on.
REFUSAL = re.compile(r"hfprune [a-z-]+: (?!stopped by SIGTERM)")


class UserError(Exception):
    """A mistake in the config, a model, a data file or an artifact.

    The message is printed as it is, without a traceback. It names the file or key, the value, the expected value and
    what to do.
    """


def is_refusal(*logs: Path) -> bool:
    """Whether a command's log contains a `UserError` message, so that the same command would fail again."""
    return any(log.is_file() and REFUSAL.search(log.read_text(encoding="utf-8", errors="replace")) for log in logs)

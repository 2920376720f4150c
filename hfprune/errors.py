"""The one exception that is a user's to mend, not ours."""

import re
from pathlib import Path

# How `cli.main` begins the message of a `UserError`; a job that was stopped goes on when it is run again.
REFUSAL = re.compile(r"hfprune [a-z-]+: (?!stopped by SIGTERM)")


class UserError(Exception):
    """Something in the config, a model, a data file or an artifact is wrong.

    The message is shown as it is, without a traceback: it names the file or key, the value found, what was
    expected and what to do.
    """


def is_refusal(*logs: Path) -> bool:
    """Whether a command's log has the message of a `UserError`, so that the same command would fail again."""
    return any(log.is_file() and REFUSAL.search(log.read_text(encoding="utf-8", errors="replace")) for log in logs)

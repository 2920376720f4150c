"""The GPUs of one machine among several jobs: each takes free ones, by locks that die with it.

Snakemake counts GPUs and names none. A job that is granted some runs as `hfprune on-gpus N COMMAND`, and sees those.
"""

import csv
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hfprune.errors import UserError

SECONDS_BETWEEN_TRIES = 1.0
VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> dict[str, str]:
    """The GPUs that this process may use: what CUDA calls each, and its name for people.

    They are those of `CUDA_VISIBLE_DEVICES`, as users and batch systems set it, or else all that `nvidia-smi` lists. A
    number in it counts as in `nvidia-smi`, and becomes the GPU's UUID, which means the same in every process.
    """
    listed = _listed()
    known = {uuid: f"{uuid} ({name})" for _, uuid, name in listed}
    numbers = {number: uuid for number, uuid, _ in listed}
    if (chosen := os.environ.get(VISIBLE)) is None:
        return known
    words = [word.strip() for word in chosen.split(",")]
    ids = [numbers.get(word, word) for word in words if word not in ("", "-1", "NoDevFiles")]
    return {each: known.get(each, each) for each in ids}


def _listed() -> list[list[str]]:
    """Number, UUID and name of every GPU of this machine; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if len(row) == 3]


def take(count: int) -> list[str]:
    """Wait until so many of the visible GPUs are free, and hold them until this process ends, however it ends.

    They stay held through `exec`. Locks are of one user's processes: see `_folder`.

    Returns:
        What CUDA calls each.

    Raises:
        UserError: fewer are visible.
    """
    found = visible()
    if len(found) < count:
        raise UserError(
            f"{count} GPUs are asked for, {len(found)} visible here ({VISIBLE}={os.environ.get(VISIBLE, 'unset')}). "
            "Ask for fewer (`--resources gpu=N`, `--set-resources RULE:gpu=N`), or show more."
        )
    told = False
    while True:
        held: dict[str, int] = {}
        for each in found:
            if len(held) < count and (lock := _lock(each)) is not None:
                held[each] = lock
        if len(held) == count:
            for lock in held.values():
                os.set_inheritable(lock, True)
            print(f"on {', '.join(found[each] for each in held)}", file=sys.stderr, flush=True)
            return list(held)
        for lock in held.values():  # holding some while waiting for others could wait for ever
            os.close(lock)
        if not told:
            print(f"{count} of {len(found)} GPUs are asked for, {len(held)} free: waiting", file=sys.stderr, flush=True)
            told = True
        time.sleep(SECONDS_BETWEEN_TRIES)


def _lock(device: str) -> int | None:
    """The file descriptor that holds a device, or None if another process does."""
    name = "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in device)
    lock = os.open(_folder() / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _folder() -> Path:
    """Of this user's locks on this machine. Others cannot open them: /tmp protects its files so."""
    folder = Path(tempfile.gettempdir()) / f"hfprune-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def run_on(count: int, command: Sequence[str]) -> None:
    """Become `command`, with so many free GPUs visible to it.

    Raises:
        UserError: fewer are visible, or there is no such command.
    """
    os.environ[VISIBLE] = ",".join(take(count))
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}.") from None

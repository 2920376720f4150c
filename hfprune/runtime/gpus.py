"""Share the GPUs of one machine among several jobs. Each job locks free GPUs; the locks end with the job.

Snakemake counts GPUs but does not say which ones a job gets. So a job runs as `hfprune on-gpus N COMMAND`, which takes
N free GPUs and shows only those to the command.
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
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"


def visible() -> dict[str, str]:
    """The GPUs that this process may use: CUDA's identifier of each, and a name for people.

    These are the GPUs of `CUDA_VISIBLE_DEVICES`, or else all that `nvidia-smi` lists. A number in the variable becomes
    the GPU's UUID, which means the same in every process. `nvidia-smi` numbers GPUs by their place on the bus. CUDA
    does so too among equal ones, but by default puts the fastest first.

    Raises:
        UserError: the variable has numbers, and they mean other GPUs to CUDA than to `nvidia-smi`.
    """
    listed = _listed()
    known = {uuid: f"{uuid} ({name})" for _, uuid, name in listed}
    numbers = {number: uuid for number, uuid, _ in listed}
    if (chosen := os.environ.get(VISIBLE)) is None:
        return known
    words = [word.strip() for word in chosen.split(",")]
    by_place = os.environ.get(ORDER) == "PCI_BUS_ID" or len({name for *_, name in listed}) < 2
    if not by_place and any(word in numbers for word in words):
        raise UserError(
            f"{VISIBLE}={chosen}: the GPUs here are of different kinds, and CUDA numbers them with the fastest first, "
            f"`nvidia-smi` by their place. Set {ORDER}=PCI_BUS_ID, by which numbers are those of `nvidia-smi`, or name "
            "the GPUs by UUID (`nvidia-smi -L`)."
        )
    ids = [numbers.get(word, word) for word in words if word not in ("", "-1", "NoDevFiles")]
    return {identifier: known.get(identifier, identifier) for identifier in ids}


def _listed() -> list[list[str]]:
    """Number, UUID and name of every GPU of this machine. Empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [row for row in csv.reader(listing.stdout.splitlines(), skipinitialspace=True) if len(row) == 3]


def take(count: int) -> list[str]:
    """Wait until `count` of the visible GPUs are free, then lock them until this process ends, however it ends.

    The locks survive `exec`. They count among the processes of one user, see `_folder`.

    Returns:
        CUDA's identifier of each.

    Raises:
        UserError: fewer GPUs are visible.
    """
    gpus = visible()
    if len(gpus) < count:
        raise UserError(
            f"{count} GPUs are asked for, {len(gpus)} visible here ({VISIBLE}={os.environ.get(VISIBLE, 'unset')}). "
            "Ask for fewer (`--resources gpu=N`, `--set-resources RULE:gpu=N`), or show more."
        )
    waiting = False
    while True:
        locks: dict[str, int] = {}
        for gpu in gpus:
            if len(locks) < count and (lock := _lock(gpu)) is not None:
                locks[gpu] = lock
        if len(locks) == count:
            for lock in locks.values():
                os.set_inheritable(lock, True)
            print(f"on {', '.join(gpus[gpu] for gpu in locks)}", file=sys.stderr, flush=True)
            return list(locks)
        for lock in locks.values():  # two jobs that each keep some and wait for more would wait forever
            os.close(lock)
        if not waiting:
            print(f"{count} of {len(gpus)} GPUs are asked for, {len(locks)} free: waiting", file=sys.stderr, flush=True)
            waiting = True
        time.sleep(SECONDS_BETWEEN_TRIES)


def _lock(device: str) -> int | None:
    """The file descriptor of a device's lock, or None if another process holds it."""
    name = "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in device)
    lock = os.open(_folder() / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _folder() -> Path:
    """The folder of this user's locks on this machine. Other users cannot open it."""
    folder = Path(tempfile.gettempdir()) / f"hfprune-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def run_on(count: int, command: Sequence[str]) -> None:
    """Replace this process by `command`, which sees `count` free GPUs.

    Raises:
        UserError: fewer GPUs are visible, or there is no such command.
    """
    os.environ[VISIBLE] = ",".join(take(count))
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}.") from None

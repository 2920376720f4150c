"""Large temporary tensors in a file: in memory while there is room, on the disk when there is not."""

import mmap
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from hfprune.errors import UserError

GIB = 2**30


class Scratch:
    """A tensor of zeros, or of what was written before, in a file that is mapped into memory.

    The kernel keeps its pages in memory as long as there is room, and writes them to the file when there is not. What
    is written survives a kill of the process.

    Attributes:
        tensor: the values.
        is_new: whether the file did not exist in this size.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """
        Raises:
            UserError: the disk is too small. No file is left.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        file.parent.mkdir(parents=True, exist_ok=True)
        self.is_new = not (file.exists() and file.stat().st_size == size)
        if self.is_new:
            _reserve(file, size)
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), size)
        self.tensor: Tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)

    def flush(self) -> None:
        """Write all changes to the disk, so that they also survive a crash of the machine."""
        self._map.flush()


def _reserve(file: Path, size: int) -> None:
    """Make a file whose place on the disk is taken, so that a full disk cannot end the process in the middle.

    Raises:
        UserError: the disk is too small.
    """
    free = shutil.disk_usage(file.parent).free + (file.stat().st_size if file.exists() else 0)
    error = None
    if size <= free:
        with file.open("wb") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, size)
            except OSError as reason:
                error = reason
    if size > free or error:
        file.unlink(missing_ok=True)
        raise UserError(
            f"{file.parent}: the hidden states of all tokens take {size / GIB:,.2f} GiB there, and "
            f"{free / GIB:,.2f} GiB are free{f' ({error.strerror})' if error else ''}. Take fewer or shorter samples "
            "or more shards, free some space, or put the store on a larger disk by `store:` or HFPRUNE_STORE."
        )

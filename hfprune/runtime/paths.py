"""Paths as users write them."""

from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path, `~` and `~user` at its beginning as the home that they stand for.

    Raises:
        ValueError: no home is known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{str(path)!r}: nobody here has such a home; write the whole path") from None

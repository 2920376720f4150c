"""Which files of a checkpoint's folder are used: known names only, and no links to files outside the folder."""

import sys
from pathlib import Path

from hfprune.errors import UserError
from hfprune.store.filenames import HISTORY, TOKENIZER, is_companion, is_one_of

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL = (*WEIGHTS, "config.json", *HISTORY)


def is_weights(name: str) -> bool:
    """Whether a file holds weights or their index."""
    return is_one_of(WEIGHTS, name)


def is_model_file(name: str) -> bool:
    """Whether a file, by its path below the checkpoint's folder, is used: model files and their companions."""
    return is_one_of(MODEL, name) or is_companion(name)


def is_out_of_folder(file: Path, folder: Path) -> bool:
    """Whether a path in a checkpoint's folder is, or passes through, a link to a place outside it.

    A snapshot in the hub's cache consists of links to the blobs of its repository; those count as inside.
    """
    home = folder.resolve()
    allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    target = file.resolve()
    return not any(target.is_relative_to(place) for place in allowed)


def model_files(folder: Path) -> list[str]:
    """The files of a local checkpoint that are used, as paths below its folder.

    A link to a place outside the folder is not followed: its target may not be meant for sharing.

    Raises:
        UserError: weights, config or tokenizer are such a link, or a broken one.
    """
    names = []
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = file.relative_to(folder).as_posix()
        if not is_model_file(name) or file.is_dir():
            continue
        if file.is_file() and not is_out_of_folder(file, folder):
            names.append(name)
            continue
        reason = f"a link that leads {'out of the folder' if file.exists() else 'nowhere'}, to {file.resolve()}"
        if is_one_of((*MODEL, *TOKENIZER), name):
            raise UserError(f"{file}: {reason}. Put the file itself in its place, or remove the link.")
        print(f"{file}: {reason}: left out", file=sys.stderr)
    return names

"""Which files of a checkpoint's folder are taken: named ones, and none that a link fetches from elsewhere."""

import sys
from pathlib import Path

from hfprune.errors import UserError
from hfprune.store.filenames import HISTORY, TOKENIZER, is_companion, is_one_of

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL = (*WEIGHTS, "config.json", *HISTORY)


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or says which file holds which."""
    return is_one_of(WEIGHTS, name)


def is_model_file(name: str) -> bool:
    """Whether a file of a checkpoint's folder is taken: what the model is made of, and what goes with it.

    Args:
        name: its path below the folder.
    """
    return is_one_of(MODEL, name) or is_companion(name)


def is_out_of_folder(file: Path, folder: Path) -> bool:
    """Whether a path in a checkpoint's folder is, or stands behind, a link that leads out of it.

    The snapshots in the hub's cache consist of links to the blobs of the same repository: those are no way out.
    """
    home = folder.resolve()
    inside = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    target = file.resolve()
    return not any(target.is_relative_to(place) for place in inside)


def model_files(folder: Path) -> list[str]:
    """The paths, below a local checkpoint's folder, of the files that are taken.

    A link that leads out of the folder is not followed: nobody said that what it leads to may be shared.

    Raises:
        UserError: weights, config or tokenizer are such a link, or one that leads nowhere.
    """
    names = []
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = file.relative_to(folder).as_posix()
        if not is_model_file(name) or file.is_dir():
            continue
        if file.is_file() and not is_out_of_folder(file, folder):
            names.append(name)
            continue
        leads = f"a link that leads {'out of the folder' if file.exists() else 'nowhere'}, to {file.resolve()}"
        if is_one_of((*MODEL, *TOKENIZER), name):
            raise UserError(f"{file}: {leads}. Put the file itself in its place, or remove the link.")
        print(f"{file}: {leads}: left out", file=sys.stderr)
    return names

"""A config to start from, for any model."""

import json
import re
from pathlib import Path

from hfprune.errors import UserError
from hfprune.experiment.schema import Experiment, parse

TEMPLATE = Path(__file__).with_name("template.yaml")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_config(file: Path, model: str) -> None:
    """Write a short config with comments.

    Args:
        file: where; its name is the experiment's.
        model: a repository of the hub, owner/name; the folder of a checkpoint; or a GGUF file.

    Raises:
        UserError: the file is there already, its folder is not, or `model` is none of these.
    """
    import yaml

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-") or "experiment"
    text = TEMPLATE.read_text(encoding="utf-8").format(file=file, experiment=name, model=_source(model))
    parse(Experiment, yaml.safe_load(text), str(file))
    try:
        with file.open("x", encoding="utf-8") as config:
            config.write(text)
    except FileExistsError:
        raise UserError(f"{file}: is there already, and is not overwritten. Choose another name.") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}. Name a file in a folder that is there.") from None


def _source(model: str) -> str:
    """The lines that say where the model comes from.

    Raises:
        UserError: it is neither there, nor like a repository's name.
    """
    path = Path(model)
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise UserError(f"--model {model}: a file, but no GGUF file. Name the folder of a checkpoint, or a .gguf file.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"--model {model}: a folder without config.json. Name the folder of a checkpoint.")
    if path.exists():
        return f"  path: {json.dumps(model, ensure_ascii=False)}"
    if not REPOSITORY.fullmatch(model) or path.suffix.lower() == ".gguf":
        raise UserError(
            f"--model {model}: no such file or folder, and no repository of the Hugging Face hub, whose names are "
            "owner/name, such as Qwen/Qwen2.5-0.5B."
        )
    return f"  hub: {model}\n  revision: main # best a commit: the same model next year"

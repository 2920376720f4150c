"""Where the workflow is: beside the package in a checkout, or where the wheel has put it."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from hfprune.errors import UserError

PACKAGE = Path(__file__).parents[1]
INSTALLED = "share/hfprune/Snakefile"  # see data-files in pyproject.toml


def snakefile() -> Path:
    """The workflow's Snakefile.

    Raises:
        UserError: there is none, because only the package was copied.
    """
    beside = PACKAGE.parent / "Snakefile"
    if beside.is_file():
        return beside
    try:
        installed = [Path(file.locate()).resolve() for file in files("hfprune") or () if str(file).endswith(INSTALLED)]
    except PackageNotFoundError:
        installed = []
    for path in installed:
        if path.is_file():
            return path
    raise UserError(f"{PACKAGE}: the workflow is not there. Install hfprune with pip, or run it in a checkout.")

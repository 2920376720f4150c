"""Write the installed versions as requirements.txt (for pip) and hfprune.yaml (for conda); `make lock` runs it."""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HEADER = "# The environment, exactly, on Python 3.11 and newer. Made by `make lock`.\n"
CONDA = (
    HEADER
    + """\
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.12
  - pip
  - pip:
"""
)


def conda(requirements: str) -> str:
    """The conda environment with the pins of a requirements.txt."""
    return CONDA + "".join(f"      - {line}\n" for line in requirements.splitlines() if not line.startswith("#"))


def main() -> None:
    """Freeze this environment; a pin must not name the CPU or CUDA build that happens to be installed."""
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable", "--exclude", "hfprune"]
    found = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    requirements = HEADER + re.sub(r"\+(cpu|cu\d+)$", "", found, flags=re.MULTILINE)
    (HERE / "requirements.txt").write_text(requirements, encoding="utf-8")
    (HERE / "hfprune.yaml").write_text(conda(requirements), encoding="utf-8")


if __name__ == "__main__":
    main()

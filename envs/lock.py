"""Write the installed versions to requirements.txt (for pip), and to cpu.yaml and cuda.yaml (for conda).

`make lock` runs it. `python envs/lock.py conda` writes only the conda environments, from the requirements.txt.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HEADER = "# The pinned environment, for Python 3.11 and newer. Written by `make lock`.\n"
CONDA = (
    HEADER
    + """\
# {comment}
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.12
  - pip
{packages}  - pip:
"""
)


def conda(requirements: str) -> dict[str, str]:
    """The text of the conda environments by file name, with the pins of a requirements.txt."""
    pins = [line for line in requirements.splitlines() if not line.startswith("#")]
    (torch,) = (pin for pin in pins if pin.startswith("torch=="))
    others = [pin for pin in pins if pin != torch]
    build = f"  - pytorch-cpu={torch.removeprefix('torch==')}\n"
    return {
        "cpu.yaml": _environment(
            "Without CUDA: torch comes from conda-forge, all other packages from PyPI.", build, others
        ),
        "cuda.yaml": _environment("On Linux, PyPI's torch is the CUDA build and brings CUDA's libraries.", "", pins),
    }


def _environment(comment: str, packages: str, pins: list[str]) -> str:
    return CONDA.format(comment=comment, packages=packages) + "".join(f"      - {pin}\n" for pin in pins)


def freeze() -> str:
    """The installed packages as a requirements.txt, without the suffix of a CPU or CUDA build."""
    command = [sys.executable, "-m", "pip", "freeze", "--exclude-editable", "--exclude", "hfprune"]
    packages = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return HEADER + re.sub(r"\+(cpu|cu\d+)$", "", packages, flags=re.MULTILINE)


def main() -> None:
    """Write requirements.txt and the conda environments."""
    lock = HERE / "requirements.txt"
    if sys.argv[1:] != ["conda"]:
        lock.write_text(freeze(), encoding="utf-8")
    for name, text in conda(lock.read_text(encoding="utf-8")).items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

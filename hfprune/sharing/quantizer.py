"""K-quants, which llama.cpp's own quantizer makes from a GGUF file. It is used where it is installed."""

import shutil
import subprocess
from pathlib import Path
from typing import Literal

from hfprune.errors import UserError

PROGRAM = "llama-quantize"
TYPES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
FileType = Literal[("f16", "bf16", "f32", "q8_0", *TYPES)]  # the others are written here
SOURCE = "f16"  # type of the file that they are made from
TOLERANCE = 4.0  # of a log-probability, in nats: enough to tell a rounded model from a broken file


def is_installed() -> bool:
    """Whether the quantizer is on the PATH."""
    return shutil.which(PROGRAM) is not None


def check_installed(kind: str, file: str) -> None:
    """Refuse a type that cannot be made here.

    Args:
        kind: the type.
        file: name of the GGUF file of type `SOURCE`.

    Raises:
        UserError: the quantizer is not on the PATH.
    """
    if not is_installed():
        words = " ".join(command(Path(file), Path(name(file, kind)), kind))
        raise UserError(
            f"--type {kind}: llama.cpp's quantizer makes this type, and `{PROGRAM}` is not on the PATH. Export --type "
            f"{SOURCE}, and where you have llama.cpp, run\n    {words}"
        )


def name(file: str, kind: str) -> str:
    """The name of the file of a type, from that of type `SOURCE`."""
    return f"{file.removesuffix(f'{SOURCE.upper()}.gguf')}{kind.upper()}.gguf"


def command(source: Path, output: Path, kind: str) -> list[str]:
    """The words that make `output` of `source`."""
    return [PROGRAM, str(source), str(output), kind.upper()]


def quantise(source: Path, output: Path, kind: str) -> None:
    """Make `output`, of type `kind`, of the GGUF file `source`.

    Raises:
        UserError: the quantizer fails.
    """
    process = subprocess.run(command(source, output, kind), capture_output=True, text=True)
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or [f"exit {process.returncode}"]
        raise UserError(f"{PROGRAM} cannot make {output.name} of {source.name}: {lines[-1]}")

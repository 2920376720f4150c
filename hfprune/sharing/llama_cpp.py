"""llama.cpp, as the PyPI package `xllamacpp`, which needs no compiler.

It runs in fresh processes, so that a file that aborts it costs no more than that process.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfprune.errors import UserError

# Begins every program. `file`, `question` and `settings` are for the rest of it.
BEGINNING = """\
import json, sys, urllib.request
import xllamacpp as llama
file, question = sys.argv[1], json.load(sys.stdin)
settings = llama.CommonParams()
settings.model.path = file
settings.n_parallel, settings.warmup, settings.verbosity = 1, False, 0
settings.n_ctx = question["context"]
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = question["threads"]

def keep_float32():
    \"\"\"Float32 keys and values, no flash attention: what rounds is the file alone.\"\"\"
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED

def post(server, path, **body):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    return json.load(opener.open(request))

"""


class LlamaCppError(Exception):
    """llama.cpp does not load a file, or fails at a question; the message says how."""


def check_installed() -> None:
    """Refuse to go on without llama.cpp.

    Raises:
        UserError: `xllamacpp` is not installed.
    """
    if find_spec("xllamacpp") is None:
        raise UserError(
            "a GGUF file is kept only if llama.cpp reads it as the checkpoint that it was written from, and llama.cpp "
            "is not here: `pip install xllamacpp`."
        )


def ask(program: str, file: Path, context: int, threads: int = 1, **question: Any) -> dict[str, Any]:
    """Run a program in a fresh process, on the CPU.

    Args:
        program: Python that follows `BEGINNING`. It prints its answer as JSON, in the last line.
        file: the GGUF file.
        context: tokens that a sequence has at most.
        threads: that llama.cpp computes with.
        question: what the program reads as `question`.

    Raises:
        LlamaCppError: the program fails.
    """
    process = subprocess.run(
        [sys.executable, "-P", "-c", BEGINNING + program, file],
        input=json.dumps({"context": context, "threads": threads, **question}),
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or [f"exit {process.returncode}"]
        raise LlamaCppError(lines[-1])
    return json.loads(process.stdout.splitlines()[-1])

"""What is shared with GGUF files: a card that says how to run them, and a Modelfile for Ollama."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers.utils import GENERATION_CONFIG_NAME

from hfprune.sharing import quantizer
from hfprune.sharing.model_card import (
    CheckpointHistory,
    Figure,
    base_model,
    licence,
    measured,
    process,
    source_and_licence,
)
from hfprune.store.artifacts import Artifact

MODELFILE = "Modelfile"
# Key of generation_config.json -> Ollama's name.
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file that was proven.

    Attributes:
        path: of the file.
        kind: its type, such as "q8_0".
        architecture: llama.cpp's name.
        not_quantised: names of the matrices that have float16 instead of the type.
        proof: see `gguf_proof.prove`.
    """

    path: Path
    kind: str
    architecture: str
    not_quantised: Sequence[str]
    proof: dict[str, Any]


def stored(artifact: Artifact) -> GGUFFile:
    """The file in an artifact of stage `gguf`."""
    details = artifact.manifest["details"]
    return GGUFFile(
        artifact.folder / details["file"],
        details["type"],
        details["architecture"],
        details["not_quantised"],
        details["proof"],
    )


def quantised(file: GGUFFile, kind: str, folder: Path, checkpoint: Path) -> GGUFFile:
    """A K-quant of a file, made by llama.cpp's quantizer in `folder`, and proven.

    Args:
        file: of type `quantizer.SOURCE`.
        kind: one of `quantizer.TYPES`.
        folder: where to write.
        checkpoint: the folder that `file` was written from.

    Raises:
        UserError: the quantizer fails, or llama.cpp does not read its file as the checkpoint.
    """
    from hfprune.sharing.gguf_proof import expected, prove

    output = folder / quantizer.name(file.path.name, kind)
    quantizer.quantise(file.path, output, kind)
    proof = prove(output, expected(checkpoint), quantizer.TOLERANCE)
    return GGUFFile(output, kind, file.architecture, [], proof)


def modelfile(file: str, checkpoint: Path) -> str:
    """A Modelfile for Ollama: the file, and how the checkpoint's `generation_config.json` samples.

    Ollama takes the chat template and the end tokens from the GGUF file itself.
    """
    settings = checkpoint / GENERATION_CONFIG_NAME
    values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    lines = [f"PARAMETER {name} {values[key]}" for key, name in SAMPLING.items() if values.get(key) is not None]
    return "\n".join([f"FROM ./{file}", *lines]) + "\n"


def gguf_card(history: CheckpointHistory, files: Sequence[GGUFFile], figures: Sequence[Figure], address: str) -> str:
    """The text of the card, with the YAML header of the hub's model cards.

    Args:
        history: how the checkpoint was made that the files were written from.
        files: the files, the first of them in the examples.
        figures: the checkpoint's results.
        address: the name or path of the folder.
    """
    header = ModelCardData(
        **base_model(history),
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=["hfprune", "gguf", *(["pruning", "structured-pruning"] if history.cut else [])],
        **licence(history),
    )
    of_checkpoint = "Of the checkpoint that the files were written from, not of the files themselves.\n\n"
    parts = [
        f"---\n{header.to_yaml()}\n---\n",
        f"# {history.title}, GGUF\n",
        "## Files\n",
        _table(files),
        "## Running\n",
        _running(files[0], address),
        "## How it was made\n",
        process(history),
        "## Measured\n",
        (of_checkpoint if figures else "") + measured(history, figures),
        "## Source and licence\n",
        source_and_licence(history),
    ]
    return "\n".join(parts)


def _table(files: Sequence[GGUFFile]) -> str:
    rows = "".join(
        f"| `{file.path.name}` | {file.kind.upper()} | {file.path.stat().st_size / 1e6:,.1f} "
        f"| {file.proof['max_difference']:.2g} |\n"
        for file in files
    )
    text = (
        f"| File | Type | MB | Difference |\n|---|---|--:|--:|\n{rows}\n"
        "Difference: before a file was kept, stock llama.cpp (xllamacpp "
        f"{files[0].proof['xllamacpp']}) read it in a fresh process. It split texts as the checkpoint's tokenizer "
        f"does, and after {files[0].proof['prompts']} prompts its log-probabilities differed from the checkpoint's by "
        "at most so many nats.\n"
    )
    for file in files:
        if count := len(file.not_quantised):
            text += (
                f"\nIn `{file.path.name}`, {count} matrices are float16: their rows are no multiple of 32, which "
                f"{file.kind.upper()} needs.\n"
            )
    return text


def _running(file: GGUFFile, address: str) -> str:
    name = file.path.name
    return (
        f"llama.cpp: `llama-cli -m {name}`, or `llama-server -m {name}`. It calls the model's architecture "
        f"`{file.architecture}`.\n\n"
        f"Ollama: `ollama create NAME -f {MODELFILE}`, then `ollama run NAME`.\n\n"
        f"LM Studio: `lms import {name}`, or put the file into `~/.lmstudio/models/OWNER/NAME/`.\n\n"
        "Python, without a compiler (`pip install xllamacpp`):\n\n"
        "```python\nimport xllamacpp\n\nsettings = xllamacpp.CommonParams()\n"
        f'settings.model.path = "{address}/{name}"\nserver = xllamacpp.Server(settings)\n'
        'question = {"prompt": "The capital of France is", "n_predict": 16}\n'
        'print(server.handle_completions(question)["choices"][0]["text"])\n```\n'
    )

"""What a GGUF file is worth where it runs: its fidelity to the dense model, and its speed in llama.cpp."""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hfprune.errors import UserError
from hfprune.evaluation.fidelity import position_measures, summary
from hfprune.models.head import Head
from hfprune.models.loading import PREFILL
from hfprune.runtime.progress import progress
from hfprune.sharing.llama_cpp import LlamaCppError, ask
from hfprune.store.filenames import REFERENCE

# llama.cpp's embeddings without pooling are the final hidden states.
STATES = """\
import numpy
keep_float32()
settings.n_batch = settings.n_ubatch = question["context"]
settings.embedding, settings.pooling_type = True, llama.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
server = llama.Server(settings)
for number, tokens in enumerate(question["sequences"]):
    (answer,) = post(server, "/embedding", content=tokens)
    numpy.save(f"{question['folder']}/{number}.npy", numpy.array(answer["embedding"], "float32"))
print("{}")
"""
# The first of the two requests reads the file into memory and is not measured.
TIME = """\
server = llama.Server(settings)
options = {"ignore_eos": True, "cache_prompt": False, "temperature": 0.0}
for tokens in (1, question["new_tokens"]):
    timings = server.handle_completions({"prompt": question["prompt"], "n_predict": tokens} | options)["timings"]
rates = {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}
print(json.dumps(rates | {"version": llama.__version__}))
"""


def fidelity(file: Path, reference: Path, samples: int | None, threads: int) -> dict[str, dict[str, float]]:
    """How far the predictions of a GGUF file are from the dense model's, as llama.cpp computes them.

    The final hidden states are llama.cpp's. The last product, with the file's output projection, is in float32.

    Args:
        file: the GGUF file.
        reference: folder of an artifact of stage `reference`.
        samples: number of its sequences to compare on, from the first; None: all.
        threads: that llama.cpp computes with.

    Returns:
        Measures with value, stderr and n (documents), see `fidelity.summary`.

    Raises:
        UserError: llama.cpp does not read the file.
    """
    dense = load_file(reference / REFERENCE)
    tokens, head, dense_head = dense["tokens"][:samples], output_head(file), Head.from_tensors(dense)
    documents = []
    for states, dense_states, document in zip(_states(file, tokens, threads), dense["hidden"], tokens, strict=False):
        measures = position_measures(states, head, dense_states, dense_head, document)
        documents.append({name: values.mean().item() for name, values in measures.items()})
    return summary(documents)


def _states(file: Path, tokens: Tensor, threads: int) -> Iterator[Tensor]:
    """The final hidden states (length, hidden size) float32 of each sequence of `tokens` (sequences, length)."""
    with TemporaryDirectory() as scratch:
        _ask(STATES, file, tokens.shape[1], threads, sequences=tokens.tolist(), folder=scratch)
        for number in range(len(tokens)):
            yield torch.from_numpy(np.load(f"{scratch}/{number}.npy"))


def output_head(file: Path) -> Head:
    """The output projection in a GGUF file: its own, or else the embeddings."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    tensor = tensors.get("output.weight") or tensors["token_embd.weight"]
    return Head(torch.tensor(dequantize(tensor.data, tensor.tensor_type)))


def speeds(files: Mapping[str, Path], rounds: int, new_tokens: int, threads: int) -> dict[str, dict[str, Any]]:
    """Tokens per second of GGUF files in llama.cpp, as it computes by default; a sequence at a time.

    In a round every file is loaded in turn, in a process of its own, so that one file at a time is in memory and a
    slower spell of the machine falls on all.

    Args:
        files: by name.
        rounds: rounds to measure.
        new_tokens: tokens to decode, after a prompt of `PREFILL`.
        threads: that llama.cpp computes with.

    Returns:
        By name, the medians `prefill` and `decode`, in tokens per second, and llama.cpp's `version`.

    Raises:
        UserError: llama.cpp does not read a file.
    """
    prompt, context = [2] * PREFILL, PREFILL + new_tokens
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    for _ in progress(range(rounds), "time", rounds, "round"):
        for name, file in files.items():
            answers[name].append(_ask(TIME, file, context, threads, prompt=prompt, new_tokens=new_tokens))
    return {
        name: {rate: statistics.median(answer[rate] for answer in found) for rate in ("prefill", "decode")}
        | {"version": found[0]["version"]}
        for name, found in answers.items()
    }


def _ask(program: str, file: Path, context: int, threads: int, **question: Any) -> dict[str, Any]:
    """`llama_cpp.ask`, whose failure is the user's to know.

    Raises:
        UserError: llama.cpp does not read the file.
    """
    try:
        return ask(program, file, context, threads, **question)
    except LlamaCppError as error:
        raise UserError(f"{file.name}: llama.cpp cannot measure it: {error}.") from None

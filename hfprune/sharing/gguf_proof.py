"""The proof that a GGUF file is the checkpoint it was written from: stock llama.cpp loads it and predicts the same.

llama.cpp comes as the PyPI package `xllamacpp`, which needs no compiler. It runs in a fresh process, so that a file that
aborts it costs no more than that process.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hfprune.errors import UserError
from hfprune.models.loading import load_model, load_tokenizer

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "In 1969, 3 men flew to the Moon; 2 of them",
    "def add(a, b):\n    return a",
    "Water boils at 100 degrees and it's",
    "I don't know what I'm doing, but we're",
)
TOP = 5
# Largest difference of a log-probability, in nats: float32 sums in another order; rounding of the weights.
TOLERANCES = {"f32": 1e-3, "f16": 0.05, "bf16": 0.2, "q8_0": 0.3}

# Float32 keys and values, no flash attention, one thread: what rounds is the file alone.
PREDICT = """\
import json, sys
import xllamacpp as llama
file, prompts = sys.argv[1], json.loads(sys.argv[2])
settings = llama.CommonParams()
settings.model.path = file
settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 512, 1, False, 0
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = llama.Server(settings)
answers = []
for prompt in prompts:
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": 5, "temperature": 0.0, "cache_prompt": False}
    (choice,) = server.handle_completions(asked)["choices"]
    predicted = choice["logprobs"]["content"][0]["top_logprobs"]
    answers.append([[token["id"], token["logprob"]] for token in predicted])
print(json.dumps({"answers": answers, "llama_cpp": llama.BUILD_INFO if hasattr(llama, "BUILD_INFO") else ""}))
"""


@dataclass(frozen=True)
class Prediction:
    """What the checkpoint predicts after a prompt.

    Attributes:
        text: the prompt.
        tokens: its token ids.
        top: the likeliest `TOP` tokens with their log-probabilities, the likeliest first.
    """

    text: str
    tokens: list[int]
    top: dict[int, float]


def available() -> bool:
    """Whether llama.cpp is here to prove a file."""
    return find_spec("xllamacpp") is not None


def prove_gguf(file: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Compare stock llama.cpp on `file` with the checkpoint in `folder`, by the next token after some prompts.

    Each prompt goes to llama.cpp as text, which its own tokenizer splits, and as the checkpoint's token ids. Both must give
    the checkpoint's likeliest token and log-probabilities.

    Returns:
        `max_difference` of the log-probabilities, `tolerance`, number of `prompts`, `llama_cpp`'s build.

    Raises:
        UserError: llama.cpp does not load the file, or predicts otherwise.
    """
    expected = _predictions(folder)
    prompts: list[Any] = [each for prediction in expected for each in (prediction.text, prediction.tokens)]
    run = subprocess.run(
        [sys.executable, "-P", "-c", PREDICT, file, json.dumps(prompts)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()] or [f"exit status {run.returncode}"]
        raise _not_proven(file, f"llama.cpp does not load it: {lines[-1]}")
    content = json.loads(run.stdout.splitlines()[-1])
    largest = 0.0
    for number, answer in enumerate(content["answers"]):
        prediction, form = expected[number // 2], ("text", "token ids")[number % 2]
        where = f"after {prediction.text!r}, given as {form}"
        found = {token: value for token, value in answer}
        difference = max(abs(found.get(token, -1e9) - value) for token, value in list(prediction.top.items())[:1])
        largest = max(largest, difference)
        if difference > TOLERANCES[kind]:
            raise _not_proven(
                file, f"{where}, log-probabilities differ by {difference:.3g}, tolerance {TOLERANCES[kind]}"
            )
    return {
        "max_difference": largest,
        "tolerance": TOLERANCES[kind],
        "prompts": len(expected),
        "llama_cpp": content["llama_cpp"],
    }


@torch.no_grad()
def _predictions(folder: Path) -> list[Prediction]:
    """What the checkpoint predicts, after those prompts whose next token is whole characters.

    llama.cpp's server holds a token back that ends within a character, and answers with the next one.
    """
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    predictions = []
    for text in PROMPTS:
        tokens = tokenizer(text)["input_ids"]
        values, ids = model(torch.tensor([tokens], device=model.device)).logits[0, -1].log_softmax(-1).topk(TOP)
        if "\ufffd" not in tokenizer.decode(ids[:1]):
            predictions.append(Prediction(text, tokens, dict(zip(ids.tolist(), values.tolist(), strict=True))))
    if not predictions:
        raise UserError(f"{folder}: its next token is never a whole character, so llama.cpp cannot be compared with it.")
    return predictions


def _not_proven(file: Path, what: str) -> UserError:
    return UserError(f"{file}: not the checkpoint that was written: {what}. It is not kept.")

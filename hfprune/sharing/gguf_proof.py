"""The proof that a GGUF file is the checkpoint it was written from: stock llama.cpp loads it and predicts the same.

llama.cpp comes as the PyPI package `xllamacpp`, which needs no compiler. It runs in a fresh process, so that a file
that aborts it costs no more than that process.
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
from torch import Tensor

from hfprune.errors import UserError
from hfprune.models.loading import load_model, load_tokenizer

TEXTS = (
    "The capital of France is",
    "Once upon a time there was a girl who",
    "In 1969, 3 men flew to the Moon; 2 of them",
    "def add(a, b):\n    return a + b\n\n\nprint(add(17, 4))",
    "Water boils at 100 degrees, and it's  HOT.\tDON'T touch it!\r\n",
    "Straße, naïve façade, Ελλάδα, 你好世界, \U0001f642 and 12345678",
)
COMPARED = 5  # of llama.cpp's likeliest tokens
ASKED = 20  # of llama.cpp's likeliest tokens: the checkpoint's likeliest has to be among them
# Largest difference of a log-probability, in nats. A wrong file is off by several. With f32 only the order of sums
# differs (SmolLM2-135M: 0.0002), with the others weights round (0.008, 0.09, 0.3).
TOLERANCES = {"f32": 1e-3, "f16": 0.05, "bf16": 0.5, "q8_0": 1.0}

# Float32 keys and values, no flash attention, one thread: what rounds is the file alone.
PREDICT = """\
import json, sys, urllib.request
import xllamacpp as llama
file, question = sys.argv[1], json.load(sys.stdin)
settings = llama.CommonParams()
settings.model.path = file
settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 512, 1, False, 0
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = llama.Server(settings)
local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
tokens = []
for text in question["texts"]:
    content = json.dumps({"content": text, "add_special": True}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", content)
    tokens.append(json.load(local.open(request))["tokens"])
top = []
for prompt in question["prompts"]:
    options = {"n_predict": 1, "n_probs": question["top"], "temperature": 0.0, "cache_prompt": False}
    (choice,) = server.handle_completions({"prompt": prompt} | options)["choices"]
    best = choice["logprobs"]["content"][0]["top_logprobs"]
    top.append([[token["id"], token["logprob"]] for token in best])
print(json.dumps({"tokens": tokens, "top": top, "version": llama.__version__}))
"""


@dataclass(frozen=True)
class Expected:
    """What the checkpoint does.

    Attributes:
        tokens: of each of `TEXTS`, the ids.
        prompts: beginnings of these, as ids.
        log_probabilities: of the token after each prompt, (prompts, vocabulary) float32.
    """

    tokens: list[list[int]]
    prompts: list[list[int]]
    log_probabilities: Tensor


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


@torch.no_grad()
def expected(folder: Path) -> Expected:
    """What the checkpoint in `folder` does in float32.

    llama.cpp's server holds back a token that ends within a character, and answers with the next one. So a prompt is
    the longest beginning of a text whose likeliest next token is whole characters.

    Raises:
        UserError: no text has such a beginning.
    """
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    tokens, prompts, rows = [tokenizer(text)["input_ids"] for text in TEXTS], [], []
    for ids in tokens:
        logits = model(torch.tensor([ids], device=model.device)).logits[0].cpu()
        next_texts = [tokenizer.decode([token], skip_special_tokens=True) for token in logits.argmax(-1).tolist()]
        whole = [place for place, text in enumerate(next_texts) if text and "\ufffd" not in text]
        if whole:
            prompts.append(ids[: whole[-1] + 1])
            rows.append(logits[whole[-1]].log_softmax(-1))
    if not prompts:
        raise UserError(f"{folder}: its likeliest next token is never whole characters, which llama.cpp needs.")
    return Expected(tokens, prompts, torch.stack(rows))


def prove(file: Path, expected: Expected, tolerance: float) -> dict[str, Any]:
    """Compare stock llama.cpp on `file` with the checkpoint: tokens of texts, and the token after some prompts.

    For each prompt, llama.cpp's likeliest tokens must have the checkpoint's log-probabilities, and the checkpoint's
    likeliest token must be among llama.cpp's.

    Args:
        file: the GGUF file.
        expected: what the checkpoint does.
        tolerance: of a log-probability, in nats.

    Returns:
        `max_difference` of the log-probabilities, `tolerance`, number of `prompts`, version of `xllamacpp`.

    Raises:
        UserError: llama.cpp does not load the file, splits a text otherwise, or predicts otherwise.
    """
    answer = _ask(file, {"texts": TEXTS, "prompts": expected.prompts, "top": ASKED})
    for text, ours, theirs in zip(TEXTS, expected.tokens, answer["tokens"], strict=True):
        if ours != theirs:
            raise _not_proven(file, f"it splits {text!r} into {theirs}, the tokenizer into {ours}")
    largest = 0.0
    for number, (best, row) in enumerate(zip(answer["top"], expected.log_probabilities, strict=True)):
        likeliest = int(row.argmax())
        if likeliest not in dict(best):
            raise _not_proven(
                file, f"after prompt {number} token {likeliest} is the likeliest, but not among its {ASKED} likeliest"
            )
        difference = max(abs(value - row[token].item()) for token, value in best[:COMPARED])
        if not difference <= tolerance:  # also if it is nan
            raise _not_proven(
                file, f"after prompt {number} log-probabilities differ by {difference:.3g}, tolerance {tolerance}"
            )
        largest = max(largest, difference)
    return {
        "max_difference": largest,
        "tolerance": tolerance,
        "prompts": len(expected.prompts),
        "xllamacpp": answer["version"],
    }


def _ask(file: Path, question: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's answer, from a fresh process.

    Raises:
        UserError: it does not load the file.
    """
    process = subprocess.run(
        [sys.executable, "-P", "-c", PREDICT, file],
        input=json.dumps(question),
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or [f"exit {process.returncode}"]
        raise _not_proven(file, f"llama.cpp does not load it: {lines[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


def _not_proven(file: Path, difference: str) -> UserError:
    return UserError(f"{file.name}: llama.cpp does not read it as the checkpoint: {difference}. It is not kept.")

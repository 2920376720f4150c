"""The proof that a GGUF file is the checkpoint it was written from: stock llama.cpp loads it and predicts the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune.errors import UserError
from hfprune.models.loading import load_model, load_tokenizer
from hfprune.sharing.llama_cpp import LlamaCppError, ask

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
# Largest difference of a log-probability, in nats, beside `SUM_ERROR`. A wrong file is off by several. With f32 only
# the order of sums differs, with the others weights round.
TOLERANCES = {"f32": 1e-4, "f16": 0.05, "bf16": 0.5, "q8_0": 1.0}
# llama.cpp's server adds up the probabilities of the vocabulary one by one in float32, so that all log-probabilities
# after a prompt are off by the same amount (0.0002 nats with 49,152 tokens).
SUM_ERROR = 1e-3

PREDICT = """\
keep_float32()
server = llama.Server(settings)
tokens = [post(server, "/tokenize", content=text, add_special=True)["tokens"] for text in question["texts"]]
top = []
for prompt in question["prompts"]:
    options = {"n_predict": 1, "n_probs": question["top"], "temperature": 0.0, "cache_prompt": False}
    (choice,) = server.handle_completions({"prompt": prompt} | options)["choices"]
    best = choice["logprobs"]["content"][0]["top_logprobs"]
    top.append([[token["id"], token["logprob"]] for token in best])
print(json.dumps({"tokens": tokens, "top": top, "version": llama.__version__}))
"""
CONTEXT = 512  # tokens, more than the texts have


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

    For each prompt, llama.cpp's likeliest tokens must have the checkpoint's log-probabilities, beside one error of
    their sum, and the checkpoint's likeliest token must be among llama.cpp's.

    Args:
        file: the GGUF file.
        expected: what the checkpoint does.
        tolerance: of a log-probability, in nats.

    Returns:
        `max_difference` of the log-probabilities, `tolerance`, number of `prompts`, version of `xllamacpp`.

    Raises:
        UserError: llama.cpp does not load the file, splits a text otherwise, or predicts otherwise.
    """
    try:
        answer = ask(PREDICT, file, CONTEXT, texts=TEXTS, prompts=expected.prompts, top=ASKED)
    except LlamaCppError as error:
        raise _not_proven(file, f"llama.cpp does not load it: {error}") from None
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
        differences = [value - row[token].item() for token, value in best[:COMPARED]]
        shift = sum(differences) / len(differences)
        difference = max(abs(value - shift) for value in differences)
        if not (difference <= tolerance and abs(shift) <= tolerance + SUM_ERROR):  # also if they are nan
            difference += abs(shift)
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


def _not_proven(file: Path, difference: str) -> UserError:
    return UserError(f"{file.name}: llama.cpp does not read it as the checkpoint: {difference}. It is not kept.")

"""A tokenizer as llama.cpp reads it: tokens with their types, merges, and how text is split before merging.

`tokenizer.json` alone is read, the file that every fast tokenizer has. Two kinds are known: byte-level BPE (GPT-2's,
with one of several ways to split a text) and BPE over SentencePiece's pieces with bytes as a fallback (Llama 2's).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune.errors import UserError
from hfprune.models.loading import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens

_WORDS_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_WORDS_QWEN_2 = _WORDS_LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_WORDS_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is split, see `_splits` -> llama.cpp's name for it.
SPLITS = {
    (("bytes", True),): "gpt-2",
    (("digits", True), ("bytes", True)): "smollm",
    (("words", _WORDS_LLAMA_3), ("bytes", False)): "llama-bpe",
    (("words", _WORDS_QWEN_2), ("bytes", False)): "qwen2",
    (("words", _WORDS_TEKKEN), ("bytes", False)): "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.

    Attributes:
        model: llama.cpp's name of the algorithm: "gpt2" or "llama".
        pre: llama.cpp's name of how a text is split.
        tokens: all of them, by id.
        types: of each, NORMAL to BYTE.
        scores: of each, higher is merged first; empty for byte-level BPE, which has `merges`.
        merges: pairs with a space between them, the first first.
        special: "bos", "eos", "unk", "pad" -> id, those that there are.
        adds_bos, adds_eos: whether the tokenizer puts them around a text.
        adds_space: whether a space comes before a text; None where the algorithm has no such step.
        chat_template: the default one, or "".
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool | None
    chat_template: str


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of the checkpoint in `folder`.

    Args:
        folder: a checkpoint with a `tokenizer.json`.
        size: rows of the embedding. Ids without a token get one that never occurs.

    Raises:
        UserError: there is no such file, or it works in a way that llama.cpp is not known to have.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{file}: missing. A GGUF file takes its tokens from it; save the tokenizer as a fast one first."
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(f"{file}: model.type is {model['type']!r}; only BPE tokenizers can be written as GGUF yet.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _tokens(content, size, file)
    pieces = bool(model.get("byte_fallback"))
    tokenizer = load_tokenizer(folder)
    special = {
        name: number
        for name in ("bos", "eos", "unk", "pad")
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None and number < size
    }
    ids = tokenizer("a")["input_ids"]
    template = tokenizer.chat_template
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _split_name(content, file),
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if pieces else [],
        merges=[] if pieces else merges,
        special=special,
        adds_bos=ids[:1] == [special.get("bos")],
        adds_eos=ids[-1:] == [special.get("eos")],
        adds_space=_adds_space(content) if pieces else None,
        chat_template=(template.get("default", "") if isinstance(template, dict) else template) or "",
    )


def _tokens(content: dict[str, Any], size: int, file: Path) -> tuple[list[str], list[int]]:
    vocabulary: dict[str, int] = content["model"]["vocab"]
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    unknown = content["model"].get("unk_token")
    for token, number in vocabulary.items():
        if number >= size:
            raise UserError(f"{file}: token {token!r} has id {number}; the largest is {size - 1}.")
        is_byte = bool(content["model"].get("byte_fallback")) and len(token) == 6 and token.startswith("<0x")
        tokens[number], types[number] = token, BYTE if is_byte else UNKNOWN if token == unknown else NORMAL
    for added in content["added_tokens"]:
        if added["id"] >= size:
            raise UserError(
                f"{file}: token {added['content']!r} has id {added['id']}; the model has ids up to {size - 1}."
            )
        if types[added["id"]] != UNKNOWN:
            tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """A score for each token that gives the order of the merges: the first merge that makes a token scores highest."""
    made_by: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        made_by.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(made_by.get(token, len(merges))) for token in tokens]


def _split_name(content: dict[str, Any], file: Path) -> str:
    """llama.cpp's name of how a text is split.

    Raises:
        UserError: none is known.
    """
    steps = tuple(_splits(content.get("pre_tokenizer") or {}))
    if content.get("normalizer") not in (None, {"type": "NFC"}) or steps not in SPLITS:
        raise UserError(
            f"{file}: its pre_tokenizer is none of those that llama.cpp is known to have "
            f"({', '.join(SPLITS.values())}). A wrong one would give other tokens in silence, so nothing is written."
        )
    return SPLITS[steps]


def _splits(step: dict[str, Any]) -> list[tuple[str, Any]]:
    """The steps of a pre-tokenizer, each by its kind and what it is given."""
    kind = step.get("type")
    if kind == "Sequence":
        return [part for inner in step["pretokenizers"] for part in _splits(inner)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [("bytes", bool(step.get("use_regex", True)))]
    if kind == "Digits":
        return [("digits", bool(step["individual_digits"]))]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return [("words", step["pattern"].get("Regex"))]
    return [("unknown", kind)]


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether a tokenizer of pieces puts a space before a text: by its normalizer or its pre-tokenizer."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text

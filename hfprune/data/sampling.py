"""From documents to token sequences: which stretch of which document, decided by a seed alone."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hfprune.errors import UserError
from hfprune.store.filenames import DOCUMENTS


def read_records(folder: Path) -> list[dict[str, str]]:
    """The records of a downloaded text, in order: all with `text`, or all with `instruction` and `response`."""
    with (folder / DOCUMENTS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_documents(folder: Path) -> list[str]:
    """The documents of a downloaded text, in order.

    Raises:
        UserError: it holds instructions.
    """
    records = read_records(folder)
    if any("text" not in record for record in records):
        raise UserError(f"{folder / DOCUMENTS}: holds instructions; plain text is needed here. Download it by `field`.")
    return [record["text"] for record in records]


def check_vocabulary(largest: int, vocabulary: int) -> None:
    """Refuse a tokenizer that gives ids which the model does not know.

    Raises:
        UserError: the `largest` id is not below `vocabulary`.
    """
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer gives token id {largest}, but the model knows ids up to {vocabulary - 1}: "
            "the tokenizer is another model's."
        )


def sample_sequences(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, folder: Path, samples: int, length: int, seed: int
) -> Tensor:
    """Token sequences of a downloaded text, see `draw_sequences`."""
    documents = read_documents(folder)
    return draw_sequences(tokenizer, vocabulary, documents, samples, length, seed, str(folder / DOCUMENTS))


def draw_sequences(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    documents: Sequence[str],
    samples: int,
    length: int,
    seed: int,
    origin: str,
) -> Tensor:
    """One stretch of `length` tokens out of each of `samples` documents.

    Documents come in an order shuffled by the seed; those shorter than `length` tokens are passed over; the stretch
    begins at a random token. Nothing is padded, no special token is added, nothing crosses a document's end.

    Args:
        tokenizer: the model's.
        vocabulary: how many token ids the model knows.
        documents: the text.
        samples: how many sequences.
        length: tokens of each.
        seed: decides which.
        origin: what messages call the text.

    Returns:
        (samples, length) int64 token ids.

    Raises:
        UserError: too few documents are long enough, or the tokenizer is not the model's.
    """
    choose = random.Random(seed)  # Mersenne Twister: the same on every machine and version
    order = list(range(len(documents)))
    choose.shuffle(order)
    found: list[list[int]] = []
    for index in order:
        if len(found) == samples:
            break
        ids = tokenizer(documents[index], add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            start = choose.randrange(len(ids) - length + 1)
            found.append(ids[start : start + length])
    if len(found) < samples:
        raise UserError(
            f"{origin}: only {len(found)} of its {len(documents)} documents have {length} tokens, and "
            f"{samples} are asked for. Set a smaller `samples` or `length`, or give a longer text."
        )
    sequences = torch.tensor(found)
    check_vocabulary(int(sequences.max()), vocabulary)
    return sequences

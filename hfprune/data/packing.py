"""Packing of documents into training sequences of one length, without attention between documents.

A row of `length` tokens holds several documents. Positions restart at every document; from them transformers masks
attention to other documents (`masking_utils.find_packed_sequence_indices`).
"""

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hfprune.data.readers import RANDOM, read_records
from hfprune.data.sampling import added_tokens, check_vocabulary
from hfprune.errors import UserError
from hfprune.runtime.progress import progress
from hfprune.store.filenames import DOCUMENTS

# Alpaca's template for an instruction without input, as in the paper's recovery.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
NO_LABEL = -100  # torch's label of positions without loss
DOCUMENTS_PER_BATCH = 1000


@dataclass(frozen=True)
class Example:
    """A document to train on.

    Attributes:
        ids: (tokens,) int32, at least two.
        prompt: number of tokens at the start without loss.
    """

    ids: np.ndarray
    prompt: int


def read_examples(tokenizer: PreTrainedTokenizerBase, vocabulary: int, folder: Path, length: int) -> list[Example]:
    """Tokenise the documents of a downloaded text, with one end-of-text token after every document.

    Special tokens that the tokenizer puts before a text are kept; the end-of-text token replaces those after it.
    For an instruction, only the response has a loss. Instructions longer than `length` tokens and empty documents are
    skipped, and their number is printed. Plain text is split into pieces of at most `length`.

    Raises:
        UserError: no document can be used, or the tokenizer is not the model's.
    """
    records = read_records(folder)
    if records == [RANDOM]:
        raise UserError(f"{folder / DOCUMENTS}: random tokens, which only calibrate. Train on a text with documents.")
    before, end = added_tokens(tokenizer)
    if tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    examples: list[Example] = []
    empty, too_long, shortest, largest = 0, 0, None, 0
    batches = [records[i : i + DOCUMENTS_PER_BATCH] for i in range(0, len(records), DOCUMENTS_PER_BATCH)]
    for batch in progress(batches, "tokenise", len(records), " documents", len):
        for prompt, answer in _tokenise(tokenizer, batch):
            while answer and answer[-1:] == end:  # the record's text ends with that token
                answer.pop()
            if not answer:
                empty += 1
                continue
            ids = np.array(before + prompt + answer + end, dtype=np.int32)
            largest = max(largest, int(ids.max()))
            if not prompt:
                pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
                examples += [Example(piece, 0) for piece in pieces if len(piece) > 1]
            elif len(ids) <= length:
                examples.append(Example(ids, len(before) + len(prompt)))
            else:
                too_long, shortest = too_long + 1, min(len(ids), shortest or len(ids))
    if not examples:
        lengths = f"all {too_long} are longer than length = {length} tokens, the shortest has {shortest}"
        remedy = f"Set `length` to {shortest} or more" if too_long else "Give records that hold text"
        raise UserError(
            f"{folder / DOCUMENTS}: no document to train on is left of {len(records)}: "
            f"{lengths if too_long else 'all are empty'}. {remedy}."
        )
    check_vocabulary(largest, vocabulary)
    if too_long:
        print(f"{too_long} of {len(records)} instructions are left out: longer than {length} tokens", flush=True)
    if empty:
        print(f"{empty} of {len(records)} documents are left out: empty, there is nothing to learn", flush=True)
    return examples


def _tokenise(tokenizer: PreTrainedTokenizerBase, records: Sequence[dict[str, str]]):
    """Token ids of every record's prompt and answer, without special tokens; plain text has an empty prompt."""

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    if "text" in records[0]:
        return [([], answer) for answer in ids([record["text"] for record in records])]
    prompts = ids([PROMPT.format(instruction=record["instruction"]) for record in records])
    return zip(prompts, ids([record["response"].strip() for record in records]), strict=True)


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Distribute documents over rows of `length` tokens, by best fit decreasing.

    Documents are placed longest first, each into the fullest row that still has space for it.

    Args:
        lengths: tokens per document, at most `length`.
        length: tokens per row.

    Returns:
        The indices of the documents in every row.
    """
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}  # free tokens -> rows
    spaces: list[int] = []  # the keys of `rows_by_space`, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fit = bisect_left(spaces, lengths[index])
        if fit == len(spaces):
            row, space = len(rows), length
            rows.append([])
        else:
            space = spaces[fit]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space]
                del spaces[fit]
        rows[row].append(index)
        rest = space - lengths[index]
        if rest not in rows_by_space:
            rows_by_space[rest] = []
            insort(spaces, rest)
        rows_by_space[rest].append(row)
    return rows


class Packed(Dataset):
    """Rows of packed documents in training order, epoch after epoch.

    An item has `input_ids`, `position_ids` and `labels`, all (length,) int64. `labels` are not shifted. A document's
    first token, its prompt and padding have `NO_LABEL`. Padding is at the end, as a document of its own.
    """

    def __init__(self, examples: Sequence[Example], length: int, epochs: int, seed: int) -> None:
        self.examples, self.length = examples, length
        self.rows = pack([len(example.ids) for example in examples], length)
        self.order: list[int] = []
        for epoch in range(epochs):
            shuffled = list(range(len(self.rows)))
            random.Random(f"{seed}/{epoch}").shuffle(shuffled)
            self.order += shuffled

    def __len__(self) -> int:
        return len(self.order)

    def truncate(self, rows: int) -> None:
        """Keep only the first `rows` items."""
        del self.order[rows:]

    def tokens(self) -> list[int]:
        """Number of tokens of every item, without padding."""
        counts = [sum(len(self.examples[index].ids) for index in row) for row in self.rows]
        return [counts[row] for row in self.order]

    def places(self, item: int) -> Iterator[tuple[int, int, int, int]]:
        """The documents of an item: index, first token, first token with a label, and the token after the last."""
        start = 0
        for index in self.rows[self.order[item]]:
            example = self.examples[index]
            stop = start + len(example.ids)
            yield index, start, start + max(example.prompt, 1), stop
            start = stop

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        ids, positions = torch.zeros(self.length, dtype=torch.int64), torch.arange(self.length)
        labels = torch.full((self.length,), NO_LABEL)
        stop = 0
        for index, start, first_label, stop in self.places(item):
            ids[start:stop] = torch.from_numpy(self.examples[index].ids)
            labels[first_label:stop] = ids[first_label:stop]
            positions[start:] = torch.arange(self.length - start)
        positions[stop:] = torch.arange(self.length - stop)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

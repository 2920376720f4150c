"""From documents to training sequences of one length, documents kept apart.

A row of `length` tokens holds several documents. Positions restart at each, and by these transformers keeps attention
within a document (`masking_utils.find_packed_sequence_indices`).
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hfprune.data.readers import read_records
from hfprune.data.sampling import added_tokens, check_vocabulary
from hfprune.errors import UserError
from hfprune.runtime.progress import progress
from hfprune.store.filenames import DOCUMENTS

# The template of Alpaca for an instruction without input, as the paper's recovery has it.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
NO_LABEL = -100  # positions that the loss passes over, torch's convention
DOCUMENTS_PER_BATCH = 1000


@dataclass(frozen=True)
class Example:
    """A document to train on.

    Attributes:
        ids: (tokens,) int32, two at least.
        prompt: how many of them, from the first, are not learned.
    """

    ids: np.ndarray
    prompt: int


def read_examples(tokenizer: PreTrainedTokenizerBase, vocabulary: int, folder: Path, length: int) -> list[Example]:
    """The documents of a downloaded text, tokenised, an end-of-text token behind each, and only there.

    What the tokenizer puts before a text by itself stands before each; what it puts behind does not count.
    Of instructions only the response is learned; those longer than `length` tokens are left out, with a line that says
    how many. Plain text is cut into stretches of at most `length`.

    Raises:
        UserError: nothing is left, or the tokenizer is not the model's.
    """
    records = read_records(folder)
    before, end = added_tokens(tokenizer)
    if tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    found: list[Example] = []
    too_long, shortest, largest = 0, None, 0
    batches = [records[i : i + DOCUMENTS_PER_BATCH] for i in range(0, len(records), DOCUMENTS_PER_BATCH)]
    for batch in progress(batches, "tokenise", len(records), " documents", len):
        for prompt, answer in _tokenise(tokenizer, batch):
            while answer and answer[-1:] == end:  # written out in the record
                answer.pop()
            if not answer:
                continue
            ids = np.array(before + prompt + answer + end, dtype=np.int32)
            largest = max(largest, int(ids.max()))
            if not prompt:
                stretches = [ids[i : i + length] for i in range(0, len(ids), length)]
                found += [Example(stretch, 0) for stretch in stretches if len(stretch) > 1]
            elif len(ids) <= length:
                found.append(Example(ids, len(before) + len(prompt)))
            else:
                too_long, shortest = too_long + 1, min(len(ids), shortest or len(ids))
    if not found:
        why = f"all {too_long} are longer than length = {length} tokens, the shortest has {shortest}"
        remedy = f"Set `length` to {shortest} or more" if too_long else "Give records that hold text"
        raise UserError(
            f"{folder / DOCUMENTS}: no document to train on is left of {len(records)}: "
            f"{why if too_long else 'all are empty'}. {remedy}."
        )
    check_vocabulary(largest, vocabulary)
    if too_long:
        print(f"{too_long} of {len(records)} instructions are left out: longer than {length} tokens", flush=True)
    return found


def _tokenise(tokenizer: PreTrainedTokenizerBase, records: Sequence[dict[str, str]]):
    """Bare token ids of prompt and answer of each record; a plain document is an answer to nothing."""

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    if "text" in records[0]:
        return [([], answer) for answer in ids([record["text"] for record in records])]
    prompts = ids([PROMPT.format(instruction=record["instruction"]) for record in records])
    return zip(prompts, ids([record["response"].strip() for record in records]), strict=True)


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Share documents of so many tokens, none longer than `length`, out to rows of `length` tokens: indices by row.

    The longest first, each into the row where it leaves the least room (best fit, decreasing).
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens left -> rows
    rooms: list[int] = []  # the keys of `with_room`, ascending
    for index in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        place = bisect_left(rooms, lengths[index])
        if place == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room]
                del rooms[place]
        rows[row].append(index)
        left = room - lengths[index]
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(row)
    return rows


class Packed(Dataset):
    """Rows of packed documents in the order in which they are trained on, all epochs one behind the other.

    Item: `input_ids`, `position_ids`, `labels`, each (length,) int64. `labels` are not shifted; a document's first
    token, its prompt and padding have `NO_LABEL`. Padding stands at the end, as a document of its own.
    """

    def __init__(self, examples: Sequence[Example], length: int, epochs: int, seed: int) -> None:
        self.examples, self.length = examples, length
        self.rows = pack([len(each.ids) for each in examples], length)
        self.order: list[int] = []
        for epoch in range(epochs):
            shuffled = list(range(len(self.rows)))
            random.Random(f"{seed}/{epoch}").shuffle(shuffled)
            self.order += shuffled

    def __len__(self) -> int:
        return len(self.order)

    def truncate(self, rows: int) -> None:
        """Leave only the first so many items."""
        del self.order[rows:]

    def tokens(self) -> list[int]:
        """How many tokens that are not padding each item has."""
        held = [sum(len(self.examples[index].ids) for index in row) for row in self.rows]
        return [held[row] for row in self.order]

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        ids, positions = torch.zeros(self.length, dtype=torch.int64), torch.arange(self.length)
        labels = torch.full((self.length,), NO_LABEL)
        start = 0
        for index in self.rows[self.order[item]]:
            example = self.examples[index]
            stop = start + len(example.ids)
            ids[start:stop] = torch.from_numpy(example.ids)
            learned = start + max(example.prompt, 1)
            labels[learned:stop] = ids[learned:stop]
            positions[start:] = torch.arange(self.length - start)
            start = stop
        positions[start:] = torch.arange(self.length - start)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

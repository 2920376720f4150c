"""Contamination: overlap between the texts for calibration and training and the documents of tests.

The words of a document are the lower-cased runs of letters and digits in all its strings, in order: in a text, in an
instruction and its response, in a task's question and choices. A test document overlaps if 13 consecutive words of it
also occur within one document of the other side, as in the analysis of GPT-3's training data (Brown et al., 2020,
appendix C). A test document with fewer words overlaps if it equals a document of the other side; an empty one never
does.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from hfprune.store.filenames import DOCUMENTS

WORDS = 13
WORD = re.compile(r"[^\W_]+")
NONE = np.array([], np.uint64)
LAST = np.array([2**64 - 1], np.uint64)  # the largest hash: no search ends behind the array
# The hash of a run is the sum of its words' 64-bit hashes times these odd numbers, modulo 2**64. With 10^8 runs on one
# side and 10^6 on the other, an equal hash of different runs has probability 10^-5.
WEIGHTS = np.random.default_rng(0).integers(2**63, size=WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class Corpus:
    """Downloaded documents, and their use in an experiment.

    Attributes:
        use: calibration, recovery, fidelity or task.
        name: their name in the experiment.
        folder: holds their `documents.jsonl`.
    """

    use: str
    name: str
    folder: Path

    def words(self) -> Iterator[list[str]]:
        """The words of each document, in order."""
        with (self.folder / DOCUMENTS).open(encoding="utf-8") as file:
            for line in file:
                yield [word for text in _strings(json.loads(line)) for word in WORD.findall(text.lower())]

    @cached_property
    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all runs of words, (runs,) uint64, and the indices of their documents, (runs,) int64."""
        hashes = [_hashes(words) for words in self.words()]
        return np.concatenate([NONE, *hashes]), np.repeat(np.arange(len(hashes)), list(map(len, hashes)))


@dataclass(frozen=True)
class Overlap:
    """Overlap of test documents with a text.

    Attributes:
        seen_for, seen: use and name of the text for calibration or training.
        tested_for, tested: use and name of the test documents.
        documents: number of test documents.
        overlapping: number of those that overlap.
        share: `overlapping` / `documents`.
        example: a shared run of words from the first that overlaps; empty if none does.
    """

    seen_for: str
    seen: str
    tested_for: str
    tested: str
    documents: int
    overlapping: int
    share: float
    example: str


def compare(seen: Sequence[Corpus], tested: Sequence[Corpus]) -> list[Overlap]:
    """The overlap of every pair of a text and test documents.

    Memory: 16 bytes per word of the test documents, whatever the length of the texts.
    """
    test_hashes = np.unique(np.concatenate([LAST, *(test.runs[0] for test in tested)]))
    rows = []
    for text in seen:
        in_text = np.zeros(len(test_hashes), bool)
        for words in text.words():
            hashes = _hashes(words)
            indices = np.searchsorted(test_hashes, hashes)
            in_text[indices[test_hashes[indices] == hashes]] = True
        rows += [_overlap(text, test, test_hashes, in_text) for test in tested]
    return rows


def _overlap(text: Corpus, test: Corpus, test_hashes: np.ndarray, in_text: np.ndarray) -> Overlap:
    """The overlap of one pair; `in_text` says which of the sorted `test_hashes` occur in the text."""
    hashes, owners = test.runs
    shared = np.flatnonzero(in_text[np.searchsorted(test_hashes, hashes)])
    overlapping = len(np.unique(owners[shared]))
    documents = sum(1 for _ in test.words())
    example = ""
    if overlapping:
        first = owners[shared[0]]
        words = next(words for index, words in enumerate(test.words()) if index == first)
        start = shared[0] - np.searchsorted(owners, first)
        example = " ".join(words[start : start + WORDS])
    share = overlapping / documents if documents else 0.0
    return Overlap(text.use, text.name, test.use, test.name, documents, overlapping, share, example)


def _hashes(words: list[str]) -> np.ndarray:
    """The uint64 hashes of all runs of `WORDS` words; with fewer words one hash of them all, without words none."""
    if len(words) < WORDS:
        return np.array([hash(tuple(words)) % 2**64], np.uint64) if words else NONE
    word_hashes = np.array([hash(word) for word in words], np.int64).view(np.uint64)
    return sliding_window_view(word_hashes, WORDS) @ WEIGHTS


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def refusal(overlaps: Sequence[Overlap]) -> str:
    """The message of a strict experiment about pairs that overlap; empty if none does."""
    lines = [
        f"{overlap.tested_for} {overlap.tested}: {overlap.overlapping} of {overlap.documents} documents overlap with "
        f"{overlap.seen_for} text {overlap.seen}, such as {overlap.example!r}."
        for overlap in overlaps
        if overlap.overlapping
    ]
    if not lines:
        return ""
    remedy = (
        "Nothing is scored, since the experiment says `strict: true`. Calibrate and train on other documents (another "
        "text, or a range of it by `documents:`), or set `strict: false` to have the overlap in the table alone."
    )
    return "\n".join([*lines, remedy])


def write(overlaps: Sequence[Overlap], path: Path) -> None:
    """Write the table as csv, one pair per row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        names = [field.name for field in fields(Overlap)]
        table.writerow(names)
        table.writerows([getattr(overlap, name) for name in names] for overlap in overlaps)

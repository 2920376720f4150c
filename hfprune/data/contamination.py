"""Whether what a model is calibrated or trained on holds what it is tested on: runs of words that both have.

A document's words are its lower-cased runs of letters and digits, of all its strings in their order: of a text, of an
instruction with its response, of a task's question with its choices. A document of the tested side overlaps where 13
words in a row, within one document, are also somewhere on the other side, as in the analysis of GPT-3's training data
(Brown et al., 2020, appendix C). One of fewer words overlaps where it is, whole, a document of the other side; one of
no words never does.
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
# A run of words is a sum of its words' 64-bit hashes times these odd numbers, modulo 2**64: with 10^8 runs on one side
# and 10^6 on the other, a chance meeting has probability 10^-5.
NONE = np.array([], np.uint64)
LAST = np.array([2**64 - 1], np.uint64)  # one behind all hashes: every search ends at a hash
WEIGHTS = np.random.default_rng(0).integers(2**63, size=WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class Corpus:
    """Downloaded documents, and what an experiment does with them.

    Attributes:
        use: calibration, recovery, fidelity or task.
        name: what the experiment calls them.
        folder: where their `documents.jsonl` is.
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
        """Hashes of all runs of words, uint64, and beside each the number of its document, int64."""
        found = [_hashes(words) for words in self.words()]
        return np.concatenate([NONE, *found]), np.repeat(np.arange(len(found)), [len(each) for each in found])


@dataclass(frozen=True)
class Overlap:
    """How much of what is tested on was seen before.

    Attributes:
        seen_for, seen: use and name of the text that a model is calibrated or trained on.
        tested_for, tested: use and name of the documents that it is tested on.
        documents: how many those are.
        overlapping: how many of them overlap.
        share: the same, as a share.
        example: a run of words that both have, of the first of them; empty where there is none.
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
    """Every pair of what is seen and what is tested on.

    In memory are 16 bytes for every word that is tested on, however long the other side is.
    """
    tests = np.unique(np.concatenate([LAST, *(each.runs[0] for each in tested)]))
    rows = []
    for text in seen:
        met = np.zeros(len(tests), bool)
        for words in text.words():
            runs = _hashes(words)
            places = np.searchsorted(tests, runs)
            met[places[tests[places] == runs]] = True
        rows += [_overlap(text, test, tests, met) for test in tested]
    return rows


def _overlap(text: Corpus, test: Corpus, tests: np.ndarray, met: np.ndarray) -> Overlap:
    hashes, owners = test.runs
    found = np.flatnonzero(met[np.searchsorted(tests, hashes)])
    overlapping = len(np.unique(owners[found]))
    documents = sum(1 for _ in test.words())
    example = ""
    if overlapping:
        first = owners[found[0]]
        words = next(words for number, words in enumerate(test.words()) if number == first)
        start = found[0] - np.searchsorted(owners, first)
        example = " ".join(words[start : start + WORDS])
    share = overlapping / documents if documents else 0.0
    return Overlap(text.use, text.name, test.use, test.name, documents, overlapping, share, example)


def _hashes(words: list[str]) -> np.ndarray:
    """A uint64 hash of each run of `WORDS` words; of all words, where there are fewer; none, where there are none."""
    if len(words) < WORDS:
        return np.array([hash(tuple(words)) % 2**64], np.uint64) if words else NONE
    each = np.array([hash(word) for word in words], np.int64).view(np.uint64)
    return sliding_window_view(each, WORDS) @ WEIGHTS


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def refusal(found: Sequence[Overlap]) -> str:
    """What to say of the pairs that overlap where an experiment is strict; empty where none does."""
    lines = [
        f"{each.tested_for} {each.tested}: {each.overlapping} of {each.documents} documents overlap with "
        f"{each.seen_for} text {each.seen}, such as {each.example!r}."
        for each in found
        if each.overlapping
    ]
    if not lines:
        return ""
    remedy = (
        "Nothing is scored, since the experiment says `strict: true`. Calibrate and train on other documents (another "
        "text, or a range of it by `documents:`), or set `strict: false` to have the overlap in the table alone."
    )
    return "\n".join([*lines, remedy])


def write(found: Sequence[Overlap], path: Path) -> None:
    """Write the table, one pair a row, as csv."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        names = [field.name for field in fields(Overlap)]
        table.writerow(names)
        table.writerows([getattr(each, name) for name in names] for each in found)

"""The overlap of texts: planted ones are found, others not, against plain sets of word tuples."""

import csv
import json
import re

import pytest

from hfprune.data.contamination import Corpus, Overlap, compare, refusal, write
from tests.conftest import run_hfprune, sentences, write_lines


@pytest.fixture
def documents(tmp_path):
    """Documents of some use from records, in a folder as stage `download` leaves it."""

    def make(use: str, name: str, records: list) -> Corpus:
        folder = tmp_path / f"{use}-{name}"
        folder.mkdir()
        write_lines(folder / "documents.jsonl", records)
        return Corpus(use, name, folder)

    return make


def plain(*words: str) -> dict:
    return {"text": " ".join(words)}


def only(seen: Corpus, tested: Corpus) -> Overlap:
    (found,) = compare([seen], [tested])
    return found


def runs_of(record: dict) -> set[tuple]:
    """The runs of 13 words of a record of strings, by the definition."""
    words = re.findall("[a-z0-9]+", " ".join(record.values()).lower())
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)} or ({tuple(words)} if words else set())


def test_it_counts_what_plain_sets_count(documents):
    seen = [{"text": sentences(i, 60)} for i in range(30)]
    tested = [{"text": sentences(100 + i, 40)} for i in range(20)]
    for i, length in ((3, 12), (5, 13), (9, 30)):  # the first is too short a run
        words = seen[i]["text"].split()[7 : 7 + length]
        tested[i]["text"] = " ".join([sentences(200, 20), *words, sentences(300 + i, 20)])
    common = set.union(*map(runs_of, seen))
    expected = [i for i, record in enumerate(tested) if runs_of(record) & common]
    assert expected == [5, 9]
    found = only(documents("calibration", "a", seen), documents("fidelity", "b", tested))
    assert (found.documents, found.overlapping, found.share) == (20, 2, 0.1)
    assert tuple(found.example.split()) in runs_of(tested[5]) & common


def test_each_pair_is_counted_by_itself(documents):
    mine, other = sentences(1, 30), sentences(2, 30)
    seen = [documents("calibration", "a", [{"text": mine}]), documents("recovery", "b", [{"text": other}])]
    tested = [
        documents("fidelity", "c", [{"text": other}, {"text": sentences(3, 30)}]),
        documents("task", "d", [{"text": mine}]),
    ]
    found = compare(seen, tested)
    assert [(each.seen_for, each.seen, each.tested_for, each.tested) for each in found] == [
        ("calibration", "a", "fidelity", "c"),
        ("calibration", "a", "task", "d"),
        ("recovery", "b", "fidelity", "c"),
        ("recovery", "b", "task", "d"),
    ]
    assert [each.overlapping for each in found] == [0, 1, 1, 0]


def test_case_and_punctuation_do_not_hide_it(documents):
    text = sentences(1, 20)
    shouted = text.upper().replace(" ", " -- ", 5)
    found = only(documents("calibration", "a", [{"text": text}]), documents("fidelity", "b", [{"text": shouted}]))
    assert found.overlapping == 1


def test_all_strings_of_a_task_count_and_those_of_instructions_too(documents):
    question, option = sentences(1, 6), sentences(2, 9)
    task = {"question": question, "choices": {"text": ["no", option], "label": ["A", "B"]}, "label": 1}
    instruction = {"instruction": "Tell me.", "response": f"{question} No. {option}"}
    found = only(documents("recovery", "a", [instruction]), documents("task", "b", [task]))
    assert found.overlapping == 1


def test_no_run_crosses_from_one_document_into_the_next(documents):
    words = sentences(1, 26).split()
    seen = documents("calibration", "a", [plain(*words[:20]), plain(*words[20:])])
    assert only(seen, documents("fidelity", "b", [plain(*words[12:])])).overlapping == 0


def test_short_documents_overlap_where_they_are_the_same_and_empty_ones_never(documents):
    seen = documents("calibration", "a", [plain("Yes", "or", "no?"), plain(), plain("...")])
    tested = documents("task", "b", [plain("yes", "or", "no"), plain("yes", "or"), plain("or", "no"), plain("!"), {}])
    found = only(seen, tested)
    assert (found.documents, found.overlapping, found.example) == (5, 1, "yes or no")


def test_where_no_document_has_words_there_is_no_overlap(documents):
    found = only(documents("calibration", "a", [plain()]), documents("fidelity", "b", [plain()]))
    assert (found.documents, found.overlapping, found.example) == (1, 0, "")
    assert refusal([found]) == ""


def test_the_table_reads_back(documents, tmp_path):
    text = sentences(1, 20)
    found = only(documents("calibration", "a", [{"text": text}]), documents("fidelity", "b", [{"text": text}]))
    write([found], tmp_path / "overlap.csv")
    (row,) = csv.DictReader((tmp_path / "overlap.csv").open())
    assert row == {
        "seen_for": "calibration", "seen": "a", "tested_for": "fidelity", "tested": "b",
        "documents": "1", "overlapping": "1", "share": "1.0", "example": " ".join(text.rstrip(".").split()[:13]),
    }  # fmt: skip


def test_the_command_is_strict_where_asked(tmp_path, data):
    store = tmp_path / "store"
    one = run_hfprune(store, "download", "text", "--path", data / "calibration.jsonl")
    task = tmp_path / "boolq.jsonl"
    passage = json.loads((data / "calibration.jsonl").read_text().splitlines()[4])["text"]
    write_lines(task, [{"passage": passage, "question": "is it so", "label": 0}])
    two = run_hfprune(store, "download", "task", "--name", "boolq", "--path", task)
    words = ("overlap", "--calibration", f"mine={one}", "--task", f"boolq={two}", "--output", tmp_path / "o.csv")
    run_hfprune(None, *words)
    assert "calibration,mine,task,boolq,1,1,1.0," in (tmp_path / "o.csv").read_text()
    message = run_hfprune(None, *words, "--strict", status=2)
    assert "`strict: true`" in message

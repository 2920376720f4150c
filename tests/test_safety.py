"""What a model, a data set, an archive or a config file holds is never run, never leaves its folder, never leaks."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from hfprune.errors import UserError
from hfprune.experiment.schema import load
from hfprune.models.loading import check_family, load_model, load_tokenizer
from tests.checkouts import Checkout, changed
from tests.conftest import run_hfprune, sentences, write_lines
from tests.hub import serve


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mknod, (str(self.file),)


@pytest.fixture
def trap(tmp_path):
    """A file that code hidden in a model or a text would make."""
    file = tmp_path / "trap"
    yield file
    assert not file.exists()


@pytest.fixture
def model(checkpoint, tmp_path, trap):
    """A checkpoint with code and a pickle beside it."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "evil.py").write_text(f"import os\nos.mknod({str(trap)!r})\nclass Evil: pass\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(trap)))
    return folder


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CODE = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}


def test_code_and_pickles_beside_a_model_are_left_where_they_are(model, tmp_path):
    edit(model / "config.json", auto_map=CODE)
    edit(model / "tokenizer_config.json", auto_map=CODE)
    made = run_hfprune(tmp_path / "store", "download", "model", "--path", model)
    assert not {"evil.py", "pytorch_model.bin"} & {file.name for file in Path(made).iterdir()}
    load_model(model, "float32")  # nor does it run where it lies in the folder itself
    load_tokenizer(model)


@pytest.mark.parametrize(
    ("file", "values", "open_it"),
    [
        ("config.json", {"auto_map": CODE, "model_type": "evil"}, check_family),
        ("tokenizer_config.json", {"auto_map": CODE, "tokenizer_class": "EvilTokenizer"}, load_tokenizer),
    ],
)
def test_a_model_that_needs_its_own_code_is_refused_without_asking(model, file, values, open_it, tmp_path):
    edit(model / file, **values)
    said = run_hfprune(tmp_path / "store", "download", "model", "--path", model, status=2)
    assert "it comes with code of its own, which never runs here." in said
    with pytest.raises(UserError, match="code of its own"):
        open_it(model)


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def not_safetensors(folder):
    shutil.copyfile(folder / "pytorch_model.bin", folder / "model.safetensors")


def elsewhere(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    weights = dict.fromkeys(names, "../other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_short, "model.safetensors: cut short, or not safetensors"),
        (not_safetensors, "model.safetensors: cut short, or not safetensors"),
        (elsewhere, "model.safetensors.index.json names '../other.safetensors', which is not beside it."),
    ],
)
def test_weights_that_are_not_all_there_are_refused(harm, message, model, tmp_path):
    harm(model)
    said = run_hfprune(tmp_path / "store", "download", "model", "--path", model, status=2)
    assert f"path {model}: {message}" in said


@pytest.mark.parametrize("name", ["rows.pkl", "rows.bin", "rows.pt"])
def test_a_pickle_is_no_text(name, trap, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Evil(trap)))
    said = run_hfprune(tmp_path / "store", "download", "text", "--path", tmp_path / name, status=2)
    assert f"cannot read '{name}'; known: .jsonl" in said


def test_a_pickle_on_the_hub_is_no_text(trap, tmp_path):
    with serve() as hub:
        hub.repository("datasets", "someone/evil").commit({"train.pkl": pickle.dumps(Evil(trap))})
        said = run_hfprune(
            tmp_path / "store", "download", "text", "--hub", "someone/evil", "--split", "train", status=2,
            HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0",
        )  # fmt: skip
    assert "hub someone/evil@main: cannot be read" in said


@pytest.mark.parametrize("file", ["../outside.jsonl", "/tmp/outside.jsonl", "data/../../outside.jsonl"])
def test_a_member_of_an_archive_does_not_leave_it(file, tmp_path, trap):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(file, "{}")
        archive.writestr("evil-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
        archive.writestr("evil-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("evil-1.0.dist-info/RECORD", "")
    (tmp_path / "evil-1.0-py3-none-any.whl").write_bytes(content.getvalue())
    said = run_hfprune(
        tmp_path / "store", "download", "text", "--wheel", "evil==1.0", "--file", file, "--sha256", "0" * 64, status=2,
        PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path),
    )  # fmt: skip
    assert "leads outside the archive" in said


def test_no_value_of_a_config_reaches_a_shell(experiment, tmp_path, checkpoint, data):
    shell = "$(touch trap) `touch trap` ; touch trap ; 'touch trap' \"x\" {trap} && touch trap #"
    folder = tmp_path / shell
    shutil.copytree(checkpoint, folder / "model")
    for file in data.iterdir():
        shutil.copyfile(file, folder / file.name)
    texts = {name: text | {"path": str(folder / Path(text["path"]).name)} for name, text in experiment["texts"].items()}
    hostile = changed(experiment, model={"path": str(folder / "model")}, texts=texts)
    checkout = Checkout(tmp_path / "checkout", tmp_path / "store")
    checkout.snakemake(hostile, "--until", "score", "overlap")
    assert checkout.manifests("score")
    assert not list(tmp_path.rglob("trap"))


@pytest.mark.parametrize("name", ["$(touch trap)", "a/b", "../a", "a b", "", "-a", "{a}"])
def test_names_are_plain(name, experiment, tmp_path):
    file = tmp_path / "config.yaml"
    for wrong in (
        experiment | {"experiment": name},
        experiment | {"texts": experiment["texts"] | {name: experiment["texts"]["calibration"]}},
    ):
        file.write_text(yaml.safe_dump(wrong))
        with pytest.raises(UserError):
            load(file)


DOWNLOADS = """
import json, sys
from hfprune.cli import main
print([main(words) for words in json.loads(sys.argv[1])])
"""


def test_a_token_is_in_no_file_and_in_no_message(checkpoint, tmp_path):
    token = "hf_secretsecretsecret"
    with serve() as hub:
        hub.repository("models", "someone/tiny").commit({file.name: file.read_bytes() for file in checkpoint.iterdir()})
        gated = hub.repository("models", "someone/gated")
        gated.commit({"config.json": b"{}"})
        gated.gated = True
        rows = write_lines(tmp_path / "rows.jsonl", [{"text": sentences(1, 9)}]).read_bytes()
        hub.repository("datasets", "someone/rows").commit({"rows.jsonl": rows})
        environment = {
            "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug",
        }  # fmt: skip
        words = (
            ("model", "--hub", "someone/tiny"),
            ("model", "--hub", "someone/gated"),
            ("model", "--hub", "someone/absent"),
            ("text", "--hub", "someone/rows", "--file", "rows.jsonl"),
        )
        commands = [["download", *each, "--store", str(tmp_path / "store")] for each in words]
        done = subprocess.run(  # libraries read the variables when they are imported
            [sys.executable, "-c", DOWNLOADS, json.dumps(commands)],
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )
        assert done.stdout.splitlines()[-1] == "[0, 2, 2, 0]", done.stderr
        assert token not in done.stdout + done.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len([file for file in files if file.name == "manifest.json"]) == 2
    assert not [file for file in files if token.encode() in file.read_bytes()]

"""`hfprune new` writes a config that every other command takes."""

import shutil

import pytest
import yaml

from hfprune.cli import main
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import load
from tests.conftest import REPOSITORY


def test_a_config_for_the_hub_for_a_folder_and_for_a_gguf_file_is_valid(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "a folder: #1")
    (tmp_path / "tiny.Q4.GGUF").write_bytes(b"GGUF")
    models = {"Qwen/Qwen2.5-0.5B": "hub", "a folder: #1": "path", str(checkpoint): "path", "tiny.Q4.GGUF": "path"}
    for number, (model, key) in enumerate(models.items()):
        assert main(["new", f"my {number}.yaml", "--model", model]) == 0
        assert main(["config", f"my {number}.yaml"]) == 0
        experiment = load(tmp_path / f"my {number}.yaml")
        assert str(getattr(experiment.model, key)) == model
        assert experiment.experiment == f"my-{number}"
        assert {model.method for model in Plan(experiment).models if model.cut} == {"HFPrune", "hfprune-best-stock"}
    assert "#" in (tmp_path / "my 0.yaml").read_text() and len((tmp_path / "my 0.yaml").read_text().splitlines()) < 60


def test_a_config_that_is_there_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("mine")
    assert main(["new", str(tmp_path / "mine.yaml"), "--model", "owner/name"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert main(["new", str(tmp_path / "no" / "mine.yaml"), "--model", "owner/name"]) == 2
    assert "a folder that is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gpt2", "no repository of the Hugging Face hub, whose names are owner/name"),
        ("./no/such/folder", "no such file or folder"),
        ("/no/such.gguf", "no such file or folder"),
        ("models/small.gguf", "no such file or folder"),
        ("notes.txt", "a file, but no GGUF file"),
        (".", "a folder without config.json"),
        ("https://huggingface.co/Qwen/Qwen2.5-0.5B", "owner/name, such as Qwen/Qwen2.5-0.5B"),
    ],
)
def test_a_model_that_is_none_is_refused_and_nothing_is_written(model, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert main(["new", "mine.yaml", "--model", model]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mine.yaml").exists()


def test_its_texts_are_those_of_the_default_experiment(tmp_path):
    main(["new", str(tmp_path / "mine.yaml"), "--model", "owner/name"])
    ours = yaml.safe_load((tmp_path / "mine.yaml").read_text())["texts"]
    theirs = yaml.safe_load((REPOSITORY / "config.yaml").read_text())["texts"]
    assert ours == {name: theirs[name] for name in ours}

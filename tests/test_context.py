"""Sequences that are longer than the model's context are refused before any work."""

import json

import pytest

from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.evaluation.timing import time_models
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.models.context import context_length
from tests.checkouts import changed
from tests.conftest import save_checkpoint


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"max_position_embeddings": 512}, 512),
        ({"max_seq_len": 64}, 64),
        ({"max_position_embeddings": 512, "rope_scaling": None}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 1024),
        (
            {
                "max_position_embeddings": 512,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            },
            512,
        ),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 512),
        ({"max_position_embeddings": 512, "sliding_window": 12}, 512),
    ],
)
def test_the_context_is_what_the_config_says(config, expected):
    assert context_length(config) == expected


@pytest.fixture(scope="module")
def store(data, tmp_path_factory):
    """A store with a model of 64 positions and a text."""
    folder = tmp_path_factory.mktemp("short")
    save_checkpoint(folder / "model", max_position_embeddings=64)
    for words in (("model", folder / "model"), ("text", data / "calibration.jsonl")):
        assert main(["download", words[0], "--path", str(words[1]), "--store", str(folder / "store")]) == 0
    return folder / "store"


COMMANDS = {
    "score": ["--criterion", "magnitude"],
    "shard": ["--shard", "0", "--shards", "2"],
    "order": [],
    "reference": [],
    "recover": ["--batch-tokens", "65"],
    "scoring-cost": ["--criteria", "entropy", "--output", "cost.csv"],
}


@pytest.mark.parametrize("stage", COMMANDS)
def test_every_stage_refuses_a_sequence_that_is_too_long(stage, store, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, text = (next((store / kind).iterdir()) for kind in ("model", "text"))
    words = ["--model", model, "--text", text, "--length", 65, *COMMANDS[stage]]
    words += ["--store", store] if stage != "scoring-cost" else []
    words += ["--samples", 4] if stage != "recover" else []
    assert main([stage, *map(str, words)]) == 2
    assert "length = 65: the model knows 64 positions" in capsys.readouterr().err
    assert not (store / stage).exists() and not list(tmp_path.iterdir())


def test_efficiency_refuses_more_tokens_than_the_model_knows(store):
    with pytest.raises(UserError, match="prefill = 256: the model knows 64 positions"):
        time_models({"a": next((store / "model").iterdir())}, "float32", 1, 8)


def test_an_experiment_is_refused_before_it_begins_and_right_after_the_download(
    experiment, store, data, capsys, monkeypatch
):
    path = json.loads((next((store / "model").iterdir()) / "manifest.json").read_text())["details"]["path"]
    long = changed(
        experiment | {"store": str(store), "model": {"path": path, "dtype": "float32"}},
        calibration={"length": 65},
        recoveries=["none", "lora"],
    ) | {
        "recovery": {
            "lora": {"text": "calibration", "length": 128, "batch_tokens": 128},
            "unused": {"text": "calibration"},
        }
    }
    plan = Plan(parse(Experiment, long, "tiny"))
    assert plan.lengths == {"calibration.length": 65, "fidelity.length": 32, "recovery.lora.length": 128}
    with pytest.raises(UserError) as raised:
        plan.refuse_misfits()
    assert [line.partition(":")[0] for line in str(raised.value).splitlines()] == [
        "calibration.length = 65",
        "recovery.lora.length = 128",
    ]
    monkeypatch.setenv("HFPRUNE_LENGTHS", json.dumps(plan.lengths))
    assert main(["download", "model", "--path", path, "--store", str(store)]) == 2
    assert "calibration.length = 65: the model knows 64 positions" in capsys.readouterr().err
    monkeypatch.setenv("HFPRUNE_LENGTHS", json.dumps({"calibration.length": 64}))
    assert main(["download", "model", "--path", path, "--store", str(store)]) == 0

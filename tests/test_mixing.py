"""Several texts as one: what is drawn of each, who reads it, and what cannot be mixed."""

import json
from pathlib import Path

import pytest
import torch

from hfprune.cli import main
from hfprune.data.packing import read_examples
from hfprune.data.sampling import sample_sequences
from hfprune.errors import UserError
from hfprune.experiment.estimate import Estimate, Models, device_of
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.models.loading import check_family
from tests.checkouts import Checkout, ran
from tests.conftest import make_model, make_tokenizer


@pytest.fixture
def texts(tmp_path) -> list[Path]:
    """Two texts in a store: long documents of distinct words, 30 of one and 5 of the other."""
    paths = []
    for name, count in (("news", 30), ("books", 5)):
        file = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"text": f"{name} {number} " + "a b c d e " * 20}) + "\n" for number in range(count)]
        file.write_text("".join(lines))
        paths.append(download(tmp_path / "store", file))
    return paths


def download(store: Path, file: Path, *words: str) -> Path:
    known = {*store.glob("text/*")}
    assert main(["download", "text", "--path", str(file), *words, "--store", str(store)]) == 0
    (folder,) = {*store.glob("text/*")} - known
    return folder


def mixed(store: Path, texts: list[Path]) -> int:
    return main(["mix", "--texts", *map(str, texts), "--store", str(store)])


def test_a_mixture_gives_as_many_sequences_of_each_text_in_turns(texts, tmp_path):
    assert mixed(tmp_path / "store", texts) == 0
    (mixture,) = (tmp_path / "store" / "mix").iterdir()
    details = json.loads((mixture / "manifest.json").read_text())["details"]
    assert details["documents"] == 35
    assert all(file.stem in details["name"] for file in tmp_path.glob("*.jsonl"))
    drawn = make_tokenizer(), make_model().config
    found = sample_sequences(*drawn, mixture, 9, 16, seed=3)
    news, books = (sample_sequences(*drawn, text, 5, 16, seed=3) for text in texts)
    assert torch.equal(found[0::2], news)
    assert torch.equal(found[1::2], books[:4])
    with pytest.raises(UserError, match=r"only 5 of its 5 documents .*, and 6 are asked for"):
        sample_sequences(*drawn, mixture, 12, 16, seed=3)
    with pytest.raises(UserError, match="mixes 2 texts; ask for at least as many samples"):
        sample_sequences(*drawn, mixture, 1, 16, seed=3)
    trained, *apart = (read_examples(make_tokenizer(), 320, text, 512) for text in (mixture, *texts))
    assert [example.ids.tolist() for example in trained] == [one.ids.tolist() for text in apart for one in text]


def test_what_cannot_be_mixed_is_refused(texts, tmp_path, capsys):
    store = tmp_path / "store"
    for given in (texts[:1], [texts[0], texts[0]]):
        assert mixed(store, given) == 2
        assert "give two texts or more, each once" in capsys.readouterr().err
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"q": "why", "a": "so"}) + "\n")
    asked = download(store, file, "--instruction", "{q}", "--response", "{a}")
    assert mixed(store, [texts[0], asked]) == 2
    assert f"{asked / 'documents.jsonl'}: no plain documents" in capsys.readouterr().err
    assert not [*(store / "mix").glob("*/manifest.json")]


def test_an_experiment_calibrates_and_trains_on_a_mixture(experiment, texts, tmp_path):
    parts = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("news", "books")}
    asked = experiment | {
        "store": str(tmp_path / "store"),
        "texts": experiment["texts"] | parts | {"both": {"mix": ["news", "books"]}},
        "calibration": {"text": "both", "samples": 6, "length": 16},
        "methods": [{"mine": {"criterion": "activation_norm", "refit": "least_squares"}}],
        "ratios": [0.2],
        "recovery": {"brief": {"text": "both", "length": 64, "batch_tokens": 64, "micro_batch": 1, "rank": 2}},
        "recoveries": ["brief"],
        "evaluation": {},
    }  # fmt: skip
    plan = Plan(parse(Experiment, asked, "test"))
    (mixture,) = plan.jobs["mix"].values()
    (score,), (prune,) = (plan.jobs[stage].values() for stage in ("score", "prune"))
    trained = plan.jobs["recover"].values()
    assert all(job.inputs["text"] is mixture for job in (score, prune, *trained))
    assert [*plan.documents["calibration"]] == ["news", "books"], "test documents are looked for in each"
    turned = asked["texts"] | {"both": {"mix": ["books", "news"]}}
    assert [*Plan(parse(Experiment, asked | {"texts": turned}, "test")).jobs["mix"]] != [mixture.key]
    estimate = Estimate(plan, Models(check_family(plan.experiment.model.path), "float32"), device_of("cpu"))
    assert estimate.cost(mixture).disk_bytes == sum(estimate.cost(text).disk_bytes for text in mixture.inputs["texts"])
    checkout = Checkout(tmp_path / "checkout", tmp_path / "store")
    assert ran(checkout.snakemake(asked, "all"))["mix"] == 1
    details = json.loads((plan.store.folder(score.recipe) / "manifest.json").read_text())["details"]
    assert "news" in details["text"]
    assert "books" in details["text"]
    assert "books" in (checkout.folder / "results" / "tiny" / "tables" / "overlap.csv").read_text()
    assert "nothing to be done" in checkout.snakemake(asked, "all", "--dry-run").lower()

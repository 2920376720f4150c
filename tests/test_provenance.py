"""How results came to be, from the record beside a file through the store's manifests to the sources."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from hfprune.cli import main
from hfprune.store.keys import file_sha256

STAGES = ("model", "text", "score", "prune", "reference", "measure")


@pytest.fixture(scope="module")
def made(checkpoint, data, tmp_path_factory) -> Path:
    """A folder with a store of a dense and a pruned model, and results of them."""
    root = tmp_path_factory.mktemp("provenance")

    def run(*words, store=True):
        asked = [str(word) for word in (*words, *(["--store", root / "store"] if store else []))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["hfprune", *asked])
            assert main(asked) == 0

    def key(stage, number=-1):
        found = sorted(
            (root / "store" / stage).iterdir(), key=lambda folder: (folder / "manifest.json").stat().st_mtime
        )
        return found[number]

    run("download", "model", "--path", checkpoint)
    run("download", "text", "--path", data / "calibration.jsonl")
    run("score", "--model", key("model"), "--text", key("text"), "--samples", 4, "--length", 16)
    run("prune", "--model", key("model"), "--scores", key("score"), "--ratio", 0.2)
    run("download", "text", "--path", data / "heldout.jsonl")
    run("reference", "--model", key("model"), "--text", key("text"), "--samples", 2, "--length", 16)
    for model in (key("model"), key("prune")):
        run("measure", "--model", model, "--reference", key("reference"))
    results = root / "results"
    run("collect", "--output", results / "metrics.csv", *(root / "store" / "measure").iterdir())
    run("tables", "--metrics", results / "metrics.csv", "--output", results / "tables", store=False)
    run("figures", "--metrics", results / "metrics.csv", "--output", results / "figures", store=False)
    return root


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of all that, to change."""
    return shutil.copytree(made, tmp_path / "copy")


def said(capsys, folder, result, *words) -> str:
    capsys.readouterr()
    assert main(["provenance", str(result), *map(str, words), "--store", str(folder / "store")]) == 0
    return capsys.readouterr().out


def refused(capsys, folder, result, *words) -> str:
    capsys.readouterr()
    assert main(["provenance", str(result), *map(str, words), "--store", str(folder / "store")]) == 2
    return capsys.readouterr().err


def manifests(folder, stage) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob(f"store/{stage}/*/manifest.json")}


@pytest.mark.parametrize("name", ["figures/kl.svg", "figures/kl.png", "tables/summary.tex", "metrics.csv"])
def test_a_result_leads_to_every_artifact_and_the_sources_hashes(made, capsys, name):
    text = said(capsys, made, made / "results" / name)
    assert text.startswith(str(made / "results" / name))
    assert f"sha256 {file_sha256(made / 'results' / name)}" in text
    for stage in STAGES:
        for key, manifest in manifests(made, stage).items():
            assert len(re.findall(rf"\b{stage} {key}$", text, re.MULTILINE)) == 1, "it is said once"
            assert f"code {manifest['code'][:16]}" in text
            if not manifest["inputs"]:
                assert manifest["parameters"]["content"] in text
                assert all(file["sha256"] in text for file in manifest["files"].values())
    (prune,) = manifests(made, "prune").values()
    assert "ratio: 0.2" in text
    assert f"command: hfprune prune {' '.join(prune['command'][2:])}" in text
    assert f"torch {prune['libraries']['torch']}" in text
    assert "edited" not in text


def test_a_value_leads_to_its_own_artifact_alone(made, capsys):
    metrics = made / "results" / "metrics.csv"
    text = said(capsys, made, metrics, "--where", "stage=pruned", "metric=kl")
    (row,) = [row for row in csv.DictReader(metrics.open()) if (row["stage"], row["metric"]) == ("pruned", "kl")]
    assert f"kl = {row['value']} of {row['key']}" in text
    assert set(manifests(made, "measure")) & set(text.split()) == {row["key"]}
    (cut,) = manifests(made, "prune")
    assert cut in text


def test_an_artifact_is_named_by_its_folder_a_file_of_it_or_how_its_key_begins(made, capsys):
    (key,) = manifests(made, "score")
    place = made / "store" / "score" / key
    texts = {
        said(capsys, made, result) for result in (place, place / "manifest.json", place / "scores.safetensors", key[:8])
    }
    assert len(texts) == 1
    assert texts.pop().startswith(f"score {key}\n")


def test_a_file_that_was_edited_is_said_to_be(folder, capsys):
    metrics, table = folder / "results" / "metrics.csv", folder / "results" / "tables" / "summary.csv"
    before = file_sha256(metrics)
    metrics.write_text(metrics.read_text().replace("dense", "Dense"))
    assert f"edited since: it was made with sha256 {before}" in said(capsys, folder, metrics)
    assert f"changed since it was read here: then it had sha256 {before}" in said(capsys, folder, table)


def test_where_an_artifact_is_gone_the_rest_is_followed(folder, capsys):
    (scores,), (cut,), (model,) = (manifests(folder, stage) for stage in ("score", "prune", "model"))
    shutil.rmtree(folder / "store" / "score" / scores)
    text = said(capsys, folder, folder / "store" / "prune" / cut)
    assert f"{scores}\n    | not in {folder / 'store'}: removed since, or made in another store" in text
    assert f"model: model {model}" in text


def test_a_manifest_that_was_edited_is_said_to_be(folder, capsys):
    (cut,) = manifests(folder, "prune")
    file = folder / "store" / "prune" / cut / "manifest.json"
    file.write_text(file.read_text().replace('"ratio": 0.2', '"ratio": 0.3'))
    assert "its manifest was edited since" in said(capsys, folder, cut)
    file.write_text("{")
    assert "its manifest was edited since" in said(capsys, folder, cut)


def test_what_leads_nowhere_is_refused_with_the_remedy(folder, capsys):
    metrics = folder / "results" / "metrics.csv"
    assert "no such file or artifact" in refused(capsys, folder, "results/none.csv")
    assert "key of none in" in refused(capsys, folder, "0" * 16)
    assert "no such column; it has model, stage" in refused(capsys, folder, metrics, "--where", "metrics=kl")
    assert "no row; there stage is dense, pruned." in refused(capsys, folder, metrics, "--where", "stage=cut")
    summary = folder / "results" / "tables" / "summary.csv"
    assert "column `key`, as metrics.csv does" in refused(capsys, folder, summary, "--where", "stage=cut")
    (metrics.parent / ".provenance" / "metrics.csv.json").write_text("{}")
    assert "metrics.csv.json: not a record of how metrics.csv was made" in refused(capsys, folder, metrics)
    shutil.rmtree(metrics.parent / ".provenance")
    assert "no record of how it was made" in refused(capsys, folder, metrics)
    assert "metrics.csv\n" in said(capsys, folder, summary), "it is followed as far as it goes"


def test_the_crate_says_the_same_as_json(made, tmp_path, capsys):
    said(capsys, made, made / "results" / "figures" / "kl.svg", "--crate", tmp_path / "crate")
    graph = {
        each["@id"]: each for each in json.loads((tmp_path / "crate" / "ro-crate-metadata.json").read_text())["@graph"]
    }
    actions = [each for each in graph.values() if each["@type"] == "CreateAction"]
    count = sum(len(manifests(made, stage)) for stage in STAGES)
    assert len(actions) == count + 2, "one an artifact, one for the figure, one for metrics.csv"
    for action in actions:
        (tool,) = [graph[action["instrument"]["@id"]]]
        libraries = [graph[each["@id"]] for each in tool["softwareRequirements"]]
        assert "torch" in {each["name"] for each in libraries}
        assert graph[action["result"]["@id"]]["sha256"] == file_sha256(tmp_path / "crate" / action["result"]["@id"])
    (prune,) = [each for each in actions if each["name"].startswith("make prune")]
    (cut,) = manifests(made, "prune").values()
    objects = [graph[each["@id"]] for each in prune["object"]]
    assert {each["@id"] for each in objects if each["@type"] == "File"} == {
        f"artifacts/{stage}/{cut['inputs'][name]}.json" for name, stage in (("model", "model"), ("scores", "score"))
    }
    assert ("ratio", 0.2) in {(each["name"], each["value"]) for each in objects if each["@type"] == "PropertyValue"}

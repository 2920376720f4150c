"""Grids of every kind on the tiny model, run as a user runs them: what they make, and that a store has it once."""

import copy
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from hfprune.store.artifacts import read
from hfprune.store.filenames import SCORES
from tests.checkouts import Checkout, changed, model_stages, ran
from tests.conftest import by_criteria, sentences, write_lines

PAPER = {
    "methods": [
        "HFPrune",
        "LLM-Pruner",
        {"HFPrune global": {"like": "HFPrune", "allocation": "global"}},
        {"HFPrune global + attention": {"like": "HFPrune", "allocation": "global", "structure": "mlp+attention"}},
    ],
    "ratios": [0.2],
}
REFITS = ["HFPrune", *({way: {"like": "HFPrune", "refit": way}} for way in ("least_squares", "sequential"))]


@pytest.fixture(scope="module")
def paper(tmp_path_factory, experiment) -> Checkout:
    """A checkout in which all of the paper's targets have been made for the tiny model."""
    root = tmp_path_factory.mktemp("grids")
    made = Checkout(root / "checkout", root / "store")
    made.first = ran(made.snakemake(changed(experiment, **PAPER), "paper"))
    return made


def test_one_target_makes_every_table_and_figure_of_the_paper(paper, experiment):
    assert model_stages(paper.first) == {
        "download": 4, "score": 2, "prune": 4, "reference": 1, "measure": 5, "evaluate": 5,
    }  # fmt: skip
    results = paper.folder / "results" / "tiny"
    for number in (1, 2, 4, 5, 6, 7, 8):
        found = pd.read_csv(results / "tables" / f"table{number}.csv", dtype=str, keep_default_na=False)
        ours, theirs = (found[found["source"] == source] for source in ("here", "published"))
        rows = {1: 5, 2: 5, 4: 4, 5: 2, 6: 3, 7: 3, 8: 3}
        assert len(ours) == rows[number], number
        assert len(theirs)
        assert (results / "tables" / f"table{number}.tex").exists()
    metrics = pd.read_csv(results / "metrics.csv", keep_default_na=False)
    pruned = metrics[(metrics["stage"] == "pruned") & (metrics["metric"] == "kl")]
    assert set(pruned["method"]) == {"HFPrune", "LLM-Pruner", "HFPrune global", "HFPrune global + attention"}
    assert sorted(pruned["structure"]) == ["mlp", "mlp", "mlp", "mlp+attention"]
    assert pruned["value"].nunique() == 4
    assert (pruned["ratio_achieved"].astype(float) - 0.2).abs().max() < 3 * 96 / pruned["parameters"].astype(int).min()
    assert {"entropy_cross_entropy.png", "pareto.svg"} <= {file.name for file in (results / "figures").iterdir()}
    assert "Nothing to be done" in paper.snakemake(changed(experiment, **PAPER), "paper")


def test_the_leaderboard_is_a_view_of_the_experiment(paper, experiment):
    assert ran(paper.snakemake(changed(experiment, **PAPER), "leaderboard")) == {"leaderboard": 1}
    results = paper.folder / "results" / "tiny"
    table = pd.read_csv(results / "tables" / "leaderboard.csv").set_index("Method")
    assert set(table.index) == {"dense", "HFPrune", "LLM-Pruner", "HFPrune global", "HFPrune global + attention"}
    assert (table["Prefill (ms)"] > 0).all() and table["Acceptance"]["dense"] == 1 > table["Acceptance"]["HFPrune"] > 0
    assert (results / "figures" / "leaderboard.svg").exists()
    assert "chart-speed" in (results / "leaderboard.html").read_text()


def logs_with(checkout, words):
    """The logs of score jobs that contain these words."""
    return [log for log in (checkout.folder / "logs" / "tiny" / "score").glob("*.log") if words in log.read_text()]


def test_criteria_of_one_seed_are_scored_in_one_pass_and_each_is_an_artifact(experiment, tmp_path):
    criteria = ["cross_entropy", "fisher_token", "wanda"]
    several = changed(experiment, methods=by_criteria(*criteria), calibration={"seeds": [0, 1]})
    elsewhere = Checkout(tmp_path / "elsewhere", tmp_path / "store")
    assert ran(elsewhere.snakemake(several, "agreement")) == {"download": 2, "score": 6, "agreement": 1}
    assert len(logs_with(elsewhere, "score: 100%")) == 2, "one pass for each seed"
    assert len(logs_with(elsewhere, "in the store already, verified")) == 4
    manifests = [json.loads(manifest.read_text()) for manifest in elsewhere.manifests("score")]
    assert {(each["parameters"]["criterion"], each["parameters"]["seed"]) for each in manifests} == {
        (criterion, seed) for criterion in criteria for seed in (0, 1)
    }
    assert {tuple(each["details"]["together"]) for each in manifests} == {tuple(criteria)}
    assert ["draws" in each["parameters"] for each in manifests] == [
        each["parameters"]["criterion"] == "fisher_token" for each in manifests
    ]
    agreement = pd.read_csv(elsewhere.folder / "results" / "tiny" / "tables" / "agreement.csv")
    assert set(agreement["layer"]) == {-1, 0, 1, 2}
    assert len(agreement) == 15 * 4

    times = {str(path): json.loads(path.read_text())["time"] for path in elsewhere.manifests("score")}
    one_more = changed(several, methods=by_criteria(*criteria, "entropy"))
    elsewhere.snakemake(one_more, "agreement")
    assert len(logs_with(elsewhere, "score: 100%")) == 4, "a pass for each seed again, for the new criterion alone"
    assert len(elsewhere.manifests("score")) == 8
    assert [json.loads(path.read_text())["time"] for path in map(Path, times)] == list(times.values())


def test_shards_give_the_scores_of_one_job_and_a_lost_one_is_made_alone(paper, experiment, tmp_path):
    whole = changed(experiment, methods=["SDMPrune"])
    paper.snakemake(whole, "agreement")
    scores = {read(path).key: load_file(path.parent / SCORES) for path in paper.manifests("score")}

    elsewhere = Checkout(tmp_path / "elsewhere", tmp_path / "store")
    sharded = changed(whole, calibration={"shards": 2})
    # Two criteria: cross_entropy makes the light cut of self_distillation.
    assert ran(elsewhere.snakemake(sharded, "agreement")) == {"download": 2, "shard": 4, "score": 2, "agreement": 1}
    for manifest in elsewhere.manifests("score"):
        for name, layer in load_file(manifest.parent / SCORES).items():
            torch.testing.assert_close(layer, scores[read(manifest).key][name], rtol=1e-5, atol=0)

    lost = [path for path in elsewhere.manifests("score") if read(path).parameters["criterion"] == "self_distillation"]
    shards = [path for path in elsewhere.manifests("shard") if "light_cut" in read(path).manifest["inputs"]]
    for path in (*lost, shards[1]):
        shutil.rmtree(path.parent)
    (elsewhere.folder / "results" / "tiny" / "tables" / "agreement.csv").unlink()
    assert ran(elsewhere.snakemake(sharded, "agreement")) == {"shard": 1, "score": 1, "agreement": 1}
    assert "shard" not in elsewhere.planned(changed(sharded, calibration={"shards": 3})), "finished scores need none"


def test_a_grid_of_refits_stands_side_by_side_in_the_results(paper, experiment, tmp_path, monkeypatch):
    for name in ("HF_ENDPOINT", "http_proxy", "https_proxy", "all_proxy"):  # all is downloaded: nobody is asked
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    grid = changed(experiment, methods=REFITS, ratios=[0.2])
    elsewhere = Checkout(tmp_path / "elsewhere", paper.store)
    output = elsewhere.snakemake(grid, "tables", "figures")
    assert model_stages(ran(output)) == {"prune": 2, "measure": 2, "evaluate": 2}
    results = elsewhere.folder / "results" / "tiny"
    metrics = pd.read_csv(results / "metrics.csv", keep_default_na=False)
    kl = (
        metrics[(metrics["metric"] == "kl") & (metrics["stage"] == "pruned")].set_index("method")["value"].astype(float)
    )
    assert kl.index.tolist() == ["HFPrune", "least_squares", "sequential"], "in the config's order"
    assert kl.nunique() == 3
    summary = (results / "tables" / "summary.md").read_text().splitlines()
    pruned = [line.split("|") for line in summary if line.startswith("| pruned |")]
    assert [cells[2].strip() for cells in pruned] == ["HFPrune", "least_squares", "sequential"]
    for made in elsewhere.manifests("prune"):
        manifest = json.loads(made.read_text())
        assert ("text" in manifest["inputs"]) == (manifest["parameters"]["refit"] != "none")


def test_recovery_stands_beside_its_controls(paper, experiment, data, tmp_path):
    records = [{"q": sentences(i, 4), "a": sentences(90 + i, 6)} for i in range(24)]
    lines = write_lines(data / "instructions.jsonl", records)
    small = {"text": "instructions", "length": 384, "batch_tokens": 768, "rank": 2, "epochs": 1, "save_steps": 3}
    trained = changed(
        experiment,
        texts={"instructions": {"path": str(lines), "instruction": "{q}", "response": "{a}"}},
        methods=["LLM-Pruner", {"HFPrune": {"recoveries": ["none", "lora", "taught"]}}],
        ratios=[0.2],
    ) | {"recovery": {"lora": small, "taught": small | {"loss": "distillation"}}}
    elsewhere = Checkout(tmp_path / "elsewhere", paper.store)
    output = elsewhere.snakemake(trained)
    assert model_stages(ran(output)) == {"download": 1, "recover": 3, "measure": 3, "evaluate": 3}
    results = elsewhere.folder / "results" / "tiny"
    metrics = pd.read_csv(results / "metrics.csv", keep_default_na=False)
    found = metrics[metrics["metric"] == "kl"]
    assert [tuple(row) for row in found[["stage", "method", "criterion", "ratio", "recovery"]].to_numpy()] == [
        ("dense", "dense", "none", 0.0, "none"),
        ("pruned", "LLM-Pruner", "cross_entropy", 0.2, "none"),
        ("pruned", "HFPrune", "entropy", 0.2, "none"),
        ("recovered", "HFPrune", "entropy", 0.2, "lora"),
        ("recovered", "HFPrune", "entropy", 0.2, "lora+distillation"),
        ("recovered", "dense", "none", 0.0, "lora"),
    ]
    assert found["value"].nunique() == 6
    costs = metrics[(metrics["group"] == "cost") & (metrics["recovery"] == "lora+distillation")]
    assert sorted(zip(costs["task"], costs["metric"], strict=True)) == sorted(
        [("score", name) for name in ("seconds", "peak_bytes", "tokens", "flops")]
        + [("prune", name) for name in ("seconds", "peak_bytes")]
        + [("recover", name) for name in ("seconds", "peak_bytes", "tokens", "flops")]
    )
    assert (costs["value"].astype(float) > 0).all()
    curves = pd.read_csv(results / "tables" / "losses.csv")
    assert set(curves["model"]) == {"dense, lora", "HFPrune, lora", "HFPrune, lora+distillation"}
    assert (results / "figures" / "losses.svg").exists()
    assert "Recovery" in (results / "tables" / "summary.md").read_text()
    assert "Training (s)" in (results / "tables" / "cost.md").read_text()
    assert "Nothing to be done" in elsewhere.snakemake(trained)
    oftener = copy.deepcopy(trained)
    oftener["recovery"]["lora"] |= {"save_steps": 1, "micro_batch": 2}
    assert not model_stages(elsewhere.planned(oftener)), "how it runs is no part of what it is"
    oftener["recovery"]["lora"]["learning_rate"] = 0.01
    assert model_stages(elsewhere.planned(oftener)) == {"recover": 2, "measure": 2, "evaluate": 2}

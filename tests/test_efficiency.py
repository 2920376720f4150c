"""What a checkpoint costs to run: counted exactly; timed without a test looking at the clock."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hfprune.cli import main
from hfprune.evaluation import timing
from hfprune.evaluation.fidelity import measure, reference
from hfprune.evaluation.timing import decode, time_models
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.models.loading import PREFILL, flops_per_token, load_model, weight_bytes
from hfprune.pruning.surgery import cut
from hfprune.reporting.statistics import MODEL
from hfprune.store.artifacts import Store, peak_memory
from hfprune.store.keys import Recipe
from tests.conftest import FAMILIES, make_model, run_hfprune

WIDTHS = (40, 17, 29)


@pytest.mark.parametrize("length", [16, PREFILL])
@pytest.mark.parametrize("cut_too", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family, cut_too, length):
    model = make_model(family, head_dim=12, tie_word_embeddings=True, attn_implementation="eager")
    if cut_too:
        groups = [torch.tensor([1]), torch.arange(2), torch.tensor([0])]
        cut(model, {"mlp": [torch.arange(width) for width in WIDTHS], "attention": groups})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None], use_cache=False)
    assert flops_per_token(model, length) * length == counter.get_total_flops()


def test_a_measurement_counts_operations_and_bytes(checkpoint, texts, tmp_path):
    (tmp_path / "reference").mkdir()
    reference(tmp_path / "reference", checkpoint, texts, samples=2, length=16, seed=0, dtype="float32")
    details = measure(tmp_path, checkpoint, tmp_path / "reference", "float32")
    model = load_model(checkpoint, "float32")
    assert details["flops_per_token"] == flops_per_token(model, PREFILL)
    assert details["bytes"] == weight_bytes(checkpoint) == (checkpoint / "model.safetensors").stat().st_size
    assert details["bytes"] >= 4 * details["parameters"]


def test_decoding_takes_the_tokens_that_generate_takes(checkpoint, monkeypatch):
    model, prompt = load_model(checkpoint, "float32"), torch.arange(10).repeat(2, 1)
    fed = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, **how: fed.append(ids) or forward(self, ids, **how))
    decode(model, prompt, 6)
    monkeypatch.undo()
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=6,
        max_new_tokens=6,
        eos_token_id=-1,
    )
    assert torch.equal(torch.cat(fed, 1), expected)


def test_the_memory_of_a_model_is_not_that_of_the_process_that_asks(checkpoint):
    ballast = bytearray(500_000_000)
    rows = time_models({"tiny": checkpoint}, "float32", rounds=1, new_tokens=2)
    (peak,) = [row["value"] for row in rows if row["metric"] == "peak_bytes"]
    assert 0 < peak < peak_memory() - len(ballast) // 2


@pytest.mark.parametrize(("free", "loads"), [(2**40, 2), (0, 2 * 3)])
def test_models_that_memory_does_not_hold_together_are_loaded_in_turn(free, loads, checkpoint, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(timing, "load_model", lambda folder, dtype: loaded.append(folder) or load_model(folder, dtype))
    monkeypatch.setattr(timing, "free_bytes", lambda device: free)
    monkeypatch.setattr(timing, "_fresh_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(timing, "peak_of", lambda *_: 1)
    rows = time_models(dict(zip("ab", (checkpoint, checkpoint), strict=True)), "float32", rounds=2, new_tokens=2)
    assert len(loaded) == loads
    assert "time models: 100%" in (shown := capsys.readouterr().err) and "peak memory: 100%" in shown
    assert [row["n"] for row in rows if row["metric"] == "prefill_seconds"] == [2, 2]


def test_the_command_times_models_side_by_side(checkpoint, tmp_path):
    def produce(folder):
        for file in checkpoint.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return {"name": "tiny"}

    store = tmp_path / "store"
    models = [Store(store).make(Recipe("model", {"number": i}), produce) for i in range(2)]
    out = tmp_path / "efficiency.csv"
    options = ("--rounds", 2, "--tokens", 3, "--output", out)
    run_hfprune(store, "efficiency", "--models", *(each.folder for each in models), *options)
    rows = pd.read_csv(out, keep_default_na=False)
    assert len(rows) == 2 * 4
    assert list(rows.columns[: len(MODEL)]) == MODEL, "what joins them with metrics.csv"
    assert set(rows["key"]) == {each.key for each in models}
    assert set(rows["model"]) == {"tiny"} and set(rows["stage"]) == {"dense"} and set(rows["ratio"]) == {0}
    assert set(rows["metric"]) == {"prefill_seconds", "decode_tokens_per_second", "peak_bytes"}
    assert set(rows["task"]) == {"prefill 256", "decode batch 1", "decode batch 8", "inference"}
    assert (rows["value"] > 0).all() and (rows["threads"] > 0).all()
    assert rows["device"].str.len().min() > 0 and rows["versions"].str.contains("torch ").all()


def test_each_criterion_is_timed_alone_with_what_it_needs(checkpoint, data, tmp_path, capsys):
    def stage(*words):
        assert main([*map(str, words), "--store", str(tmp_path / "store")]) == 0
        return Path(capsys.readouterr().out.splitlines()[-1])

    model = stage("download", "model", "--path", checkpoint)
    text = stage("download", "text", "--path", data / "calibration.jsonl")
    sampling = ("--samples", 4, "--length", 32)
    of = ("score", "--model", model, "--text", text, *sampling, "--criterion")
    cut = stage(*of, "cross_entropy", "--together", "entropy", "wanda")
    pass_of = {name: json.loads((stage(*of, name) / "manifest.json").read_text()) for name in ("entropy", "wanda")}
    out = tmp_path / "scoring_cost.csv"
    asked = ["scoring-cost", "--model", model, "--text", text, *sampling, "--rounds", 1, "--output", out, "--criteria"]
    asked = list(map(str, asked))
    assert main([*asked, "entropy", "self_distillation"]) == 2
    needed = "criterion self_distillation takes --light-cut with scores of this model by cross_entropy"
    assert needed in capsys.readouterr().err
    assert main([*asked, "fisherman"]) == 2
    assert "criterion = 'fisherman'" in capsys.readouterr().err
    assert main([*asked, "wanda", "self_distillation", "--light-cut", str(cut)]) == 0
    rows = pd.read_csv(out, keep_default_na=False).set_index("criterion")
    forward = 4 * 32 * flops_per_token(load_model(checkpoint, "float32"), 32)
    assert rows["flops"].to_dict() == {"wanda": forward, "self_distillation": 3 * forward}
    costs = {name: (each["details"]["flops"], each["details"]["flops_together"]) for name, each in pass_of.items()}
    assert costs == {"entropy": (2 * forward, 3 * forward), "wanda": (forward, 3 * forward)}, "each alone; all in one"
    assert rows["light_cut"].to_dict() == {"wanda": "none", "self_distillation": "cross_entropy"}
    assert (rows["tokens"] == 4 * 32).all() and (rows["seconds"] > 0).all() and (rows["n"] == 1).all()
    assert (rows["peak_bytes"] > 1e8).all() and set(rows["key"]) == {model.name}


def test_what_is_timed_of_an_experiment(experiment):
    methods = [{"HFPrune": {"ratios": [0.1, 0.2, 0.3]}}, "SDMPrune", {"biased": {"like": "HFPrune", "refit": "bias"}}]
    methods[2]["biased"]["ratios"] = [0.3]
    asked = experiment | {"methods": methods, "calibration": experiment["calibration"] | {"seeds": [3, 4]}}
    plan = Plan(parse(Experiment, asked, "test"))
    cuts = ("0.1 by HFPrune", "0.2 by HFPrune", "0.3 by HFPrune", "0.3 by biased")
    assert [job.label for job in plan.timed[1:]] == [f"{cut}, seed 3" for cut in cuts]
    assert plan.timed[0].recipe.stage == "model"
    (cut,) = plan.light_cuts
    assert cut.label == "cross_entropy, seed 3"
    sampling = ("--samples", "6", "--length", "32", "--draws", "1", "--products", "auto", "--seed", "3")
    assert plan.sampling == (*sampling, "--dtype", "float32")

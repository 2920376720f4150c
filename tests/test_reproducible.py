"""The same bytes from empty stores; the same to rounding with other batches and thread counts."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from hfprune.evaluation.fidelity import measure
from hfprune.pruning.scoring import unit_scores
from tests.conftest import REPOSITORY, make_model, sentences, write_lines

# Every stage in one process; `salt` sets the random states that each finds. `test_slurm.py` compares a process a stage.
BY_HAND = """
import random, sys
import numpy, torch, yaml
from pathlib import Path
from hfprune.cli import main
from hfprune.experiment.schema import Experiment, parse
from hfprune.experiment.plan import Plan
from hfprune.models import checkpoint
from tests.forks import forked, reloading

checkpoint.subprocess = reloading(forked)
file, store, output, salt = sys.argv[1:]
plan = Plan(parse(Experiment, yaml.safe_load(Path(file).read_text()), file))
for number, job in enumerate(plan.needed):
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(number + int(salt))
    assert main(plan.command(job)) == 0
results = [plan.manifest(job) for model in plan.models for job in model.results]
texts = [word for name, job in plan.documents["fidelity"].items() for word in ("--text", f"{name}={job.key}")]
assert main(["collect", "--store", store, *texts, "--output", f"{output}/metrics.csv", *results]) == 0
assert main(["tables", "--metrics", f"{output}/metrics.csv", "--output", f"{output}/tables"]) == 0
"""


@pytest.fixture(scope="module")
def runs(experiment, tmp_path_factory) -> list[Path]:
    """Two folders, each with a store and results of the tiny experiment with a refit, a training and two criteria."""
    root = tmp_path_factory.mktemp("reproducible")
    records = [{"q": sentences(i, 4), "a": sentences(90 + i, 6)} for i in range(12)]
    lines = write_lines(root / "instructions.jsonl", records)
    instructions = {"path": str(lines), "instruction": "{q}", "response": "{a}"}
    lora = {"text": "instructions", "length": 384, "batch_tokens": 384, "rank": 2, "epochs": 1, "dense": False}
    asked = experiment | {
        "texts": experiment["texts"] | {"instructions": instructions},
        "methods": [
            {"refitted": {"criterion": "entropy", "refit": "least_squares", "recoveries": ["lora"]}},
            {"Fisher": {"criterion": "fisher_token"}},
        ],
        "ratios": [0.2],
        "recovery": {"lora": lora},
    }
    for salt, name in (("7", "once"), ("100", "once again")):
        folder = root / name
        folder.mkdir()
        (folder / "tiny.yaml").write_text(yaml.safe_dump(asked))
        here = {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": salt, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-c", BY_HAND, "tiny.yaml", folder / "store", "results", salt],
            cwd=folder,
            env=os.environ | here | {"HFPRUNE_STORE": str(folder / "store")},
            check=True,
        )
    return [root / "once", root / "once again"]


def files(folder: Path) -> dict[str, Path]:
    """The files of a folder, without the records of when and where they were made."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json" and not {".work", ".provenance"} & set(path.parts)
    }


def untimed(file: Path) -> object:
    """What a file of a store holds, without the seconds that it took."""
    if file.name not in ("losses.jsonl", "recovery.json"):
        return file.read_bytes()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in each.items() if "seconds" not in name} for each in records]


def test_every_artifact_has_the_same_key_and_the_same_bytes(runs):
    once, again = (files(run / "store") for run in runs)
    assert once.keys() == again.keys()
    assert Counter(name.split("/")[0] for name in once if name.endswith(".safetensors")) == {
        "model": 1, "score": 2, "prune": 2, "recover": 1, "reference": 1,
    }  # fmt: skip
    assert [name for name in once if untimed(once[name]) != untimed(again[name])] == []


def test_results_differ_in_nothing_but_timings(runs):
    once, again = (run / "results" for run in runs)
    metrics, theirs = (pd.read_csv(folder / "metrics.csv", dtype=str) for folder in (once, again))
    timed = (metrics["group"] == "cost") & metrics["metric"].isin(["seconds", "peak_bytes"])
    assert set(metrics["group"]) == {"perplexity", "fidelity", "task", "efficiency", "cost"}
    metrics.loc[timed, "value"] = theirs.loc[timed, "value"]
    pd.testing.assert_frame_equal(metrics, theirs)
    for suffix in ("csv", "md", "tex"):
        assert (once / f"tables/summary.{suffix}").read_bytes() == (again / f"tables/summary.{suffix}").read_bytes()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (1, 3), (2, 8)])
def test_scores_with_other_batches_and_threads_agree_to_rounding_and_keep_the_same_units(count, batch, threads):
    tokens = torch.randint(2, 320, (8, 32), generator=torch.Generator().manual_seed(3))
    shape = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}
    criteria = ["entropy", "fisher_token", "wanda"]
    threads(1)
    right = unit_scores(make_model(**shape), tokens, criteria, batch=8)
    threads(count)
    found = unit_scores(make_model(**shape), tokens, criteria, batch=batch)
    for name in criteria:
        for ours, theirs in zip(found[name]["mlp"], right[name]["mlp"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
            kept, rightly = (set(layer.argsort()[102:].tolist()) for layer in (ours, theirs))
            assert kept == rightly, name


def test_fidelity_with_other_threads_agrees_to_rounding(runs, tmp_path, threads):
    store = runs[1] / "store"
    (reference,) = (store / "reference").iterdir()
    for manifest in store.glob("measure/*/manifest.json"):
        if not (model := store / "prune" / json.loads(manifest.read_text())["inputs"]["model"]).is_dir():
            continue
        threads(2)
        measure(tmp_path, model, reference, "float32")
        once, again = (json.loads((folder / "results.json").read_text()) for folder in (manifest.parent, tmp_path))
        for name, estimate in once.items():
            assert again[name]["value"] == pytest.approx(estimate["value"], rel=1e-5), name

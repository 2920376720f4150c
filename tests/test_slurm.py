"""The whole DAG as jobs of a real SLURM, beside a run on this machine."""

import os
import re
import shutil
import signal
import subprocess
import time
from math import ceil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from hfprune.experiment.estimate import device_of, estimate
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.store.filenames import SCORES
from tests.checkouts import DRAWN, Checkout, changed, model_stages, ran

CLUSTER = Path(__file__).parent / "slurm" / "cluster.sh"
COMPUTES = {"shard": True, "score": False, "prune": False, "recover": True, "reference": True, "measure": True}
# Of a cluster without accounting; and to wait less, where nothing is slow.
OPTIONS = ["--slurm-status-command=squeue", "--slurm-init-seconds-before-status-checks=1", "--latency-wait=10"]
OPTIONS += ["--workflow-profile=profiles/slurm", "--seconds-between-status-checks=1"]


@pytest.fixture(scope="module")
def cluster():
    """A running cluster. It ends with the pipe to it, however these tests end."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM is started as root")
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        pytest.skip("there is no SLURM here, and no apt-get to install it with")
    with subprocess.Popen([CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline().strip()
        if said != "ready":
            assert process.wait() == 3, said
            pytest.skip(said)
        yield
        process.stdin.close()


@pytest.fixture(scope="module")
def sharded(experiment) -> dict:
    """The tiny experiment, scored in three shards and trained after the cut."""
    lora = {"text": "calibration", "length": 128, "batch_tokens": 512, "rank": 2, "epochs": 1, "dense": False}
    asked = changed(experiment, calibration={"shards": 3}, ratios=[0.2], recoveries=["lora"])
    return asked | {"recovery": {"lora": lora}}


@pytest.fixture(scope="module")
def runs(cluster, sharded, tmp_path_factory) -> dict:
    """Of a run here and two on the cluster, the checkouts and what the cluster's printed.

    A job is killed in both. The first may not submit it again, the second goes on where the first ended.
    """
    root = tmp_path_factory.mktemp("slurm")
    here, there = (Checkout(root / name, root / f"{name}-store") for name in ("here", "there"))
    run = there.start(sharded, *OPTIONS, "--retries=0")
    cancel(run, "shard")
    here.snakemake(sharded, "collect")  # while the other jobs go on
    killed = run.communicate()[0]
    run = there.start(sharded, *OPTIONS)
    cancel(run, "score")
    after = run.communicate()[0]
    assert run.returncode == 0, after
    return {"here": here, "there": there, "killed": killed, "next": after}


def jobs() -> dict[str, dict[str, str]]:
    """The cluster's jobs, also those that have ended: by rule and key, what SLURM says of the last."""
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner"], capture_output=True, text=True, check=True)
    found = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in shown.stdout.splitlines()]
    return {job["Comment"]: job for job in found if "Comment" in job}


def cancel(run: subprocess.Popen, rule: str) -> None:
    """Kill one job of that rule as soon as it runs."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for comment, job in jobs().items():
            if comment.startswith(f"rule_{rule}") and job["JobState"] == "RUNNING":
                subprocess.run(["scancel", job["JobId"]], check=True)
                return
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    raise AssertionError(f"no job of {rule} ran: {run.communicate()[0]}")


def test_a_cancelled_job_fails_the_run_and_the_next_one_ends_well(runs):
    assert "Error in rule shard" in runs["killed"]
    assert "Traceback" not in runs["killed"]
    before, after = (ran(runs[run]) for run in ("killed", "next"))
    assert before["shard"] < 3
    assert model_stages(before + after) == {
        "download": 4, "score": 1, "shard": 3, "prune": 1, "recover": 1, "reference": 1, "measure": 2, "evaluate": 2,
    }, "and nothing is made again"  # fmt: skip
    assert "Trying to restart job" in runs["next"]


def test_results_are_those_of_a_run_on_one_machine(runs):
    here, there = runs["here"], runs["there"]
    weights = "model.safetensors"
    for stage, name in (("score", SCORES), ("prune", "pruning.json"), ("prune", weights), ("recover", weights)):
        (one,), (other,) = (each.manifests(stage) for each in (here, there))
        assert one.parent.name == other.parent.name, "the same key"
        if name == SCORES:
            for units, scores in load_file(one.parent / name).items():
                assert torch.equal(scores, load_file(other.parent / name)[units])
        else:
            assert (one.parent / name).read_bytes() == (other.parent / name).read_bytes()
    measured = [pd.read_csv(each.folder / "results" / "tiny" / "metrics.csv") for each in (here, there)]
    one, other = (each[each["group"] != "cost"].reset_index(drop=True) for each in measured)
    pd.testing.assert_frame_equal(one, other)
    drawn = {file.stem for file in (there.folder / "results" / "tiny" / "figures").glob("*.svg")}
    assert drawn == {*DRAWN, "losses"} - {"headline"}, "to the end; no cut model goes untrained"


def test_jobs_ask_for_what_is_estimated(runs, sharded):
    plan = Plan(parse(Experiment, sharded | {"store": str(runs["there"].store)}, "test"))
    counted, _ = estimate(plan, device_of("h100"))
    asked = jobs()
    for stage, computes in COMPUTES.items():
        for key, job in plan.jobs[stage].items():
            request, found = counted.request(job), asked[f"rule_{stage}_wildcards_{key}"]
            attempt = 2 if stage == "score" else 1  # the second asks for more
            resources = dict(each.split("=") for each in found["TRES"].split(","))
            assert request.gpus == int(found.get("TresPerJob", "gres:gpu:0")[-1]) == computes
            hours, minutes, _ = found["TimeLimit"].split(":")
            assert 60 * int(hours) + int(minutes) == ceil(attempt * request.seconds / 60)
            assert resources["mem"] == f"{ceil(attempt * request.memory_bytes / 10**6)}M"
    assert not [comment for comment in asked if "download" in comment or "figures" in comment]


def test_a_jobs_log_is_where_a_local_runs_is(runs):
    for rule in ("shard", "measure"):
        logs = [sorted((runs[run].folder / "logs" / "tiny" / rule).glob("*.log")) for run in ("here", "there")]
        assert [log.name for log in logs[0]] == [log.name for log in logs[1]] != []
        assert all(log.stat().st_size for log in logs[1])


def test_an_unknown_device_is_refused_before_anything_runs(sharded, tmp_path):
    fresh = Checkout(tmp_path / "fresh", tmp_path / "store")
    output = fresh.snakemake(sharded, "--config", "gpu=h10", "--dry-run", status=1)
    assert "h10: not known" in output
    assert "Did you mean 'h100'?" in output
    assert "Traceback" not in output

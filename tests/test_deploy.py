"""`snakemake deploy`: GGUF files are compared as llama.cpp computes them, and the table says when not to prune."""

import json
import os
import shutil
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.evaluation.fidelity import measure
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.reporting.deployment import INSTEAD, by_file, read_files, sheet
from hfprune.reporting.figures import deployment
from hfprune.reporting.statistics import MODEL
from hfprune.sharing import quantizer
from hfprune.sharing.gguf_measures import fidelity, output_head, speeds
from hfprune.store.filenames import RESULTS
from tests.checkouts import Checkout
from tests.test_estimate import estimate, make

WRITTEN = {"types": ["f32", "f16", "q8_0"], "samples": 2}


def asked(experiment, store, **deploy) -> Plan:
    keys = {"store": str(store), "ratios": [0.2], "deploy": deploy}
    return Plan(parse(Experiment, experiment | keys, "test"))


@pytest.fixture(scope="module")
def made(experiment, tmp_path_factory):
    """A plan whose GGUF files and dense predictions are in the store; by stage and type the folders and files."""
    plan = asked(experiment, tmp_path_factory.mktemp("deploy") / "store", **WRITTEN)
    files = {}
    # Other tests are of the proofs, which take a process each. Stages switch the hub off for their process.
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.setattr("hfprune.models.checkpoint.prove", lambda *_: {"trust_remote_code": False})
        patch.setattr("hfprune.sharing.model_card.write_card", lambda _: None)
        patch.setattr("hfprune.sharing.gguf_proof.prove", lambda *_: {})
        make(plan, plan.compared_with)
        for job in plan.files:
            name = make(plan, job)["details"]["file"]
            files[job.inputs["model"].recipe.stage, job.parameters["type"]] = plan.store.folder(job.recipe) / name
    return plan, plan.store.folder(plan.compared_with.recipe), files


def test_a_float32_file_is_as_far_from_the_dense_model_as_its_checkpoint(made, tmp_path):
    plan, reference, files = made
    (cut,) = (job for job in plan.jobs["prune"].values())
    measure(tmp_path, plan.store.folder(cut.recipe), reference, "float32")
    right = json.loads((tmp_path / RESULTS).read_text())
    found = fidelity(files["prune", "f32"], reference, None, 1)
    for name in ("kl", "perplexity", "top1_agreement"):
        assert found[name]["value"] == pytest.approx(right[name]["value"], rel=1e-3), name
        assert found[name]["n"] == 4
    assert fidelity(files["model", "f32"], reference, 2, 1)["kl"]["value"] < 1e-6 < found["kl"]["value"]
    rounded = fidelity(files["prune", "q8_0"], reference, None, 1)["kl"]["value"]
    assert rounded == pytest.approx(found["kl"]["value"], rel=0.1)
    assert abs(rounded - found["kl"]["value"]) > 1e-7


def test_the_output_projection_is_read_from_the_file(made):
    _, _, files = made
    exact, rounded = (output_head(files["prune", kind]).weight for kind in ("f32", "q8_0"))
    assert 0 < (exact - rounded).abs().max() < 0.01


def test_every_file_is_timed_in_every_round(made):
    _, _, files = made
    rates = speeds({"a": files["prune", "f16"], "b": files["model", "f16"]}, 1, 2, 1)
    assert {name for name, found in rates.items() if found["prefill"] > 0 and found["decode"] > 0} == {"a", "b"}


def test_files_that_llama_cpp_does_not_read_are_refused(made, tmp_path):
    _, _, files = made
    short = tmp_path / "short.gguf"
    short.write_bytes(files["prune", "f16"].read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"short.gguf: llama.cpp cannot measure it: "):
        speeds({"a": short}, 1, 2, 1)


def run_files(plan, output, *types):
    """`hfprune files` on all files that there are."""
    files = map(plan.manifest, plan.files)
    words = ["--gguf", *files, "--reference", plan.manifest(plan.compared_with), "--types", *types, "--samples", "2"]
    return main(["files", *words, "--rounds", "1", "--output", str(output), "--store", str(plan.store.root)])


@pytest.fixture
def measured(monkeypatch):
    """What llama.cpp would find, by the file's name."""

    def near(file, reference, samples, threads):
        distance = {"F16": 0.0, "Q4_K_M": 0.07}[file.stem.rpartition("-")[2]] + (0.5 if "pruned" in file.name else 0)
        measure = {"value": distance, "stderr": 0.01, "n": samples}
        return {"kl": measure, "perplexity": measure | {"value": 30.0}, "top1_agreement": measure}

    def fast(files, rounds, tokens, threads):
        return {name: {"prefill": 300.0, "decode": 80.0, "version": "1"} for name in files}

    monkeypatch.setattr("hfprune.sharing.gguf_measures.fidelity", near)
    monkeypatch.setattr("hfprune.sharing.gguf_measures.speeds", fast)


def test_k_quants_are_made_of_the_float16_files(made, measured, tmp_path, monkeypatch):
    plan, _, _ = made

    def quantise(source, output, kind):
        assert kind == "q4_k_m" and source.name.endswith("-F16.gguf")
        output.write_bytes(source.read_bytes()[: source.stat().st_size // 3])

    monkeypatch.setattr(quantizer, "is_installed", lambda: True)
    monkeypatch.setattr(quantizer, "quantise", quantise)
    assert run_files(plan, tmp_path / "deploy.csv", "f16", "q4_k_m") == 0
    table = by_file(read_files(tmp_path / "deploy.csv"))
    assert list(zip(table["method"], table["type"], strict=True)) == [
        (method, kind) for method in ("dense", "HFPrune") for kind in ("F16", "Q4_K_M")
    ]
    assert list(table["kl"]) == pytest.approx([0.0, 0.07, 0.5, 0.57])
    assert main(["deploy", "--files", str(tmp_path / "deploy.csv"), "--output", str(tmp_path)]) == 0
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("[ft]*/deploy.*")}
    assert names == {f"tables/deploy.{end}" for end in ("csv", "md", "tex")} | {
        f"figures/deploy.{end}" for end in ("png", "pdf", "svg", "txt")
    }
    written = pd.read_csv(tmp_path / "tables" / "deploy.csv", keep_default_na=False)
    assert list(written[INSTEAD]) == ["", "", "Q4_K_M", "none"]


def test_k_quants_without_a_quantizer_are_left_out_with_the_command(made, measured, tmp_path, monkeypatch, capsys):
    plan, _, files = made
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert run_files(plan, tmp_path / "deploy.csv", "f16", "q4_k_m") == 0
    told = capsys.readouterr().err
    source = files["prune", "f16"]
    assert f"llama-quantize {source} {source.name.replace('F16', 'Q4_K_M')} Q4_K_M" in told
    table = sheet(read_files(tmp_path / "deploy.csv"))
    assert {row.heads[1] for row in table.rows} == {"F16"}
    assert table.notes[-1].startswith("Left out, for want of llama.cpp's quantizer on the PATH: Q4_K_M.")


def test_types_without_a_file_are_refused(made, measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert run_files(made[0], tmp_path / "deploy.csv", "q4_k_m") == 2
    assert "--types q4_k_m: --gguf has no file of a type that can be had here." in capsys.readouterr().err


def files_of(values) -> pd.DataFrame:
    """The csv's rows for (method, ratio, type) -> (MB, KL, decode tokens/s)."""
    rows = []
    for (method, ratio, kind), (size, kl, decode) in values.items():
        model = dict.fromkeys(MODEL, "none") | {"model": "m", "method": method, "ratio": ratio, "type": kind}
        model |= {"stage": "pruned" if ratio else "dense", "criterion": "entropy" if ratio else "none", "seed": np.nan}
        numbers = {"bytes": 1e6 * size, "kl": kl, "perplexity": 30, "top1_agreement": 0.9}
        numbers |= {"prefill_tokens_per_second": 3 * decode, "decode_tokens_per_second": decode}
        rows += [
            model | {"metric": name, "value": value, "stderr": 0.01 if name == "kl" else np.nan, "n": 4}
            for name, value in numbers.items()
        ]
    return pd.DataFrame(rows).assign(key="k", text="quac", device="a CPU", threads=2, xllamacpp="1")


TRIED = {
    ("dense", 0.0, "q8_0"): (145, 0.005, 80), ("dense", 0.0, "q4_k_m"): (105, 0.07, 77),
    ("HFPrune", 0.2, "q8_0"): (116, 0.51, 99), ("HFPrune", 0.2, "q4_k_m"): (89, 0.56, 87),
    ("mine", 0.1, "q8_0"): (130, 0.06, 90),
}  # fmt: skip


def test_the_table_says_where_the_dense_model_is_no_larger_and_nearer():
    table = sheet(files_of(TRIED))
    assert [row.heads for row in table.rows] == [
        ["dense", "Q8_0", ""],
        ["dense", "Q4_K_M", ""],
        ["HFPrune, 20%", "Q8_0", "Q4_K_M"],
        ["HFPrune, 20%", "Q4_K_M", "none"],  # nothing of the dense model is as small
        ["mine, 10%", "Q8_0", "none"],  # the only smaller one is farther
    ]
    cell = table.rows[2].cells["KL (nats/token)"]
    assert (cell.value, cell.high - cell.value) == pytest.approx((0.51, 3.1824 * 0.01), rel=1e-3)  # t of 3 degrees
    assert table.rows[2].cells["MB"].value == pytest.approx(116)


def test_the_figure_has_a_line_a_model_and_a_marker_a_type():
    figure = deployment(files_of(TRIED))
    for axis, place in zip(figure.axes, (0, 2), strict=True):
        points = {
            (round(line.get_xdata()[0]), line.get_ydata()[0], line.get_marker())
            for line in axis.lines
            if line.get_marker() != "None"
        }
        markers = {"q8_0": "o", "q4_k_m": "s"}
        assert points == {(values[place], values[1], markers[kind]) for (_, _, kind), values in TRIED.items()}
        lines = [line for line in axis.lines if line.get_marker() == "None"]
        assert [len(line.get_xdata()) for line in lines] == [2, 2, 1]
    assert {text.get_text() for text in figure.axes[1].texts} == {"dense", "HFPrune, 20%", "mine, 10%"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Q8_0", "Q4_K_M"]


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.csv: cannot be read: "):
        read_files(tmp_path / "none.csv")
    pd.DataFrame({"key": ["k"]}).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(UserError, match=r"other.csv: not a csv of `hfprune files`: it lacks the columns model, "):
        read_files(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("deploy", "message"),
    [
        ({"types": ["q8"]}, r"test: deploy.types.0 = 'q8': .* Did you mean 'q8_0'"),
        ({"types": []}, r"test: deploy.types = \[\]: "),
        ({"types": ["f16", "f16"]}, r"test: deploy.types: 'f16' stands twice"),
        ({"text": "calibration"}, r"test: deploy.text = 'calibration': not one of `fidelity.texts`: heldout"),
        ({"samples": 5}, r"test: deploy.samples = 5: more than fidelity.samples = 4"),
        ({"sample": 4}, r"test: deploy.sample: unknown key. Did you mean 'samples'"),
    ],
)
def test_what_cannot_be_compared_is_refused(deploy, message, experiment, tmp_path):
    with pytest.raises(UserError, match=message):
        asked(experiment, tmp_path, **deploy)


def test_the_plan_has_the_first_seeds_models_and_the_files_that_k_quants_are_made_of(experiment, tmp_path):
    seeds = {"calibration": experiment["calibration"] | {"seeds": [0, 1]}}
    plan = asked(experiment | seeds, tmp_path, types=["q4_k_m", "q8_0"])
    assert {(job.inputs["model"].label, job.parameters["type"]) for job in plan.files} == {
        (model.job.label, kind) for model in (plan.models[0], *plan.cuts) for kind in ("f16", "q8_0")
    }
    assert plan.compared_with in plan.jobs["reference"].values()
    assert not {job.key for job in plan.files} & {job.key for job in plan.needed}, "not part of `all`"
    without = Plan(parse(Experiment, experiment | {"store": str(tmp_path)}, "test"))
    assert not without.files and not without.jobs["gguf"]


def test_the_target_measures_the_files_and_draws(made, experiment, tmp_path):
    plan, _, _ = made
    checkout = Checkout(tmp_path / "checkout", plan.store.root)
    whole = experiment | {"ratios": [0.2], "deploy": WRITTEN | {"types": ["q8_0", "bf16"]}}
    assert checkout.planned(whole, "deploy") == {"gguf": 2, "files": 1, "deploy": 1}
    assert "the config names no types of files: add `deploy: " in checkout.snakemake(experiment, "deploy", status=1)


def test_files_are_estimated_as_large_as_they_are_and_measured_on_the_cpu(made):
    plan, _, files = made
    estimated = estimate(plan, plan.experiment, "h100")
    for job in plan.files:
        size = files[job.inputs["model"].recipe.stage, job.parameters["type"]].stat().st_size
        weights = size - 20_000  # the header, with the vocabulary
        assert weights < estimated.cost(job).disk_bytes < size, job.label
    request = estimated.files(16)
    assert request.gpus == 0 and request.memory_bytes > 0
    assert estimated.files(1).seconds > request.seconds

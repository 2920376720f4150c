"""Stages are declared once: commands, keys and plans follow from the declarations."""

import json
import os
import shutil

import pytest

from hfprune.stages.registry import STAGES
from hfprune.store import keys
from hfprune.store.keys import code_digest
from tests.forks import python

TOY = '''"""How many documents a text has, times a factor."""

from pydantic import Field

from hfprune.stages.declaration import Input, Parameters, Stage, outside_key


class CountParameters(Parameters):
    factor: int = Field(1, ge=1, description="what the number is multiplied by")


def _produce(folder, inputs, parameters, run):
    lines = (inputs["text"].folder / "documents.jsonl").read_text().splitlines()
    (folder / "count.txt").write_text(str(len(lines) * parameters.factor))


@outside_key
def _cost(job, estimate):
    from hfprune.stages.costs import Cost

    return Cost(job.settings.factor, estimate.device.process, 2)


COUNT = Stage(
    name="count",
    module=__name__,
    description="Count documents.",
    examples=("hfprune count --text store/text/KEY --factor 2",),
    parameters=CountParameters,
    produce=_produce,
    inputs={"text": Input(("text",), description="what is counted")},
    cost=_cost,
)
'''
USE = """
import contextlib, io, json, sys
from pathlib import Path
from hfprune.cli import main
from hfprune.experiment.estimate import device_of, estimate
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.store.keys import code_digest

plan = Plan(parse(Experiment, json.loads(sys.argv[1]), "tiny"))
text = plan.documents["calibration"]["calibration"]
job = plan.add("count", {"factor": 3}, {"text": text}, "count")
help = io.StringIO()
with contextlib.redirect_stdout(help), contextlib.suppress(SystemExit):
    main(["count", "--help"])
statuses = [main(plan.command(each)) for each in (text, job)]
folder = plan.store.folder(job.recipe)
print(json.dumps({
    "flops": estimate(plan, device_of("cpu"))[0].cost(job).flops,
    "gpus": estimate(plan, device_of("h100"))[0].request(job).gpus,
    "help": help.getvalue(),
    "statuses": statuses,
    "command": plan.command(job),
    "count": (folder / "count.txt").read_text(),
    "manifest": json.loads((folder / "manifest.json").read_text()),
    "code": code_digest("hfprune.stages.count"),
    "again": plan.add("count", {"factor": 3}, {"text": text}, "count") is job,
    "refused": main(["count", "--text", str(folder)]),
}))
"""


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the package, which keys are made of."""
    folder = tmp_path / "hfprune"
    shutil.copytree(keys.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(keys, "PACKAGE", folder)
    code_digest.cache_clear()
    yield folder
    code_digest.cache_clear()


def test_a_stage_in_one_file_is_a_command_has_a_key_and_stands_in_a_plan(copied, experiment):
    (copied / "stages" / "count.py").write_text(TOY)
    words = ["-c", USE, json.dumps(experiment | {"store": str(copied.parent / "store")})]
    status, printed, said = python(words, os.environ | {"PYTHONPATH": str(copied.parent)}, copied.parent)
    assert status == 0, said
    found = json.loads(printed.splitlines()[-1])
    assert "example:\n  hfprune count --text store/text/KEY --factor 2" in found["help"]
    assert "what the number is multiplied by (default: 1)" in found["help"]
    assert found["statuses"] == [0, 0]
    assert found["count"] == "36"
    manifest = found["manifest"]
    assert (manifest["stage"], manifest["parameters"], list(manifest["inputs"])) == ("count", {"factor": 3}, ["text"])
    assert manifest["code"] == found["code"]
    assert found["command"][:2] == ["count", "--text"]
    assert found["command"][3:7] == ["--factor", "3", "--key", manifest["key"]]
    assert (found["flops"], found["gpus"]) == (3, 0)
    assert found["again"]
    assert found["refused"] == 2
    assert "hfprune count: " in said
    assert "expected one of text" in said


def digests() -> dict[str, str]:
    """The digest of every stage's code."""
    code_digest.cache_clear()
    return {name: code_digest(stage.module) for name, stage in STAGES.items()}


@pytest.fixture(scope="module")
def before():
    """The same of the package as it is."""
    return digests()


SCORING = {"shard", "score"}
FIDELITY = {"reference", "measure"}
TASKS = {"evaluate", "evaluate-task"}


@pytest.mark.parametrize(
    ("edited", "changed"),
    [
        ("reporting/figures", set()),
        ("cli", set()),
        ("experiment/schema", set()),
        ("experiment/plan", set()),
        ("stages/run", set()),
        ("stages/registry", set()),
        ("sharing/model_card", set()),
        ("sharing/gguf", {"gguf"}),
        ("stages/score", SCORING),
        ("stages/measure", {"measure"}),
        ("stages/evaluate", TASKS),
        ("stages/order", {"order"}),
        ("stages/prune", {"prune"}),
        ("stages/recover", {"recover"}),
        ("stages/search", {"search"}),
        ("stages/budget", {"search", "prune"}),
        ("pruning/width_search", {"search"}),
        ("pruning/refit", {"prune", "order", "search", "recover"}),
        ("evaluation/fidelity", FIDELITY),
        ("data/sampling", {*SCORING, *FIDELITY, *TASKS, "order", "search", "prune", "recover"}),
        ("stages/declaration", set(STAGES)),
    ],
)
def test_a_key_follows_the_code_that_its_stage_runs_and_no_other(edited, changed, before, copied):
    file = copied / f"{edited}.py" if (copied / f"{edited}.py").exists() else copied / edited / "__init__.py"
    file.write_text(file.read_text() + "\nEDITED = 1\n")
    after = digests()
    assert {name for name in STAGES if before[name] != after[name]} == changed


def test_what_makes_an_artifact_is_in_its_key_and_what_explains_it_is_not(before, copied):
    file = copied / "stages" / "prune.py"
    text = file.read_text()
    assert (
        text.count("from `hfprune score`")
        == text.count("part of each layer to cut")
        == text.count("calibration = scores.para")
        == 1
    )
    file.write_text(
        text.replace("from `hfprune score`", "by `hfprune score`").replace("part of each layer", "some of each layer")
    )
    assert digests() == before
    file.write_text(text.replace("calibration = scores.para", "calibration = dict() or scores.para"))
    assert {name for name, digest in digests().items() if digest != before[name]} == {"prune"}

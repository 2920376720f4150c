"""What a store is said to hold, and what may go: on plans of tiny experiments, their artifacts made of nothing."""

import builtins
import copy
import sys
from pathlib import Path

import pytest
import yaml

from hfprune.cli import main
from hfprune.experiment.inventory import human
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import load
from hfprune.stages.run import recipe
from hfprune.stages.wheel import WHEEL as WHEEL_STAGE
from hfprune.stages.wheel import WheelParameters
from hfprune.store import artifacts
from hfprune.store.artifacts import Store
from hfprune.store.keys import Recipe

WHEEL = {"wheel": "llm==1", "file": "a.gguf", "sha256": "0" * 64}


def wheel_recipe(requirement: str) -> Recipe:
    return recipe(WHEEL_STAGE, WheelParameters(wheel=requirement), {})


def write(folder):
    (folder / "data.bin").write_bytes(bytes(1000))
    (folder / "source.bin").symlink_to(__file__)


class Shelf:
    """A store, and experiments whose artifacts are in it."""

    def __init__(self, folder: Path, experiment: dict, capsys) -> None:
        self.folder, self.experiment, self.capsys = folder, experiment, capsys
        self.store = Store(folder / "store")

    def config(self, name: str, ratio: float) -> Path:
        """The file of an experiment with a task, two shards of its scores, and a model out of a wheel."""
        made = copy.deepcopy(self.experiment) | {"experiment": name, "store": str(self.store.root)}
        made["model"] = WHEEL | {"dtype": "float32"}
        made["calibration"]["shards"] = 2
        made["ratios"] = [ratio]
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(made))
        return file

    def make(self, config: Path) -> None:
        """All artifacts of an experiment."""
        self.store.make(wheel_recipe(WHEEL["wheel"]), write)
        for jobs in Plan(load(config)).jobs.values():
            for job in jobs.values():
                self.store.make(job.recipe, write)
                for key in self.parts(job):
                    self.put("evaluate-task", key)

    def parts(self, job) -> list[str]:
        """The tasks' own artifacts of an evaluation."""
        return [key for name, key in job.recipe.inputs.items() if job.recipe.stage == "evaluate" and name != "model"]

    def put(self, stage: str, key: str) -> None:
        """An artifact of which only the key is known."""
        (self.store.root / stage / key).mkdir(parents=True, exist_ok=True)
        (self.store.root / stage / key / "manifest.json").write_text("{}")

    def __call__(self, *words) -> tuple[int, str]:
        """Run `hfprune store`; its exit status, and what it printed."""
        self.capsys.readouterr()
        status = main(["store", *map(str, words)])
        said = self.capsys.readouterr()
        return status, said.out + said.err

    def held(self) -> set[str]:
        """What is in the store, as stage/key."""
        return {
            str(path.parent.relative_to(self.store.root)) for path in self.store.root.glob("[a-z]*/*/manifest.json")
        }


@pytest.fixture
def shelf(tmp_path, experiment, capsys):
    return Shelf(tmp_path, experiment, capsys)


def row(output: str, *words: str) -> str:
    (found,) = [line for line in output.splitlines() if all(word in line for word in words)]
    return found


def test_the_list_says_what_there_is_from_what_how_big_and_for_whom(shelf):
    first, second = shelf.config("first", 0.1), shelf.config("second", 0.2)
    for config in (first, second):
        shelf.make(config)
    status, output = shelf("list", first, second)
    assert status == 0
    (model,) = Plan(load(first)).jobs["model"]
    (cut,) = Plan(load(first)).jobs["prune"].values()
    manifest = (shelf.store.folder(cut.recipe) / "manifest.json").stat().st_size
    line = row(output, cut.key, "ratio 0.1")
    assert " ".join([model, cut.recipe.inputs["scores"]]) in line
    assert f" {human(1000 + manifest)} " in line, "a link's file is not the store's"
    assert line.endswith("  first")
    assert row(output, "model  ", model, "llm==1").endswith("  first, second")
    assert row(output, "wheel  ", "llm==1").endswith("  first, second")
    status, output = shelf("list", "--store", shelf.store.root)
    assert row(output, cut.key, "ratio 0.1").endswith("  -")
    assert f"{len(shelf.held())} artifacts, 0 leftovers: " in output


def test_a_store_that_is_not_there_is_named(shelf):
    status, output = shelf("list", "--store", shelf.folder / "none")
    assert (status, output) == (
        2,
        f"hfprune store: {shelf.folder}/none: no such folder. Name the store by --store or HFPRUNE_STORE.\n",
    )


def test_verify_names_every_damaged_artifact_and_only_those(shelf):
    made = [shelf.store.make(Recipe("score", {"seed": seed}), write) for seed in range(4)]
    status, output = shelf("verify", "--store", shelf.store.root)
    assert status == 0
    assert "4 artifacts: every file is as its manifest says" in output
    (made[1].folder / "data.bin").write_bytes(bytes(999))
    (made[2].folder / "manifest.json").write_text('{"stage": "score"')
    assert shelf("verify", made[0].key, "--store", shelf.store.root)[0] == 0
    status, output = shelf("verify", "--store", shelf.store.root)
    assert status == 2
    assert f"{made[1].folder}/data.bin: refused: 999 bytes, the manifest says 1,000" in output
    assert f"{made[2].folder}/manifest.json: refused: not a manifest" in output
    assert "2 artifacts are not whole. Run their experiments again" in output
    assert shelf.held() == {f"score/{made[number].key}" for number in (0, 3)}
    assert shelf("verify", "--store", shelf.store.root)[0] == 0
    status, output = shelf("list", "--store", shelf.store.root)
    assert "2 artifacts, 2 leftovers" in output
    assert "damaged, set aside" in row(output, made[1].key)
    status, output = shelf("verify", "f" * 16, "--store", shelf.store.root)
    assert (status, f"no artifact {'f' * 16}; " in output) == (2, True)


def test_prune_removes_what_no_named_experiment_uses_and_nothing_else(shelf):
    first, second = shelf.config("first", 0.1), shelf.config("second", 0.2)
    shelf.make(first)
    (shelf.store.root / "my-notes").mkdir()
    (shelf.store.root / "my-notes" / "manifest.json").write_text("{}")
    plan = Plan(load(first))
    needed = {f"{job.recipe.stage}/{job.key}" for job in plan.needed}
    needed |= {f"evaluate-task/{key}" for job in plan.needed for key in shelf.parts(job)}
    needed |= {f"wheel/{wheel_recipe(WHEEL['wheel']).key}"}
    shards = {each for each in needed if each.startswith("shard/")}
    assert len(shards) == 2
    assert shelf.held() == needed
    shelf.make(second)
    old = shelf.store.make(wheel_recipe("old==1"), write)
    unused = shelf.held() - needed | shards | {f"wheel/{old.key}"}

    status, output = shelf("prune", first)
    assert status == 0
    assert {"/".join(line.split()[:2]) for line in output.splitlines()[1:-2]} == unused
    assert "Nothing is removed: no terminal to ask on. Give --yes" in output
    assert shelf.held() > needed

    assert shelf("prune", "--yes", first)[0] == 0
    assert shelf.held() == needed - shards
    assert not shelf.store.leftovers()
    assert (shelf.store.root / "my-notes" / "manifest.json").exists()
    assert "0 artifacts, 0 leftovers" in shelf("prune", "--yes", first)[1]

    (score,) = plan.jobs["score"].values()
    shelf.store.remove("score", score.key, shelf.store.folder(score.recipe))
    shelf.make(first)
    shelf.store.remove("score", score.key, shelf.store.folder(score.recipe))
    shelf("prune", "--yes", first)
    assert shelf.held() == needed - {f"score/{score.key}"}, "scores that are missing need their shards"


def test_prune_asks_where_there_is_somebody_to_ask(shelf, monkeypatch):
    config = shelf.config("first", 0.1)
    made = shelf.store.make(Recipe("score", {}), write)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, left in (("y", {f"score/{made.key}"}), ("yes", set())):
        monkeypatch.setattr(builtins, "input", lambda question, answer=answer: answer)
        assert shelf("prune", config)[0] == 0
        assert shelf.held() == left


def test_prune_refuses_experiments_that_have_other_stores(shelf):
    made = shelf.store.make(Recipe("score", {}), write)
    first, second = shelf.config("first", 0.1), shelf.config("second", 0.2)
    second.write_text(second.read_text().replace(str(shelf.store.root), "/elsewhere"))
    status, output = shelf("prune", "--yes", first, second)
    assert (status, "these experiments have 2 stores, /elsewhere, " in output) == (2, True)
    second.write_text("experiment: second\n")
    assert shelf("prune", "--yes", first, second)[0] == 2
    assert shelf.held() == {f"score/{made.key}"}


def test_prune_keeps_what_an_experiment_can_go_on_from_and_what_is_being_made(shelf):
    config = shelf.config("first", 0.1)
    (model,) = Plan(load(config)).jobs["model"]
    killed = {name: shelf.store.root / ".work" / f"{name}-0" for name in (f"model-{model}", f"score-{'f' * 16}")}
    for folder in killed.values():
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(bytes(10))

    def at_work(folder):
        write(folder)
        status, output = shelf("prune", "--yes", config)
        assert status == 0
        assert f"score {Recipe('score', {}).key}: stays, a process is making it" in output
        assert (folder / "data.bin").exists()

    shelf.store.make(Recipe("score", {}), at_work)
    assert [folder.exists() for folder in killed.values()] == [True, False]


def test_what_is_removed_is_never_half_there(shelf, monkeypatch):
    made = shelf.store.make(Recipe("score", {}), write)

    def killed(path):
        raise SystemExit

    monkeypatch.setattr(artifacts.shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        shelf.store.remove("score", made.key, made.folder)
    monkeypatch.undo()
    assert not made.folder.exists()
    assert [folder.name for *_, folder in shelf.store.leftovers()] == [f"score-{made.key}-removed"]
    shelf("prune", "--yes", shelf.config("first", 0.1))
    assert not shelf.store.leftovers()

"""Results are whole or not there: what a command leaves that fails or is killed, and what the next run makes."""

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.evaluation import timing
from hfprune.store.keys import file_sha256
from hfprune.store.results import publish
from tests.conftest import hfprune


def files(folder: Path) -> dict[str, str]:
    """The content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_results_stand_in_their_places_when_all_are_written_each_with_its_record(tmp_path):
    source = tmp_path / "source.csv"
    source.write_text("x\n")
    with publish([source]) as scratch:
        (scratch.folder(tmp_path / "out" / "tables") / "a.csv").write_text("a\n")
        (scratch.folder(tmp_path / "out" / "figures") / "a.svg").write_text("<svg>")
        scratch.path(tmp_path / "out" / "b.csv").write_text("b\n")
        assert not [name for name in files(tmp_path / "out") if ".aside-" not in name]
    places = [tmp_path / "out" / name for name in ("b.csv", "figures/a.svg", "tables/a.csv")]
    assert sorted(scratch.places) == places
    for place in places:
        said = json.loads((place.parent / ".provenance" / f"{place.name}.json").read_text())
        assert said["sha256"] == file_sha256(place)
        (made_from,) = said["made_from"]
        assert (place.parent / made_from["file"]).resolve() == source
        assert made_from["sha256"] == file_sha256(source)
    assert len(files(tmp_path / "out")) == 6, "nothing else is left"


@pytest.mark.parametrize("old", [True, False])
def test_a_command_that_fails_leaves_what_was_there(old, tmp_path):
    if old:
        with publish([]) as scratch:
            for name in ("a.csv", "b.csv"):
                (scratch.folder(tmp_path) / name).write_text("old\n")
    before = files(tmp_path)
    for fault in (ValueError, KeyboardInterrupt):
        with pytest.raises(fault), publish([]) as scratch:
            (scratch.folder(tmp_path) / "a.csv").write_text("new\n")
            raise fault
        assert files(tmp_path) == before
        assert not list(tmp_path.glob(".aside-*"))


def test_of_two_runs_at_once_each_writes_by_itself(tmp_path):
    with publish([]) as one:
        (one.folder(tmp_path) / "a.csv").write_text("one\n")
        with publish([]) as other:
            (other.folder(tmp_path) / "a.csv").write_text("oth")
            (one.folder(tmp_path) / "b.csv").write_text("one\n")
        assert (tmp_path / "a.csv").read_text() == "oth"
        assert not (tmp_path / "b.csv").exists()
    assert {(tmp_path / name).read_text() for name in ("a.csv", "b.csv")} == {"one\n"}
    assert json.loads((tmp_path / ".provenance" / "a.csv.json").read_text())["sha256"] == file_sha256(
        tmp_path / "a.csv"
    )


def test_a_source_that_another_run_replaces_meanwhile_is_named(tmp_path):
    source = tmp_path / "metrics.csv"
    source.write_text("one\n")
    with pytest.raises(UserError, match=r"metrics\.csv: has changed while it was read"), publish([source]) as scratch:
        scratch.path(tmp_path / "out" / "a.csv").write_text(source.read_text())
        source.write_text("two\n")
    assert not files(tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match=r"file: cannot be written \(File exists\)"), publish() as scratch:
        scratch.folder(tmp_path / "file")
    with pytest.raises(UserError, match=r"below: cannot be written \(Not a directory\)"), publish() as scratch:
        scratch.folder(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"folder: cannot be written \(Is a directory\)"), publish() as scratch:
        scratch.path(tmp_path / "folder").write_text("")
    for name in ("null", "stdout"):
        (tmp_path / name).symlink_to(f"/dev/{name}")
        with pytest.raises(UserError, match=f"{name}: a link or a device"), publish() as scratch:
            scratch.path(tmp_path / name)
    assert not list(tmp_path.rglob(".aside-*"))
    with pytest.raises(FileNotFoundError), publish() as scratch:
        scratch.path(tmp_path / "out").write_text((tmp_path / "none").read_text())


def test_only_what_a_killed_process_left_is_removed(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    with publish() as scratch:
        mine = scratch.folder(tmp_path)
        dead, away = (
            tmp_path / mine.name.replace(f"-{os.getpid()}-", f"-{process.pid}-").replace("aside-", f"aside-{host}")
            for host in ("", "x")
        )
        for path in (dead, away):
            path.mkdir()
        with publish() as other:
            assert other.folder(tmp_path) != mine
            assert (dead.exists(), away.exists(), mine.exists()) == (False, True, True)


def test_a_folder_appears_as_a_whole_and_is_merged_into_one_that_is_there(tmp_path):
    for name in ("a", "b"):
        with publish() as scratch:
            made = scratch.path(tmp_path / "crate")
            (made / "data").mkdir(parents=True)
            (made / "data" / name).write_text(name)
            (made / "both").write_text(name)
    assert files(tmp_path) == {"crate/both": "b", "crate/data/a": "a", "crate/data/b": "b"}


@pytest.fixture(scope="module")
def commands(checkpoint, data, experiment, tmp_path_factory) -> dict[str, list]:
    """Every command that writes results, by name: its words, all but the place that it writes to. Each times once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("time_models", "time_scoring"):
            patch.setattr(timing, name, once(getattr(timing, name)))
        yield _commands(checkpoint, data, experiment, tmp_path_factory)


def once(measure):
    """A function that measures at its first call, and says the same again."""
    made = []

    def call(*given, **options):
        if not made:
            made.append(list(measure(*given, **options)))
        return made[0]

    return call


def _commands(checkpoint, data, experiment, tmp_path_factory) -> dict[str, list]:
    root = tmp_path_factory.mktemp("results")
    store = root / "store"

    def run(*words) -> list[Path]:
        stage = words[1] if words[0] == "download" else words[0]
        assert main([*map(str, words), "--store", str(store)]) == 0
        return sorted((store / stage).iterdir())

    (model,) = run("download", "model", "--path", checkpoint)
    (text,) = run("download", "text", "--path", data / "calibration.jsonl")
    (heldout,) = set(run("download", "text", "--path", data / "heldout.jsonl")) - {text}
    (task,) = run("download", "task", "--name", "boolq", "--path", data / "boolq.jsonl")
    (scores,) = run("score", "--model", model, "--text", text, "--samples", 4, "--length", 16)
    (cut,) = run("prune", "--model", model, "--scores", scores, "--ratio", 0.2)
    (reference,) = run("reference", "--model", model, "--text", heldout, "--samples", 2, "--length", 16)
    for checked in (model, cut):
        measured = run("measure", "--model", checked, "--reference", reference)
        evaluated = run("evaluate", "--model", checked, "--tasks", task, "--limit", 4)
    there = ["--store", store]
    metrics, timings = root / "metrics.csv", root / "efficiency.csv"
    results = [*measured, *evaluated]
    time_models = ["efficiency", "--models", model, cut, "--rounds", 1, "--tokens", 2, *there]
    assert main([*map(str, ["collect", "--output", metrics, *results, *there])]) == 0
    assert main([*map(str, [*time_models, "--output", timings])]) == 0
    (root / "config.yaml").write_text(json.dumps(experiment))
    return {
        "collect": ["collect", *results, *there, "--output"],
        "differences": ["differences", *results, *there, "--output"],
        "headline": ["headline", *measured, *there, "--output"],
        "profile": ["profile", *measured, *there, "--output"],
        "tables": ["tables", "--metrics", metrics, "--output"],
        "figures": ["figures", "--metrics", metrics, "--output"],
        "pareto": ["pareto", "--metrics", metrics, "--timings", timings, "--output"],
        "compare": ["compare", scores, "--output"],
        "widths": ["widths", cut, *there, "--output"],
        "table": ["table", "table1", *results, *there, "--output"],
        "overlap": ["overlap", "--calibration", f"a={text}", "--task", f"b={task}", "--output"],
        "page": ["page", metrics, "--title", "All", "--caption", "", "--output"],
        "artifacts": ["artifacts", model, cut, "--output"],
        "efficiency": [*time_models, "--output"],
        "scoring-cost": [
            *("scoring-cost", "--model", model, "--text", text, "--criteria", "entropy"),
            *("--samples", 2, "--length", 16, "--rounds", 1, "--output"),
        ],
        "config": ["config", root / "config.yaml", "--output"],
        "schema": ["config", "--schema"],
        "crate": ["provenance", metrics, *there, "--crate"],
        "export": ["export", "--model", cut, "--results", *results, *there, "--output"],
    }


NAMES = (
    "collect", "headline", "differences", "profile", "tables", "figures", "pareto", "compare", "widths", "table",
    "overlap", "page", "artifacts", "efficiency", "scoring-cost", "config", "schema", "crate", "export",
)  # fmt: skip


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    """A file system in memory, of 4 MiB."""
    folder = tmp_path_factory.mktemp("disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_on_a_full_disk_a_command_leaves_nothing_and_then_all(name, commands, disk, capsys):
    filler = disk / "filler"
    # Of 4 KiB that are free: where the first of several files still fits, or a file does and its record does not.
    for pages in (0, 1, 2):
        place = disk / f"{name}{pages}"
        filler.write_bytes(bytes(4 * 2**20 - pages * 4096))
        capsys.readouterr()
        status = main([*map(str, commands[name]), str(place)])
        filler.unlink()
        if status == 0:
            break
        said = capsys.readouterr().err
        assert re.search(rf"{place}\S*: no room on the disk, [\d,]+ bytes are free .* run again\.", said), said
        assert not files_of(disk)
    assert pages > 0
    assert main([*map(str, commands[name]), str(disk / name)]) == 0
    made = files_of(disk)
    assert made
    for path in made:
        if path.parent.name == ".provenance":
            result = path.parent.parent / path.stem
            assert json.loads(path.read_text())["sha256"] == file_sha256(result)
        elif path.suffix == ".csv":
            assert len({len(row) for row in csv.reader(path.open())}) == 1, "every row is whole"
    for path in made:
        path.unlink()


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["tables", "widths"])
def test_after_kill_9_between_two_results_the_next_run_makes_all_of_them(name, commands, tmp_path):
    words = [*commands[name], tmp_path]
    assert hfprune(*words)[0] == 0
    whole = {path.relative_to(tmp_path): path.read_bytes() for path in files_of(tmp_path)}
    results = [path for path in files_of(tmp_path) if path.parent.name != ".provenance"]
    for path in results:
        path.write_text("old")
    assert hfprune(*words, killed="result")[0] == -9
    assert sum(path.read_text(errors="replace") != "old" for path in results) == 1
    records = {path: json.loads((path.parent / ".provenance" / f"{path.name}.json").read_text()) for path in results}
    for path, said in records.items():
        assert (said["sha256"] == file_sha256(path)) == (path.read_text(errors="replace") != "old"), "it shows"
    assert hfprune(*words)[0] == 0
    again = {path.relative_to(tmp_path): path.read_bytes() for path in files_of(tmp_path)}
    assert set(again) == set(whole), "and nothing is left of the killed one"
    assert all(again[path] == content for path, content in whole.items() if path.parent.name != ".provenance")

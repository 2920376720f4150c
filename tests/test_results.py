"""Results are whole or not there: what a command leaves that fails, is killed, or meets a full disk; and the next run."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from hfprune.errors import UserError
from hfprune.store.keys import file_sha256
from hfprune.store.results import written


def files(folder: Path) -> dict[str, str]:
    """The content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_results_stand_in_their_places_when_all_are_written_each_with_its_record(tmp_path):
    source = tmp_path / "source.csv"
    source.write_text("x\n")
    with written([source]) as aside:
        (aside.folder(tmp_path / "out" / "tables") / "a.csv").write_text("a\n")
        (aside.folder(tmp_path / "out" / "figures") / "a.svg").write_text("<svg>")
        aside.path(tmp_path / "out" / "b.csv").write_text("b\n")
        assert not [name for name in files(tmp_path / "out") if ".aside-" not in name]
    places = [tmp_path / "out" / name for name in ("b.csv", "figures/a.svg", "tables/a.csv")]
    assert sorted(aside.places) == places
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
        with written([]) as aside:
            for name in ("a.csv", "b.csv"):
                (aside.folder(tmp_path) / name).write_text("old\n")
    before = files(tmp_path)
    for fault in (ValueError, KeyboardInterrupt):
        with pytest.raises(fault), written([]) as aside:
            (aside.folder(tmp_path) / "a.csv").write_text("new\n")
            raise fault
        assert files(tmp_path) == before
        assert not list(tmp_path.glob(".aside-*"))


def test_of_two_runs_at_once_each_writes_by_itself(tmp_path):
    with written([]) as one:
        (one.folder(tmp_path) / "a.csv").write_text("one\n")
        with written([]) as other:
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
    with pytest.raises(UserError, match=r"metrics\.csv: has changed while it was read"), written([source]) as aside:
        aside.path(tmp_path / "out" / "a.csv").write_text(source.read_text())
        source.write_text("two\n")
    assert not files(tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match=r"file: cannot be written \(File exists\)"), written() as aside:
        aside.folder(tmp_path / "file")
    with pytest.raises(UserError, match=r"below: cannot be written \(Not a directory\)"), written() as aside:
        aside.folder(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"folder: cannot be written \(Is a directory\)"), written() as aside:
        aside.path(tmp_path / "folder").write_text("")
    assert not list(tmp_path.rglob(".aside-*"))
    with pytest.raises(FileNotFoundError), written() as aside:
        aside.path(tmp_path / "out").write_text((tmp_path / "none").read_text())


def test_only_what_a_killed_process_left_is_removed(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    with written() as aside:
        mine = aside.folder(tmp_path)
        dead, away = (
            tmp_path / mine.name.replace(f"-{os.getpid()}-", f"-{process.pid}-").replace("aside-", f"aside-{host}")
            for host in ("", "x")
        )
        for path in (dead, away):
            path.mkdir()
        with written() as other:
            assert other.folder(tmp_path) != mine
            assert (dead.exists(), away.exists(), mine.exists()) == (False, True, True)


def test_a_folder_appears_as_a_whole_and_is_merged_into_one_that_is_there(tmp_path):
    for name in ("a", "b"):
        with written() as aside:
            made = aside.path(tmp_path / "crate")
            (made / "data").mkdir(parents=True)
            (made / "data" / name).write_text(name)
            (made / "both").write_text(name)
    assert files(tmp_path) == {"crate/both": "b", "crate/data/a": "a", "crate/data/b": "b"}

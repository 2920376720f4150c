"""`hfprune doctor`, and the workflow that `hfprune run` finds."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from hfprune.cli import main
from hfprune.experiment import doctor, workflow_files
from hfprune.experiment.doctor import GIB, Machine, fits
from tests.conftest import REPOSITORY


def test_it_tells_what_fits_into_memory():
    large = {size: (scores, trains) for size, _, scores, trains in fits(Machine("a GPU", 80 * GIB, "bfloat16"))}
    assert large[8] == (True, True)
    assert large[32] == (False, False)
    small = {size: (weights, scores) for size, weights, scores, _ in fits(Machine("a laptop", 8 * GIB, "float32"))}
    assert small[1] == (pytest.approx(4e9 / GIB), True)
    assert not small[3][1]
    between = Machine("between", int(2 * 2e9), "bfloat16")  # twice the weights of 1B
    assert [row[2:] for row in fits(between) if row[0] == 1] == [(True, False)]


def test_it_names_the_store_and_how_to_do_without_a_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["doctor", "--store", str(tmp_path / "not" / "yet")]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/not/yet: " in printed and "GiB of disk free" in printed
    assert "take models and texts from `path` or `wheel`" in printed
    assert not (tmp_path / "not").exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert "NOT writable: set HFPRUNE_STORE" in doctor._store(tmp_path)


def test_a_run_is_snakemake_with_the_workflow_of_the_checkout(monkeypatch):
    started = []
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words))
    assert main(["run", "mine.yaml", "--dry-run", "--cores", "1"]) == 0
    assert started == [
        [
            sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"),
            "--configfile", "mine.yaml", "--cores", "all", "--dry-run", "--cores", "1",
        ]
    ]  # fmt: skip


def test_a_package_without_its_workflow_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workflow_files, "PACKAGE", tmp_path / "hfprune")
    monkeypatch.setattr(workflow_files, "files", lambda _: [])
    assert main(["run", "mine.yaml"]) == 2
    assert "the workflow is not there. Install hfprune with pip" in capsys.readouterr().err


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    pytest.importorskip("setuptools", minversion="77", reason="a wheel is built with it, without a network")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True
    )
    for name in tracked.stdout.decode().split("\0"):
        if (file := REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(file.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        folder,
        source,
    ]
    subprocess.run(command, check=True)
    (made,) = folder.glob("*.whl")
    return made


def test_a_wheel_holds_all_that_a_run_reads(wheel):
    names = {name.partition(".data/data/share/hfprune/")[2] or name for name in zipfile.ZipFile(wheel).namelist()}
    parts = ("Snakefile", "workflow/rules", "workflow/report", "profiles", "results/published", "envs")
    read = [path for part in parts for path in (REPOSITORY / part, *(REPOSITORY / part).rglob("*"))]
    wanted = {path.relative_to(REPOSITORY).as_posix() for path in read if path.is_file()}
    others = {name for name in wanted if name.startswith("envs/") and not name.endswith(".yaml")}
    assert wanted - others - {"results/published/README.md"} <= names
    assert {"hfprune/reporting/overview.html", "snakemake_logger_plugin_hfprune/__init__.py"} <= names


def test_an_installed_wheel_writes_a_config_and_plans_its_run_in_an_empty_folder(wheel, checkpoint, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel], check=True
    )
    # The packages that hfprune needs; after its own folder, so that its own is the wheel's.
    theirs = next(path for path in map(Path, sys.path) if (path / "snakemake").is_dir())
    (packages / "theirs.pth").write_text(f"{theirs}\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}

    def hfprune(*words: str) -> str:
        command = [python, "-m", "hfprune", *words]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "Now: hfprune run mine.yaml" in hfprune("new", "mine.yaml", "--model", str(checkpoint))
    planned = hfprune("run", "mine.yaml", "--dry-run")
    assert "1 step to do:\n[1/1] write the config" in hfprune("run", "mine.yaml", "config", "--dry-run"), "a target"
    assert "] write the overview page" in planned
    assert f"download model {checkpoint}" in planned

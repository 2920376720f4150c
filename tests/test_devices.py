"""Devices are taken and given back as on a machine with four GPUs, by a driver's tool that pretends them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hfprune.errors import UserError
from hfprune.runtime import gpus
from hfprune.runtime.gpus import visible
from tests.conftest import run_hfprune

UUIDS = [f"GPU-{letter * 8}-0000" for letter in "abcd"]
SHOW = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); "


@pytest.fixture(autouse=True)
def four_gpus(tmp_path, monkeypatch):
    """A driver that lists four GPUs, and locks of this test alone."""
    lines = "".join(f"{number}, {uuid}, NVIDIA Pretended\\n" for number, uuid in enumerate(UUIDS))
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, UUIDS),
        ("0,2", [UUIDS[0], UUIDS[2]]),
        ("3", [UUIDS[3]]),
        (f"{UUIDS[1]}, 0", [UUIDS[1], UUIDS[0]]),
        ("MIG-1234", ["MIG-1234"]),
        ("", []),
        ("-1", []),
    ],
)
def test_what_is_visible_is_what_the_user_shows(setting, expected, monkeypatch):
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert list(visible()) == expected


def test_numbers_of_gpus_of_different_kinds_need_an_order(monkeypatch):
    kinds = [["0", UUIDS[0], "Slow"], ["1", UUIDS[1], "Fast"]]
    monkeypatch.setattr("hfprune.runtime.gpus._listed", lambda: kinds)
    assert list(visible()) == UUIDS[:2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", UUIDS[1])
    assert list(visible()) == [UUIDS[1]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UserError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        visible()
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert list(visible()) == [UUIDS[1]]


def test_without_a_driver_nothing_is_visible(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible() == {}


def start(count, code):
    """`hfprune on-gpus` with some Python."""
    command = [sys.executable, "-m", "hfprune", "on-gpus", str(count), sys.executable, "-c", SHOW + code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_four_jobs_take_four_devices_and_a_fifth_waits_for_one_that_is_killed():
    jobs = [start(1, "import time; time.sleep(120)") for _ in range(4)]
    try:
        taken = [job.stdout.readline().strip() for job in jobs]
        assert sorted(taken) == UUIDS
        fifth = start(1, "")
        assert "1 of 4 GPUs are asked for, 0 free: waiting" in fifth.stderr.readline()
        assert fifth.poll() is None
        jobs[2].send_signal(signal.SIGKILL)
        assert fifth.communicate(timeout=60)[0].strip() == taken[2]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


def test_one_job_takes_several_and_its_status_is_its_own():
    job = start(3, "raise SystemExit(7)")
    output, said = job.communicate(timeout=60)
    assert output.strip().split(",") == UUIDS[:3]
    assert said == f"on {', '.join(f'{each} (NVIDIA Pretended)' for each in UUIDS[:3])}\n"
    assert job.returncode == 7


def test_a_job_that_gets_too_few_holds_none_while_it_waits(monkeypatch):
    held = [gpus.take(1), gpus.take(1)]
    waited = []

    def give_back(_seconds):
        waited.append(gpus.take(2))  # both that are left are free
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", give_back)
    with pytest.raises(KeyboardInterrupt):
        gpus.take(3)
    assert sorted([*held[0], *held[1], *waited[0]]) == UUIDS


def test_more_than_are_visible_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    said = run_hfprune(None, "on-gpus", "3", "true", status=2)
    assert "3 GPUs are asked for, 2 visible here (CUDA_VISIBLE_DEVICES=1,2). Ask for fewer" in said


def test_a_command_that_is_not_there_is_named():
    assert run_hfprune(None, "on-gpus", "1", "no-such-program", status=2).endswith(
        "no-such-program: No such file or directory."
    )

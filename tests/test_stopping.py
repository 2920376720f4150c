"""Stages that are stopped from outside: by SIGTERM, as batch systems send it when time is up, and by a full memory."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from hfprune.runtime.signals import sigterm_deferred
from tests.conftest import run_hfprune
from tests.forks import python

# The console command, in which something happens from the second batch of the pass on.
WRAPPER = """
import signal, sys, torch
from hfprune import cli
from hfprune.pruning import scoring
scoring.TOKENS_PER_BATCH = 64
calls, final_hidden = [], scoring.final_hidden
def disturbed(*given):
    calls.append(1)
    if len(calls) >= 2:
        {}
    return final_hidden(*given)
scoring.final_hidden = disturbed
sys.exit(cli.main(sys.argv[1:]))
"""
SIGTERM = "signal.raise_signal(signal.SIGTERM)"
FULL = "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')"


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        (SIGTERM, 143, "stopped by SIGTERM: the sums over 4 of 6 sequences are kept; run again to go on.\n"),
        (FULL, 2, "out of memory: CUDA out of memory. What is finished is kept. Free some, or take a device"),
    ],
)
def test_a_stage_that_is_stopped_says_so_and_the_next_run_makes_it(what, status, message, checkpoint, data, tmp_path):
    store = tmp_path / "store"
    model = run_hfprune(store, "download", "model", "--path", checkpoint)
    text = run_hfprune(store, "download", "text", "--path", data / "calibration.jsonl")
    words = ["score", "--model", model, "--text", text, "--samples", "6", "--length", "32"]
    ended, _, said = python(["-c", WRAPPER.replace("{}", what), *words, "--store", store], os.environ)
    assert ended == status
    assert f"hfprune score: {message}" in said
    assert "Traceback" not in said
    assert not list(store.glob("score/*"))
    assert len(list(store.glob(".work/score-*/.resume/sums*"))) == (what is SIGTERM)
    run_hfprune(store, *words)
    assert len(list(store.glob("score/*/manifest.json"))) == 1


def test_outside_of_what_notes_it_sigterm_ends_the_process():
    code = (
        "from hfprune.runtime.signals import sigterm_deferred\nimport time\n"
        "with sigterm_deferred(): pass\nprint('on', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM


def test_in_another_thread_nothing_is_noted_and_nothing_fails():
    found = []

    def work():
        with sigterm_deferred() as sigterm:
            found.append(sigterm.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]

"""SIGTERM, as a batch system sends it when time is up."""

import signal
import subprocess
import sys
import threading

from hfprune.stopping import noting
from tests.conftest import run_hfprune

# The console command, in which SIGTERM comes with the second batch of the pass.
WRAPPER = """
import signal, sys
from hfprune import cli, scoring
scoring.TOKENS_PER_BATCH = 64
calls, final_hidden = [], scoring.final_hidden
def terminated(*given):
    calls.append(1)
    if len(calls) == 2:
        signal.raise_signal(signal.SIGTERM)
    return final_hidden(*given)
scoring.final_hidden = terminated
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_stage_out_of_time_fails_says_what_is_kept_and_goes_on_from_there(checkpoint, data, tmp_path):
    store = tmp_path / "store"
    model = run_hfprune(store, "download", "model", "--path", checkpoint)
    text = run_hfprune(store, "download", "text", "--path", data / "calibration.jsonl")
    words = ["score", "--model", model, "--text", text, "--samples", "6", "--length", "32"]
    done = subprocess.run(
        [sys.executable, "-c", WRAPPER, *words, "--store", store], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 143
    assert done.stderr.endswith(
        "hfprune score: stopped by SIGTERM: the sums over 4 of 6 sequences are kept; run again to go on.\n"
    )
    assert "Traceback" not in done.stderr
    assert not list(store.glob("score/*"))
    assert list(store.glob(".work/score-*/.resume/sums*"))
    run_hfprune(store, *words)
    assert len(list(store.glob("score/*/manifest.json"))) == 1


def test_outside_of_what_notes_it_sigterm_ends_the_process():
    code = (
        "from hfprune.stopping import noting\nimport time\nwith noting(): pass\nprint('on', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM


def test_in_another_thread_nothing_is_noted_and_nothing_fails():
    found = []

    def work():
        with noting() as sigterm:
            found.append(sigterm.stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]

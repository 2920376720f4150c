"""What a run shows on the screen, from records as Snakemake logs them; test_flow.py looks at real runs."""

import io
import logging
from types import SimpleNamespace

import pytest
from snakemake.settings.types import OutputSettings
from snakemake_interface_logger_plugins.common import LogEvent

import snakemake_logger_plugin_hfprune as screen


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which only the test moves."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def shown(clock, monkeypatch):
    """Log a record; the lines that were on the screen since the last."""
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    handler = screen.LogHandler(OutputSettings(), None)
    assert handler.writes_to_stream

    def log(event=None, message=None, **values) -> list[str]:
        record = logging.makeLogRecord({"event": event, "msg": message, "levelno": logging.INFO, **values})
        stream.seek(0)
        stream.truncate()
        handler.handle(record)
        return stream.getvalue().splitlines()

    return log


def job(number: int, rule: str, message: str | None = None, *files: str) -> dict:
    return {"event": LogEvent.JOB_INFO, "jobid": number, "rule_name": rule, "rule_msg": message, "output": files}


def test_a_line_for_each_step_and_the_time_left(shown, clock):
    stats = {"download": 1, "measure": 3, "tables": 1, "all": 1, "total": 6}
    assert shown(LogEvent.RUN_INFO, stats=stats) == ["5 steps to do:"]
    assert shown(**job(7, "download", "download text a")) == ["[1/5] download text a"]
    assert not shown(LogEvent.SHELLCMD, "Shell command: python -m hfprune download")
    clock.now = 16
    shown(LogEvent.JOB_FINISHED, job_id=7)
    assert shown(**job(3, "measure", "measure: dense")) == ["[2/5] measure: dense"], "a download tells no time"
    clock.now = 116
    shown(LogEvent.JOB_FINISHED, job_id=3)
    # Two more of 100 s, and a table, which usually takes a fifth of a measurement; jobs took 2.4 times the usual.
    tables = screen.OTHER_SECONDS * 116 / (screen.SECONDS["measure"] + screen.OTHER_SECONDS)
    assert round((200 + tables) / 60) == 4
    assert shown(**job(4, "measure", "measure: cut")) == ["[3/5] measure: cut (2 min so far, about 4 min left)"]
    assert not shown(**job(0, "all"))


def test_jobs_that_run_at_once_halve_the_time_left(shown, clock):
    shown(LogEvent.RUN_INFO, stats={"measure": 4, "total": 4})
    shown(**job(1, "measure", "a"))
    shown(**job(2, "measure", "b"))
    clock.now = 60
    shown(LogEvent.JOB_FINISHED, job_id=1)
    shown(LogEvent.JOB_FINISHED, job_id=2)
    assert shown(**job(3, "measure", "c")) == ["[3/4] c (60 s so far, about 60 s left)"]


def test_the_first_results_are_shown_as_soon_as_they_are_there(shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "results" / "it" / "tables" / "headline.md"
    table.parent.mkdir(parents=True)
    table.write_text("Caption.\n\n| Model | KL |\n| --- | --: |\n| dense | 0.000 |\n| a\\_b | 12.000 |\n\nA note.\n")
    shown(LogEvent.RUN_INFO, stats={"headline": 1, "total": 1})
    shown(**job(1, "headline", "write", "results/it/tables/headline.csv", "results/it/tables/headline.md"))
    assert shown(LogEvent.JOB_FINISHED, job_id=1) == ["", "  Model      KL", "  dense   0.000", "  a_b    12.000", ""]


def test_the_end_says_what_was_made_and_what_to_open(shown, clock):
    shown(LogEvent.RUN_INFO, stats={"tables": 1, "page": 1, "prune": 1, "total": 3})
    for number, files in enumerate(
        (["results/it/tables/a.csv", "results/it/tables/a.md"], ["results/it/index.html"], ["store/prune/x/y.json"])
    ):
        shown(**job(number, "tables", "write", *files))
        shown(LogEvent.JOB_FINISHED, job_id=number)
    assert not shown(LogEvent.PROGRESS, done=2, total=3)
    clock.now = 7200
    assert shown(LogEvent.PROGRESS, done=3, total=3) == [
        "Done: 3 steps in 2.0 h.",
        "Made in results/it: index.html, tables/ (2 files).",
        "Open results/it/index.html in a browser.",
    ]
    assert shown(None, "Complete log(s): /here/x.log") == ["Commands and details: /here/x.log"]


def test_a_failure_is_told_once_with_its_reason_and_log(shown, tmp_path):
    log = tmp_path / "a.log"
    log.write_text("score:  50%|##  | 1/2\rhfprune score: out of tokens.\nGive more.\n")
    error = {"event": LogEvent.JOB_ERROR, "jobid": 1, "rule_name": "score", "log": [str(log)]}
    shown(**job(1, "score", "score: entropy"))
    told = ["FAILED: score: entropy", "  hfprune score: out of tokens.", "  Give more.", f"  log: {log}"]
    assert shown(**error) == told
    assert not shown(LogEvent.ERROR, "RuleException:\nCalledProcessError in file x", exception="RuleException")
    assert shown(**error) == []
    assert shown(**job(1, "score", "score: entropy")) == ["[1/1] score: entropy"], "tried again"
    log.write_text("Traceback\nValueError: x\n")
    assert shown(**error) == ["FAILED: score: entropy", "  ValueError: x", f"  log: {log}"]
    assert shown(None, "Complete log(s): x")[0].startswith("1 step failed. Run the same command again")


def test_a_wrong_config_is_told_without_a_place_in_the_snakefile(shown):
    said = shown(LogEvent.ERROR, 'WorkflowError in file "x.smk", line 3:\nmine.yaml: ratios: too large.')
    assert said == ["mine.yaml: ratios: too large."]
    assert shown(None, "Nothing to be done (all requested files are present and up to date).")
    assert not shown(None, "Select jobs to execute...")


def test_scores_that_another_jobs_pass_has_made_are_no_warning(shown):
    made = "Warning: the following output files of rule score were not present when the DAG was created:\n{'x'}"
    assert not shown(None, made)
    assert shown(None, "Warning: something else.") == ["Warning: something else."]


def test_verbose_leaves_the_screen_to_snakemake():
    assert not screen.LogHandler(OutputSettings(verbose=True), None).writes_to_stream

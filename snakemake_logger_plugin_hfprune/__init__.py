"""What a run shows on the screen: a line for each step, what failed and why, and what was made.

Snakemake finds this package by its name, and `logger: hfprune` in the profiles chooses it. Commands, hashes and reasons
are in Snakemake's own log, whose path is the last line; `--verbose` shows them on the screen instead.

It imports nothing of `hfprune` before a Snakefile has put its own copy of `hfprune` on the path.
"""

import sys
import time
from collections import Counter, defaultdict
from logging import LogRecord
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

TARGETS = ("all", "paper")  # rules that only name what to make
# Seconds of a job on the model of the default experiment, on two cores. A rule counts in this proportion until one of
# its jobs has finished. Other rules draw or write.
SECONDS = {
    "score": 60, "first_score": 60, "shard": 60, "first_shard": 60, "search": 600, "prune": 30, "recover": 200,
    "reference": 30, "measure": 30, "evaluate": 50, "evaluate_task": 50, "efficiency": 300, "scoring_cost": 300,
}  # fmt: skip
OTHER_SECONDS = 8
PAGES = ("index.html", "report.html")
FIRST = "headline.md"  # the table of the first results, which is shown as soon as it is there
# The beginnings of messages that only tell how Snakemake works.
INTERNAL = (
    "--keep-incomplete", "Assuming unrestricted", "At least one job", "Building DAG", "Cannot restore",
    "Cleaning up SLURM log", "Conda environments", "No SLURM account", "No account was given", "Unable to guess SLURM",
    "DAG of jobs will", "Elapsed time", "Exiting because", "Finished updating", "Job ", "Keeping incomplete",
    "Reasons:", "Removing output files", "Select jobs", "Shutting down", "SLURM run ID", "Some jobs were triggered",
    "The run involves checkpoint", "Trying to restart", "Updating checkpoint", "Using shell",
    "Warning: the following output files of rule", "host: ",  # the former: one pass makes the scores of several jobs
)  # fmt: skip
LOG = "Complete log(s): "  # before the path of Snakemake's log


class LogHandler(LogHandlerBase):
    """Writes a line for each step."""

    writes_to_file = has_filter = has_formatter = needs_rulegraph = False

    def __post_init__(self) -> None:
        self._stream = sys.stdout if self.common_settings.stdout else sys.stderr
        self._start = time.monotonic()
        self._waiting: Counter[str] = Counter()  # how many jobs of each rule have not finished
        self._seconds: dict[str, list[float]] = defaultdict(list)  # of finished jobs, by rule
        self._steps: dict[int, dict] = {}  # by Snakemake's number of the job, in order of starts
        self._total = 0
        self._failed: set[int] = set()
        self._made: list[Path] = []

    @property
    def writes_to_stream(self) -> bool:
        """Whether this handler writes to the screen; if not, Snakemake does."""
        return not (self.common_settings.verbose or self.common_settings.debug_dag)

    def emit(self, record: LogRecord) -> None:
        """Show a record, if it says something to people."""
        if not self.writes_to_stream:
            return
        try:
            handle = {
                LogEvent.RUN_INFO: self._count,
                LogEvent.JOB_INFO: self._begin,
                LogEvent.JOB_FINISHED: self._finish,
                LogEvent.PROGRESS: self._end,
                LogEvent.JOB_ERROR: self._fail,
                LogEvent.ERROR: self._refuse,
                None: lambda record: self._tell(record.getMessage() if record.msg else ""),
            }.get(getattr(record, "event", None))
            if handle:
                handle(record)
        except Exception:
            self.handleError(record)

    def _say(self, *lines: str) -> None:
        print(*lines, sep="\n", file=self._stream, flush=True)

    def _count(self, record: LogRecord) -> None:
        """The number of jobs by rule, before the first; a dry run tells it again at its end."""
        if self._total:
            return
        self._waiting = Counter({rule: jobs for rule, jobs in record.stats.items() if rule not in ("total", *TARGETS)})
        self._total = self._waiting.total()
        self._say(f"{_counted(self._total, 'step')} to do:")

    def _begin(self, record: LogRecord) -> None:
        """A job starts, or starts again."""
        if record.rule_name in TARGETS:
            return
        number = self._steps.get(record.jobid, {}).get("number", len(self._steps) + 1)
        self._total = max(self._total, number)
        self._failed.discard(record.jobid)
        what = record.rule_msg or record.rule_name
        line = f"[{number:>{len(str(self._total))}}/{self._total}] {what}{self._time()}"
        self._steps[record.jobid] = {
            "number": number, "what": what, "rule": record.rule_name, "files": record.output, "start": time.monotonic()
        }  # fmt: skip
        self._say(line)

    def _time(self) -> str:
        """The time so far and, once the time of one job says something about the others, the time left."""
        if not SECONDS.keys() & self._seconds.keys():
            return ""
        now = time.monotonic()
        so_far = now - self._start
        running = sum(now - step["start"] for step in self._steps.values() if "start" in step)
        done = sum(map(sum, self._seconds.values()))
        pace = done / sum(_usual(rule) * len(seconds) for rule, seconds in self._seconds.items())
        means = {rule: sum(seconds) / len(seconds) for rule, seconds in self._seconds.items()}
        left = sum(jobs * means.get(rule, _usual(rule) * pace) for rule, jobs in self._waiting.items()) - running
        at_once = max(1, (done + running) / so_far)
        return f" ({_duration(so_far)} so far, about {_duration(max(0, left / at_once))} left)"

    def _finish(self, record: LogRecord) -> None:
        if step := self._steps.get(record.job_id):
            self._seconds[step["rule"]].append(time.monotonic() - step.pop("start"))
            self._waiting[step["rule"]] -= 1
            made = [path for file in step["files"] if (path := Path(file)).parts[0] == "results"]
            self._made += made
            for path in made:
                if path.name == FIRST:
                    self._say("", *_aligned(path.read_text(encoding="utf-8")), "")

    def _end(self, record: LogRecord) -> None:
        """After the last job: what was made, and what to open."""
        if record.done < record.total:
            return
        self._say(f"Done: {_counted(len(self._steps), 'step')} in {_duration(time.monotonic() - self._start)}.")
        for experiment in dict.fromkeys(path.parts[1] for path in self._made):
            inside = Counter(path.parts[2:-1] for path in self._made if path.parts[1] == experiment)
            folders = [f"{'/'.join(parts)}/ ({_counted(files, 'file')})" for parts, files in inside.items() if parts]
            files = [path.name for path in self._made if path.parts[1:-1] == (experiment,)]
            self._say(f"Made in results/{experiment}: {', '.join([*files, *folders])}.")
        for path in self._made:
            if path.name in PAGES:
                self._say(f"Open {path} in a browser.")

    def _fail(self, record: LogRecord) -> None:
        """A job failed; Snakemake tells it twice."""
        if record.jobid in self._failed:
            return
        self._failed.add(record.jobid)
        step = self._steps.get(record.jobid, {})
        step.pop("start", None)
        self._say(f"FAILED: {step.get('what', record.rule_name)}")
        for log in map(Path, record.log):
            if log.is_file():
                self._say(*(f"  {line}" for line in _reason(log).splitlines()), f"  log: {log}")

    def _refuse(self, record: LogRecord) -> None:
        """The workflow cannot run. People need not know where in the Snakefile that was noticed."""
        if "CalledProcessError" in record.getMessage():
            return  # a job failed, which is told by itself
        place, _, message = record.getMessage().partition("\n")
        self._tell(message if place.startswith("WorkflowError") and message else record.getMessage())

    def _tell(self, message: str) -> None:
        if message.startswith(LOG):
            if self._failed:
                failed = _counted(len(self._failed), "step")
                self._say(f"{failed} failed. Run the same command again after a remedy: what is finished stays.")
            self._say(f"Commands and details: {message.removeprefix(LOG)}")
        elif message.strip() and not message.startswith(INTERNAL):
            self._say(message)


def _reason(log: Path) -> str:
    """Why a job failed, by its log: the message that `hfprune` ended with, or else the last line."""
    from hfprune.errors import REFUSAL

    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if message := REFUSAL.search(text):
        return text[message.start() :]
    return text.splitlines()[-1] if text else "It ended without a message."


def _aligned(markdown: str) -> list[str]:
    """The table of a Markdown file, its columns below one another."""
    lines = [line.strip("|") for line in markdown.splitlines() if line.startswith("|")]
    head, rule, *rows = [[cell.strip().replace("\\", "") for cell in line.split("|")] for line in lines]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    shown = []
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if side.endswith(":") else cell.ljust(width)
            for cell, width, side in zip(row, widths, rule, strict=True)
        ]
        shown.append(f"  {'  '.join(cells)}".rstrip())
    return shown


def _usual(rule: str) -> int:
    return SECONDS.get(rule, OTHER_SECONDS)


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"

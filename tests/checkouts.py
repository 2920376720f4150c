"""Copies of the project, in which workflows run as users run them."""

import copy
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml

from tests import forks
from tests.conftest import REPOSITORY

PARTS = ("Snakefile", "workflow", "profiles", "envs", "hfprune", "results/published")
LOG = "Commands and details: "  # on the screen, before the path of Snakemake's log
# What is drawn of the tiny experiment.
DRAWN = ("accuracy", "headline", "kl", "fidelity_profile", "importance", "widths")
MODEL_STAGES = ("download", "score", "shard", "order", "search", "prune", "recover", "reference", "measure", "evaluate")


class Run(subprocess.Popen):
    """A run of Snakemake."""

    def communicate(self) -> tuple[str, None]:
        """What was on the screen, then what Snakemake's log says."""
        return with_log(super().communicate()[0]), None


def with_log(screen: str) -> str:
    """What was on the screen, then what Snakemake's log says."""
    log = Path(screen.rpartition(LOG)[2].strip()) if LOG in screen else None
    return screen + (log.read_text() if log else "")


class Checkout:
    """A copy of the project, in which code may be edited, with a store that may be another's.

    Args:
        folder: to make.
        store: of its experiments.

    Attributes:
        preloads: whether Snakemake and jobs fork from a process that has imported the libraries, see `tests.forks`;
            otherwise they start as a user's.
    """

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.store, self.preloads = folder, store, True
        folder.mkdir()
        for part in PARTS:
            source = REPOSITORY / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, folder / part)

    def start(self, experiment: dict, *options: str, preloads: bool = True) -> Run:
        """Start `snakemake` on an experiment in a process group of its own; unless it `preloads`, as a user's.

        Its jobs are as `self.preloads` says.
        """
        words, environment = self._prepared(experiment, options)
        path = os.pathsep.join([str(self.folder), environment.get("PYTHONPATH", "")])  # where `forks.CLIENT` is
        started = [sys.executable, "-m", "snakemake"] if preloads else ["snakemake"]
        return Run(
            [*started, *words],
            cwd=self.folder,
            env=environment | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def snakemake(self, experiment: dict, *options: str, status: int = 0, killed: str = "") -> str:
        """Run `snakemake` on an experiment; what it printed, and its log.

        With `killed`, SIGKILL ends the command of that name when it has moved the first of its results to its place.
        """
        if self.preloads:
            words, environment = self._prepared(experiment, options, killed)
            words = ["-m", "snakemake", *words]
            ended, screen, _ = forks.python(words, environment, self.folder, on_one_screen=True)
            output = with_log(screen)
        else:
            process = self.start(experiment, *options, preloads=False)
            output, ended = process.communicate()[0], process.returncode
        assert ended == status, output
        return output

    def _prepared(
        self, experiment: dict, options: tuple[str, ...], killed: str = ""
    ) -> tuple[list[str], dict[str, str]]:
        """Snakemake's words and environment. The experiment's config, and what jobs run first, are written."""
        if self.preloads:
            (self.folder / "sitecustomize.py").write_text(forks.client(killed))
        else:
            (self.folder / "sitecustomize.py").unlink(missing_ok=True)
        config = self.folder / f"{experiment['experiment']}.yaml"
        config.write_text(yaml.safe_dump(experiment))
        threads = [f"{rule}=1" for rule in (*MODEL_STAGES, "efficiency", "scoring_cost")]
        words = ["--cores", "2", *options, "--configfile", str(config), "--set-threads", *threads]
        return words, os.environ | {"HFPRUNE_STORE": str(self.store)}

    def planned(self, experiment: dict, *targets: str) -> Counter:
        """How many jobs of each rule a run would run."""
        return planned(self.snakemake(experiment, *targets, "--dry-run", "--verbose"))

    def manifests(self, stage: str) -> list[Path]:
        """The manifests of a stage's artifacts."""
        return sorted(self.store.glob(f"{stage}/*/manifest.json"))


def planned(output: str) -> Counter:
    """How many jobs of each rule a dry run with --verbose would run; scores that others wait for count as scores."""
    stats = output.partition("Job stats:")[2].partition("total")[0]
    jobs = Counter()
    for rule, count in re.findall(r"^(?:first_)?(\w+) +(\d+)$", stats, re.MULTILINE):
        jobs[rule] += int(count)
    return jobs


def ran(output: str) -> Counter:
    """How many jobs of each rule a run finished; scores that others wait for count as scores."""
    return Counter(re.findall(r"Finished jobid: \d+ \(Rule: (?:first_)?(\w+)\)", output))


def model_stages(jobs: Counter) -> dict[str, int]:
    """Of those, the stages that compute on a model or get one."""
    return {stage: jobs[stage] for stage in MODEL_STAGES if jobs[stage]}


def changed(experiment: dict, /, **sections) -> dict:
    """The experiment with some keys of some sections changed."""
    made = copy.deepcopy(experiment)
    for name, values in sections.items():
        made[name] = made[name] | values if isinstance(values, dict) else values
    return made

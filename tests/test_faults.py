"""Every stage, killed in the middle, on a full disk, in a store that is only read: what stays, and what is said."""

import re
import subprocess
from pathlib import Path

import pytest

from hfprune.experiment.plan import Job, Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.stages.registry import STAGES as DECLARED
from hfprune.store.artifacts import Artifact, read
from tests.conftest import hfprune

STAGES = ("model", "text", "task", "score", "shard", "prune", "recover", "reference", "measure", "evaluate")
ROOM = {"prune": 60 * 2**10, "recover": 60 * 2**10}  # bytes free on the full disk: they fail in the middle
TIMED = ("recovery.json", "losses.jsonl")  # files that hold seconds


class Pipeline:
    """An experiment, whose stages run one by one; the store in which nothing disturbs them."""

    def __init__(self, experiment: dict, whole: Path) -> None:
        self.whole = whole
        self.jobs: dict[str, Job] = {}  # one of each stage
        for shards in (1, 2):
            experiment["calibration"]["shards"] = shards
            for job in Plan(parse(Experiment, experiment, "tiny")).needed:
                self.jobs.setdefault(job.recipe.stage, job)

    def run(self, job: Job, store: Path, killed: str = "") -> tuple[int, str]:
        """The stage that makes a job's artifact, from inputs in the store `whole`; its exit status and output."""
        words = [*DECLARED[job.recipe.stage].words]
        for name, made in job.inputs.items():
            inputs = [self.make(each).folder for each in (made if isinstance(made, list) else [made])]
            words += [f"--{name}", *map(str, inputs)]
        status, printed, said = hfprune(*words, *job.options, "--store", store, killed=killed)
        return status, said + printed

    def make(self, job: Job) -> Artifact:
        """A job's artifact in the store `whole`."""
        folder = self.whole / job.recipe.stage / job.key
        if not folder.exists():
            status, output = self.run(job, self.whole)
            assert status == 0, output
        return read(folder)


@pytest.fixture(scope="module")
def pipeline(experiment, tmp_path_factory):
    small = {"text": "calibration", "length": 128, "batch_tokens": 512, "rank": 2, "epochs": 1, "save_steps": 1}
    return Pipeline(
        experiment
        | {"calibration": dict(experiment["calibration"]), "recovery": {"lora": small}}
        | {"ratios": [0.2], "recoveries": ["lora"]},
        tmp_path_factory.mktemp("whole"),
    )


@pytest.fixture
def mount(tmp_path):
    """Mount a file system in memory, of 4 MiB, in the test's folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=755", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def artifacts_in(store: Path) -> list[Path]:
    return sorted(store.glob("[a-z]*/*/manifest.json"))


def check_same(made: Path, whole: Artifact) -> None:
    """Two artifacts hold the same, whatever time it took."""
    files = read(made).manifest["files"]
    assert set(files) == set(whole.manifest["files"])
    for name in files:
        contents = [(folder / name).read_bytes() for folder in (made, whole.folder)]
        if name in TIMED:
            contents = [re.sub(rb'"seconds\w*": [\d.e-]+', b"", each) for each in contents]
        assert contents[0] == contents[1], name


@pytest.mark.parametrize("stage", STAGES)
def test_after_kill_9_the_next_run_makes_what_an_undisturbed_run_makes(stage, pipeline, tmp_path):
    job = pipeline.jobs[stage]
    whole = pipeline.make(job)
    for moment in ("open", "os.rename"):
        finished = artifacts_in(tmp_path)
        status, output = pipeline.run(job, tmp_path, killed=moment)
        assert status == -9, output
        assert any((tmp_path / ".work").glob("*/*")), "it was at work"
        assert not (tmp_path / stage / job.key).exists()
        for manifest in artifacts_in(tmp_path):
            read(manifest)
        assert set(finished) <= set(artifacts_in(tmp_path))
    status, output = pipeline.run(job, tmp_path)
    assert status == 0, output
    check_same(tmp_path / stage / job.key, whole)
    assert not list((tmp_path / ".work").glob(f"{stage}-{job.key}*/"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_named_and_the_next_run_finds_no_trace_of_it(stage, pipeline, mount):
    job = pipeline.jobs[stage]
    whole = pipeline.make(job)
    filler = mount / "filler"
    filler.write_bytes(bytes(4 * 2**20 - ROOM.get(stage, 0)))
    status, output = pipeline.run(job, mount)
    assert status == 2, output
    assert "Traceback" not in output
    assert re.search(rf"{mount}: no room on the disk, [\d,]+ bytes are free .*Free space .*, run again", output), output
    assert artifacts_in(mount) == []
    filler.unlink()
    status, output = pipeline.run(job, mount)
    assert status == 0, output
    check_same(mount / stage / job.key, whole)


def test_a_store_that_is_only_read_gives_what_it_has_and_says_what_it_cannot_take(pipeline, mount):
    text, score = pipeline.jobs["text"], pipeline.jobs["score"]
    made = pipeline.make(text)
    subprocess.run(["cp", "-a", pipeline.whole / "text", mount], check=True)
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    status, output = pipeline.run(text, mount)
    assert (status, output.splitlines()[-1]) == (0, str(mount / "text" / made.key))
    status, output = pipeline.run(score, mount)
    assert status == 2
    assert f"{mount}/.work: cannot write to the store (Read-only file system)" in output
    assert "Traceback" not in output

    subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
    (mount / "text" / made.key / "documents.jsonl").write_text("")
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    status, output = pipeline.run(text, mount)
    assert status == 2
    assert "documents.jsonl: refused: 0 bytes" in output
    assert f"It could not be set aside (Read-only file system): remove {mount}/text/{made.key}" in output
    assert "Traceback" not in output

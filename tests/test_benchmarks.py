"""The scripts in benchmarks/ run: at a tiny size, on the CPU. What they measure there means nothing."""

import json
import os
import select
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Their folder on the path, as for a script that runs there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [
        name for name, module in sys.modules.items() if str(BENCHMARKS) in str(getattr(module, "__file__", ""))
    ]:
        del sys.modules[name]


@pytest.mark.parametrize("part", ["profile", "refitting", "widths", "evaluation", "training"])
def test_a_part_of_gpu(benchmarks, part, tmp_path):
    import gpu

    gpu.run_part(part, "tiny", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["shape"] == "tiny"
    numbers = [value for value in figures.values() if isinstance(value, float)]
    assert numbers
    assert all(number >= 0 for number in numbers)
    if part == "evaluation":
        assert figures["max_difference"] < 1e-4


def test_a_part_of_gpu_that_takes_too_long_ends_with_all_that_it_started(benchmarks, tmp_path):
    import gpu

    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert gpu.end_of(["sh", "-c", f"sleep 600 > {tmp_path}/pipe & wait"], 3, {}) == "stopped after 3 s"
    assert select.select([pipe], [], [], 60)[0], "the child that held the other end is gone"
    assert os.read(pipe, 1) == b""
    os.close(pipe)
    assert gpu.end_of(["sh", "-c", "exit 3"], 60, {}) == "exit status 3"
    assert gpu.end_of(["true"], 60, dict(os.environ)) == "finished"


def test_gpu_records_each_part_as_it_ends_and_ends_in_time(benchmarks, tmp_path, monkeypatch):
    import common
    import gpu

    clock, records = [100.0], []

    def end_of(words, seconds, environment):
        """Each part takes all of its time; the second leaves nothing."""
        part = words[words.index("--part") + 1]
        clock[0] += seconds
        records.append(sorted(file.name for file in tmp_path.iterdir()))
        if part != "evaluation":
            Path(words[words.index("--figures") + 1]).write_text(json.dumps({"took": seconds}))
        return "finished"

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "end_of", end_of)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "widths", "evaluation", "training", "--seconds", "200"])
    gpu.main()
    (name,) = records[1]
    figures = json.loads((tmp_path / name).read_text())["figures"]
    assert not records[0], "nothing was recorded before"
    assert (figures["widths, took"], figures["training, took"]) == (200, 80)
    assert "evaluation, took" not in figures
    assert figures["evaluation, outcome"] == "finished"


def test_what_gpu_runs_as_other_scripts(benchmarks, monkeypatch, tmp_path):
    import gpu
    import scoring
    import streaming

    commands = []
    monkeypatch.setattr(gpu, "run", lambda *words: commands.append(words) or {})
    for part in ("tests", "scoring", "streaming"):
        for size in ("tiny", "full"):
            gpu.run_part(part, size, tmp_path / "figures.json")
    for file in (words[0] for words in commands if words[0] != "-m"):
        assert Path(file).exists()
    model = scoring.build("tiny")
    tokens = torch.randint(0, 1000, (2, 16))
    ours, published = scoring.ours(model, tokens), scoring.published(model, tokens)
    for own, other in zip(ours["mlp"], published, strict=True):
        both = torch.stack([own, other.float()]).argsort(-1).argsort(-1).double()
        assert torch.corrcoef(both)[0, 1] > 0.95  # sums in bfloat16
    assert set(scoring.matrix_product_rates(torch.float32)) == {"torch", "ours"}
    for module in (streaming.surgery, streaming.fidelity):  # the steps replace this, each in its own process
        monkeypatch.setattr(module, "sample_sequences", module.sample_sequences)
    assert len(streaming.costs(tmp_path / "cost", streaming.SHAPES["tiny"], 1)) == 7
    streaming.write_checkpoint(tmp_path / "model", streaming.SHAPES["tiny"], torch.bfloat16)
    streaming.score(tmp_path / "model", tokens)
    streaming.cut(tmp_path / "model", tokens)
    streaming.measure(tmp_path / "model", tokens)
    assert (tmp_path / "model" / "pruned" / "model.safetensors").exists() or list(
        (tmp_path / "model" / "pruned").glob("*.safetensors")
    )

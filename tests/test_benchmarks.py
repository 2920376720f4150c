"""The scripts in benchmarks/ run: at a tiny size, on the CPU. What they measure there means nothing."""

import json
import sys
from pathlib import Path

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
    streaming.write_checkpoint(tmp_path / "model", streaming.SHAPES["tiny"], torch.bfloat16)
    streaming.score(tmp_path / "model", tokens)
    streaming.cut(tmp_path / "model", tokens)
    streaming.measure(tmp_path / "model", tokens)
    assert (tmp_path / "model" / "pruned" / "model.safetensors").exists() or list(
        (tmp_path / "model" / "pruned").glob("*.safetensors")
    )

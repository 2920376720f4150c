"""Scoring that stops when two halves of the calibration text would keep the same units."""

import signal

import pandas as pd
import pytest
import torch

from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.models.loading import load_model
from hfprune.pruning.convergence import FIRST, agreement, rounds
from hfprune.pruning.scoring import scores_until, unit_scores
from hfprune.runtime.signals import Stopped
from tests.checkouts import changed
from tests.conftest import make_model, save_dense, sentences, write_lines
from tests.test_estimate import estimate, make
from tests.test_scoring import assert_close, flat

CRITERIA = ["entropy", "wanda", "llm_pruner_element_1", "fisher_token"]
RATIO = 0.3


def tokens(count=50, length=12):
    torch.manual_seed(5)
    return torch.randint(0, 320, (count, length))


def run(model, criteria, until, resume=None, sequences=None):
    sequences = tokens() if sequences is None else sequences
    return scores_until(model, sequences, criteria, 0, 1, None, resume, "float32", until, RATIO)


def kept(scores):
    """The units that stay, by part, layer and number; in plain Python."""
    best = set()
    for part, layers in scores.items():
        for layer, values in enumerate(layers):
            values = values.tolist()
            order = sorted(range(len(values)), key=lambda unit: (-values[unit], unit))
            best |= {(part, layer, unit) for unit in order[: len(values) - round(RATIO * len(values))]}
    return best


def in_common(model, name, sequences, middle):
    one, other = (kept(unit_scores(model, half, [name])[name]) for half in (sequences[:middle], sequences[middle:]))
    return len(one & other) / len(one)


@pytest.mark.parametrize("samples", [3, 8, 16, 50, 64])
def test_every_round_is_as_long_as_those_before_it(samples):
    parts = list(rounds(samples))
    assert [number for part in parts for number in part] == list(range(samples))
    assert all(len(part) == part.start for part in parts[1:-1])
    assert all(len(part) <= part.start for part in parts[1:])


def test_agreement_counts_the_units_that_both_keep():
    one = {"mlp": [torch.tensor([4.0, 3, 2, 1])], "experts": [torch.tensor([[1.0, 2], [2, 1]]), torch.zeros(0)]}
    other = {"mlp": [torch.tensor([1.0, 3, 2, 4])], "experts": [torch.tensor([[1.0, 2], [1, 2]]), torch.zeros(0)]}
    assert agreement(one, other, 0.5) == pytest.approx((1 + 1) / (2 + 2))
    assert agreement(one, one, 0.5) == agreement(one, other, 0.1) == 1


@pytest.mark.parametrize("name", ["entropy", "wanda", "llm_pruner_element_1"])
def test_it_stops_at_the_first_comparison_that_reaches_the_level(name):
    model, sequences = make_model(), tokens()
    expected = {2 * middle: in_common(model, name, sequences[: 2 * middle], middle) for middle in (8, 16)}
    expected[50] = in_common(model, name, sequences, 32)
    assert len({*expected.values()}) > 1, "a level that only a later comparison reaches"
    level = max(expected.values())
    used = next(samples for samples, share in expected.items() if share >= level - 1e-9)
    scores, passes, records = run(model, [name], level - 1e-9)
    assert records[name]["samples_used"] == used == sum(sequences for sequences, _ in passes)
    found = {each["samples"]: each["agreement"] for each in records[name]["convergence"]}
    assert found == pytest.approx({samples: share for samples, share in expected.items() if samples <= used}, abs=1e-6)
    assert_close(scores[name], unit_scores(model, sequences[:used], [name])[name])


def test_scores_that_never_agree_are_those_of_all_samples():
    model = make_model()
    scores, _, records = run(model, CRITERIA, 1.0)
    whole = unit_scores(model, tokens(), CRITERIA)
    assert records["entropy"]["samples_used"] == 50
    assert [each["samples"] for each in records["entropy"]["convergence"]] == [16, 32, 50]
    for name in CRITERIA:
        if records[name]["samples_used"] == 50:
            assert_close(scores[name], flat(whole[name]))


def test_each_criterion_gets_what_it_gets_alone_and_is_not_scored_after_it_settled():
    model = make_model()
    criteria = ["magnitude", *CRITERIA]  # the first needs no text, so its halves agree at once
    scores, passes, records = run(model, criteria, 0.97)
    assert records["magnitude"]["samples_used"] == 2 * FIRST < records["entropy"]["samples_used"]
    for name in criteria:
        alone, _, record = run(model, [name], 0.97)
        assert record[name] == records[name]
        assert_close(scores[name], flat(alone[name]))
        assert sum(sequences for sequences, names in passes if name in names) == records[name]["samples_used"]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_killed_pass_goes_on_in_the_round_where_it_was(memory, tmp_path, monkeypatch):
    monkeypatch.setattr("hfprune.pruning.scoring.TOKENS_PER_BATCH", 24)  # two sequences
    model = load_model(save_dense(tmp_path / "model"), "float32", memory)
    calls, stop = [], 0

    def fail_in_the_last_round(*_):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(fail_in_the_last_round)
    whole, _, records = run(model, CRITERIA, 1.0)
    all_calls, stop = len(calls), len(calls) - 1
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(model, CRITERIA, 1.0, tmp_path / "resume")
    calls.clear()
    again, _, found = run(model, CRITERIA, 1.0, tmp_path / "resume")
    assert 0 < len(calls) < all_calls / 2, "finished rounds do not run again"
    assert found == records
    for name in CRITERIA:
        assert all(a.equal(b) for a, b in zip(flat(again[name]), flat(whole[name]), strict=True)), name
    assert all(path.is_file() for path in (tmp_path / "resume").iterdir()), "nothing else of a finished round stays"


def test_sigterm_in_the_last_batch_of_a_round_ends_the_pass(tmp_path):
    model, calls = make_model(), []

    def terminate(*_):
        calls.append(1)
        if len(calls) == 2:  # each round is one batch
            signal.raise_signal(signal.SIGTERM)

    model.model.register_forward_pre_hook(terminate)
    with pytest.raises(Stopped, match="the sums over 16 of 50 sequences are kept"):
        run(model, ["entropy"], 1.0, tmp_path / "resume")
    scores, _, _ = run(model, ["entropy"], 1.0, tmp_path / "resume")
    assert len(calls) == 4
    assert_close(scores["entropy"], flat(unit_scores(model, tokens(), ["entropy"])["entropy"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"until": 0.95}, r"calibration: until = 0\.95 with samples = 6: halves are first compared at 16 sequences"),
        ({"until": 0.95, "samples": 32, "shards": 2}, r"until = 0\.95 with shards = 2: .*Write `shards: 1`"),
        ({"until": 95, "samples": 32}, r"calibration\.until = 95: .*less than or equal to 1"),
    ],
)
def test_what_cannot_stop_early_is_refused(changes, message, experiment):
    with pytest.raises(UserError, match=message):
        parse(Experiment, changed(experiment, calibration=changes), "test")


def test_without_ratios_there_is_nothing_to_compare_at(experiment):
    asked = changed(experiment, calibration={"until": 0.9, "samples": 32}, ratios=None, target_parameters=[30_000])
    with pytest.raises(UserError, match=r"calibration\.until = 0\.9: .*there are only target_parameters"):
        parse(Experiment, asked, "test")


def test_a_plan_asks_at_the_largest_ratio_records_what_was_used_and_writes_a_table(experiment, tmp_path):
    text = write_lines(tmp_path / "text.jsonl", [{"text": sentences(seed, 12)} for seed in range(20)])
    asked = changed(experiment, calibration={"until": 0.5, "samples": 20, "length": 8}, ratios=[0.1, 0.25])
    asked = changed(asked, texts={"calibration": {"path": str(text)}}, store=str(tmp_path / "store"))
    plan = Plan(parse(Experiment, asked, "test"))
    (score,) = plan.scores
    assert "--until 0.5 --until-ratio 0.25" in " ".join(score.options)
    assert {"until", "until_ratio"} <= set(score.parameters)
    assert "until" not in Plan(parse(Experiment, experiment, "test")).scores[0].parameters
    assumed = estimate(plan, plan.experiment)
    assumed.stages()
    assert any("all 20 samples; `until` may need fewer" in assumption for assumption in assumed.assumptions)
    details = make(plan, score)["details"]
    assert details["samples_used"] == details["convergence"][0]["samples"] == 16
    assert details["tokens"] == 16 * 8
    assert details["flops"] == details["flops_together"]
    assert main(["compare", "--output", str(tmp_path / "results"), plan.manifest(score)]) == 0
    table = pd.read_csv(tmp_path / "results" / "tables" / "convergence.csv")
    assert table.to_dict("records") == [{"criterion": "entropy", "seed": 0, **details["convergence"][0]}]

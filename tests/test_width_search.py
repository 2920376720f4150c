"""The search of widths: what it measures, what it finds, what it leaves alone, and what it refuses."""

import copy
import json
from itertools import product

import pytest
import torch

from hfprune import api
from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.experiment.estimate import report
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.models.loading import count_parameters, load_model
from hfprune.models.units import part_of
from hfprune.pruning import width_search
from hfprune.pruning.budget import shape_of
from hfprune.pruning.refit import refit
from hfprune.pruning.refit_names import RIDGE
from hfprune.pruning.saving import saving_of
from hfprune.pruning.searched import held_out, read_widths, save_widths
from hfprune.pruning.surgery import cut, of_widths
from hfprune.pruning.width_search import changes_of, counts_tried, search
from hfprune.runtime.signals import Stopped
from hfprune.store.filenames import PRUNING, WIDTHS
from tests.conftest import make_model, make_tokenizer, save_dense, sentences
from tests.test_depth import divergence
from tests.test_estimate import estimate
from tests.test_estimate import make as make_job
from tests.test_families import make

TEXT = torch.randint(320, (16, 16), generator=torch.Generator().manual_seed(0))
BUDGET = {"ratio_of": "all", "target_parameters": None, "attention_share": None, "context": None, "latencies": None}
BUDGET |= {"ratio": 0.2, "round_to": 8}
REFITTED_ON, MEASURED_ON = TEXT[:12], TEXT[12:]


def scores_of(model, seed=0):
    """Random scores: what they start from is far from the best."""
    generator = torch.Generator().manual_seed(seed)
    units = shape_of(model).units
    return {name: [torch.rand(count, generator=generator) for count in layers] for name, layers in units.items()}


def found_for(model, structure="mlp", scores=None, rounds=3, **asked):
    return search(model, scores or scores_of(model), TEXT, structure, RIDGE, rounds, **(BUDGET | asked))


def cut_to(model, scores, widths):
    """The model cut to widths for real, each part refitted by itself."""
    small, kept = copy.deepcopy(model), of_widths(scores, widths)
    refit(small, kept, REFITTED_ON, "least_squares", RIDGE)
    cut(small, kept)
    return small


FAMILIES = ["llama", "gemma2", "phi", "gpt2", "cohere", "mpt"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_measured_is_the_model_cut_and_refitted(name):
    model = make(name)
    before, scores = copy.deepcopy(model.state_dict()), scores_of(model)
    structure = "mlp" if shape_of(model).refusals.get("attention") else "mlp+attention"
    rounds, details = found_for(model, structure)
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())
    for widths, kl in rounds:
        expected = divergence(model, cut_to(model, scores, widths), MEASURED_ON)
        assert kl == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert details["held_out"] == len(MEASURED_ON) and details["measured"] > 1


@pytest.mark.parametrize("seed", range(4))
def test_a_search_finds_what_measuring_all_widths_finds(seed):
    model = make("llama", num_hidden_layers=4)
    scores = scores_of(model, seed)
    asked = {"ratio": None, "target_parameters": shape_of(model).total - 64 * 96, "round_to": 16}
    rounds, _ = found_for(model, scores=scores, rounds=9, **asked)
    possible = [widths for widths in product((16, 32, 48), repeat=4) if sum(widths) == 128]
    kl = {widths: divergence(model, cut_to(model, scores, {"mlp": widths}), MEASURED_ON) for widths in possible}
    assert tuple(rounds[-1][0]["mlp"]) == min(kl, key=kl.get)
    assert kl[tuple(rounds[0][0]["mlp"])] > min(kl.values()), "there was something to find"


@pytest.mark.parametrize("structure", ["mlp", "attention", "mlp+attention"])
def test_a_search_keeps_the_budget_and_the_steps_and_gets_no_worse(structure):
    model = make("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    scores = scores_of(model)
    rounds, _ = found_for(model, structure, ratio=0.05)
    (begun, _), (widths, _) = rounds[0], rounds[-1]
    assert widths != begun, "something moved"
    assert {name: sum(layers) for name, layers in widths.items()} == {
        name: sum(layers) for name, layers in begun.items()
    }
    assert all(width % 8 == 0 for width in widths.get("mlp", ()))
    assert count_parameters(cut_to(model, scores, widths)) == count_parameters(cut_to(model, scores, begun))
    measured = [kl for _, kl in rounds]
    assert measured == sorted(measured, reverse=True) and len(set(measured)) == len(measured)


def test_a_budget_of_memory_holds_after_every_exchange():
    """In layers with a window a group takes less of the cache, so an exchange of groups can take too much."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = make("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    model.config.layer_types, model.config.sliding_window = kinds, 8
    asked = {"ratio_of": "memory", "context": 4096, "ratio": 0.3}
    saving, taken = saving_of(shape_of(model), "memory", "attention", model.config, 4096, None), []
    for seed in range(4):
        rounds, _ = found_for(model, "attention", scores_of(model, seed), **asked)
        taken += [saving.share(widths) for widths, _ in rounds]
    assert max(taken) <= 0.7 and len(taken) > 4


def test_steps_are_multiples_between_the_floor_and_the_whole():
    units, widths = {"mlp": [320, 320], "attention": [3, 3]}, {"mlp": [320, 32], "attention": [1, 2]}
    assert changes_of(widths, units, 8) == [
        (("attention", 0), 2), (("mlp", 0), 304), (("attention", 1), 1), (("attention", 1), 3), (("mlp", 1), 48),
    ]  # fmt: skip
    assert changes_of({"mlp": [320]}, {"mlp": [320]}, 64) == [(("mlp", 0), 256)]


def test_exchanges_are_tried_in_doubling_numbers():
    assert [counts_tried(count) for count in (0, 1, 2, 3, 8, 9)] == [
        [], [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 9],
    ]  # fmt: skip


def test_a_search_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    model, walked = make("llama"), []
    whole = found_for(model, "mlp+attention")
    walk = width_search.WidthSearch._walk

    def counted(self, changes):
        if len(walked) == 3:
            raise KeyboardInterrupt  # as a kill: nothing of the search runs any more
        walked.append(changes)
        return walk(self, changes)

    monkeypatch.setattr(width_search.WidthSearch, "_walk", counted)
    with pytest.raises(KeyboardInterrupt):
        found_for(model, "mlp+attention", resume=tmp_path)
    walked.append("killed")
    assert found_for(model, "mlp+attention", resume=tmp_path) == whole, "and counts what it measured before"
    walked.clear()
    monkeypatch.setattr(width_search.WidthSearch, "_walk", lambda *_: pytest.fail("measured twice"))
    assert found_for(model, "mlp+attention", resume=tmp_path) == whole


def test_a_search_that_is_stopped_keeps_what_it_measured(tmp_path, monkeypatch):
    class Received:
        received = True

    monkeypatch.setattr(width_search, "sigterm_deferred", lambda: __import__("contextlib").nullcontext(Received))
    with pytest.raises(Stopped, match="the KL of 1 widths is kept"):
        found_for(make("llama"), resume=tmp_path)
    assert len(json.loads((tmp_path / width_search.MEASURED).read_text())) == 1


def test_widths_are_read_as_they_were_written(tmp_path):
    save_widths(tmp_path / WIDTHS, [({"mlp": [3, 4]}, 0.5), ({"mlp": [4, 3]}, 0.25)])
    assert read_widths(tmp_path / WIDTHS) == {"mlp": [4, 3]}


def test_a_quarter_is_held_out_up_to_so_many_tokens():
    assert [held_out(samples, 256) for samples in (4, 32, 256)] == [1, 8, 32]


def test_streamed_weights_are_refused(tmp_path):
    model = load_model(save_dense(tmp_path / "dense"), "float32", "streamed")
    with pytest.raises(
        UserError, match=r"allocation 'searched': .* cannot be streamed. Use a machine with more memory"
    ):
        found_for(model)


SEARCHED = {"criterion": "fisher_token", "allocation": "searched", "refit": "sequential"}


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ({"refit": "none"}, {}, "measures refitted widths, so it goes with refit least_squares, .*, not none"),
        ({"refit": "bias"}, {}, "measures refitted widths, .*, not bias"),
        (
            {"structure": "mlp+layers", "depth_share": 0.5},
            {},
            r"goes with structure mlp, attention, mlp\+attention, not",
        ),
        ({"structure": "layers", "criterion": "greedy_kl"}, {}, "goes with structure mlp, attention"),
        ({"structure": "experts", "criterion": "reap"}, {}, "structure experts goes with allocation uniform"),
        ({"rounds": 0}, {}, "rounds = 0: Input should be greater than or equal to 1"),
        ({}, {"calibration": {"text": "calibration", "samples": 3, "length": 32}}, "samples = 3 .*'mine'.* at least 4"),
        ({}, {"memory": "streamed"}, "model.memory = 'streamed' with method 'mine': .* Write `memory: auto`"),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_refused_with_the_config(method, changes, message, experiment):
    asked = experiment | {"methods": [{"mine": SEARCHED | method}]}
    if "memory" in changes:
        asked["model"] = experiment["model"] | changes
    else:
        asked |= changes
    with pytest.raises(UserError, match=f"my.yaml: .*{message}"):
        parse(Experiment, asked, "my.yaml")


def test_the_python_interface_searches():
    model, texts = make_model(), [sentences(number, 60) for number in range(6)]
    small = api.prune(model, make_tokenizer(), texts, 0.2, SEARCHED, samples=6, length=16, round_to=8)
    plain = api.prune(
        model, make_tokenizer(), texts, 0.2, SEARCHED | {"allocation": "global"}, samples=6, length=16, round_to=8
    )
    widths = [[part_of(each, "mlp", number).units for number in range(3)] for each in (small, plain)]
    assert sum(widths[0]) == sum(widths[1]) and widths[0] != widths[1]
    with pytest.raises(UserError, match=r"allocation 'searched': .*hfprune.prune"):
        api.allocate(model, {}, 0.2, allocation="searched")
    with pytest.raises(UserError, match="samples 3: allocation searched measures on one in 4 sequences"):
        api.prune(model, make_tokenizer(), texts, 0.2, SEARCHED, samples=3, length=16)


@pytest.fixture
def planned(experiment, tmp_path, monkeypatch):
    reload = {"trust_remote_code": True, "transformers": "5", "parameters": 1, "max_difference": 0.0, "generated": 8}
    monkeypatch.setattr("hfprune.models.checkpoint.prove", lambda *_: reload | {"tolerance": 1e-4, "dtype": "float32"})
    asked = experiment | {"store": str(tmp_path / "store"), "ratios": [0.2], "round_to": 8}
    return Plan(parse(Experiment, asked | {"methods": ["hfprune-best-searched"]}, "test"))


def test_an_experiment_cuts_to_the_widths_found_and_its_cost_is_at_least_that_recorded(planned, tmp_path):
    (job,), (pruned,) = planned.jobs["search"].values(), planned.jobs["prune"].values()
    costs = estimate(planned, planned.experiment)
    (line,) = costs.searches()
    assert line.startswith("search 0.2 by hfprune-best-searched, seed 0: at most ")
    assert line.endswith(" forward passes over 1 of 6 calibration sequences")
    assert line in report(planned.experiment, "cpu", 0.4, None)
    make_job(planned, pruned)
    details = planned.store.manifest("search", job.key)["details"]
    assert details["forward_passes"] <= float(line.split("at most ")[1].split()[0])
    assert details["flops"] <= costs.cost(job).flops <= 4 * details["flops"]
    assert not costs.searches(), "what the store has costs nothing more"
    found = json.loads((planned.store.folder(job.recipe) / WIDTHS).read_text())
    written = json.loads((planned.store.folder(pruned.recipe) / PRUNING).read_text())
    assert {name: list(map(len, layers)) for name, layers in written["kept"].items()} == found["widths"]
    assert (written["allocation"], written["rounds"]) == ("searched", 3)
    card = (planned.store.folder(pruned.recipe) / "README.md").read_text()
    assert "hfprune-best-searched" in card
    (dense, small) = (model.results[0] for model in planned.models)
    words = []
    for measured in (dense, small):
        make_job(planned, measured)
        words.append(planned.manifest(measured))
    out = tmp_path / "metrics.csv"
    assert main(["collect", "--store", str(planned.store.root), "--output", str(out), *words]) == 0
    assert ",search,seconds" in out.read_text() and ",score,seconds" in out.read_text()


def test_widths_of_another_cut_are_refused(planned, capsys):
    (job,), (pruned,) = planned.jobs["search"].values(), planned.jobs["prune"].values()
    make_job(planned, job)
    words = planned.command(pruned)
    words = [*words[: words.index("--key")], "--store", str(planned.store.root)]
    at = words.index("--widths")
    for changed, message in (
        (
            [*words[:at], *words[at + 2 :]],
            "allocation 'searched' takes widths: give --widths, those of `hfprune search`",
        ),
        ([*words, "--allocation", "global"], "allocation 'global' takes no widths: leave out --widths"),
        ([*words, "--ratio", "0.1"], "a search with ratio 0.2; this cut has 0.1"),
        ([*words, "--rounds", "5"], "a search with rounds 3; this cut has 5"),
    ):
        assert main(changed) == 2
        assert message in capsys.readouterr().err


def test_a_search_of_too_few_sequences_is_refused_before_it_begins(planned, capsys):
    (job,) = planned.jobs["search"].values()
    scores = job.inputs["scores"]
    command = planned.command(scores)
    for source in scores.sources:
        make_job(planned, source)
    assert main([*command[: command.index("--key")], "--store", str(planned.store.root), "--samples", "3"]) == 0
    few = capsys.readouterr().out.splitlines()[-1]
    words = [few if word == planned.manifest(scores) else word for word in planned.command(job)]
    assert main([*words[: words.index("--key")], "--store", str(planned.store.root)]) == 2
    assert "samples = 3: allocation searched measures on one in 4 sequences" in capsys.readouterr().err

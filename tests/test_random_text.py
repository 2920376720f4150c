"""Random tokens in place of a calibration text: what is drawn, and what is made from it."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from scipy.stats import chisquare

from hfprune.cli import main
from hfprune.data.packing import read_examples
from hfprune.data.sampling import random_sequences
from hfprune.errors import UserError
from hfprune.experiment.estimate import Estimate, Models, device_of
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, parse
from hfprune.models.loading import check_family
from tests.conftest import make_model, make_tokenizer


def test_every_token_but_the_special_ones_is_as_likely():
    tokenizer, config = make_tokenizer(), make_model().config
    tokenizer.add_special_tokens({"additional_special_tokens": ["bobo"]})
    tokens = random_sequences(tokenizer, config, 100, 500, 0)
    assert tokens.shape == (100, 500)
    special = {tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "bobo")}
    ordinary = set(range(len(tokenizer))) - special
    assert len(special) == 3 < len(tokenizer) == len(ordinary) + 3
    assert set(tokens.unique().tolist()) == ordinary
    assert chisquare(tokens.flatten().bincount()[sorted(ordinary)]).pvalue > 0.001
    assert tokens.equal(random_sequences(tokenizer, config, 100, 500, 0))
    assert not tokens.equal(random_sequences(tokenizer, config, 100, 500, 1))
    with pytest.raises(UserError, match="knows 512 positions"):
        random_sequences(tokenizer, config, 1, 513, 0)


def make(plan, job) -> Path:
    """The artifact of a job, and those that it needs, each made as its rule does."""
    for source in job.sources:
        make(plan, source)
    assert main(plan.command(job)) == 0
    return plan.store.folder(job.recipe)


def test_scores_and_a_refit_are_made_on_random_tokens(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("hfprune.models.checkpoint.prove", lambda *_: {"trust_remote_code": False})  # takes a process
    monkeypatch.setattr("hfprune.sharing.model_card.write_card", lambda _: None)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # stages switch the hub off for their process
        monkeypatch.setenv(name, "1")
    asked = experiment | {
        "store": str(tmp_path / "store"),
        "texts": experiment["texts"] | {"noise": {"random": True}},
        "calibration": {"text": "noise", "samples": 4, "length": 32, "seeds": [3]},
        "methods": [{"mine": {"criterion": "activation_norm", "refit": "least_squares"}}],
        "ratios": [0.2],
    }  # fmt: skip
    plan = Plan(parse(Experiment, asked, "test"))
    (text,) = (job for job in plan.jobs["text"].values() if job.settings.random)
    (score,), (prune,) = (plan.jobs[stage].values() for stage in ("score", "prune"))
    assert score.inputs["text"] is prune.inputs["text"] is text
    estimate = Estimate(plan, Models(check_family(plan.experiment.model.path), "float32"), device_of("cpu"))
    assert estimate.cost(text).disk_bytes == 0
    pruned = make(plan, prune)
    assert estimate.cost(text).disk_bytes == 0  # also once it is in the store
    drawn = random_sequences(make_tokenizer(), make_model().config, 4, 32, 3)
    network, inputs = make_model(tie_word_embeddings=True), []
    down = network.model.layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    network(drawn)
    hook.remove()
    found = load_file(plan.store.folder(score.recipe) / "scores.safetensors")["layers.1.mlp"]
    assert found.argsort().equal(inputs[0].norm(dim=0).argsort())
    details = json.loads((pruned / "pruning.json").read_text())
    kept = details["kept"]["mlp"][1]
    refitted = load_file(pruned / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    errors = [  # of what the layer writes for these tokens
        (inputs[0] @ down.weight.T - inputs[0][:, kept] @ weight.T).norm()
        for weight in (down.weight[:, kept], refitted)
    ]
    assert errors[1] < 0.9 * errors[0]
    with pytest.raises(UserError, match="random tokens, which only calibrate"):
        read_examples(make_tokenizer(), 320, plan.store.folder(text.recipe), 32)

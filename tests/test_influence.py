"""How far layers turn the residual stream, against the hidden states that the model gives out."""

import math
from itertools import pairwise

import pytest
import torch

import hfprune
from hfprune.errors import UserError
from hfprune.models.loading import load_model
from hfprune.pruning.influence import layer_influence
from tests.conftest import FAMILIES, make_model, save_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_mean_over_all_tokens_of_all_batches(family, monkeypatch):
    monkeypatch.setattr("hfprune.pruning.refit.TOKENS_PER_BATCH", 50)
    model, tokens = make_model(family), torch.randint(2, 320, (5, 20), generator=torch.Generator().manual_seed(1))
    last = []
    hook = model.model.norm.register_forward_pre_hook(lambda _module, inputs: last.append(inputs[0]))
    states = [*model(tokens, output_hidden_states=True).hidden_states[:-1], last[0]]
    hook.remove()
    angles, distances = [], []
    for enters, leaves in pairwise(states):
        cosines = [
            (one @ other / one.norm() / other.norm()).item()
            for one, other in zip(enters.flatten(0, 1).double(), leaves.flatten(0, 1).double(), strict=True)
        ]
        angles.append(sum(math.acos(each) / math.pi for each in cosines) / 100)
        distances.append(sum(1 - each for each in cosines) / 100)
    assert layer_influence(model, tokens, "angle").tolist() == pytest.approx(angles, rel=1e-4)
    assert layer_influence(model, tokens, "cosine").tolist() == pytest.approx(distances, rel=1e-4)


def test_a_streamed_model_has_the_same(tmp_path):
    folder, tokens = save_checkpoint(tmp_path / "model"), torch.randint(320, (4, 20))
    found = [
        layer_influence(load_model(folder, "float32", memory), tokens, "angle") for memory in ("resident", "streamed")
    ]
    torch.testing.assert_close(*found)


def test_an_allocation_that_measures_layers_asks_for_tokens():
    model, tokens = make_model(), torch.randint(320, (4, 20))
    scores = hfprune.score(model, tokens, "activation_norm")
    with pytest.raises(UserError, match="allocation 'angular' measures the layers on text: give `tokens`"):
        hfprune.allocate(model, scores, 0.2, allocation="angular")
    kept = hfprune.allocate(model, scores, 0.2, allocation="angular", tokens=tokens)
    assert len({len(layer) for layer in kept["mlp"]}) > 1

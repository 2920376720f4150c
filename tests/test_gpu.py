"""On a GPU: scores, refit, cut and measures are the CPU's, within rounding. Needs no data and no other test's parts."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hfprune
from hfprune.pruning.scoring import unit_scores

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip
CRITERIA = ("entropy", "cross_entropy", "wanda", "flap", "ppm_activation", "magnitude")
CLOSE = 1e-3  # of the largest score of a layer; float32 sums in another order


@pytest.fixture(params=["llama", "qwen2", "qwen3", "gemma2", "phi3"], scope="module")
def models(request):
    """The same random float32 model on the CPU and on the GPU, and tokens."""
    torch.manual_seed(0)
    extra = {"head_dim": 16, "sliding_window": 32} if request.param == "gemma2" else {}
    extra |= {"pad_token_id": 0} if request.param == "phi3" else {}
    config = AutoConfig.for_model(request.param, **SHAPE, **extra)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    return model, copy.deepcopy(model).cuda(), torch.randint(1, 320, (6, 64))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores(models, criterion):
    here, there, tokens = models
    # not by `hfprune.score`: a CPU may multiply in bfloat16 there
    expected, scores = (
        unit_scores(model, tokens, [criterion], products="float32")[criterion] for model in (here, there)
    )
    assert scores.keys() == expected.keys()
    for kind, layers in expected.items():
        for one, other in zip(layers, scores[kind], strict=True):
            assert other.device.type == "cpu"
            assert torch.allclose(one, other, rtol=0, atol=CLOSE * one.abs().max())


@pytest.mark.parametrize("refit", ["least_squares", "sequential", "local_search", "trained"])
def test_refit_and_cut(models, refit):
    here, there, tokens = (copy.deepcopy(model) for model in models)
    kept = hfprune.allocate(here, hfprune.score(here, tokens), ratio=0.1, round_to=1)
    logits = []
    for model in (here, there):
        own = copy.deepcopy(kept)
        hfprune.refit(model, own, tokens, refit)
        hfprune.cut(model, own)
        with torch.no_grad():
            logits.append(model(tokens.to(model.device)).logits.cpu())
    scale = logits[0].std()
    tolerance = 0.05 if refit == "trained" else 5e-3  # training adds up its rounding
    assert (logits[0] - logits[1]).abs().mean() < tolerance * scale


def test_measures(models):
    here, there, tokens = models
    other_here, other_there = (copy.deepcopy(model) for model in (here, there))
    for model in (other_here, other_there):
        for name, weight in model.named_parameters():
            if name.endswith("down_proj.weight"):
                weight.data *= 0.7
    expected = hfprune.fidelity(other_here, here, tokens)
    measured = hfprune.fidelity(other_there, there, tokens)
    assert measured == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_half_precision(models):
    _, there, tokens = models
    half = copy.deepcopy(there).bfloat16()
    exact, rounded = (hfprune.score(model, tokens)["mlp"] for model in (there, half))
    for one, other in zip(exact, rounded, strict=True):
        both = torch.stack([one, other]).argsort(-1).argsort(-1).double()
        assert torch.corrcoef(both)[0, 1] > 0.95

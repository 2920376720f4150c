"""Fidelity measures against independent computations."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from hfprune.evaluation.fidelity import Profile, measure, position_measures, reference, summary, token_measures
from hfprune.models.head import Head
from hfprune.models.loading import load_model
from hfprune.store.filenames import PROFILE, REFERENCE, RESULTS, SAMPLES
from tests.conftest import save_checkpoint


def log_probabilities(seed):
    torch.manual_seed(seed)
    return (2 * torch.randn(6, 40, dtype=torch.float64)).log_softmax(-1)


def test_token_measures_equal_their_definitions():
    log_p, log_q = log_probabilities(0), log_probabilities(1)
    found = token_measures(log_p, log_q)
    p, q = log_p.exp().numpy(), log_q.exp().numpy()
    np.testing.assert_allclose(found["kl"], (p * np.log(p / q)).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(found["js"], jensenshannon(p, q, axis=-1, base=2), rtol=1e-10)
    np.testing.assert_array_equal(found["top1_agreement"], p.argmax(-1) == q.argmax(-1))
    sets = [[set(np.argsort(-row)[:15]) for row in each] for each in (p, q)]
    shared = [len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)]
    np.testing.assert_allclose(found["top15_jaccard"], shared, rtol=1e-12)
    assert 0 < min(shared) < max(shared) < 1
    np.testing.assert_allclose(found["acceptance"], np.minimum(p, q).sum(-1), rtol=1e-12)
    change = [scipy_entropy(b) - scipy_entropy(a) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(found["entropy_change"], change, rtol=1e-10)


def test_a_distribution_compared_with_itself_gives_exact_values():
    log_p = log_probabilities(0).float()
    found = {name: values.tolist() for name, values in token_measures(log_p, log_p.clone()).items()}
    exact = {"kl": 0, "js": 0, "top1_agreement": 1, "top15_jaccard": 1, "acceptance": 1, "entropy_change": 0}
    assert found == {name: [value] * 6 for name, value in exact.items()}


def test_chunks_change_nothing_and_the_loss_is_the_models_own(checkpoint, monkeypatch):
    model = load_model(checkpoint, "float32")
    tokens = torch.arange(5, 25)
    with torch.no_grad():
        hidden = model.model(tokens[None]).last_hidden_state[0]
        loss = model(tokens[None], labels=tokens[None]).loss.item()
    head = Head(model.get_output_embeddings().weight)
    other = hidden + torch.linspace(-1, 1, 32)
    whole = position_measures(other, head, hidden, head, tokens)
    monkeypatch.setattr("hfprune.evaluation.fidelity.LOGITS_PER_CHUNK", 3 * 320)
    chunks = position_measures(other, head, hidden, head, tokens)
    for name, values in whole.items():
        assert len(values) == 19 if name == "loss" else 20
        torch.testing.assert_close(chunks[name], values, rtol=1e-4, atol=1e-5)
    assert position_measures(hidden, head, hidden, head, tokens)["loss"].mean() == pytest.approx(loss, rel=1e-5)


def test_a_profile_has_means_within_bins_of_position_and_of_dense_entropy(tmp_path):
    torch.manual_seed(0)
    entropy, kl = torch.rand(3, 20), torch.rand(3, 20, dtype=torch.float64)
    profile = Profile(entropy)
    for document, values in zip(entropy, kl, strict=True):
        profile.add({"kl": values, "loss": values[:-1]}, document)
    profile.write(tmp_path / PROFILE)
    table = pd.read_csv(tmp_path / PROFILE)
    rows = table[(table["by"] == "entropy") & (table["metric"] == "kl")]
    assert rows["n"].tolist() == [6] * 10, "as many positions in each tenth"
    ranked = kl.flatten()[entropy.flatten().argsort()].view(10, 6).mean(1)
    np.testing.assert_allclose(rows["value"], ranked, rtol=1e-12)
    assert rows["low"].iloc[0] == pytest.approx(entropy.min().item())
    assert rows["high"].iloc[-1] == pytest.approx(entropy.max().item())
    rows = table[(table["by"] == "position") & (table["metric"] == "kl")]
    assert rows["low"].tolist() == [0, 2, 5, 8, 10, 12, 15, 18]  # 20 positions in 8 stretches
    np.testing.assert_allclose(rows["value"].iloc[1], kl[:, 2:5].mean(), rtol=1e-12)
    assert rows["n"].sum() == 60
    loss = table[(table["by"] == "position") & (table["metric"] == "loss")]
    assert loss["n"].tolist() == [6, 9, 9, 6, 6, 9, 9, 3]


def test_summary_is_mean_and_standard_error_over_documents():
    found = summary([{"kl": 1.0, "loss": 2.0}, {"kl": 3.0, "loss": 2.5}, {"kl": 2.0, "loss": 3.0}])
    assert found["kl"] == {"value": 2.0, "stderr": pytest.approx(1 / math.sqrt(3)), "n": 3}
    assert found["perplexity"]["value"] == pytest.approx(math.exp(2.5))
    assert found["perplexity"]["stderr"] == pytest.approx(0.5 / math.sqrt(3) * math.exp(2.5))
    assert summary([{"kl": 1.0}])["kl"]["stderr"] is None


def test_the_dense_model_agrees_with_itself_and_another_does_not(checkpoint, texts, tmp_path):
    for name in ("reference", "same", "other"):
        (tmp_path / name).mkdir()
    reference(tmp_path / "reference", checkpoint, texts, 4, 16, 0, "float32")
    assert (tmp_path / "reference" / REFERENCE).is_file()
    other = save_checkpoint(tmp_path / "model", tie_word_embeddings=True, initializer_range=0.1)
    found = {}
    for name, model in (("same", checkpoint), ("other", other)):
        measure(tmp_path / name, model, tmp_path / "reference", "float32")
        found[name] = json.loads((tmp_path / name / RESULTS).read_text())
    assert found["same"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["same"]["top1_agreement"]["value"] == found["same"]["top15_jaccard"]["value"] == 1
    assert found["same"]["entropy_change"]["value"] == 0
    assert found["other"]["kl"]["value"] > 0.02
    assert found["other"]["js"]["value"] > 0.1
    assert found["other"]["perplexity"]["n"] == 4
    profiles = {}
    for name, results in found.items():
        samples = pd.read_json(tmp_path / name / SAMPLES, lines=True)
        assert samples["doc_id"].tolist() == [0, 1, 2, 3]
        assert samples["kl"].mean() == pytest.approx(results["kl"]["value"])
        assert math.exp(samples["loss"].mean()) == pytest.approx(results["perplexity"]["value"])
        table = profiles[name] = pd.read_csv(tmp_path / name / PROFILE)
        kl = table[table["metric"] == "kl"]
        for by in ("position", "entropy"):
            bins = kl[kl["by"] == by]
            assert np.average(bins["value"], weights=bins["n"]) == pytest.approx(results["kl"]["value"], abs=1e-12)
    bounds = ["by", "bin", "low", "high", "metric", "n"]
    pd.testing.assert_frame_equal(profiles["same"][bounds], profiles["other"][bounds])  # the reference's bins

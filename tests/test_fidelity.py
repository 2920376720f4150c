"""Fidelity measures against independent computations."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from hfprune.fidelity import document_measures, measure, reference, summary, token_measures
from hfprune.layout import REFERENCE, RESULTS
from hfprune.models import load_model
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


def test_chunks_change_nothing_and_the_loss_is_the_models_own(checkpoint, monkeypatch):
    model = load_model(checkpoint, "float32")
    tokens = torch.arange(5, 25)
    with torch.no_grad():
        hidden = model.model(tokens[None]).last_hidden_state[0]
        loss = model(tokens[None], labels=tokens[None]).loss.item()
    head = model.get_output_embeddings().weight
    other = hidden + torch.linspace(-1, 1, 32)
    whole = document_measures(other, head, hidden, head, tokens)
    monkeypatch.setattr("hfprune.fidelity.LOGITS_PER_CHUNK", 3 * 320)
    assert document_measures(other, head, hidden, head, tokens) == pytest.approx(whole, rel=1e-4)
    assert document_measures(hidden, head, hidden, head, tokens)["loss"] == pytest.approx(loss, rel=1e-5)


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
    assert found["same"]["top1_agreement"]["value"] == 1
    assert found["other"]["kl"]["value"] > 0.02
    assert found["other"]["js"]["value"] > 0.1
    assert found["other"]["perplexity"]["n"] == 4

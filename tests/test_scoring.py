"""Scores against an independent float64 computation, and what must not change them."""

import pytest
import torch

from hfprune.criteria import CRITERIA
from hfprune.errors import UserError
from hfprune.models import load_tokenizer
from hfprune.scoring import hidden_gradient, neuron_scores
from hfprune.texts import sample_sequences
from tests.conftest import FAMILIES, make_model, sentences, write_lines

ENTROPY = CRITERIA["entropy"].logit_gradient


def tokens(count=6, length=20):
    torch.manual_seed(3)
    return torch.randint(0, 320, (count, length))


def scores_by_autograd(model, sequences):
    """The paper's formula with nothing of ours: float64, autograd through the whole model, one sequence at a time."""
    model = model.double()
    totals = None
    for sequence in sequences:
        seen = []

        def remember(_module, inputs, seen=seen):
            h = inputs[0].detach().requires_grad_() if not inputs[0].requires_grad else inputs[0]
            h.retain_grad()
            seen.append(h)
            return (h,)

        hooks = [layer.mlp.down_proj.register_forward_pre_hook(remember) for layer in model.model.layers]
        p = torch.softmax(model(sequence[None]).logits, -1)
        (-(p * p.log()).sum(-1)).mean().backward()
        for hook in hooks:
            hook.remove()
        found = [(h * h.grad).abs().sum((0, 1)).detach() for h in seen]
        totals = found if totals is None else [a + b for a, b in zip(totals, found, strict=True)]
    return [total / len(sequences) for total in totals]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_scores_equal_float64_autograd(family, tied):
    ours = neuron_scores(make_model(family, tie_word_embeddings=tied), tokens(), ENTROPY)
    expected = scores_by_autograd(make_model(family, tie_word_embeddings=tied), tokens())
    for layer, (found, right) in enumerate(zip(ours, expected, strict=True)):
        error = ((found - right).norm() / right.norm()).item()
        assert error < 1e-5, f"layer {layer}: relative error {error:.1e}"


def test_scores_do_not_depend_on_the_batch():
    one, all_at_once = (neuron_scores(make_model(), tokens(), ENTROPY, batch=batch) for batch in (1, 6))
    for a, b in zip(one, all_at_once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)


def test_the_output_projection_in_chunks_changes_nothing(monkeypatch):
    torch.manual_seed(4)
    hidden, head = torch.randn(2, 9, 32), torch.randn(320, 32)
    whole = hidden_gradient(hidden, head, ENTROPY)
    monkeypatch.setattr("hfprune.scoring.LOGITS_PER_CHUNK", 4 * 320)
    torch.testing.assert_close(hidden_gradient(hidden, head, ENTROPY), whole)


def test_no_parameter_receives_a_gradient():
    model = make_model()
    neuron_scores(model, tokens(), ENTROPY)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_bfloat16_sums_do_not_stall():
    """A bfloat16 sum of equal terms stalls at 256 of them; ours is float32 or better."""
    many = tokens(1, 8).repeat(600, 1)
    total = neuron_scores(make_model().bfloat16(), many, ENTROPY, batch=4)
    once = neuron_scores(make_model().bfloat16(), many[:4], ENTROPY, batch=4)
    for a, b in zip(total, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


def test_all_zero_scores_name_the_layer():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(UserError, match="layer 1: all scores are zero"):
        neuron_scores(model, tokens(), ENTROPY)


def test_scores_that_are_not_finite_name_the_layer():
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5] = float("inf")
    with pytest.raises(UserError, match="layer 0: scores are not finite"):
        neuron_scores(model, tokens(), ENTROPY)


def test_sequences_are_the_same_for_a_seed_and_differ_between_seeds(checkpoint, texts):
    tokenizer = load_tokenizer(checkpoint)
    drawn = [sample_sequences(tokenizer, 320, texts, 4, 16, seed) for seed in (0, 0, 1)]
    assert drawn[0].shape == (4, 16)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_sequence_is_a_stretch_of_one_document(checkpoint, texts):
    tokenizer = load_tokenizer(checkpoint)
    documents = [tokenizer(sentences(i, 150), add_special_tokens=False)["input_ids"] for i in range(12)]
    found = sample_sequences(tokenizer, 320, texts, 12, 16, seed=5).tolist()
    homes = [
        [i for i, ids in enumerate(documents) if any(ids[k : k + 16] == row for k in range(len(ids)))] for row in found
    ]
    assert sorted(home for (home,) in homes) == list(range(12))


def test_too_little_text_says_how_much_there_is(checkpoint, tmp_path):
    write_lines(tmp_path / "documents.jsonl", [{"text": sentences(1, 150)}, {"text": "short"}])
    with pytest.raises(UserError, match=r"documents\.jsonl: only 1 of its 2 documents have 32 tokens, and 2"):
        sample_sequences(load_tokenizer(checkpoint), 320, tmp_path, 2, 32, 0)


def test_another_models_tokenizer_is_refused(checkpoint, texts):
    with pytest.raises(UserError, match="the tokenizer is another model's"):
        sample_sequences(load_tokenizer(checkpoint), 200, texts, 4, 16, 0)

"""Scores against an independent float64 computation, and what must not change them."""

import pytest
import torch

from hfprune.criteria import CRITERIA, TOP_K, GradientCriterion
from hfprune.errors import UserError
from hfprune.models import load_tokenizer
from hfprune.scoring import LOGITS_PER_CHUNK, generator, hidden_gradient, neuron_scores, positions_of
from hfprune.texts import sample_sequences
from tests.conftest import FAMILIES, make_model, sentences, write_lines

GRADIENT = [name for name, criterion in CRITERIA.items() if isinstance(criterion, GradientCriterion)]


def tokens(count=6, length=20):
    torch.manual_seed(3)
    return torch.randint(0, 320, (count, length))


def loss(name, logits, sequence, number, seed):
    """S, summed over the positions of one sequence, by its definition."""
    log_p = torch.log_softmax(logits, -1)
    if name == "entropy_top_k":
        log_p = torch.log_softmax(logits.topk(TOP_K, -1).values, -1)
    if name.startswith("entropy"):
        return -(log_p.exp() * log_p).sum()
    if name == "cross_entropy":
        return -log_p[:-1].gather(-1, sequence[1:, None]).sum()
    uniforms = torch.rand(len(sequence), generator=generator(seed, 0, number)).double()
    labels = torch.searchsorted(log_p.detach().exp().cumsum(-1), uniforms[:, None], right=True)
    return log_p.gather(-1, labels).sum()


PRODUCT_SUMS = {
    "absolute": lambda products: products.abs().sum(0),
    "square": lambda products: products.square().sum(0),
    "square_of_sum": lambda products: products.sum(0).square(),
}


def scores_by_autograd(name, model, sequences, seed=0):
    """The formula with nothing of the engine: float64, autograd through the whole model, one sequence at a time."""
    model = model.double()
    totals = 0
    for number, sequence in enumerate(sequences):
        seen = []

        def remember(_module, inputs, seen=seen):
            h = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
            h.retain_grad()
            seen.append(h)
            return (h,)

        hooks = [layer.mlp.down_proj.register_forward_pre_hook(remember) for layer in model.model.layers]
        loss(name, model(sequence[None]).logits[0], sequence, number, seed).backward()
        for hook in hooks:
            hook.remove()
        summed = PRODUCT_SUMS[CRITERIA[name].products]
        totals = totals + torch.stack([summed((h * h.grad)[0]).detach() for h in seen])
    return totals / sequences.numel()


def assert_close(found, right, tolerance=1e-5):
    for layer, (ours, expected) in enumerate(zip(found, right, strict=True)):
        error = ((ours.double() - expected).norm() / expected.norm()).item()
        assert error < tolerance, f"layer {layer}: relative error {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_entropy_scores_equal_float64_autograd(family, tied):
    ours = neuron_scores(make_model(family, tie_word_embeddings=tied), tokens(), ["entropy"])["entropy"]
    assert_close(ours, scores_by_autograd("entropy", make_model(family, tie_word_embeddings=tied), tokens()))


@pytest.mark.parametrize("name", GRADIENT)
def test_scores_of_all_criteria_at_once_equal_float64_autograd(name):
    ours = neuron_scores(make_model(), tokens(), list(CRITERIA), seed=4)
    assert_close(ours[name], scores_by_autograd(name, make_model(), tokens(), seed=4))


def test_static_scores_rest_on_the_activations_of_the_intact_model():
    model = make_model()
    seen = []
    hook = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model(tokens())
    hook.remove()
    norms = seen[0].flatten(0, 1).norm(dim=0) * model.model.layers[2].mlp.down_proj.weight.norm(dim=0)
    torch.testing.assert_close(neuron_scores(model, tokens(), ["wanda"])["wanda"][2], norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_scores_do_not_depend_on_the_batch(batch):
    some, whole = (neuron_scores(make_model(), tokens(), list(CRITERIA), batch=size) for size in (batch, 6))
    for name in CRITERIA:
        assert_close(some[name], whole[name])
        for a, b in zip(some[name], whole[name], strict=True):
            assert a.argsort()[-24:].sort().values.equal(b.argsort()[-24:].sort().values), name


def test_more_draws_come_closer_to_the_expectation():
    def fisher(seed, draws):
        return neuron_scores(make_model(), tokens(), ["fisher_token"], seed=seed, draws=draws)["fisher_token"][0]

    expectation = fisher(seed=99, draws=400)
    errors = [(fisher(seed=0, draws=draws) - expectation).norm() / expectation.norm() for draws in (1, 40)]
    assert errors[1] < 0.5 * errors[0]


def test_one_backward_pass_serves_all_criteria_of_one_gradient(monkeypatch):
    passes = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **kw: (passes.append(1), backward(*args, **kw)))
    neuron_scores(make_model(), tokens(), list(CRITERIA), batch=6)
    assert len(passes) == 4  # entropy, entropy_top_k, cross_entropy, and one for both of Fisher's
    passes.clear()
    neuron_scores(make_model(), tokens(), ["wanda", "random"], batch=6)
    assert not passes


def test_the_output_projection_in_chunks_changes_nothing(monkeypatch):
    torch.manual_seed(4)
    hidden, head = torch.randn(2, 9, 32), torch.randn(320, 32)
    positions = positions_of(tokens(2, 9), 0, 0, 0, torch.device("cpu"))
    for name in GRADIENT:
        monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 10**6)
        whole = hidden_gradient(hidden, head, CRITERIA[name].logit_gradient, positions)
        monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 4 * 320)
        torch.testing.assert_close(hidden_gradient(hidden, head, CRITERIA[name].logit_gradient, positions), whole)


def test_no_parameter_receives_a_gradient():
    model = make_model()
    neuron_scores(model, tokens(), ["entropy"])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_bfloat16_sums_do_not_stall():
    """A bfloat16 sum of equal terms stalls at 256 of them; ours is float32 or better."""
    many = tokens(1, 8).repeat(600, 1)
    total, once = (
        neuron_scores(make_model().bfloat16(), some, ["entropy"], batch=4)["entropy"] for some in (many, many[:4])
    )
    assert_close(total, once, 1e-4)


def test_a_pass_that_was_cut_short_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = neuron_scores(make_model(), tokens(), list(CRITERIA), batch=2)
    monkeypatch.setattr("hfprune.scoring.SECONDS_BETWEEN_SAVES", 0)
    model, calls = make_model(), []

    def fail_at_the_third_batch(_module, _args, _kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.register_forward_pre_hook(fail_at_the_third_batch, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        neuron_scores(model, tokens(), list(CRITERIA), batch=2, resume=tmp_path / "resume")
    hook.remove()
    calls.clear()
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    resumed = neuron_scores(model, tokens(), list(CRITERIA), batch=2, resume=tmp_path / "resume")
    assert len(calls) == 1
    for name in CRITERIA:
        assert all(a.equal(b) for a, b in zip(resumed[name], whole[name], strict=True)), name


@pytest.mark.parametrize(
    ("criteria", "draws"), [(["entropy", "fisher_token"], 3), (["entropy", "cross_entropy", "fisher_token"], 1)]
)
def test_a_pass_over_other_criteria_or_draws_does_not_go_on_with_partial_sums(criteria, draws, tmp_path, monkeypatch):
    monkeypatch.setattr("hfprune.scoring.SECONDS_BETWEEN_SAVES", 0)
    neuron_scores(make_model(), tokens(), ["entropy", "fisher_token"], batch=2, resume=tmp_path / "resume")
    found = neuron_scores(make_model(), tokens(), criteria, draws=draws, batch=2, resume=tmp_path / "resume")
    fresh = neuron_scores(make_model(), tokens(), criteria, draws=draws, batch=2)
    for name in criteria:
        assert all(a.equal(b) for a, b in zip(found[name], fresh[name], strict=True)), name


def test_all_zero_scores_name_the_layer():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(UserError, match="layer 1: all scores by entropy are zero"):
        neuron_scores(model, tokens(), ["entropy"])


def test_scores_that_are_not_finite_name_the_layer():
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5] = float("inf")
    with pytest.raises(UserError, match="layer 0: scores by entropy are not finite"):
        neuron_scores(model, tokens(), ["entropy"])


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
    begins = [documents[home][:16] == row for (home,), row in zip(homes, found, strict=True)]
    assert not all(begins), "every stretch begins where its document begins"


def test_too_little_text_says_how_much_there_is(checkpoint, tmp_path):
    write_lines(tmp_path / "documents.jsonl", [{"text": sentences(1, 150)}, {"text": "short"}])
    with pytest.raises(UserError, match=r"documents\.jsonl: only 1 of its 2 documents have 32 tokens, and 2"):
        sample_sequences(load_tokenizer(checkpoint), 320, tmp_path, 2, 32, 0)


def test_another_models_tokenizer_is_refused(checkpoint, texts):
    with pytest.raises(UserError, match="the tokenizer is another model's"):
        sample_sequences(load_tokenizer(checkpoint), 200, texts, 4, 16, 0)

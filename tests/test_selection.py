"""Which documents a training sees, and the ranks of its adapters, against what each document gives alone."""

import json
import math
import re
from collections import Counter

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hfprune.data.packing import Packed, read_examples
from hfprune.errors import UserError
from hfprune.models.loading import load_model, load_tokenizer
from hfprune.pruning.influence import layer_influence
from hfprune.pruning.surgery import cut
from hfprune.recovery import selection, training
from hfprune.recovery.ranks import in_proportion, measured_tokens
from hfprune.recovery.training import recover
from hfprune.stages.recover import RecoverParameters
from tests.conftest import save_checkpoint, sentences, write_lines

TOKENS = torch.arange(64).view(2, 32)
SMALL = {"dtype": "float32", "length": 96, "batch_tokens": 192, "rank": 4, "epochs": 1, "learning_rate": 5e-3}


@pytest.fixture(autouse=True)
def not_reloaded(monkeypatch):
    """The proof takes a process each time, and is no part of this."""
    monkeypatch.setattr("hfprune.models.checkpoint.prove", lambda *_: {"trust_remote_code": False})


def not_again(*_):
    raise AssertionError("documents and ranks are chosen")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of different lengths."""
    folder = tmp_path_factory.mktemp("text")
    write_lines(folder / "documents.jsonl", [{"text": sentences(i, 20 + 4 * i)} for i in range(14)])
    return folder


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructions")
    records = [{"instruction": sentences(i, 3), "response": sentences(50 + i, 2 + i)} for i in range(8)]
    write_lines(folder / "documents.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("pruned") / "model", tie_word_embeddings=True)
    model = load_model(folder, "float32")
    cut(model, {"mlp": [torch.arange(30)] * 3})
    model.save_pretrained(folder)
    return folder


def train(folder, model, text, teacher=None, **changes):
    """`recover`, in this process."""
    asked = RecoverParameters(**(SMALL | changes)).model_dump()
    folder.mkdir(exist_ok=True)
    return recover(folder, model, text, teacher, {"text": "tiny", "source": {"name": "tiny"}}, **asked)


def examples_of(model, text, length=96):
    return read_examples(load_tokenizer(model), 320, text, length)


def alone(network, teacher, example):
    """KL and the gradient's norm of one document by itself, from all its logits, in float64."""
    ids = torch.from_numpy(example.ids).long()[None]
    predicting = slice(max(example.prompt, 1) - 1, -1)
    hidden = network.model(ids).last_hidden_state[0, predicting].double()
    log_p = (hidden @ network.lm_head.weight.double().T).log_softmax(-1)
    if teacher:
        log_t = teacher(ids).logits[0, predicting].double().log_softmax(-1)
        per_token = (log_t.exp() * (log_t - log_p)).sum(-1)
    else:
        per_token = -log_p.gather(1, ids[0, max(example.prompt, 1) :, None])
    hidden.requires_grad_()
    log_p = (hidden @ network.lm_head.weight.double().T).log_softmax(-1)
    loss = (log_t.exp() * -log_p).sum() if teacher else -log_p.gather(1, ids[0, max(example.prompt, 1) :, None]).sum()
    (gradient,) = torch.autograd.grad(loss, hidden)
    return per_token.mean().item(), math.sqrt(gradient.square().sum(-1).mean().item())


@pytest.mark.parametrize("source", ["text", "instructions"])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_packed_document_has_the_value_that_it_has_alone(pruned, checkpoint, source, with_teacher, request):
    network, teacher = load_model(pruned, "float32"), load_model(checkpoint, "float32") if with_teacher else None
    length = 96 if source == "text" else 384
    examples = examples_of(pruned, request.getfixturevalue(source), length)
    expected = [alone(network, teacher, example) for example in examples]
    rows = Packed(examples, length, 1, 0)
    assert 1 < len(rows) < len(examples)
    for by_gradient in (False, True):
        values, states = selection.measure(network, teacher, rows, by_gradient)
        assert values.tolist() == pytest.approx([each[by_gradient] for each in expected], rel=1e-4)
        for example, state in zip(examples, states, strict=True):
            hidden = (teacher or network).model(torch.from_numpy(example.ids).long()[None]).last_hidden_state[0]
            torch.testing.assert_close(state, hidden.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_operations_are_those_that_torch_counts(pruned, checkpoint, text, with_teacher):
    network, teacher = load_model(pruned, "float32"), load_model(checkpoint, "float32") if with_teacher else None
    rows = Packed(examples_of(pruned, text), 96, 1, 0)
    with FlopCounterMode(display=False) as counter:
        selection.measure(network, teacher, rows, by_gradient=not with_teacher)
    models = [network] if teacher is None else [network, teacher]
    layers = [module for model in models for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    learned = sum(len(example.ids) - 1 for example in rows.examples)
    heads = 2 * 32 * 320 * (len(models) + 1)  # the gradient is multiplied by the head's weights
    least = len(rows) * 96 * sum(2 * layer.weight.numel() for layer in layers) + learned * heads
    claimed = len(rows) * 96 * selection.flops_of_measure(network, teacher, 96)  # the head at all tokens, attention
    assert least <= counter.get_total_flops() <= claimed < 1.6 * least


def test_clusters_are_groups_of_one_direction():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:3]
    groups = torch.tensor([0, 1, 2] * 20)
    sizes = 10 ** (4 * torch.rand(60, 1, generator=generator) - 2)  # only the direction counts
    states = sizes * (directions[groups] + 0.01 * torch.randn(60, 16, generator=generator))
    found = selection.clusters(states, 0)
    for cluster in found.unique():
        assert len(groups[found == cluster].unique()) == 1
    assert found.equal(selection.clusters(states, 0))
    assert len(selection.clusters(states[:2], 0)) == 2  # fewer documents than clusters


def test_clusters_get_tokens_in_proportion_to_what_the_cut_did_to_them():
    cluster = torch.tensor([0, 1] * 30)
    values = torch.tensor([3.0, 1.0] * 30, dtype=torch.float64) + torch.arange(60) * 1e-3
    chosen = selection.by_cluster(values, cluster, [10] * 60, 200)
    assert len(chosen) == 20
    assert Counter(cluster[chosen].tolist()) == {0: 15, 1: 5}
    for number, count in ((0, 15), (1, 5)):  # in each, those with the largest values
        assert (
            sorted(document for document in chosen if cluster[document] == number)
            == [document for document in range(60) if cluster[document] == number][-count:]
        )
    chosen = selection.by_cluster(values, cluster, [10] * 60, 500)  # the first cluster has 300 tokens
    assert Counter(cluster[chosen].tolist()) == {0: 30, 1: 20}


@pytest.mark.parametrize("rule", ["random", "gradient_norm", "degradation"])
def test_a_share_of_the_tokens_is_trained_on_in_whole_documents(tmp_path, pruned, checkpoint, text, rule, monkeypatch):
    made = {}
    packed = training.Packed
    monkeypatch.setattr(
        training, "Packed", lambda examples, *more: made.update(examples=examples) or packed(examples, *more)
    )
    teacher = checkpoint if rule == "degradation" else None
    done = train(tmp_path / "made", pruned, text, teacher, share=0.4, select=rule)
    examples = examples_of(pruned, text)
    lengths = [len(example.ids) for example in examples]
    chosen = [
        next(i for i, one in enumerate(examples) if one.ids.tolist() == each.ids.tolist()) for each in made["examples"]
    ]
    assert 0.4 * sum(lengths) <= sum(lengths[i] for i in chosen) < 0.4 * sum(lengths) + max(lengths)
    assert (done["documents"], done["documents_selected"]) == (len(examples), len(chosen))
    assert (done["select"], done["share"], done["loss"]) == (rule, 0.4, "cross_entropy")
    assert done["seconds_together"] > done["preparation_seconds"]
    assert (done["preparation_seconds"] > 0) == (rule != "random")
    network = load_model(pruned, "float32")
    if rule == "gradient_norm":
        norms = [alone(network, None, example)[1] for example in examples]
        rest = set(range(len(examples))) - set(chosen)
        assert min(norms[i] for i in chosen) > max(norms[i] for i in rest)


def test_a_draw_depends_on_the_seed_alone(pruned, text):
    rows = Packed(examples_of(pruned, text), 96, 1, 0)
    drawn = [selection.select("random", None, None, rows, 200, seed) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert len({tuple(each) for each in drawn}) > 2


def test_a_killed_training_keeps_its_documents_and_ranks(tmp_path, pruned, text, monkeypatch):
    asked = {"share": 0.6, "select": "gradient_norm", "rank_by_layer": True, "save_steps": 1, "epochs": 2}
    train(tmp_path / "whole", pruned, text, **asked)
    step = training.RecoveryTrainer.training_step

    def broken(self, *given):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.RecoveryTrainer, "training_step", broken)
        train(tmp_path / "killed", pruned, text, **asked)
    monkeypatch.setattr(training, "prepare", not_again)  # nothing is measured a second time
    done = train(tmp_path / "killed", pruned, text, **asked)
    before = json.loads((tmp_path / "killed" / ".resume" / "prepared.json").read_text())
    assert done["preparation_seconds"] == before["seconds"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(one[name].equal(two[name]) for name in one)


def test_a_share_that_fills_no_step_is_refused_before_documents_are_measured(tmp_path, pruned, text, monkeypatch):
    monkeypatch.setattr(training, "prepare", not_again)
    with pytest.raises(UserError, match=r"a step takes 8 sequences of 96 tokens; .* or a larger share"):
        train(tmp_path / "made", pruned, text, share=0.1, batch_tokens=768)
    with pytest.raises(UserError, match="no linear layer 'query'"):
        train(tmp_path / "made", pruned, text, share=0.5, targets=["query"])


@pytest.mark.parametrize(
    ("shares", "rank", "expected"),
    [
        ([0.1, 0.3, 0.2], 10, [5, 15, 10]),  # exact
        ([1, 1, 1], 7, [7, 7, 7]),
        ([1e-6, 0.5, 0.5], 2, [1, 3, 2]),  # none gets nothing
        ([0.5, 0.1, 0.1, 0.1], 1, [1, 1, 1, 1]),
    ],
)
def test_ranks_are_in_proportion_and_their_mean_is_the_rank(shares, rank, expected):
    found = in_proportion(shares, rank)
    assert sorted(found) == sorted(expected)
    assert sum(found) == rank * len(shares)
    assert all(
        (one - other) * (mine - yours) >= 0
        for one, mine in zip(shares, found, strict=True)
        for other, yours in zip(shares, found, strict=True)
    )


def test_adapters_have_the_ranks_of_their_layers_and_one_scale(tmp_path, pruned, text):
    done = train(tmp_path / "made", pruned, text, rank=6, rank_by_layer=True, keep_adapter=True)
    tokens = measured_tokens(examples_of(pruned, text), 96)
    influence = layer_influence(load_model(pruned, "float32"), tokens, "angle")
    exact = 18 * influence / influence.sum()
    assert sum(done["ranks"]) == 18
    assert max(abs(rank - share) for rank, share in zip(done["ranks"], exact.tolist(), strict=True)) < 1
    assert len(set(done["ranks"])) > 1
    adapter = load_file(tmp_path / "made" / "adapter" / "adapter_model.safetensors")
    ranks = {}
    for name, tensor in adapter.items():
        layer = int(re.search(r"layers\.(\d+)\.", name)[1])
        ranks.setdefault(layer, set()).add(min(tensor.shape))
    assert ranks == {layer: {rank} for layer, rank in enumerate(done["ranks"])}
    weights = {folder: load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "made")}
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
    change = weights[tmp_path / "made"][f"{name}.weight"] - weights[pruned][f"{name}.weight"]
    torch.testing.assert_close(change, 64 / 6 * b @ a, rtol=1e-3, atol=1e-6)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), tmp_path / "made" / "adapter")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "made")(TOKENS).logits
        torch.testing.assert_close(merged, again(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_layers_are_measured_on_text_without_padding(pruned, text, monkeypatch):
    examples = examples_of(pruned, text)
    joined = [token for example in examples for token in example.ids.tolist()]
    monkeypatch.setattr("hfprune.recovery.ranks.SEQUENCES", 3)
    assert measured_tokens(examples, 96).tolist() == [joined[i : i + 96] for i in (0, 96, 192)]
    assert measured_tokens(examples[:1], 96).tolist() == [examples[0].ids.tolist()[:96]]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"select": "degradation"}, "select = 'degradation' with share = 1: all documents are taken. Write a share"),
        ({"share": 0}, "greater than 0"),
        ({"share": 1.5}, "less than or equal to 1"),
        ({"select": "hardest", "share": 0.5}, "'random', 'gradient_norm' or 'degradation'"),
        ({"method": "norms", "rank_by_layer": True}, "'rank_by_layer' goes with method lora, not norms"),
    ],
)
def test_what_does_not_go_together_is_refused(asked, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RecoverParameters(**asked)


def test_a_training_on_all_documents_with_equal_ranks_has_the_key_that_it_had():
    names = {"share", "select", "rank_by_layer"}
    assert not names & RecoverParameters().read().keys()
    assert names - RecoverParameters(share=0.5).read().keys() == {"rank_by_layer"}
    assert names - RecoverParameters(rank_by_layer=True).read().keys() == {"share", "select"}

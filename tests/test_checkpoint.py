"""What is written loads: per-layer widths, padding, shards, and the proof that refuses what does not."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfprune.errors import UserError
from hfprune.evaluation.fidelity import measure, reference
from hfprune.evaluation.lm_eval_runner import language_model
from hfprune.models import checkpoint
from hfprune.models.loading import count_parameters, load_model
from hfprune.models.units import parts
from hfprune.models.widths import FLAG, widths_of
from hfprune.pruning import surgery
from hfprune.store.artifacts import Store
from hfprune.store.filenames import PRUNING, RESULTS
from hfprune.store.keys import Recipe
from tests.conftest import save_dense
from tests.test_families import logits, make
from tests.test_surgery import masked_logits, prune_into, random_scores, run_prune, write_scores

TOKENS = torch.arange(24).view(2, 12)
WIDTHS = (40, 17, 29)
KEPT = [torch.randperm(48, generator=torch.Generator().manual_seed(i))[:n].sort().values for i, n in enumerate(WIDTHS)]
GROUPS = [torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([0])]  # key-value groups, of two
BOTH = {"mlp": KEPT, "attention": GROUPS}
CASES = {
    "llama-tied": ("llama", "float32", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", "float32", {"mlp_bias": True, "attention_bias": True}),
    "llama-bfloat16": ("llama", "bfloat16", {"head_dim": 12}),
    "mistral": ("mistral", "float32", {}),
    "qwen2-tied": ("qwen2", "float32", {"tie_word_embeddings": True}),
    "qwen3-head_dim": ("qwen3", "float32", {"head_dim": 12}),
}
# What someone else does with the folders, in a process with nothing of ours in it.
SOMEONE_ELSE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

tokens = torch.arange(24).view(2, 12)
for folder in map(Path, sys.argv[1:]):
    how = {"dtype": "auto", "trust_remote_code": folder.name == "own"}
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    AutoTokenizer.from_pretrained(folder)
    greedy = {"attention_mask": torch.ones_like(tokens), "min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", **how)
    with torch.no_grad():
        found = {
            "logits": model(tokens).logits,
            "again": again(tokens).logits,
            "cached": model.generate(tokens, use_cache=True, **greedy),
            "whole": model.generate(tokens, use_cache=False, **greedy),
            "parameters": torch.tensor(model.num_parameters()),
        }
    save_file(found, folder / "found.safetensors")
"""


def cut_model(dense, dtype, pad):
    network = load_model(dense, dtype)
    surgery.cut(network, BOTH)
    if pad:
        checkpoint.pad(network)
    return network


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """By case a folder with `dense`, `own` (widths per layer) and `padded`, both loaded by someone else."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = []
    for case, (family, dtype, changes) in CASES.items():
        dense = save_dense(root / case / "dense", family, **changes)
        for name in ("own", "padded"):
            checkpoint.write(cut_model(dense, dtype, pad=name == "padded"), root / case / name, dense)
            folders.append(root / case / name)
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", SOMEONE_ELSE, *folders], check=True, cwd=root, env=environment)
    return {case: root / case for case in CASES}


@pytest.mark.parametrize("name", ["own", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_someone_else_loads_the_model_that_was_cut(case, name, made):
    found = load_file(made[case] / name / "found.safetensors")
    network = cut_model(made[case] / "dense", CASES[case][1], pad=name == "padded")
    with torch.no_grad():
        expected = network(TOKENS).logits
    assert found["logits"].dtype == expected.dtype
    assert (found["logits"] - expected).abs().max() < 1e-6
    assert torch.equal(found["again"], found["logits"]), "saved again, it is the same"
    assert torch.equal(found["cached"], found["whole"]), "generating with a cache is the same as without"
    assert found["parameters"] == count_parameters(network)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1] == "float32"])
def test_widths_per_layer_and_padding_are_the_dense_model_with_units_silent(case, made):
    expected = masked_logits(made[case] / "dense", BOTH, TOKENS)
    for name in ("own", "padded"):
        logits = load_file(made[case] / name / "found.safetensors")["logits"]
        assert (logits - expected).abs().max() < 1e-4


def test_configs_say_what_the_folders_hold(made):
    own, padded, dense = (json.loads((made["mistral"] / name / "config.json").read_text()) for name in
                          ("own", "padded", "dense"))  # fmt: skip
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert own["per_layer_config"] == {
        "0": heads,
        "1": {"intermediate_size": 17},
        "2": {"intermediate_size": 29} | heads,
    }
    assert (own["intermediate_size"], own["num_attention_heads"], own["num_key_value_heads"]) == (40, 4, 2)
    assert own["auto_map"] == {
        "AutoModel": "modeling_per_layer.PerLayerMistralModel",
        "AutoModelForCausalLM": "modeling_per_layer.PerLayerMistralForCausalLM",
    }
    assert padded == dense | {"intermediate_size": max(WIDTHS), "rope_theta": 10000.0}


def test_a_checkpoint_with_widths_per_layer_is_loaded_here_without_running_its_code(made, tmp_path):
    own = tmp_path / "own"
    own.symlink_to(made["qwen2-tied"] / "own")
    code = own / "modeling_per_layer.py"
    before = code.read_text()
    try:
        code.write_text("raise SystemExit('this must not run')")
        network = load_model(own, "float32")
    finally:
        code.write_text(before)
    with torch.no_grad():
        logits = network(TOKENS).logits
    assert (logits - load_file(own / "found.safetensors")["logits"]).abs().max() < 1e-6


def test_a_checkpoint_of_before_with_lists_of_widths_is_loaded(made, tmp_path):
    own = made["llama-biases"] / "own"
    config = written_config(own)
    for name in ("per_layer_config", FLAG):
        del config[name]
    config |= {"intermediate_sizes": list(WIDTHS), "key_value_heads": [1, 2, 1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(own / "model.safetensors")
    network = load_model(tmp_path, "float32")
    with torch.no_grad():
        assert (network(TOKENS).logits - load_file(own / "found.safetensors")["logits"]).abs().max() < 1e-6
    surgery.cut(network, {"mlp": [torch.arange(10), torch.arange(12), torch.arange(10)]})
    assert "intermediate_sizes" not in network.config.to_dict()
    assert widths_of(network.config).neurons == [10, 12, 10]
    assert widths_of(network.config).groups == [1, 2, 1]


def test_what_else_differs_between_layers_is_refused(made, tmp_path):
    config = written_config(made["mistral"] / "own")
    config["per_layer_config"]["1"]["skip"] = ["mlp"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json: per_layer_config.1.skip: only widths may differ"):
        load_model(tmp_path, "float32")


def test_one_width_again_is_a_plain_model_again(made):
    network = load_model(made["qwen3-head_dim"] / "own", "float32")
    surgery.cut(network, {"mlp": [torch.arange(10)] * 3, "attention": [torch.arange(1)] * 3})
    assert type(network).__module__.startswith("transformers.")
    config = network.config
    assert not {"per_layer_config", FLAG, "auto_map"} & set(config.to_dict())
    assert (config.intermediate_size, config.num_key_value_heads, config.num_attention_heads) == (10, 1, 2)
    assert config.head_dim == 12


@pytest.mark.parametrize(("pad", "groups"), [(False, 3), (True, 4)])
def test_heads_that_the_stock_class_does_not_take_go_into_ours_or_are_padded(pad, groups, tmp_path):
    """Llama's config wants a number of heads that divides the hidden size: 6 do not divide 32, 8 do."""
    dense = save_dense(tmp_path / "dense", num_attention_heads=8, num_key_value_heads=4)
    scores = {name: [torch.rand(count) for _ in range(3)] for name, count in (("mlp", 48), ("attention", 4))}
    asked = {"structure": "attention", "target_parameters": count_parameters(load_model(dense, "float32")) - 3 * 1536}
    out, _ = run_prune(dense, tmp_path, scores=scores, pad=pad, **asked)
    network = load_model(out, "float32")
    assert [part.units for part in parts(network, "attention")] == [groups] * 3
    assert type(network).__name__ == ("LlamaForCausalLM" if pad else "PerLayerLlamaForCausalLM")
    kept = json.loads((out / PRUNING).read_text())["kept"]
    assert [len(layer) for layer in kept["attention"]] == [3] * 3
    with torch.no_grad():
        assert (network(TOKENS).logits - masked_logits(dense, kept, TOKENS)).abs().max() < 1e-5


def test_a_checkpoint_with_widths_per_layer_is_measured_and_evaluated(made, texts, tmp_path):
    dense, own = made["llama-tied"] / "dense", made["llama-tied"] / "own"
    (tmp_path / "reference").mkdir()
    reference(tmp_path / "reference", dense, texts, samples=2, length=16, seed=0, dtype="float32")
    details = measure(tmp_path, own, tmp_path / "reference", "float32")
    assert details["parameters"] == count_parameters(load_model(own, "float32"))
    assert json.loads((tmp_path / RESULTS).read_text())["kl"]["value"] > 0
    lm = language_model(own, "float32", "shared")
    assert type(lm.model).__name__ == "PerLayerLlamaForCausalLM"
    with torch.no_grad():
        assert torch.equal(lm.model(TOKENS).logits, load_model(own, "float32")(TOKENS).logits)


def prune_to_widths(monkeypatch, model, folder, **options):
    """Stage `prune` with an allocation that gives layers widths of their own."""
    monkeypatch.setattr(surgery, "allocate", lambda *_: KEPT)
    return run_prune(model, folder, ratio=0.1, **options)


@pytest.mark.parametrize("pad", [False, True])
def test_prune_writes_the_proof_beside_the_checkpoint(pad, made, tmp_path, monkeypatch, fresh_reload, capsys):
    out, done = prune_to_widths(monkeypatch, made["qwen2-tied"] / "dense", tmp_path, pad=pad)
    written = json.loads((out / PRUNING).read_text())
    reload = written["reload"]
    assert reload["max_difference"] <= reload["tolerance"] == 1e-4
    assert reload["parameters"] == done["parameters"] == count_parameters(load_model(out, "float32"))
    assert reload["generated"] == 8
    assert reload["trust_remote_code"] is not pad
    assert (out / "modeling_per_layer.py").exists() is not pad
    assert written["padding"] == pad * (3 * 40 - sum(WIDTHS)) * 3 * 32
    assert [len(layer) for layer in written["kept"]["mlp"]] == list(WIDTHS)
    zeros = f"`pad` stores all layers as wide as the widest, with {written['padding']} parameters of zeros"
    assert (zeros in capsys.readouterr().err) is pad


PLAIN, NEOX = ("rope_theta", "partial_rotary_factor"), ("rotary_emb_base", "rotary_pct")
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}


@pytest.mark.parametrize(
    ("family", "rope", "stated"),
    [
        ("llama", {"rope_theta": 777.0}, {"rope_theta": 777.0}),
        ("qwen3", {"rope_theta": 777.0, **LLAMA3}, {"rope_theta": 777.0, "rope_scaling": LLAMA3}),
        (
            "olmo2",
            {"rope_theta": 777.0, **LINEAR},
            {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        (
            "phi3",
            {"rope_theta": 777.0, **LONG, "original_max_position_embeddings": 64},
            {"rope_theta": 777.0, "rope_scaling": {"type": LONG["rope_type"], **dict([*LONG.items()][1:])}},
        ),
        ("glm", {"rope_theta": 777.0, "partial_rotary_factor": 0.5}, dict(zip(PLAIN, (777.0, 0.5), strict=True))),
        ("gpt_neox", {"rope_theta": 777.0, "partial_rotary_factor": 0.5}, dict(zip(NEOX, (777.0, 0.5), strict=True))),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_theta": 777.0, **LINEAR},
                "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
            },
            {"rope_theta": 777.0, "rope_local_base_freq": 55.0, "rope_scaling": LINEAR},
        ),
    ],
)
def test_rope_stands_in_the_config_as_transformers_4_reads_it_too(family, rope, stated, tmp_path):
    """With these keys transformers 4.57.6 gave the logits of all families here that it knows; without, others."""
    beside = {"original_max_position_embeddings": 64} if family == "phi3" else {}
    model = make(family, rope_parameters=copy.deepcopy(rope), **beside)
    before = logits(model)
    checkpoint.write(model, tmp_path / "made", save_dense(tmp_path / "dense"))
    config = written_config(tmp_path / "made")
    every = {*PLAIN, *NEOX, "rope_scaling", "rope_local_base_freq"}
    found = {key: config[key] for key in every & config.keys()}
    assert found == stated | ({"partial_rotary_factor": 1.0} if family == "phi3" else {})
    torch.testing.assert_close(logits(load_model(tmp_path / "made", "float32")), before)


def test_a_model_with_learned_positions_has_no_rope_to_state(tmp_path):
    checkpoint.write(make("gpt2"), tmp_path / "made", save_dense(tmp_path / "dense"))
    assert not [key for key in written_config(tmp_path / "made") if "rope" in key or "rotary" in key]


def test_large_checkpoints_are_in_shards_and_the_generation_config_stays_as_it_was(made, tmp_path, monkeypatch):
    dense = save_dense(tmp_path / "dense")
    odd = '{"temperature": 0.6, "eos_token_id": 1, "transformers_version": "4.31.0"}'
    (dense / "generation_config.json").write_text(odd)
    monkeypatch.setattr("hfprune.models.checkpoint.BYTES_PER_FILE", 30_000)
    out, _ = prune_to_widths(monkeypatch, dense, tmp_path, dtype="float16")
    assert len(list(out.glob("model-0*.safetensors"))) > 1
    assert (out / "model.safetensors.index.json").exists()
    assert (out / "generation_config.json").read_text() == odd
    assert json.loads((out / PRUNING).read_text())["reload"]["dtype"] == "float16"


def written_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["tied", "another", "untied"])
def test_the_config_says_what_is_in_the_file(head, dtype, tmp_path):
    """A head of its own beside a config that says tied is loaded by transformers, and so it is written."""
    dense = save_dense(tmp_path / "dense", tie_word_embeddings=head != "untied")
    if head == "another":
        torch.manual_seed(3)
        change_weights(dense, lambda weights: weights.update({"lm_head.weight": torch.randn(320, 32) * 0.15}))
    out, done = run_prune(dense, tmp_path, ratio=0.1, dtype=dtype)
    weights = load_file(out / "model.safetensors")
    config = written_config(out)
    assert config["tie_word_embeddings"] is ("lm_head.weight" not in weights) is (head == "tied")
    assert sum(weight.numel() for weight in weights.values()) == done["parameters"]
    assert config["dtype"] == dtype
    assert {str(weight.dtype).removeprefix("torch.") for weight in weights.values()} == {dtype}
    assert config["intermediate_size"] == weights["model.layers.0.mlp.up_proj.weight"].shape[0]
    assert config["vocab_size"] == weights["model.embed_tokens.weight"].shape[0]
    kept = json.loads((out / PRUNING).read_text())["kept"]
    with torch.no_grad():
        logits = load_model(out, "float32")(TOKENS).logits
    near = 1e-5 if dtype == "float32" else 0.2
    assert (logits - masked_logits(dense, kept, TOKENS)).abs().max() < near


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: change_weights(folder, lambda found: found[NAME][3].mul_(1.05)), "logits differ by up to"),
        (lambda folder: change_weights(folder, lambda found: found.pop(NAME)), "logits differ by up to"),
        (lambda folder: change_weights(folder, lambda found: found[NAME].fill_(float("nan"))), "differ by up to nan"),
        (lambda folder: change_config(folder, tie_word_embeddings=False), r"parameters \d+, saved with \d+"),
        (
            lambda folder: change_config(
                folder, auto_map={"AutoModelForCausalLM": "modeling_per_layer.PerLayerLlamaForCausalLM"}
            ),
            "it does not load|auto_model False, saved with True",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "it does not load"),
    ],
)
def test_a_checkpoint_damaged_between_saving_and_proof_is_refused(damage, message, made, tmp_path, monkeypatch):
    finish = checkpoint.LayerWriter.finish

    def finish_and_damage(writer):
        expected = finish(writer)
        damage(writer.folder)
        return expected

    monkeypatch.setattr(checkpoint.LayerWriter, "finish", finish_and_damage)
    monkeypatch.setattr(surgery, "allocate", lambda *_: KEPT)
    dense, scores = made["llama-tied"] / "dense", write_scores(tmp_path / "scores", random_scores())

    def produce(folder):
        return prune_into(folder, dense, scores, ratio=0.1)

    with pytest.raises(UserError, match=message) as refused:
        Store(tmp_path / "store").make(Recipe("prune", {}), produce)
    assert "reloaded in a fresh process, the checkpoint is not the model that was saved" in str(refused.value)
    assert not list(tmp_path.glob("store/prune/*"))


def test_the_tolerance_is_a_few_roundings_of_the_largest_logit():
    def tolerance(logits):
        return checkpoint.Expected(TOKENS, logits, 0, False, "cpu").tolerance

    assert tolerance(torch.tensor([-20.0, 3.0])) == 1e-4
    assert tolerance(torch.tensor([-20.0, 3.0], dtype=torch.bfloat16)) == 2 * 2**-7 * 20
    assert tolerance(torch.tensor([-20.0, 3.0], dtype=torch.float16)) == 2 * 2**-10 * 20

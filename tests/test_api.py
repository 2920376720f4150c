"""hfprune in Python keeps what the stages keep, leaves its model alone, and refuses what it would get wrong."""

import copy
import json
import runpy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hfprune
from hfprune import api
from hfprune.errors import UserError
from hfprune.evaluation import fidelity
from hfprune.models.loading import load_model, load_tokenizer
from hfprune.models.units import save_scores
from hfprune.pruning import scoring, surgery
from hfprune.pruning.criteria import passes
from hfprune.pruning.methods import presets
from hfprune.stages.prune import PruneParameters
from hfprune.store.filenames import PRUNING, SCORES
from tests.conftest import REPOSITORY, make_model, make_tokenizer, sentences

TEXTS = [sentences(i, 150) for i in range(12)]  # as those of the fixture `texts`
SAMPLING = {"samples": 6, "length": 32, "seed": 3}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def run_stages(folder, checkpoint, texts, recipe, **cut):
    """The folder that stages `score` and `prune` leave."""
    cuts = None
    for _, names in passes([recipe.criterion]):
        found, _ = scoring.score(folder, checkpoint, texts, names, **SAMPLING, draws=1, dtype="float32", light_cut=cuts)
        for name, scores in found.items():
            (folder / name).mkdir()
            save_scores(folder / name / SCORES, scores)
        cuts = folder / "cross_entropy"
    out = folder / "pruned"
    out.mkdir()
    asked = PruneParameters(**recipe.model_dump(exclude={"criterion"}), **cut, dtype="float32")
    words = texts if asked.reads_text else None
    calibration = SAMPLING | {"criterion": recipe.criterion, "text": "words"}
    surgery.prune(
        out, checkpoint, folder / recipe.criterion, words, {"name": "tiny"}, calibration, **asked.model_dump()
    )
    return out


@pytest.mark.parametrize(
    ("method", "cut"),
    [
        ("HFPrune", {"ratio": 0.2}),
        ("SDMPrune", {"ratio": 0.3, "ratio_of": "mlp", "round_to": 8}),
        ("hfprune-best", {"ratio": 0.2}),
        ("MoDeGPT", {"ratio": 0.2}),
        ("hfprune-best", {"ratio": 0.2, "pad": True}),
        ("hfprune-best-stock", {"target_parameters": 25_000}),
    ],
)
def test_it_makes_the_model_that_the_stages_make(method, cut, checkpoint, texts, tmp_path):
    out = run_stages(tmp_path, checkpoint, texts, presets()[method].recipe, **cut)
    dense = load_model(checkpoint, "float32")
    small = hfprune.prune(dense, load_tokenizer(checkpoint), TEXTS, method=method, **cut, **SAMPLING)
    same(small.state_dict(), load_model(out, "float32").state_dict())
    kept = json.loads((out / PRUNING).read_text())["kept"]
    tokens = hfprune.sample(dense, load_tokenizer(checkpoint), TEXTS, **SAMPLING)
    recipe = presets()[method].recipe
    scores = hfprune.score(dense, tokens, recipe.criterion, seed=3)
    budget = {name: value for name, value in cut.items() if name != "pad"}
    chosen = hfprune.allocate(
        dense, scores, structure=recipe.structure, allocation=recipe.allocation, tokens=tokens, **budget
    )
    assert {name: [layer.tolist() for layer in layers] for name, layers in chosen.items()} == kept


def test_the_model_stays_as_it_is_and_so_does_what_it_was_set_to():
    model, tokenizer = make_model(tie_word_embeddings=True), make_tokenizer()
    model.train().requires_grad_(True)
    model.model.embed_tokens.requires_grad_(False)
    asking = {name: each.requires_grad for name, each in model.named_parameters()}
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    small = hfprune.prune(model, tokenizer, TEXTS, ratio=0.2, **SAMPLING)
    same(model.state_dict(), before)
    assert model.config.to_dict() == config and model.training
    tokens = hfprune.sample(model, tokenizer, TEXTS, **SAMPLING)
    hfprune.score(model, tokens)
    hfprune.fidelity(small, model, tokens)
    assert model.training and asking == {name: each.requires_grad for name, each in model.named_parameters()}
    assert small.training and all(each.requires_grad for each in small.parameters())
    assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in model.parameters())
    small(input_ids=tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_the_result_is_a_model_of_transformers_that_saves_and_loads(family, tmp_path):
    model = make_model(family)
    small = hfprune.prune(model, make_tokenizer(), TEXTS, ratio=0.2, method="hfprune-best-stock", **SAMPLING)
    assert type(small) is type(model)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(again(tokens).logits, small(tokens).logits)


def test_a_recipe_may_be_written_out():
    model, tokenizer = make_model(), make_tokenizer()
    named = hfprune.prune(model, tokenizer, TEXTS, ratio=0.2, method="Wanda-sp", **SAMPLING)
    written = hfprune.prune(model, tokenizer, TEXTS, ratio=0.2, method={"criterion": "wanda"}, **SAMPLING)
    same(named.state_dict(), written.state_dict())


def test_fidelity_is_what_stage_measure_says(checkpoint, texts, tmp_path):
    dense, tokenizer = load_model(checkpoint, "float32"), load_tokenizer(checkpoint)
    small = hfprune.prune(dense, tokenizer, TEXTS, ratio=0.2, method="HFPrune", **SAMPLING)
    tokens = hfprune.sample(dense, tokenizer, TEXTS, 4, 24, seed=1)
    found = hfprune.fidelity(small, dense, tokens)
    for folder in ("pruned", "reference", "measured"):
        (tmp_path / folder).mkdir()
    small.save_pretrained(tmp_path / "pruned")
    fidelity.reference(tmp_path / "reference", checkpoint, texts, 4, 24, 1, "float32")
    fidelity.measure(tmp_path / "measured", tmp_path / "pruned", tmp_path / "reference", "float32")
    expected = json.loads((tmp_path / "measured" / "results.json").read_text())
    assert found == pytest.approx({name: estimate["value"] for name, estimate in expected.items()})
    assert hfprune.fidelity(dense, dense, tokens)["kl"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "hfprune"}, "no method is called 'hfprune'. Did you mean 'HFPrune'"),
        ({"method": {"criterion": "entrpy"}}, "criterion: Input should be 'entropy'"),
        ({"method": {"criterion": "entropy", "attention_share": 0.2}}, "goes with structure mlp.attention"),
        ({"ratio": None}, "give one of ratio and target_parameters, not none"),
        ({"target_parameters": 9}, "not both"),
        ({"ratio": 20}, "ratio 20: expected a share between 0 and 1"),
        ({"ratio": 0.99}, "largest ratio that allows"),
        ({"ratio_of": "mlps"}, "ratio_of 'mlps'"),
        ({"round_to": 16}, "round_to 16: expected one of 1, 8, 32, 64, 128, 256"),
        ({"texts": "one string"}, "expected a list of strings"),
        ({"texts": [1, 2]}, "expected a list of strings"),
        ({"texts": ["short"]}, "texts: only 0 of its 1 documents have 32 tokens"),
        ({"model": make_model(vocab_size=100, bos_token_id=0, eos_token_id=1)}, "the tokenizer is another model's"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear is no model of transformers"),
    ],
)
def test_what_is_wrong_is_refused(changes, message):
    asked = {"model": make_model(), "tokenizer": make_tokenizer(), "texts": TEXTS, "ratio": 0.2} | changes
    with pytest.raises(UserError, match=message):
        hfprune.prune(**asked, **SAMPLING)


MIXED = {"criterion": "entropy", "structure": "mlp+layers", "depth_share": 0.5}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "HFPrune", "ratio": 0.99}, "largest ratio that allows"),
        ({"method": "HFPrune", "target_parameters": 10**9}, "the target has to be smaller"),
        ({"method": "HFPrune", "ratio": 0.2, "round_to": 16}, "round_to 16: expected one of"),
        ({"method": "HFPrune", "ratio": 0.99, "ratio_of": "memory", "context": 8}, "largest ratio that allows"),
        ({"method": "SLEB", "ratio": 0.99}, "largest ratio that allows"),
        ({"method": "SLEB", "ratio": 0.2, "ratio_of": "mlp"}, "ratio_of 'mlp' with structure 'layers'"),
        ({"method": MIXED, "ratio": 0.9}, "largest depth_share that allows"),
        ({"method": MIXED | {"depth_share": 0.01}, "ratio": 0.2}, "Set a depth_share above"),
        ({"method": "REAP", "ratio": 0.2}, "structure 'experts'"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_scored(asked, message, monkeypatch):
    for name in ("sample", "score", "order", "layer_influence", "unit_scores"):
        monkeypatch.setattr(api, name, lambda *_, name=name, **__: pytest.fail(f"{name} ran first"))
    with pytest.raises(UserError, match=message):
        hfprune.prune(make_model(), make_tokenizer(), TEXTS, **asked, **SAMPLING)


def test_models_that_the_engine_would_get_wrong_are_refused():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    with pytest.raises(UserError, match="model_type 'bloom' is not supported"):
        config = AutoConfig.for_model("bloom", n_layer=1, hidden_size=8, n_head=1, slow_but_exact=True)
        api.check_model(AutoModelForCausalLM.from_config(config))
    config = make_model().config
    with pytest.raises(UserError, match="no language model with an output layer"):
        api.check_model(AutoModelForSequenceClassification.from_config(config))
    base = make_model()
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(UserError, match=r"merge them first, `model = model\.merge_and_unload\(\)`"):
        api.check_model(adapted)
    with pytest.raises(UserError, match="adapters or quantised weights"):
        api.check_model(base)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="is spread over meta"):
        api.check_model(empty)


def test_the_package_imports_nothing_until_it_is_asked():
    said = (
        "import sys, hfprune; names = dir(hfprune); heavy = {'torch', 'hfprune.api'} & set(sys.modules)\n"
        "print(sorted(heavy), {'prune', 'score', 'allocate', 'refit', 'cut', 'fidelity'} <= set(names))\n"
        "try: hfprune.prun\nexcept AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.splitlines() == ["[] True", "module 'hfprune' has no attribute 'prun'"]
    assert all(callable(getattr(hfprune, name)) for name in hfprune.__all__)


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prune_in_python.py"])
    runpy.run_path(str(REPOSITORY / "examples" / "prune_in_python.py"))
    printed = capsys.readouterr().out
    assert "parameters became" in printed and printed.count("nats per token") == 3

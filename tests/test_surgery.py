"""The pruned checkpoint: exact, of the asked size, and loadable by anyone."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfprune.data.sampling import sample_sequences
from hfprune.errors import UserError
from hfprune.evaluation.fidelity import token_measures
from hfprune.models.loading import count_parameters, load_model, load_tokenizer
from hfprune.models.units import parts, save_scores
from hfprune.pruning.allocation import allocate
from hfprune.pruning.budget import Shape, shape_of, shape_on_disk, units_to_keep
from hfprune.pruning.scoring import unit_scores
from hfprune.pruning.surgery import best_units, cut, prune
from hfprune.stages.prune import PruneParameters
from hfprune.store.filenames import PRUNING, SCORES
from tests.conftest import FAMILIES, make_model, save_checkpoint, save_dense


def random_scores(seed=0, layers=3, neurons=48, groups=2):
    torch.manual_seed(seed)
    return {
        name: [torch.rand(count) for _ in range(layers)] for name, count in (("mlp", neurons), ("attention", groups))
    }


PER_NEURON = 3 * 32  # parameters of a neuron of the tiny model
CALIBRATION = {"criterion": "entropy", "samples": 6, "length": 32, "seed": 0, "text": "words"}
SOURCE = {"name": "tiny", "content": "0"}


def write_scores(folder, scores):
    folder.mkdir(parents=True)
    save_scores(folder / SCORES, scores)
    return folder


def prune_into(out, model, scores, text=None, calibration=CALIBRATION, order=None, **asked):
    asked = PruneParameters(**({"dtype": "float32"} | asked))
    return prune(out, model, scores, text, SOURCE, calibration, order=order, **asked.model_dump())


def run_prune(model, folder, text=None, scores=None, **asked):
    scores, out = write_scores(folder / "scores", scores or random_scores()), folder / "pruned"
    out.mkdir()
    return out, prune_into(out, model, scores, text, **asked)


def masked(model, kept):
    """A copy of the model with the units that are not in `kept` silent."""
    model = copy.deepcopy(model)
    for name, layers in kept.items():
        for part, stays in zip(parts(model, name), layers, strict=True):
            mask = torch.zeros(part.units, part.columns)
            mask[stays] = 1
            hook = partial(lambda _module, inputs, mask: (inputs[0] * mask,), mask=mask.flatten())
            part.output.register_forward_pre_hook(hook)
    return model


def masked_logits(dense, kept, tokens):
    """The logits of the intact model with the units that are not in `kept` silent."""
    with torch.no_grad():
        return masked(load_model(dense, "float32"), kept)(tokens).logits


VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"mlp_bias": True, "attention_bias": True}),
    ("mistral", {"num_key_value_heads": 4}),  # a group is a single head
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 12, "attention_bias": True}),
]


@pytest.mark.parametrize("structure", ["mlp", "attention", "mlp+attention"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_reloaded_by_stock_code_it_is_the_intact_model_with_those_units_silent(family, changes, structure, tmp_path):
    dense = save_dense(tmp_path / "dense", family, **changes)
    share = {"attention_share": 0.5} if structure == "mlp+attention" else {}
    scores = random_scores(groups=changes.get("num_key_value_heads", 2))
    ratio = 0.09 if structure == "attention" else 0.2
    out, _ = run_prune(dense, tmp_path, scores=scores, ratio=ratio, structure=structure, **share)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
    kept = json.loads((out / PRUNING).read_text())["kept"]
    assert set(kept) == set(structure.split("+"))
    dense_model = load_model(dense, "float32")
    for name, layers in kept.items():
        assert all(len(stays) < part.units for stays, part in zip(layers, parts(dense_model, name), strict=True))
    expected = masked_logits(dense, kept, tokens)
    assert (found - expected).abs().max() < 1e-4
    assert (dense_model(tokens).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_every_family_goes_the_whole_way(family, changes, texts, tmp_path):
    """Scored, cut to widths per layer, refitted, saved, reloaded by someone else, who generates."""
    dense = save_dense(tmp_path / "dense", family, **changes)
    network = load_model(dense, "float32")
    tokens = sample_sequences(load_tokenizer(dense), network.config, texts, 6, 32, 0)
    scores = unit_scores(network, tokens, ["fisher_token"])["fisher_token"]
    asked = {"ratio": 0.2, "structure": "mlp+attention", "allocation": "global"}
    out, done = run_prune(dense, tmp_path, texts, scores, refit="sequential", **asked)
    written = json.loads((out / PRUNING).read_text())
    assert written["reload"]["generated"] == 8
    assert written["reload"]["max_difference"] == 0, "the saved model is computed as the reloaded one is"
    assert abs(done["ratio_achieved"] - 0.2) < 2 * PER_NEURON / done["parameters_dense"]
    _, plain = run_prune(dense, tmp_path / "plain", scores=scores, **asked)
    kl = [divergence(network, load_model(tmp_path / each, "float32"), tokens) for each in ("pruned", "plain/pruned")]
    assert kl[0] < 0.9 * kl[1], "the refit brings it nearer to the dense model"
    assert plain["parameters"] == done["parameters"]


@torch.no_grad()
def divergence(dense, model, tokens):
    log_p, log_q = (each(tokens).logits.log_softmax(-1) for each in (dense, model))
    return token_measures(log_p, log_q)["kl"].mean().item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.2, 0.25])
def test_the_share_removed_is_within_half_a_neuron_per_layer(ratio, tied):
    model = make_model(tie_word_embeddings=tied)
    before = count_parameters(model)
    keep = units_to_keep(shape_of(model), ratio).keep["mlp"]
    cut(model, {"mlp": allocate("uniform", random_scores()["mlp"], keep, 1)})
    half_a_neuron_per_layer = 3 * 3 * 32 / 2 / before
    assert abs(1 - count_parameters(model) / before - ratio) <= half_a_neuron_per_layer + 1e-12


def test_what_was_done_stands_beside_the_weights_with_the_tokenizer_and_all(checkpoint, tmp_path):
    out, done = run_prune(checkpoint, tmp_path, ratio=0.1)
    before, after = (count_parameters(load_model(folder, "float32")) for folder in (checkpoint, out))
    written = json.loads((out / PRUNING).read_text())
    assert {name: written[name] for name in done} == done
    assert written["parameters"] == after
    assert written["parameters_dense"] == before
    assert written["ratio_achieved"] == pytest.approx(1 - after / before, abs=1e-12)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert json.loads((out / "config.json").read_text())["intermediate_size"] < 48


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("budget", ["ratio", "ratio_of_mlp", "target_parameters"])
def test_a_budget_is_met_to_the_nearest_width(budget, round_to, allocation):
    model = make_model()
    before = count_parameters(model)
    asked = {
        "ratio": {"ratio": 0.2},
        "ratio_of_mlp": {"ratio": 0.45, "ratio_of": "mlp"},
        "target_parameters": {"target_parameters": before - 50 * PER_NEURON - 11},
    }[budget]
    removed = {
        "ratio": 0.2 * before / PER_NEURON,
        "ratio_of_mlp": 0.45 * 144,
        "target_parameters": 50 + 11 / PER_NEURON,
    }
    keep = units_to_keep(shape_of(model), **asked, round_to=round_to, allocation=allocation).keep["mlp"]
    widths = [len(layer) for layer in allocate(allocation, random_scores()["mlp"], keep, round_to)]
    assert keep == pytest.approx(144 - removed[budget])
    assert all(width % round_to == 0 for width in widths)
    step = round_to * (3 if allocation == "uniform" else 1)  # uniform widths move together
    assert abs(sum(widths) - keep) <= step / 2
    assert len(set(widths)) == 1 or allocation == "global"


@pytest.mark.parametrize("asked", [{"ratio": 0.45, "ratio_of": "mlp"}, {"target_parameters": 24_000}], ids=str)
def test_both_shares_on_record_are_of_all_parameters(asked, checkpoint, tmp_path):
    before = count_parameters(load_model(checkpoint, "float32"))
    _, done = run_prune(checkpoint, tmp_path, **asked, round_to=8, allocation="global")
    removed = 0.45 * 144 * PER_NEURON if "ratio" in asked else before - 24_000
    assert done["ratio"] == pytest.approx(removed / before)
    assert done["ratio_achieved"] == pytest.approx(1 - done["parameters"] / before)
    assert abs(done["ratio_achieved"] - done["ratio"]) <= 4 * PER_NEURON / before


@pytest.mark.parametrize(("hidden", "step"), [(32, 1), (255, 1), (256, 64), (2047, 64), (2048, 256)])
def test_widths_are_multiples_that_fit_the_models_size(hidden, step):
    shape = Shape(10_000_000, {"mlp": [4096, 4096], "attention": [4, 4]}, {"mlp": 1000, "attention": 1000}, hidden)
    budget = units_to_keep(shape, 0.3)
    assert budget.round_to == step
    kept = best_units(budget, {"mlp": [torch.rand(4096), torch.rand(4096)]}, "uniform")
    assert {len(layer) for layer in kept["mlp"]} == {round(2596 / step) * step}
    assert units_to_keep(shape, 0.3, round_to=8).round_to == 8


def test_a_share_that_steps_miss_is_told(checkpoint, tmp_path, capsys):
    _, done = run_prune(checkpoint, tmp_path, ratio=0.1, round_to=8)
    message = capsys.readouterr().err
    assert f"removed {done['ratio_achieved']:.4f} of all parameters, asked 0.1000: " in message
    assert "multiples of 8" in message


@pytest.mark.parametrize("ratio_of", ["all", "mlp"])
@pytest.mark.parametrize(
    ("allocation", "round_to", "fewest"), [("uniform", 1, 3), ("uniform", 8, 24), ("global", 1, 15)]
)
def test_an_impossible_ratio_is_refused_with_the_largest_possible_one(allocation, round_to, fewest, ratio_of):
    model, words = make_model(), {"ratio_of": ratio_of, "allocation": allocation, "round_to": round_to}
    said = f"ratio 0.99 of {ratio_of} parameters.*largest ratio that allows is 0[.][0-9]+"
    with pytest.raises(UserError, match=said) as refused:
        units_to_keep(shape_of(model), 0.99, **words)
    largest = float(str(refused.value).split()[-1].rstrip("."))
    assert units_to_keep(shape_of(model), largest, **words).keep["mlp"] == pytest.approx(fewest, abs=0.1)


def test_an_impossible_target_is_refused_with_the_smallest_possible_one():
    model = make_model()
    with pytest.raises(
        UserError, match=r"target_parameters 1000.*smallest target_parameters that allows is [0-9]+"
    ) as refused:
        units_to_keep(shape_of(model), target_parameters=1000)
    smallest = int(str(refused.value).split()[-1].rstrip("."))
    assert units_to_keep(shape_of(model), target_parameters=smallest).keep == {"mlp": 3}
    with pytest.raises(UserError, match="the target has to be smaller"):
        units_to_keep(shape_of(model), target_parameters=count_parameters(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_the_files_headers_say_the_shape_of_the_model(family, changes, tied, tmp_path):
    dense = save_dense(tmp_path / "dense", family, tie_word_embeddings=tied, **changes)
    assert shape_on_disk(dense) == shape_of(load_model(dense, "float32"))


PER_GROUP = 2 * 8 * 32 + 2 * 8 * 32 + 2 * 8 * 32  # two query heads, a key and a value head, columns of o_proj


def gone(model, kept):
    """By part, how many units of each layer go."""
    return {
        name: [part.units - len(stay) for part, stay in zip(parts(model, name), layers, strict=True)]
        for name, layers in kept.items()
    }


def keep_of(model, allocation, scores, asked, round_to=1):
    return {
        name: allocate(allocation, scores[name], keep, round_to if name == "mlp" else 1)
        for name, keep in asked.keep.items()
    }


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_a_set_share_comes_from_attention_and_neurons_give_the_rest(share, allocation):
    model, scores = make_model(), random_scores()
    words = {"structure": "mlp+attention", "allocation": allocation, "attention_share": share}
    asked = units_to_keep(shape_of(model), 0.2, **words)
    kept = keep_of(model, allocation, scores, asked)
    lost = {name: sum(layers) for name, layers in gone(model, kept).items()}
    whole = share * 0.2 * count_parameters(model) / PER_GROUP
    step = 3 if allocation == "uniform" else 1
    assert abs(lost["attention"] - whole) <= step / 2 + 1e-9
    before = count_parameters(model)
    cut(model, kept)
    assert abs(1 - count_parameters(model) / before - 0.2) <= 2 * PER_NEURON / before


def test_without_a_set_share_the_lowest_scores_per_parameter_go_wherever_they_are():
    model, scores = make_model(), random_scores()
    scores["attention"] = [layer * PER_GROUP / PER_NEURON for layer in scores["attention"]]
    asked = units_to_keep(shape_of(model), 0.2, structure="mlp+attention", allocation="global", scores=scores)
    kept = keep_of(model, "global", scores, asked)
    per_unit = {"mlp": PER_NEURON, "attention": PER_GROUP}
    values = {name: [layer / per_unit[name] for layer in scores[name]] for name in kept}
    stays, goes = [], []
    for name, layers in kept.items():
        for value, stay in zip(values[name], layers, strict=True):
            mask = torch.zeros(len(value), dtype=torch.bool).index_fill_(0, stay, True)
            stays += value[mask].tolist() if len(stay) > 1 else []  # the last group of a layer stays in any case
            goes += value[~mask].tolist()
    assert gone(model, kept)["attention"] != [0, 0, 0]
    # But for the neurons that fill up what a whole group more would have overshot.
    assert sum(value > min(stays) for value in goes) <= PER_GROUP // PER_NEURON


def test_groups_that_nobody_would_miss_all_go_but_one_a_layer():
    model, scores = make_model(), random_scores()
    scores["attention"] = [torch.full((2,), 1e-6) for _ in range(3)]
    for allocation in ("uniform", "global"):
        asked = units_to_keep(shape_of(model), 0.2, structure="mlp+attention", allocation=allocation, scores=scores)
        assert gone(model, keep_of(model, allocation, scores, asked))["attention"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"ratio": 0.3, "structure": "attention"},
            "at least 3 of 6 key-value groups.*largest ratio .* is 0.1",
        ),
        ({"target_parameters": 1000, "structure": "mlp+attention"}, "3 of 144 neurons and 3 of 6 key-value groups"),
        ({"ratio": 0.3, "structure": "mlp+attention", "attention_share": 0.9}, "largest attention_share .* is 0.35"),
        ({"ratio": 0.4, "structure": "mlp+attention", "attention_share": 0.0}, "smallest attention_share .* is 0.2"),
    ],
)
def test_what_attention_does_not_hold_is_refused_with_what_it_holds(asked, message):
    with pytest.raises(UserError, match=message):
        units_to_keep(shape_of(make_model()), scores=random_scores(), **asked)


def test_a_budget_that_rounds_to_nothing_is_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"ratio 0\.02 .* less than half of the 4,608 .*: nothing would go"):
        run_prune(checkpoint, tmp_path, ratio=0.02, structure="attention")


def test_widths_too_small_for_the_step_are_refused():
    with pytest.raises(UserError, match="round_to 64: a layer has only 48 neurons"):
        units_to_keep(shape_of(make_model()), 0.1, round_to=64)


@pytest.mark.parametrize("refit", ["bias", "least_squares", "sequential"])
def test_a_refit_is_on_record_and_reads_the_sequences_of_the_scores(refit, texts, tmp_path):
    dense = save_checkpoint(tmp_path / "dense", mlp_bias=True)
    out, done = run_prune(dense, tmp_path, text=texts, ratio=0.2, refit=refit, ridge=0.2)
    plain, _ = run_prune(dense, tmp_path / "plain", ratio=0.2)
    solved = {"ridge": 0.2, "starved_layers": []} if refit != "bias" else {}
    report = json.loads((out / PRUNING).read_text())
    assert report["kept"] == json.loads((plain / PRUNING).read_text())["kept"]
    for record in (done, report):
        assert {name: record.get(name) for name in ("refit", "refit_tokens", *solved)} == {
            "refit": refit, "refit_tokens": 6 * 32, **solved
        }  # fmt: skip
        assert ("ridge" in record) == (refit != "bias")
    weights, before = (load_file(folder / "model.safetensors") for folder in (out, plain))
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    expected = {f"model.layers.{layer}.mlp.down_proj.{'bias' if refit == 'bias' else 'weight'}" for layer in range(3)}
    if refit == "sequential":  # attention above the first cut makes up for what went wrong below it
        expected |= {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 2)}
    assert changed == expected


def test_cutting_nothing_changes_nothing():
    model, tokens = make_model(), torch.arange(10)[None]
    before = model(tokens).logits
    cut(model, {"mlp": [torch.arange(48)] * 3, "attention": [torch.arange(2)] * 3})
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "rwkv"},
            "'rwkv' is not supported: no family's modules match.*Supported families: llama",
        ),
        ({"model_type": "llama", "final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0, which models of"),
    ],
)
def test_what_would_be_scored_or_cut_wrongly_is_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        load_model(tmp_path, "float32")


def test_an_unsupported_family_is_refused_by_name_with_the_list(tmp_path):
    from transformers import GPTJConfig, GPTJForCausalLM

    GPTJForCausalLM(GPTJConfig(n_embd=8, n_layer=1, n_head=2, vocab_size=20, rotary_dim=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config.json: model_type 'gptj' is not supported.*llama, mistral, qwen2"):
        load_model(tmp_path, "float32")

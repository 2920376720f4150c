"""Methods: presets, a config's own, what is refused, and the names that results show."""

import json

import pytest
import yaml

from hfprune.cli import main
from hfprune.errors import UserError
from hfprune.experiment.plan import Plan
from hfprune.experiment.schema import Experiment, Training, parse
from hfprune.pruning.criteria import CRITERIA
from hfprune.pruning.methods import FOLDER, MethodRecipe, method_name, presets
from tests.conftest import REPOSITORY


def planned(experiment, **changes):
    return Plan(parse(Experiment, experiment | changes, "my.yaml"))


def cuts(plan):
    """(method, criterion, ratio, recovery) of every pruned model."""
    return [(each.method, each.criterion, each.cut.ratio, each.recovery) for each in plan.models if each.cut]


def test_every_preset_is_explained_and_reads_like_the_others(capsys):
    assert {file.suffix for file in FOLDER.iterdir()} == {".yaml"} and len(presets()) == len(list(FOLDER.iterdir()))
    assert main(["methods"]) == 0
    overview = capsys.readouterr().out
    for name, preset in presets().items():
        assert f"\n{name}\n" in f"\n{overview}" and preset.summary in overview
        assert main(["methods", name]) == 0
        explained = capsys.readouterr().out
        assert preset.citation in explained and all(each in explained for each in preset.differs)
        assert preset.recipe.criterion in explained and "forward pass" in explained
        Training(**preset.recovery)
        assert method_name(preset.recipe.model_dump()) == name, "no two presets are one recipe"


def test_the_documentation_lists_the_presets():
    page = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    shown = {cells[0].strip(" `"): [cell.strip(" `") for cell in cells[1:5]] for cells in rows}
    recipes = {name: preset.recipe for name, preset in presets().items()}
    assert shown == {
        name: [each.criterion, each.structure, each.allocation, each.refit] for name, each in recipes.items()
    }


def test_an_unknown_preset_is_refused_with_the_nearest(capsys):
    assert main(["methods", "hfprune"]) == 2
    assert "no method is called 'hfprune'. Did you mean 'HFPrune'?" in capsys.readouterr().err
    assert main(["methods", "x"]) == 2
    assert "Known: 2SSP, Adapt-Pruner, BlockPruner, CFSP, " in capsys.readouterr().err


def test_names_presets_and_own_methods_stand_in_one_list(experiment):
    plan = planned(
        experiment,
        methods=[
            "HFPrune",
            {"FLAP": {"ratios": [0.3]}},
            {"mine": {"criterion": "fisher_token", "allocation": "global", "refit": "sequential"}},
            {"HFPrune + refit": {"like": "HFPrune", "refit": "sequential", "target_parameters": [20_000]}},
        ],
        ratios=[0.1, 0.2],
    )
    assert cuts(plan) == [
        ("HFPrune", "entropy", 0.1, "none"),
        ("HFPrune", "entropy", 0.2, "none"),
        ("FLAP", "flap_standardized", 0.3, "none"),
        ("mine", "fisher_token", 0.1, "none"),
        ("mine", "fisher_token", 0.2, "none"),
        ("HFPrune + refit", "entropy", None, "none"),
    ]
    mine = next(each.cut for each in plan.models if each.method == "mine")
    assert (mine.structure, mine.allocation, mine.refit, mine.ridge) == ("mlp", "global", "sequential", 0.4)
    assert set(plan.methods.values()) == {"HFPrune", "FLAP", "mine", "HFPrune + refit"}
    assert set(plan.methods) == set(plan.jobs["prune"])


def test_a_method_that_stands_there_twice_has_the_budgets_and_recoveries_of_both(experiment):
    ways = {"lora": {"text": "calibration"}}
    plan = planned(
        experiment,
        methods=[
            {"mine": {"criterion": "wanda"}},
            {"mine": {"ratios": [0.2], "recoveries": ["lora"]}},
        ],
        recovery=ways,
    )
    assert cuts(plan) == [
        ("mine", "wanda", 0.1, "none"),
        ("mine", "wanda", 0.2, "none"),
        ("mine", "wanda", 0.2, "lora"),
    ]
    assert len(plan.jobs["prune"]) == 2


def test_a_preset_is_its_recipe_written_out(experiment):
    (recipe,) = [presets()["hfprune-best"].recipe.read()]
    named = planned(experiment, methods=["hfprune-best"])
    written = planned(experiment, methods=[{"mine": recipe}])
    assert set(named.jobs["prune"]) == set(written.jobs["prune"])
    assert set(named.jobs["measure"]) == set(written.jobs["measure"])


def test_a_cut_whose_allocation_measures_layers_reads_the_calibration_text(experiment):
    plan = planned(experiment, methods=["CFSP", "Wanda-sp"], ratios=[0.2])
    measured, plain = plan.jobs["prune"].values()
    assert "text" in measured.inputs and not measured.is_light
    assert "text" not in plain.inputs and plain.is_light
    assert "allocation: 1 forward pass over the same text" in presets()["CFSP"].recipe.needs


MINE = {"criterion": "entropy", "refit": "sequential"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, r"methods = \[\]: .*at least 1 item"),
        ({"methods": "HFPrune"}, r"methods: expected a list of methods: \[HFPrune, FLAP\]"),
        ({"methods": {"mine": MINE}}, r"methods: expected a list of methods"),
        ({"methods": [3]}, r"methods\.0: expected a method's name, or one with its settings, found 3"),
        ({"methods": ["HFprune"]}, r"methods\.0 = 'HFprune': no method is called 'HFprune'\. Did you mean 'HFPrune'\?"),
        ({"methods": ["mine"]}, r"A method of your own needs a recipe: `- mine: \{criterion: entropy\}`"),
        (
            {"methods": [{"mine": None, "criterion": "entropy"}]},
            r"one name with its settings indented .*mine, criterion",
        ),
        ({"methods": [{"mine": {"refit": "bias"}}]}, r"methods\.0\.mine: 'refit' alone: a method needs a `criterion`"),
        ({"methods": [{"mine": {"like": "HFprune"}}]}, r"methods\.0\.mine: like = 'HFprune': .*Did you mean 'HFPrune'"),
        (
            {"methods": [{"mine": {"criterion": "entrpy"}}]},
            r"methods\.0\.mine\.criterion = 'entrpy': .*mean 'entropy'\?",
        ),
        (
            {"methods": [{"a": {"like": "FLAP", "refit": "least-squares"}}]},
            r"refit = 'least-squares': .*'least_squares'",
        ),
        ({"methods": [{"a": {"like": "FLAP", "allocation": "globl"}}]}, r"allocation = 'globl': .*mean 'global'\?"),
        ({"methods": [{"a": {"like": "FLAP", "structure": "attn"}}]}, r"structure = 'attn': .*mean 'attention'\?"),
        ({"methods": [{"a": MINE | {"ridge": -1}}]}, r"methods\.0\.a\.ridge = -1: .*greater than or equal to 0"),
        (
            {"methods": [{"a": MINE | {"refits": ["none"]}}]},
            r"methods\.0\.a\.refits: unknown key\. Did you mean 'refit'\?",
        ),
        (
            {"methods": [{"a": MINE | {"attention_share": 0.3}}]},
            r"'attention_share' goes with structure mlp\+attention",
        ),
        ({"methods": [{"a": MINE | {"ratios": [3]}}]}, r"methods\.0\.a\.ratios\.0 = 3: .*less than 1"),
        (
            {"methods": [{"HFPrune": MINE}]},
            r"'HFPrune': a preset\. One that differs needs a name of its own: `- my HFPr",
        ),
        ({"methods": [{"dense": MINE}]}, r"methods\.0 = 'dense': stands for the model before the cut"),
        ({"methods": [{"a=b": MINE}]}, r"methods\.0\.a=b.*should match pattern"),
        (
            {"methods": ["HFPrune", {"mine": {"criterion": "entropy"}}]},
            r"'HFPrune' and 'mine' are the same cut \(0\.1\)",
        ),
        (
            {"methods": [{"a": MINE}, {"a": {"criterion": "wanda"}}]},
            r"methods\.1 = 'a': stands there twice with different",
        ),
        (
            {"methods": ["HFPrune", {"HFPrune": {"round_to": 8}}]},
            r"'HFPrune' stands there twice for 0\.1, and differs in r",
        ),
        (
            {"methods": [{"FLAP": {"recoveries": ["lora"]}}]},
            r"methods\.0\.FLAP\.recoveries = 'lora': not one of `recovery`",
        ),
        (
            {"methods": [{"a": MINE | {"target_parameters": [9], "ratios": [0.1]}}]},
            r"methods\.0\.a: give at most one of ratios and target_parameters",
        ),
        (
            {"methods": [{"a": MINE | {"target_parameters": [9]}}], "ratio_of": "mlp"},
            r"methods\.0 \(a\): 'ratio_of' does not go with 'target_parameters'",
        ),
        (
            {"methods": ["hfprune-best"], "ratio_of": "mlp"},
            r"methods\.0 \(hfprune-best\): 'ratio_of: mlp' goes with structure mlp alone",
        ),
        ({"pruning": {"criteria": ["entropy"]}}, r"my\.yaml: `pruning` grids are now `methods:`.*docs/methods\.md"),
        ({"pruning": [{"ratios": [0.1]}]}, r"`pruning` grids are now `methods:`"),
    ],
)
def test_a_wrong_method_is_refused(changes, message, experiment):
    with pytest.raises(UserError, match=message) as refused:
        parse(Experiment, experiment | changes, "my.yaml")
    assert "a name with settings" not in str(refused.value)


def test_methods_that_differ_only_in_widths_are_two_where_they_have_two_names(experiment):
    plan = planned(
        experiment, methods=["HFPrune", {"HFPrune in eights": {"like": "HFPrune", "round_to": 8}}], ratios=[0.2]
    )
    assert [each.cut.round_to for each in plan.models if each.cut] == [None, 8]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"methods": ["Wanda-sp", {"mine": MINE}], "ratio_of": "mlp", "round_to": 8},
        {"methods": [{"FLAP": {"target_parameters": [9]}}, {"mine": {"like": "FLAP", "refit": "bias", "pad": True}}]},
    ],
)
def test_the_methods_that_the_config_command_prints_are_the_same_methods(changes, experiment, tmp_path, capsys):
    asked = experiment | changes
    (tmp_path / "my.yaml").write_text(json.dumps(asked))
    assert main(["config", str(tmp_path / "my.yaml")]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert parse(Experiment, printed, "printed") == parse(Experiment, asked, "asked")


def test_a_cut_that_no_experiment_names_has_a_name_that_tells_it_apart():
    plain = MethodRecipe(criterion="entropy").model_dump()
    others = [
        plain,
        plain | {"structure": "attention"},
        plain | {"allocation": "global"},
        plain | {"refit": "sequential"},
        plain | {"refit": "sequential", "ridge": 0.2},
        plain | {"structure": "mlp+attention"},
        plain | {"structure": "mlp+attention", "attention_share": 0.3},
        plain | {"round_to": 64},
        plain | {"pad": True},
        *(plain | {"criterion": name} for name in CRITERIA if name != "entropy"),
    ]
    names = [method_name(each) for each in others]
    assert len(set(names)) == len(names)
    assert names[0] == "HFPrune"
    assert names[3:5] == ["entropy sequential", "entropy sequential ridge 0.2"]
    assert method_name(plain | {"ridge": 0.5}) == "HFPrune", "nothing reads it"

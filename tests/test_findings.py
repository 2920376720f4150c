"""Sentences below figures say what was measured, whatever that was."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from hfprune.reporting import findings
from hfprune.reporting.figures import draw, draw_headline, losses
from hfprune.reporting.findings import ACCURACY_CHANGE, KL, MEAN
from hfprune.reporting.statistics import MODEL
from tests.test_deploy import files_of
from tests.test_tables import WAYS, metrics, trained


def models(*rows: tuple, half: float = 0.01) -> pd.DataFrame:
    """Rows of name, stage, ratio, KL and perhaps mean accuracy; the method is the name's first word."""
    columns = ["name", "stage", "ratio", KL, MEAN]
    table = pd.DataFrame(rows, columns=columns[: len(rows[0])])
    for column in columns[3 : len(rows[0])]:
        table[f"{column} low"], table[f"{column} high"] = table[column] - half, table[column] + half
    trained = table["name"].str.partition(", ")[2].replace("", "none")
    return table.assign(method=table["name"].str.partition(", ")[0], recovery=trained, parent="none")


ONE = [("dense", "dense", 0, 0), ("A", "pruned", 0.1, 0.4), ("A", "pruned", 0.2, 1.08)]
SEVERAL = [*ONE, ("B", "pruned", 0.2, 0.7), ("A, lora", "recovered", 0.2, 1)]


def test_of_one_method_the_sizes_are_told():
    assert findings.fidelity(models(*ONE)) == (
        "The more A removes, the farther the model is from the dense one: KL 0.40 at 10% and 1.08 at 20%."
    )
    fell = models(*ONE[:2], ("A", "pruned", 0.2, 0.3))
    assert (
        findings.fidelity(fell)
        == "A leaves the model at a distance from the dense one: KL 0.40 at 10% and 0.30 at 20%."
    )


def test_of_several_methods_the_nearest_is_told_at_the_size_that_most_have():
    assert findings.fidelity(models(*SEVERAL)) == (
        "At 20% B keeps the model at 0.70 nats per token from the dense one, A at 1.08."
    )
    turned = [*ONE, ("B", "pruned", 0.2, 2.5), ("C", "pruned", 0.2, 9)]
    assert findings.fidelity(models(*turned)) == (
        "At 20% A keeps the model at 1.08 nats per token from the dense one, B at 2.50; of 3 methods, C is farthest "
        "with 9.00."
    )
    assert findings.fidelity(models(*SEVERAL, half=0.2)).endswith(" The intervals of B and A overlap.")


def test_what_training_changed_is_told_of_models_that_were_measured_before_it():
    assert findings.training(models(*ONE)) == ""
    assert findings.training(models(*SEVERAL)) == "Training after the cut: lora takes A, 20% from KL 1.08 to 1.00."
    worse = models(*SEVERAL[:-1], ("A, lora", "recovered", 0.2, 3))
    assert findings.training(worse) == "Training after the cut: lora takes A, 20% from KL 1.08 to 3.00."
    all_trained = models(SEVERAL[0], SEVERAL[-1])
    assert (
        findings.fidelity(all_trained) == "A, lora leaves the model at a distance from the dense one: KL 1.00 at 20%."
    )
    assert findings.training(all_trained) == ""
    many = [("D", "pruned", ratio / 10, ratio) for ratio in range(1, 6)]
    many += [("D, lora", "recovered", ratio / 10, ratio) for ratio in range(1, 6)]
    assert findings.training(models(*many)).endswith("D, 30% from KL 3.00 to 3.00; and 2 more.")


def test_no_difference_of_accuracy_is_claimed_that_may_be_chance():
    changes = pd.DataFrame(
        {"name": ["A, 10%", "A, 30%"], ACCURACY_CHANGE: [3.2, -5.2], "distinguishable": [False, True]}
    )
    assert findings.accuracy_changes(changes) == (
        "Mean accuracy differs from the dense model's for A, 30% (-5.2 points). The other 1 cannot be told from it "
        "after correction for many tests."
    )
    assert "tells none of 2 models" in findings.accuracy_changes(changes.assign(distinguishable=False))


def test_accuracy_is_told_beside_the_dense_models():
    rows = [("dense", "dense", 0, 0, 60.0), ("A", "pruned", 0.1, 1, 62.0), ("A", "pruned", 0.2, 2, 51.0)]
    dense = "Mean accuracy of the dense model is 60.0 %."
    below, above = ("Models whose interval is below that: A, 20%.", "Models whose interval is above that: A, 10%.")
    for half, told in ((3, f"{below} It is inside the interval of the other 1."), (1, f"{below} {above}")):
        assert findings.accuracy(models(*rows, half=half)) == f"{dense} {told}"
    assert findings.accuracy(models(*rows, half=20)) == f"{dense} It is inside the interval of all 2."
    assert findings.accuracy(models(*ONE)) == "No task has an accuracy."


def kept(**shares: list[int]) -> pd.DataFrame:
    """Kept neurons of 100 in each layer, by model."""
    rows = [
        {"model": model, "ratio": 0.2, "part": "mlp", "layer": layer, "kept": share, "dense": 100}
        for model, layers in shares.items()
        for layer, share in enumerate(layers)
    ]
    return pd.DataFrame(rows)


def test_the_model_whose_layers_differ_most_is_told():
    assert findings.widths(kept(A=[70, 70], B=[60, 60])) == "Every layer keeps the same share of its neurons."
    assert findings.widths(kept(A=[70, 70], B=[90, 40])) == (
        "B, 20% keeps 40% of the neurons of layer 1 and 90% of those of layer 0. With A, 20% every layer keeps the "
        "same share."
    )
    assert findings.widths(kept(A=[60, 70], B=[90, 40])).endswith("of those of layer 0.")


def test_losses_are_told_as_they_went():
    curves = pd.DataFrame({"model": ["A", "A", "B", "B"], "loss": [2, 1.5, 1, 1.25]})
    assert findings.losses(curves) == (
        "The loss of the first step and of the last: A from 2.00 to 1.50 and B from 1.00 to 1.25."
    )


@pytest.mark.parametrize(("values", "high", "low"), [((3, 1), 0, 1), ((1, 3), 1, 0)])
def test_where_models_are_farthest_is_told(values, high, low):
    rows = [
        dict.fromkeys(MODEL, "none")
        | {"stage": stage, "method": f"m{number}", "seed": 0, "text": "quac", "metric": "kl"}
        | {"by": by, "bin": place, "low": float(place), "high": place + 1.0, "value": number * value}
        for number, stage in enumerate(("dense", "pruned", "pruned", "pruned"))
        for by in ("entropy", "position")
        for place, value in enumerate(values)
    ]
    assert findings.profile(pd.DataFrame(rows)) == (
        f"KL on quac, mean of 3 models: by the dense model's entropy highest at an entropy of {high}.0 to {high + 1}.0 "
        f"nats (6.00) and lowest at an entropy of {low}.0 to {low + 1}.0 nats (2.00); by position highest at tokens "
        f"{high} to {high + 1} (6.00) and lowest at tokens {low} to {low + 1} (2.00)."
    )


def test_layers_that_score_highest_are_told():
    scores = {
        "entropy": {1: np.array([1.0, 2, 90]), 4: np.array([4.0, 5, 6])},  # the others have no such neurons
        "wanda": {0: np.ones(3), 1: np.zeros(3)},
        "zero": {0: np.zeros(3), 1: np.zeros(3)},
    }
    assert findings.importance(scores) == (
        "The median score of a layer's neurons is highest in layer 4 (5) and lowest in layer 1 (2) by entropy, "
        "highest in layer 0 (1) and lowest in layer 1 (0) by wanda and 0 in every layer by zero."
    )
    assert "by 0.50 in layer 2." in findings.ranks({0: np.nan, 2: 0.5})
    assert findings.ranks({0: np.nan}).endswith("ranks no neurons in these layers: all scores are equal.")
    assert findings.ranks({0: 0.5, 2: -0.25}) == (
        "Ranks of neurons by entropy and by cross-entropy correlate by 0.50 in layer 0 and -0.25 in layer 2."
    )


def agreements(*rows: tuple) -> pd.DataFrame:
    columns = ["criterion", "seed", "other_criterion", "other_seed", "spearman", "overlap"]
    return pd.DataFrame(rows, columns=columns).assign(layer=-1)


def test_criteria_that_agree_most_and_least_are_told():
    two = agreements(("a", 0, "b", 0, 0.4, 0.75))
    assert findings.agreement(two) == (
        "a and b rank neurons alike by 0.40 and have 75% of the kept ones in common (by chance 67%)."
    )
    three = agreements(
        ("a", 0, "b", 0, 0.4, 0.75), ("a", 0, "c", 0, 0.9, 0.95), ("b", 0, "c", 0, -0.1, 0.6), ("a", 0, "a", 1, 0.99, 1)
    )
    assert findings.agreement(three) == (
        "a and c rank neurons most alike by 0.90 and have 95% of the kept ones in common (by chance 67%); b and c "
        "least, by -0.10; a agrees with itself at another seed by 0.99."
    )
    chance = agreements(("a", 0, "b", 0, 0.4, 0.75), ("a", 0, "c", 0, -0.001, 0.67), ("b", 0, "c", 0, 0.1, 0.7))
    assert "a and c least, by 0.00" in findings.agreement(chance)  # not -0.00
    assert findings.agreement(agreements()) == "No two of these scores rank the same units."


def test_training_that_helps_some_is_told_so():
    pairs = pd.DataFrame({"recovery": "lora", "before": [1.0, 2, 3], "after": [1.5, 0.5, 1]})
    assert findings.before_after(pairs) == (
        "lora brings 2 of 3 models nearer to the dense one, and their ranks correlate by -0.50."
    )
    assert findings.before_after(pairs.assign(before=1.0)) == "lora brings 1 of 3 models nearer to the dense one."
    assert findings.before_after(pairs[:2]) == "lora brings 1 of 2 models nearer to the dense one."


def test_the_fastest_is_told_even_if_it_is_slower():
    quality = models(*ONE).assign(recovery="none")
    for seconds, told in (
        ((0.1, 0.09, 0.05), "A, 20%, takes 50 ms: 2.00"),
        ((0.1, 0.2, np.nan), "A, 10%, takes 200 ms: 0.50"),
    ):
        assert findings.speed(quality, pd.Series(seconds)) == f"The fastest, {told} times as fast as the dense model."
    assert "not both timed" in findings.speed(quality, pd.Series([np.nan, 1, 1]))


def test_the_nearest_of_each_size_is_told():
    board = pd.DataFrame(
        [("dense", 0, 0, False), ("A", 0.1, 0.5, False), ("A", 0.2, 2, True), ("B", 0.2, 1, False)],
        columns=["name", "ratio", "KL, text", "tied"],
    )
    assert findings.best_of_board(board, "KL, text") == (
        "Nearest to the dense model is at 10% A, 0.50 nats per token; and at 20% B, 1.00 nats per token (1 cannot be "
        "told from it)."
    )


@pytest.mark.parametrize(("kl", "worse"), [(0.01, 0), (0.3, 1)])
def test_pruned_files_that_a_smaller_type_beats_are_counted(kl, worse):
    files = files_of(
        {
            ("dense", 0.0, "f16"): (270, 0.0, 10),
            ("dense", 0.0, "q8_0"): (140, 0.1, 20),
            ("A", 0.2, "f16"): (200, kl, 12),
        }
    )
    assert findings.files(files) == (
        f"For {worse} of 1 pruned files there is a file of the dense model that is no larger and nearer to it."
    )


def test_a_figures_finding_lies_beside_it(tmp_path):
    both = pd.concat([metrics(WAYS[0]), trained("lora")])
    assert {path.name for path in draw(both, tmp_path) if path.suffix == ".txt"} == {"kl.txt", "accuracy.txt"}
    told = (tmp_path / "kl.txt").read_text()
    assert told.startswith("The more entropy removes, the farther the model is from the dense one: KL 1.00 at 10%")
    assert "Training after the cut: lora takes entropy, 20% from KL 2.00 to" in told
    draw_headline(metrics(WAYS[0]), tmp_path)
    assert (tmp_path / "headline.txt").read_text() == told.partition(" Training")[0] + "\n"


def test_what_was_not_compared_is_not_told_as_a_finding(tmp_path):
    """A model whose KL is NaN, or a table of the dense model alone."""
    told = "No cut model was compared with the dense one."
    dense, unknown = models(ONE[0]), models(ONE[0], ("A", "pruned", 0.2, np.nan), ("A, lora", "recovered", 0.2, 1))
    assert findings.fidelity(dense) == findings.fidelity(unknown[:2]) == told
    assert findings.fidelity(models(*ONE, ("B", "pruned", 0.2, np.nan))).startswith("The more A removes")
    assert findings.training(unknown) == ""
    assert findings.accuracy_changes(pd.DataFrame(columns=["name", ACCURACY_CHANGE, "distinguishable"])) == told
    board = pd.DataFrame({"name": ["dense", "A"], "ratio": [0, 0.2], "KL, text": [0, np.nan], "tied": False})
    assert findings.best_of_board(board, "KL, text") == findings.best_of_board(board[:1], "KL, text") == told
    bins = pd.DataFrame({"text": "quac", "metric": "kl", "stage": ["dense", "pruned"], "value": [0, np.nan]})
    assert findings.profile(bins) == findings.profile(bins[:1]) == told
    assert findings.files(files_of({("dense", 0.0, "f16"): (270, 0.0, 10)})) == told
    measured = metrics(WAYS[0])
    is_unknown = (measured["metric"] == "kl") & (measured["stage"] != "dense")
    for table in (measured[measured["stage"] == "dense"], measured.assign(value=measured["value"].mask(is_unknown))):
        draw(table, tmp_path)
        assert (tmp_path / "kl.txt").read_text() == f"{told}\n"


def test_a_line_that_ends_in_no_number_is_named_at_its_last_one(tmp_path):
    curves = pd.DataFrame(
        {"model": ["A", "A", "B"], "loss_name": "distillation", "tokens": [0, 1000, 0], "loss": [2, np.nan, np.nan]}
    ).assign(learning_rate=0.1, tokens_per_second=9)
    figure = losses(curves)
    figure.savefig(tmp_path / "losses.png")
    assert [(name.get_text(), *name.xy) for name in figure.axes[0].texts] == [("A", 0, 2)]
    plt.close(figure)

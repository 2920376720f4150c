"""Tables and figures do not mix models that were made in different ways, and say what tells them apart."""

import csv
import json
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.text import Text

from hfprune.reporting import figures
from hfprune.reporting.identity import recovery_names
from hfprune.reporting.metrics import COLUMNS, collect
from hfprune.reporting.statistics import MODEL, varying
from hfprune.reporting.summary import cost, summary, write_headline, write_tables
from hfprune.store.artifacts import Store
from tests.test_comparison import Fabricated

METRICS = [
    ("task", "boolq", "acc"),
    ("perplexity", "text", "perplexity"),
    *(("fidelity", "text", name) for name in ("kl", "top1_agreement")),
]


def named(criterion, allocation="uniform", refit="none"):
    """The name of a method."""
    words = [criterion, *(word for word in (allocation, refit) if word not in ("uniform", "none"))]
    return "dense" if criterion == "none" else " ".join(words)


def metrics(*settings):
    """A metrics.csv of the dense model and of a pruned one for each (criterion, allocation, refit), two ratios each."""
    models = [("dense", "none", "none", "none", 0.0)]
    models += [("pruned", *setting, ratio) for setting in settings for ratio in (0.1, 0.2)]
    rows = []
    for number, (stage, criterion, allocation, refit, ratio) in enumerate(models):
        for group, task, metric in METRICS:
            made = {"stage": stage, "criterion": criterion, "allocation": allocation, "refit": refit, "ratio": ratio}
            made["method"] = named(criterion, allocation, refit)
            model = made | {"model": "m", "structure": "mlp" if number else "none", "recovery": "none", "seed": 0}
            model["parent"] = "none"
            size = {"acc": 0.5 + number / 100, "perplexity": 20.0 + number, "top1_agreement": 1 - number / 100}
            value = {"group": group, "task": task, "metric": metric, "value": size.get(metric, float(number))}
            value |= {"stderr": 0.1, "n": 4}
            rows.append(model | value | {"ratio_achieved": ratio, "parameters": 100 - number, "key": str(number)})
    return pd.DataFrame(rows, columns=COLUMNS)


WAYS = [("entropy", "uniform", "none"), ("entropy", "uniform", "least_squares"), ("entropy", "global", "least_squares")]


def test_a_summary_has_one_row_for_each_way_of_pruning(tmp_path):
    table = summary(metrics(*WAYS))
    assert len(table) == 1 + 3 * 2
    assert table["KL (nats/token)"].tolist() == list(range(7))
    write_tables(metrics(*WAYS), tmp_path)
    printed = (tmp_path / "summary.md").read_text()
    titles = [title.strip() for title in printed.splitlines()[2].split("|")]
    assert titles[1:4] == ["Model", "Method", "Removed (%)"]
    assert "| pruned | entropy global least_squares |" in " ".join(printed.split())
    tex = (tmp_path / "summary.tex").read_text()
    assert r"least\_squares" in tex
    assert r"{llrr" in tex


def test_what_does_not_vary_is_not_said(tmp_path):
    assert not varying(metrics(*WAYS))
    write_tables(metrics(*WAYS), tmp_path)
    assert "Recovery" not in (tmp_path / "summary.md").read_text()
    write_tables(pd.concat([metrics(*WAYS), trained("lora")]), tmp_path)
    assert "Recovery" in (tmp_path / "summary.md").read_text()


def test_figures_draw_a_line_for_each_way_of_pruning():
    for settings, labels in (
        (WAYS[:1], ["entropy"]),
        (WAYS[:2], ["entropy", "entropy least_squares"]),
        (WAYS, ["entropy", "entropy least_squares", "entropy global least_squares"]),
    ):
        figure = figures.kl(metrics(*settings))
        lines = figure.axes[0].get_legend_handles_labels()
        assert lines[1] == labels
        assert [line.get_xdata().tolist() for line in lines[0]] == [[10, 20]] * len(labels), "measured nowhere else"
        assert [text.get_text() for text in figure.axes[0].texts] == labels, "beside the lines"
        plt.close(figure)


def test_a_thread_from_a_point_ends_at_the_left_edge_of_its_name():
    """Also where names stand far above or below their points, because these lie close together."""
    close = metrics(*WAYS)
    close.loc[close["metric"] == "kl", "value"] = 0.2 + close["value"] / 1000
    board = pd.DataFrame({"name": list("abc"), "ratio": 0.2, "speed": [5, 5, 6], "KL": [0.5, 0.5001, 0.5002]})
    board = board.assign(structure="mlp", allocation="uniform", best=False, tied=False)
    for figure in (figures.kl(close), figures.leaderboard(board, "speed", "KL")):
        figure.canvas.draw()
        names = [text for text in figure.axes[0].texts if text.arrow_patch]
        assert len(names) == 3
        for name in names:
            text = Text.get_window_extent(name)  # without the thread
            ends = name.arrow_patch.get_transform().transform_path(name.arrow_patch.get_path()).vertices
            assert np.hypot(*(ends[0] - (text.x0, (text.y0 + text.y1) / 2))) < 3  # pixels
            assert (ends[:, 0] <= text.x0).all()
        plt.close(figure)


def test_many_methods_at_several_sizes_are_drawn_in_several_panels_each_with_its_names():
    settings = list(product(["entropy", "wanda"], ["uniform", "global"], ["none", "sequential"]))
    figure = figures.kl(metrics(*settings))
    panels = [axis for axis in figure.axes if axis.get_visible()]
    shown = []
    for axis in panels:
        lines, labels = axis.get_legend_handles_labels()
        assert [line.get_xdata().tolist() for line in lines] == [[10, 20]] * len(lines)
        assert [text.get_text() for text in axis.texts] == labels
        assert len({line.get_color() for line in lines}) == len(lines)
        shown.append(labels)
    assert [len(labels) for labels in shown] == [figures.MOST_LINES, 8 - figures.MOST_LINES]
    assert [label for labels in shown for label in labels] == [named(*setting) for setting in settings]
    plt.close(figure)


def test_many_models_of_one_size_stand_one_below_the_other_the_nearest_last_drawn_on_top():
    found = metrics(*product(["entropy", "wanda"], ["uniform", "global"], ["none", "sequential"]))
    figure = figures.kl(found[found["ratio"] != 0.1])
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[0] == "wanda global sequential"  # the largest value at the bottom
    assert labels[-1] == "entropy"
    assert "20%" in axis.get_title()
    plt.close(figure)


def test_ways_tried_at_several_sizes_are_lines_beside_all_models_of_one_size():
    found = metrics(*product(["entropy", "wanda"], ["uniform", "global"], ["none", "sequential"]))
    only_once = (found["criterion"] == "wanda") | (found["refit"] == "sequential")
    figure = figures.kl(found[~(only_once & (found["ratio"] == 0.1))])
    left, right = figure.axes
    assert len(left.get_yticklabels()) == 8
    assert left.get_title() == "Cut models: 20% of all parameters removed"
    assert right.get_legend_handles_labels()[1] == ["entropy", "entropy global"]
    plt.close(figure)


def trained(recovery, criterion="entropy", ratio=0.2, value=0.5):
    """Rows of a model that was trained, dense where its criterion is none."""
    rows = metrics(WAYS[0])
    rows = rows[rows["ratio"] == 0.2].assign(stage="recovered", criterion=criterion, recovery=recovery, value=value)
    rows["method"] = named(criterion)
    return (
        rows if criterion != "none" else rows.assign(ratio=0.0, ratio_achieved=0.0, structure="none", allocation="none")
    )


def test_kl_after_training_stands_against_kl_before_it():
    cuts = metrics(*WAYS)
    after = cuts[cuts["stage"] != "dense"].assign(stage="recovered", recovery="lora")
    of_kl = after["metric"] == "kl"
    after.loc[of_kl, "value"] = [3.0, 1.0, 2.0, 4.0, 5.0, 6.0]  # before: 1 to 6
    dense = cuts[cuts["stage"] == "dense"].assign(stage="recovered", recovery="lora")
    few = after[(after["criterion"] == "entropy") & (after["allocation"] == "uniform")].assign(recovery="norms")
    found = pd.concat([cuts, dense, after, few[few["refit"] == "none"]])
    pairs = figures.before_and_after(found)
    assert pairs[pairs["recovery"] == "lora"][["before", "after"]].values.tolist() == [
        [1, 3], [2, 1], [3, 2], [4, 4], [5, 5], [6, 6]
    ]  # fmt: skip
    figure = figures.after_against_before(found)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["lora: rank correlation 0.83 (-0.13 to 0.99), 6 models", "norms: 2 models"], (
        "two models have no rank correlation"
    )
    plt.close(figure)
    assert figures.before_and_after(cuts).empty


def test_models_cut_twice_are_told_from_those_cut_once():
    once = metrics(WAYS[0])
    twice = once[once["ratio"] == 0.2].assign(parent="wanda 0.1", ratio_achieved=0.28, value=9.0)
    found = pd.concat([once, twice])
    assert varying(found) == ["parent"]
    table = summary(found).set_index("parent")
    assert len(table) == 4
    assert table.loc["wanda 0.1", ["Removed (%)", "KL (nats/token)"]].tolist() == [0.28, 9]
    figure = figures.kl(found)
    assert figure.axes[0].get_legend_handles_labels()[1] == ["entropy", "entropy, after wanda 0.1"]
    plt.close(figure)


def test_trained_models_stand_beside_the_others_and_their_controls_at_0():
    found = pd.concat([metrics(WAYS[0]), trained("lora"), trained("lora", "none", value=0.3), trained("norms")])
    assert varying(found) == ["recovery"]
    table = summary(found)
    assert len(table) == 3 + 3
    figure = figures.kl(found)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    assert labels == ["entropy", "entropy, lora", "entropy, norms"]
    assert [handle.get_xdata().tolist() for handle in handles] == [[10, 20], [20], [20]]
    (control,) = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0]]
    assert list(control.get_ydata()) == [0.3]
    assert control.get_color() == handles[1].get_color()
    plt.close(figure)


def test_costs_are_those_of_all_stages_and_mean_over_seeds(tmp_path):
    def costs(rows, seed, **stages):
        first = rows.iloc[0].to_dict() | {"group": "cost", "stderr": None, "n": 1, "seed": seed}
        return [
            first | {"task": stage, "metric": metric, "value": value}
            for stage, found in stages.items()
            for metric, value in found.items()
        ]

    plain, taught = (rows[rows["ratio"] == 0.2] for rows in (metrics(WAYS[0]), trained("lora")))
    rows = [
        *costs(plain, 0, score={"seconds": 10, "flops": 2e12, "peak_bytes": 2**30}, prune={"seconds": 1}),
        *costs(plain, 1, score={"seconds": 20, "flops": 4e12, "peak_bytes": 2**30}, prune={"seconds": 1}),
        *costs(taught, 0, score={"seconds": 10, "flops": 2e12, "peak_bytes": 2**30}, prune={"seconds": 1}),
        *costs(taught, 0, recover={"seconds": 99, "flops": 3e12, "peak_bytes": 2**31}),
    ]
    table = cost(pd.concat([metrics(WAYS[0]), trained("lora"), pd.DataFrame(rows, columns=COLUMNS)]))
    table = table.set_index(["stage", "ratio"])
    names = ["Scoring (s)", "Cutting (s)", "Training (s)", "TFLOP", "Peak memory (GiB)"]
    assert table.loc[("recovered", 0.2), names].tolist() == [10, 1, 99, 5, 2]
    assert table.loc[("pruned", 0.2), names].fillna(-1).tolist() == [15, 1, -1, 3, 1]
    assert table.loc[("dense", 0.0), names].isna().all()
    write_tables(pd.concat([trained("lora"), pd.DataFrame(rows[-5:], columns=COLUMNS)]), tmp_path)
    assert "| 99.0" in (tmp_path / "cost.md").read_text()
    assert "nan" not in (tmp_path / "cost.md").read_text()


def test_each_criterion_is_charged_what_it_costs_alone_and_the_scores_that_it_needs_first(tmp_path):
    made = Fabricated(tmp_path)
    cut = {"allocation": "uniform", "refit": "none", "structure": "mlp", "ratio": 0.2, "ratio_achieved": 0.2}
    cut["ratio_achieved_parent"] = 0.2
    in_one_pass = {"seconds_together": 40.0, "tokens": 8, "flops_together": 4e12}
    for key, criterion, inputs, details in (
        ("one", "entropy", {}, in_one_pass | {"flops": 2e12}),
        ("first", "cross_entropy", {}, in_one_pass | {"flops": 1e12}),
        ("two", "self_distillation", {"light_cut": "first"}, {"seconds_together": 30.0, "flops": 3e12}),
    ):
        made.put("score", key, inputs=inputs, parameters={"criterion": criterion, "seed": 0}, details=details)
        made.put("prune", f"by {key}", inputs={"model": "dense", "scores": key}, details=cut)
        measured = made.artifacts[0]
        inputs = {"model": f"by {key}", "reference": "ontext1"}
        files = {"results.json": (measured.folder / "results.json").read_text()}
        details = measured.manifest["details"]
        made.artifacts.append(made.put("measure", f"of {key}", inputs=inputs, details=details, files=files))
    metrics = collect(made.artifacts, made.store)
    costs = metrics[metrics["metric"].isin(["seconds", "flops"]) & metrics["task"].isin(["score", "light_cut"])]
    found = {tuple(row[:3]): row[3] for row in costs[["criterion", "task", "metric", "value"]].to_numpy()}
    assert found["entropy", "score", "seconds"] == 20 and found["entropy", "score", "flops"] == 2e12
    assert found["self_distillation", "score", "seconds"] == 30
    assert found["self_distillation", "light_cut", "seconds"] == 10
    assert found["self_distillation", "light_cut", "flops"] == 1e12
    assert ("cross_entropy", "light_cut", "flops") not in found
    table = cost(metrics).set_index("criterion")
    assert table["TFLOP"].dropna().to_dict() == {"entropy": 2, "cross_entropy": 1, "self_distillation": 4}
    assert table.loc[["entropy", "self_distillation"], "Scoring (s)"].tolist() == [20, 40]


def test_trainings_are_called_by_what_tells_them_apart(tmp_path):
    store = Store(tmp_path)

    def manifest(text, **parameters):
        path = tmp_path / "text" / text / "manifest.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"details": {"name": "a file" if "part" in text else f"the {text}"}}))
        common = {"method": "lora", "loss": "cross_entropy", "learning_rate": 0.1, "targets": ["a", "b"]}
        return {"parameters": common | parameters, "inputs": {"text": text}}

    names = recovery_names(
        {
            "1": manifest("x"),
            "2": manifest("x", learning_rate=0.2),
            "3": manifest("x", loss="distillation"),
            "4": manifest("x", method="norms"),
            "5": manifest("y", method="norms"),
            "6": manifest("y", method="norms"),
            "7": manifest("part1", method="full"),
            "8": manifest("part2", method="full"),
            "9": manifest("x", method="norms", share=0.2, select="random"),
        },
        store,
    )
    assert names == {
        "1": "lora, learning_rate 0.1",
        "2": "lora, learning_rate 0.2",
        "3": "lora+distillation",
        "4": "norms, text the x",
        "5": "norms, text the y",
        "6": "norms, text the y",
        "7": "full, text a file part1",
        "8": "full, text a file part2",
        "9": "norms, share 0.2, select random, text the x",
    }
    assert recovery_names({}, store) == {}


def test_more_lines_than_colours_can_be_told_apart():
    settings = [(f"c{i}", "uniform", "none") for i in range(12)]
    found = metrics(*settings)
    found["task"] = found["task"].replace("text", "boolq")
    figure = figures.accuracy(found)
    looks = figure.axes[0].get_legend_handles_labels()[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in looks}) == 12
    plt.close(figure)


def test_the_first_text_is_the_headline_of_summary_and_figure():
    other = metrics(WAYS[0])
    other = other[other["group"].isin(["perplexity", "fidelity"])].assign(task="another", value=99.0)
    both = pd.concat([metrics(WAYS[0]), other])
    pd.testing.assert_frame_equal(summary(both), summary(metrics(WAYS[0])))
    figure = figures.kl(both)
    assert figure.get_suptitle() == "Held-out text: text"
    plt.close(figure)


def profiles(count):
    """What `read_profiles` gives for the dense model and so many others, two seeds each; KL is the model's number."""
    rows = []
    for number, seed, text, by in product(range(count + 1), (0, 1), ("one", "two"), ("position", "entropy")):
        about = (
            {"criterion": f"c{number}", "ratio": 0.2, "seed": seed} if number else {"criterion": "none", "ratio": 0.0}
        )
        about["method"] = named(about["criterion"])
        about |= {"stage": "pruned" if number else "dense", "text": text, "by": by, "metric": "kl"}
        same = dict.fromkeys(["model", "allocation", "refit", "structure", "recovery", "parent"], "none")
        if number or not seed:
            for place in range(3):
                bounds = {"bin": place, "low": place, "high": place + 2, "n": 9}
                rows.append(same | about | bounds | {"value": number + 0.5 * seed})
    return pd.DataFrame(rows)


def test_profiles_are_a_line_a_model_over_both_kinds_of_bins_for_each_text():
    figure = figures.fidelity_profile(profiles(3))
    assert len(figure.axes) == 2 * 2
    for axis in figure.axes:
        assert [line.get_label() for line in axis.lines] == ["c1", "c2", "c3"], "the nearest first, none for the dense"
        assert axis.lines[0].get_xdata().tolist() == [1, 2, 3]
        assert axis.lines[1].get_ydata().tolist() == [2.25] * 3, "the mean over seeds"
    plt.close(figure)
    figure = figures.fidelity_profile(profiles(20))
    assert [line.get_label() for line in figure.axes[0].lines] == ["c1", "c5", "c9", "c12", "c16", "c20"]
    plt.close(figure)


def test_without_tasks_there_is_no_accuracy(tmp_path):
    found = metrics(*WAYS)
    found = found[found["group"] != "task"]
    columns = [name for name in summary(found) if not name.endswith((" low", " high"))]
    assert columns == [
        *MODEL,
        "seeds",
        "Removed (%)",
        "Parameters (M)",
        "Perplexity",
        "KL (nats/token)",
        "Top-1 agreement",
    ]
    write_tables(found, tmp_path)
    assert "Perplexity" in (tmp_path / "summary.md").read_text()
    assert {path.stem for path in figures.draw(found, tmp_path)} == {"kl"}


def test_the_mean_of_one_task_is_no_column_beside_it(tmp_path):
    one = metrics(*WAYS)
    two = pd.concat([one, one[one["group"] == "task"].assign(task="piqa")])
    size, distance = ["Removed (%)", "Parameters (M)"], ["Perplexity", "KL (nats/token)", "Top-1 agreement"]
    for found, tasks in ((one, ["BoolQ"]), (two, ["BoolQ", "PIQA", "Mean"])):
        write_tables(found, tmp_path)
        printed = (tmp_path / "summary.md").read_text().splitlines()[2]
        titles = [title.strip() for title in printed.strip("|").split("|")]
        assert titles == ["Model", "Method", *size, *tasks, *distance]
        (head, *_) = csv.reader((tmp_path / "summary.csv").open())
        assert ("Mean" in head) == ("Mean low" in head) == (len(tasks) > 1)


def test_the_mean_of_one_task_is_not_drawn_beside_it():
    one = metrics(*WAYS)
    two = pd.concat([one, one[one["group"] == "task"].assign(task="piqa")])
    for found, titles in ((one, ["BoolQ"]), (two, ["Mean of tasks", "BoolQ", "PIQA"])):
        figure = figures.accuracy(found)
        assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == titles
        plt.close(figure)


def test_the_first_results_are_a_table_and_a_figure_without_tasks(tmp_path):
    found = metrics(*WAYS)
    found = found[found["group"] != "task"]
    written = [*write_headline(found, tmp_path), *figures.draw_headline(found, tmp_path)]
    assert {path.suffix for path in written} == {".csv", ".md", ".tex", ".png", ".pdf", ".svg", ".txt"}
    assert {path.stem for path in written} == {"headline"}
    assert "| KL (nats/token) |" in (tmp_path / "headline.md").read_text()

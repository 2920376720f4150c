"""Tables and figures do not mix models that were made in different ways, and say what tells them apart."""

import matplotlib.pyplot as plt
import pandas as pd

from hfprune import figures
from hfprune.statistics import MODEL, varying
from hfprune.tables import COLUMNS, summary, write_summary

METRICS = [
    ("task", "boolq", "acc"),
    ("perplexity", "text", "perplexity"),
    *(("fidelity", "text", name) for name in ("kl", "top1_agreement")),
]


def metrics(*settings):
    """A metrics.csv of the dense model and of a pruned one for each (criterion, allocation, refit), two ratios each."""
    models = [("dense", "none", "none", "none", 0.0)]
    models += [("pruned", *setting, ratio) for setting in settings for ratio in (0.1, 0.2)]
    rows = []
    for number, (stage, criterion, allocation, refit, ratio) in enumerate(models):
        for group, task, metric in METRICS:
            made = {"stage": stage, "criterion": criterion, "allocation": allocation, "refit": refit, "ratio": ratio}
            model = made | {"model": "m", "structure": "mlp" if number else "none", "recovery": "none", "seed": 0}
            value = {"group": group, "task": task, "metric": metric, "value": float(number), "stderr": 0.1, "n": 4}
            rows.append(model | value | {"ratio_achieved": ratio, "parameters": 100 - number, "key": str(number)})
    return pd.DataFrame(rows, columns=COLUMNS)


WAYS = [("entropy", "uniform", "none"), ("entropy", "uniform", "least_squares"), ("entropy", "global", "least_squares")]


def test_a_summary_has_one_row_for_each_way_of_pruning(tmp_path):
    table = summary(metrics(*WAYS))
    assert len(table) == 1 + 3 * 2
    assert table["KL (nats/token)"].tolist() == list(range(7))
    write_summary(metrics(*WAYS), tmp_path)
    printed = (tmp_path / "summary.md").read_text()
    titles = [title.strip() for title in printed.splitlines()[0].split("|")]
    assert titles[1:6] == ["Model", "Criterion", "Allocation", "Refit", "Removed (%)"]
    tex = (tmp_path / "summary.tex").read_text()
    assert r"least\_squares" in tex
    assert r"{llllrr" in tex


def test_what_does_not_vary_is_not_said(tmp_path):
    assert varying(metrics(WAYS[0])) == []
    assert varying(metrics(*WAYS[:2])) == ["refit"]
    write_summary(metrics(WAYS[0]), tmp_path)
    assert "Refit" not in (tmp_path / "summary.md").read_text()


def test_figures_draw_a_line_for_each_way_of_pruning():
    for settings, labels in (
        (WAYS[:1], ["entropy"]),
        (WAYS[:2], ["entropy, no refit", "entropy, least_squares"]),
        (WAYS, ["entropy, uniform, no refit", "entropy, uniform, least_squares", "entropy, global, least_squares"]),
    ):
        figure = figures.kl(metrics(*settings))
        lines = figure.axes[0].get_legend_handles_labels()
        assert lines[1] == labels
        assert [line.lines[0].get_xdata().tolist() for line in lines[0]] == [[0, 10, 20]] * len(labels)
        plt.close(figure)


def test_more_lines_than_colours_can_be_told_apart():
    settings = [(f"c{i}", "uniform", "none") for i in range(12)]
    figure = figures.kl(metrics(*settings))
    looks = [each.lines[0] for each in figure.axes[0].get_legend_handles_labels()[0]]
    assert len({(line.get_color(), line.get_linestyle()) for line in looks}) == 12
    plt.close(figure)


def test_without_tasks_there_is_no_accuracy(tmp_path):
    found = metrics(*WAYS)
    found = found[found["group"] != "task"]
    assert list(summary(found))[len(MODEL) :: 2] == ["Removed", "Perplexity", "KL (nats/token)", "Top-1 agreement"]
    write_summary(found, tmp_path)
    assert "Perplexity" in (tmp_path / "summary.md").read_text()
    assert {path.stem for path in figures.draw(found, tmp_path)} == {"kl"}

"""The figures: drawn from `metrics.csv` and from scores, one look throughout."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from hfprune.artifacts import Artifact
from hfprune.layout import SCORES, layer_name
from hfprune.statistics import MODEL, mean_accuracy, over_seeds
from hfprune.tables import TASK_TITLES, headline

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
MARKERS = "osD^vP*"
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "savefig.bbox": "tight",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "svg.hashsalt": "hfprune",  # else every drawing of the same figure differs
}
NO_DATE = {"png": None, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


def draw(metrics: pd.DataFrame, scores: list[Artifact], folder: Path) -> Iterator[Path]:
    """Draw every figure into `folder` as png, pdf and svg, and yield the paths."""
    with plt.rc_context(STYLE):
        figures = {"accuracy": accuracy(metrics), "kl": kl(metrics), "importance": importance(scores)}
        for name, figure in figures.items():
            for suffix, metadata in NO_DATE.items():
                path = folder / f"{name}.{suffix}"
                figure.savefig(path, metadata=metadata)
                yield path
            plt.close(figure)


def accuracy(metrics: pd.DataFrame) -> Figure:
    """Zero-shot accuracy against the share of parameters removed: every task, and their mean."""
    tasks = over_seeds(headline(metrics))
    names = list(dict.fromkeys(tasks["task"]))
    panels = {"Mean of tasks": mean_accuracy(tasks)} | {
        TASK_TITLES.get(name, name): tasks[tasks["task"] == name] for name in names
    }
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.3 * columns, 1.9 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    achieved = tasks.drop_duplicates(MODEL).set_index(MODEL)["ratio_achieved"]
    for axis, (title, found) in zip(axes.flat, panels.items(), strict=False):
        found = found.assign(ratio_achieved=achieved.reindex(pd.MultiIndex.from_frame(found[MODEL])).to_numpy())
        _curves(axis, found, scale=100)
        axis.set_title(title, fontsize=9)
    for place, axis in enumerate(axes.flat):
        axis.tick_params(labelbottom=place + columns >= len(panels))  # the lowest panel of each column
        axis.set_visible(place < len(panels))
    figure.supxlabel("Parameters removed (%)", fontsize=9)
    figure.supylabel("Accuracy (%)", fontsize=9)
    _legend(figure, axes[0, 0])
    return figure


def kl(metrics: pd.DataFrame) -> Figure:
    """KL divergence from the dense model on held-out text against the share of parameters removed."""
    figure, axis = plt.subplots(figsize=(3.4, 2.6), layout="constrained")
    found = over_seeds(metrics[metrics["metric"] == "kl"])
    _curves(axis, found)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("Parameters removed (%)")
    axis.set_ylabel("KL(dense || pruned), nats per token")
    axis.set_title(f"Held-out text: {', '.join(dict.fromkeys(found['task']))}", fontsize=9)
    axis.legend(frameon=False)
    return figure


def importance(scores: list[Artifact]) -> Figure:
    """The spread of the neurons' scores in each layer: median, middle half and middle nine tenths."""
    figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
    shown: set[str] = set()
    for artifact in scores:
        criterion = artifact.parameters["criterion"]
        if criterion in shown:  # one seed of each criterion
            continue
        color = COLORS[len(shown) % len(COLORS)]
        shown.add(criterion)
        by_name = load_file(artifact.folder / SCORES)
        layers = [by_name[layer_name(i)] for i in range(len(by_name))]
        levels = np.array([np.quantile(layer, [0.05, 0.25, 0.5, 0.75, 0.95]) for layer in layers]).T
        index = np.arange(len(layers))
        axis.fill_between(index, levels[0], levels[4], color=color, alpha=0.15, lw=0, label="5 to 95 % of neurons")
        axis.fill_between(index, levels[1], levels[3], color=color, alpha=0.35, lw=0, label="25 to 75 %")
        axis.plot(index, levels[2], color=color, label=f"median, {criterion}")
    axis.set_yscale("log")
    axis.set_xlabel("Layer")
    axis.set_ylabel("Importance of a neuron\n(nats, first order)")
    axis.legend(frameon=False)
    return figure


def _curves(axis: plt.Axes, found: pd.DataFrame, scale: float = 1) -> None:
    """One line per criterion from the dense model on, with error bars of one standard error."""
    dense = found[found["stage"] == "dense"]
    pruned = found[found["stage"] != "dense"]
    for number, (criterion, line) in enumerate(pruned.groupby("criterion", sort=False)):
        line = pd.concat([dense, line]).sort_values("ratio_achieved")
        axis.errorbar(
            100 * line["ratio_achieved"],
            scale * line["value"],
            yerr=scale * line["stderr"],
            label=criterion,
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            capsize=2,
            lw=1.2,
        )


def _legend(figure: Figure, axis: plt.Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)

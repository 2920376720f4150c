"""The figures, in one style: drawn from `metrics.csv`, scores, widths and training curves."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation
from scipy.stats import rankdata

from hfprune.models.units import UNITS
from hfprune.pruning.methods import DENSE, shares_of
from hfprune.reporting import findings
from hfprune.reporting.agreement import (
    FEWEST_RANKED,
    KEPT,
    between_criteria,
    correlation,
    correlation_in_words,
    layers,
)
from hfprune.reporting.deployment import by_file
from hfprune.reporting.labels import name_of, spread
from hfprune.reporting.metrics import TASK_TITLES, headline, on_headline_text, operations
from hfprune.reporting.paper_sheets import timed
from hfprune.reporting.statistics import BESIDE_METHOD, MODEL, estimates, mean_accuracy, varying, with_sizes
from hfprune.reporting.typeset import NOT_WORSE
from hfprune.store.artifacts import Artifact

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
MARKERS = "osD^vP*"
LINES = ("-", "--", ":")  # when there are more lines than colours
MOST_LINES = 6  # in one panel
COLUMN, PAGE = 3.35, 6.9  # inches: the widths of a column and of both columns of a paper
LONG = 18  # characters of a name that leaves a column too little room
OFFSET = 4  # points between models of one cost
KL_LINEAR = 0.01  # nats: smaller values of KL stand on a linear axis
KL_LABEL = "KL(dense || pruned), nats per token"
LOSS_LABELS = {"cross_entropy": "Cross-entropy, nats per token", "distillation": "KL(dense || model), nats per token"}
THREAD = {"arrowstyle": "-", "relpos": (0, 0.5), "patchA": None, "shrinkA": 1}  # to the left edge of a point's name
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 8,
    "figure.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "svg.hashsalt": "hfprune",  # without it, two drawings of one figure differ
}
PAIR = ("entropy", "cross_entropy")  # the paper argues for the first over the second
NO_DATE = {"png": None, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


Figures = Mapping[str, tuple[Callable[[], Figure], str]]  # by name: what draws it, and what it shows


def draw(metrics: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw KL and, of what was measured, accuracy and KL before and after training into `folder`; the files' paths."""
    models = findings.named_models(metrics)
    told = [findings.fidelity(models), findings.training(models)]
    figures = {"kl": (lambda: kl(metrics), " ".join(filter(None, told)))}
    pairs = before_and_after(metrics)
    if len(pairs.groupby("recovery").filter(lambda cuts: len(cuts) >= FEWEST_RANKED)):
        figures["before_after"] = lambda: after_against_before(metrics), findings.before_after(pairs)
    if (metrics["group"] == "task").any():
        figures["accuracy"] = lambda: accuracy(metrics), findings.accuracy(models)
    return _save(figures, folder)


def draw_headline(metrics: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw KL of models before any training into `folder`; the files' paths."""
    finding = findings.fidelity(findings.named_models(metrics))
    return _save({"headline": (lambda: kl(metrics), finding)}, folder)


def draw_scores(scores: list[Artifact], agreements: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw the scores and, if there are several, their agreement into `folder`; the files' paths."""
    by_criterion = {criterion: layers(artifact) for criterion, artifact in _first_of_each(scores).items()}
    figures: dict = {"importance": (lambda: importance(scores), findings.importance(by_criterion))}
    if set(PAIR) <= set(by_criterion):
        pair = [by_criterion[name] for name in PAIR]
        correlations = {layer: correlation(*(scores[layer] for scores in pair)) for layer in _drawn(pair[0])}
        figures["entropy_cross_entropy"] = lambda: against_each_other(*pair), findings.ranks(correlations)
    if len(scores) > 1:
        figures["agreement"] = lambda: agreement(agreements), findings.agreement(agreements)
    return _save(figures, folder)


def draw_pareto(metrics: pd.DataFrame, timings: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw quality against speed and cost into `folder`; the files' paths."""
    quality = with_sizes(_quality(metrics)[0], metrics)
    finding = findings.speed(quality, timed(quality, timings[timings["metric"] == "prefill_seconds"]))
    return _save({"pareto": (lambda: pareto(metrics, timings), finding)}, folder)


def draw_leaderboard(board: pd.DataFrame, speed: str, distance: str, folder: Path) -> list[Path]:
    """Draw a `leaderboard.board` into `folder`; the files' paths. Arguments: see `leaderboard`."""
    finding = findings.best_of_board(board, distance)
    return _save({"leaderboard": (lambda: leaderboard(board, speed, distance), finding)}, folder)


def draw_widths(widths: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw the width of every layer into `folder`; the files' paths."""
    return _save({"widths": (lambda: kept_widths(widths), findings.widths(widths))}, folder)


def draw_losses(curves: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw the loss curves of recovery into `folder`; the files' paths."""
    return _save({"losses": (lambda: losses(curves), findings.losses(curves))}, folder)


def draw_deployment(files: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw fidelity against size and speed of GGUF files into `folder`; the files' paths."""
    return _save({"deploy": (lambda: deployment(files), findings.files(files))}, folder)


def draw_profile(bins: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw where models differ from the dense one into `folder`; the files' paths."""
    return _save({"fidelity_profile": (lambda: fidelity_profile(bins), findings.profile(bins))}, folder)


def _save(figures: Figures, folder: Path) -> list[Path]:
    """Write each figure as png, pdf and svg, and what it shows as txt: the first sentences of its caption."""
    paths = []
    with plt.rc_context(STYLE):
        for name, (make, finding) in figures.items():
            figure = make()
            for suffix, metadata in NO_DATE.items():
                path = folder / f"{name}.{suffix}"
                figure.savefig(path, metadata=metadata)
                paths.append(path)
            plt.close(figure)
            paths.append(folder / f"{name}.txt")
            paths[-1].write_text(f"{finding}\n", encoding="utf-8")
    return paths


def accuracy(metrics: pd.DataFrame) -> Figure:
    """Zero-shot accuracy against the share of parameters removed: every task and, of several, their mean."""
    headlines = headline(metrics)
    names = list(dict.fromkeys(headlines["task"]))
    if not names:
        figure, axis = plt.subplots(figsize=(3.8, 1), layout="constrained")
        axis.set_axis_off()
        axis.text(0.5, 0.5, "No task has an accuracy.", ha="center")
        return figure
    tasks = with_sizes(estimates(headlines), headlines)
    panels = {TASK_TITLES.get(name, name): tasks[tasks["task"] == name] for name in names}
    if len(panels) > 1:
        panels = {"Mean of tasks": with_sizes(mean_accuracy(headlines), headlines)} | panels
    if (ratio := _one_size(tasks)) is not None:
        return _ranked_tasks(panels, ratio)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(PAGE, 0.2 + 1.6 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        dense = panel.loc[panel["stage"] == "dense", "value"].iloc[0]
        axis.axhline(100 * dense, color="0.5", linestyle="--", lw=0.8, zorder=0)
        _curves(axis, panel, scale=100)
        axis.set_title(title)
    for place, axis in enumerate(axes.flat):
        axis.tick_params(labelbottom=place + columns >= len(panels))  # the lowest panel of each column
        axis.set_visible(place < len(panels))
    figure.supxlabel("Parameters removed (%)")
    figure.supylabel("Accuracy (%)")
    _name_lines(axes[0, 0])
    return figure


def _ranked_tasks(panels: dict[str, pd.DataFrame], ratio: float) -> Figure:
    """A panel for each task, a row for each model, in the order of the first panel's values, the highest on top."""
    order = next(iter(panels.values())).sort_values("value")[MODEL]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(PAGE, 0.6 + rows * (0.5 + 0.17 * len(order))), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        in_order = list(order.itertuples(index=False, name=None))
        _ranked(axis, panel.set_index(MODEL).loc[in_order].reset_index(), scale=100)
        axis.set_title(title)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    methods = order[order["method"] != DENSE]["method"]
    figure.suptitle(f"Cut models: {ratio:.0%} {shares_of(methods)} removed")
    figure.supxlabel("Accuracy (%)")
    return figure


def kl(metrics: pd.DataFrame) -> Figure:
    """KL divergence from the dense model on held-out text, against the share of parameters removed; a line a method.

    If there is one size, or too many lines for a panel: all models of the commonest size, one below the other, the
    nearest to the dense one on top, and beside them lines for the methods with several sizes. If there are still too
    many lines: several panels.
    """
    heldout = on_headline_text(metrics)
    models = with_sizes(estimates(heldout[heldout["metric"] == "kl"]), heldout).dropna(subset="value")
    title = f"Held-out text: {', '.join(dict.fromkeys(models['task']))}"
    pruned = models[models["method"] != DENSE]
    lines = pruned.groupby(["method", *BESIDE_METHOD])["ratio"]
    several = pruned[lines.transform("nunique") > 1]
    if lines.ngroups <= MOST_LINES and _one_size(models) is None:
        longest = max((len(name_of(model, varying(models))) for _, model in pruned.iterrows()), default=0)
        figure, axis = plt.subplots(figsize=(PAGE if longest > LONG else COLUMN, 2.5), layout="constrained")
        _against_ratio(axis, models)
    elif several.groupby(["method", *BESIDE_METHOD]).ngroups <= MOST_LINES:
        ratio = pruned["ratio"].mode().iloc[0]
        controls = (models["method"] == DENSE) & (models["stage"] != "dense")
        rows = models[controls | ((models["method"] != DENSE) & (models["ratio"] == ratio))]
        height = max(1.1 + 0.19 * len(rows), 3.1 if len(several) else 0)
        if len(several):
            figure, (left, right) = plt.subplots(
                1, 2, figsize=(PAGE, height), layout="constrained", width_ratios=[1, 1.1]
            )
            _against_ratio(right, pd.concat([models[models["method"] == DENSE], several]))
        else:
            figure, left = plt.subplots(figsize=(PAGE, height), layout="constrained")
        _ranked(left, rows.sort_values("value", ascending=False))
        left.set_xlim(left=0)
        left.set_xlabel(KL_LABEL)
        left.set_title(f"Cut models: {ratio:.0%} {shares_of(pruned['method'])} removed")
    else:
        figure = _panels(models)
    figure.suptitle(title)
    return figure


def _against_ratio(axis: plt.Axes, models: pd.DataFrame) -> None:
    """KL against the share of parameters removed."""
    _curves(axis, models)
    axis.set_ylim(bottom=0)
    _name_lines(axis)
    axis.set_xlabel("Parameters removed (%)")
    axis.set_ylabel(KL_LABEL.replace(", ", ",\n"))


def _panels(models: pd.DataFrame) -> Figure:
    """Panels of at most `MOST_LINES` methods each, with a logarithmic KL axis."""
    pruned = models[models["method"] != DENSE]
    lines = [line for _, line in pruned.groupby(["method", *BESIDE_METHOD], sort=False)]
    panels = [lines[first : first + MOST_LINES] for first in range(0, len(lines), MOST_LINES)]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(PAGE, 0.3 + 2.4 * rows), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    differing = varying(models)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, line in enumerate(panel):
            _line(axis, line, name_of(line.iloc[0], differing), number, number, 0)
        axis.set_yscale("log")
    for axis in axes.flat[: len(panels)]:
        _name_lines(axis)  # when the scale that they share is set
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("Parameters removed (%)")
    figure.supylabel(KL_LABEL)
    return figure


def _one_size(models: pd.DataFrame) -> float | None:
    """The ratio of the cut models if all have the same; a line from the dense model to one point would mislead."""
    ratios = models[models["method"] != DENSE]["ratio"].unique()
    return ratios[0] if len(ratios) == 1 else None


def _ranked(axis: plt.Axes, models: pd.DataFrame, scale: float = 1) -> None:
    """A row for each model, the last on top, with 95 % intervals; one colour for each training."""
    recoveries, differing = list(dict.fromkeys(sorted(models["recovery"]))), varying(models)
    for row, (_, model) in enumerate(models.iterrows()):
        color = COLORS[recoveries.index(model["recovery"]) % len(COLORS)]
        look = {"color": color, "marker": "o", "markersize": 4, "capsize": 2}
        axis.errorbar(scale * model["value"], row, xerr=_bars(model, scale), **look)
    labels = [name_of(model, differing) for _, model in models.iterrows()]
    axis.set_yticks(range(len(models)), labels, fontsize=8)
    axis.set_ylim(-0.7, len(models) - 0.3)


def losses(curves: pd.DataFrame) -> Figure:
    """Loss, learning rate and speed of every training against the tokens seen; a column for each loss.

    Args:
        curves: see `curves.training_curves`.
    """
    panels = list(curves.groupby("loss_name", sort=False))
    figure, axes = plt.subplots(
        3, len(panels), figsize=(PAGE if len(panels) > 1 else COLUMN, 4.2), sharex="col", squeeze=False,
        layout="constrained", height_ratios=[3, 1, 1],
    )  # fmt: skip
    for (above, *below), (name, of_loss) in zip(axes.T, panels, strict=True):
        for number, (model, curve) in enumerate(of_loss.groupby("model", sort=False)):
            color, line = COLORS[number % len(COLORS)], LINES[number // len(COLORS) % len(LINES)]
            above.plot(curve["tokens"] / 1000, curve["loss"], color=color, linestyle=line, lw=1.2, label=model)
            for axis, column in zip(below, ("learning_rate", "tokens_per_second"), strict=True):
                axis.plot(curve["tokens"] / 1000, curve[column], color=color, linestyle=line, lw=1.2)
        above.set_ylabel(LOSS_LABELS[name])
        _name_lines(above)
        below[0].set_ylabel("Learning rate")
        below[1].set_ylabel("Tokens/s")
        below[1].set_ylim(bottom=0)
        below[1].set_xlabel("Thousand tokens seen")
    return figure


def fidelity_profile(bins: pd.DataFrame) -> Figure:
    """KL by position in the document, and by the dense model's entropy; a row for each text, a line a model.

    Means over calibration seeds. If there are more models than `MOST_LINES`: those of the commonest size, and if these
    are still too many, an even choice from the nearest to the dense model to the farthest.

    Args:
        bins: see `samples.read_profiles`.
    """
    kl = bins[(bins["metric"] == "kl") & (bins["stage"] != "dense")]
    kl = kl.groupby([*MODEL, "text", "by", "bin"], dropna=False, sort=False)[["low", "high", "value"]].mean()
    kl = kl.reset_index()
    first = kl[(kl["text"] == kl["text"].iloc[0]) & (kl["by"] == "entropy")]  # its bins are about equally full
    models = first.groupby(MODEL, sort=False)["value"].mean().reset_index()
    if len(models) > MOST_LINES:
        models = models[models["ratio"] == models.loc[models["method"] != DENSE, "ratio"].mode().iloc[0]]
    models = models.sort_values("value")
    if len(models) > MOST_LINES:
        models = models.iloc[np.linspace(0, len(models) - 1, MOST_LINES).round().astype(int)]
    texts = list(dict.fromkeys(kl["text"]))
    figure, axes = plt.subplots(
        len(texts), 2, figsize=(PAGE, 0.4 + 1.7 * len(texts)), sharex="col", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    differing = varying(models)
    several = models["ratio"].nunique() > 1
    for number, (_, model) in enumerate(models.iterrows()):
        size = [f"{model['ratio']:.0%}"] if several and model["ratio"] else []
        label = ", ".join([name_of(model, differing), *size])
        lines = kl[(kl[MODEL] == model[MODEL]).all(axis=1)]
        look = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "label": label}
        for row, text in zip(axes, texts, strict=True):
            for axis, by in zip(row, ("position", "entropy"), strict=True):
                line = lines[(lines["text"] == text) & (lines["by"] == by)].sort_values("bin")
                axis.plot((line["low"] + line["high"]) / 2, line["value"], lw=1.2, markersize=4, **look)
    for row, text in zip(axes, texts, strict=True):
        row[0].set_title(text, loc="left")
        row[0].set_ylim(bottom=0)
    axes[-1, 0].set_xlabel("Position in the document, tokens")
    axes[-1, 1].set_xlabel("Entropy of the dense model, nats")
    figure.supylabel("KL(dense || model), nats")
    for row in axes:
        _name_lines(row[1])
    return figure


def importance(scores: list[Artifact]) -> Figure:
    """The spread of the neurons' scores in each layer, by criterion: median, and the middle 50 % and 90 %."""
    first = _first_of_each(scores)
    columns = min(3, len(first))
    rows = -(-len(first) // columns)
    width = COLUMN if columns == 1 else PAGE
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, 2.5 if rows == 1 else 0.3 + 1.6 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(first) :]:
        axis.set_visible(False)
    for axis, (criterion, artifact) in zip(axes.flat, first.items(), strict=False):
        by_layer = layers(artifact)
        levels = np.array([np.quantile(layer, [0.05, 0.25, 0.5, 0.75, 0.95]) for layer in by_layer.values()]).T
        index = list(by_layer)
        axis.fill_between(index, levels[0], levels[4], color=COLORS[0], alpha=0.15, lw=0, label="5 to 95 % of neurons")
        axis.fill_between(index, levels[1], levels[3], color=COLORS[0], alpha=0.35, lw=0, label="25 to 75 %")
        axis.plot(index, levels[2], color=COLORS[0], label="median")
        if (levels >= 0).all():  # z-scores are not
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(criterion)
    figure.supxlabel("Layer")
    figure.supylabel("Score of a neuron")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=7, loc="outside upper center", ncols=3, columnspacing=1)
    return figure


def _first_of_each(scores: list[Artifact]) -> dict[str, Artifact]:
    """By criterion, its scores of the first seed."""
    by_criterion: dict[str, Artifact] = {}
    for artifact in scores:
        by_criterion.setdefault(artifact.parameters["criterion"], artifact)
    return by_criterion


def against_each_other(one: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]) -> Figure:
    """Where the neurons of the first, the middle and the last layer rank by one criterion and by another.

    Args:
        one, other: (neurons,) scores by layer, by the criteria of `PAIR`.
    """
    drawn = _drawn(one)
    figure, axes = plt.subplots(
        1,
        len(drawn),
        figsize=(PAGE, 2.4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, layer in zip(axes.flat, drawn, strict=True):
        ranks = [100 * rankdata(scores[layer]) / len(scores[layer]) for scores in (one, other)]
        image = axis.hexbin(*ranks, gridsize=24, cmap="viridis", mincnt=1, extent=(0, 100, 0, 100), lw=0.1)
        axis.set_title(f"Layer {layer}: rank correlation {correlation(*ranks):.2f}", fontsize=8)
        axis.set_aspect("equal")
        axis.grid(False)
    figure.colorbar(image, ax=axes, label="Neurons", shrink=0.8)
    figure.supxlabel("Rank by entropy (%)")
    axes[0, 0].set_ylabel("Rank by cross-entropy (%)")
    return figure


def _drawn(layers: Iterable[int]) -> list[int]:
    """The first, the middle and the last of the layers' numbers, each once."""
    numbers = list(layers)
    return list(dict.fromkeys([numbers[0], numbers[len(numbers) // 2], numbers[-1]]))


def kept_widths(widths: pd.DataFrame) -> Figure:
    """The share of its neurons and key-value groups that every layer keeps: a row a part, a column a size.

    If there is one method, its sizes are lines of one panel.

    Args:
        widths: see `curves.kept_widths`.
    """
    parts = [part for part in UNITS if part in set(widths["part"])]
    removed = widths["ratio"].map("{:.0%} removed".format)
    line, panel = ("ratio", "model") if widths["model"].nunique() == 1 else ("model", "ratio")
    words = {"ratio": removed, "model": widths["model"]}
    lines = widths.assign(line=words[line], panel=words[panel])
    panels, names = (list(dict.fromkeys(lines[column])) for column in ("panel", "line"))
    figure, axes = plt.subplots(
        len(parts),
        len(panels),
        figsize=(COLUMN if len(panels) == 1 else PAGE, 0.6 + 1.6 * len(parts)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for (row, part), (column, title) in product(enumerate(parts), enumerate(panels)):
        axis, panel = axes[row, column], lines[(lines["part"] == part) & (lines["panel"] == title)]
        for name, line in panel.groupby("line", sort=False):
            number = names.index(name)
            look = {"color": COLORS[number % len(COLORS)], "linestyle": LINES[number // len(COLORS) % len(LINES)]}
            axis.plot(line["layer"], 100 * line["kept"] / line["dense"], lw=1.2, label=name, **look)
        axis.set_ylim(0, 105)
        if row == 0:
            axis.set_title(title)
        if column == 0:
            axis.set_ylabel(f"{UNITS[part].capitalize()} kept (%)")
    for axis in axes[-1]:
        axis.set_xlabel("Layer")
    for axis in axes[:, -1]:
        _name_lines(axis)
    return figure


def before_and_after(metrics: pd.DataFrame) -> pd.DataFrame:
    """KL on the headline text of every cut model that was also trained, before and after; both are numbers.

    Args:
        metrics: rows of metrics.csv.

    Returns:
        Columns of `MODEL`, those of the trained model; `before`, `after`.
    """
    heldout = on_headline_text(metrics)
    kl = estimates(heldout[(heldout["metric"] == "kl") & (heldout["method"] != DENSE)])
    cut = [name for name in MODEL if name not in ("stage", "recovery")]
    before, after = (kl[kl["stage"] == stage] for stage in ("pruned", "recovered"))
    before = before[before["recovery"] == "none"].rename(columns={"value": "before"})[[*cut, "before"]]
    pairs = after.rename(columns={"value": "after"})[[*MODEL, "after"]].merge(before, on=cut)
    return pairs.dropna(subset=["before", "after"])


def after_against_before(metrics: pd.DataFrame) -> Figure:
    """Does KL before training predict KL after it? A point for each cut model, a look for each training.

    The legend has Spearman's rank correlation between the cuts of each training, with its 95 % interval. On the
    diagonal training changed nothing.
    """
    pairs = before_and_after(metrics)
    figure, axis = plt.subplots(figsize=(COLUMN, COLUMN), layout="constrained")
    for number, (recovery, cuts) in enumerate(pairs.groupby("recovery", sort=False)):
        rank = correlation_in_words(cuts["before"], cuts["after"])
        label = f"{recovery}: {f'rank correlation {rank}, ' if rank else ''}{len(cuts)} models"
        look = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        axis.plot("before", "after", data=cuts, ls="", markersize=5, label=label, **look)
    axis.set_xscale("log")
    axis.set_yscale("log")
    ends = [pairs[["before", "after"]].min(axis=None), pairs[["before", "after"]].max(axis=None)]
    axis.plot(ends, ends, color="0.5", ls="--", lw=0.8, zorder=0)
    axis.set_xlabel("KL before training, nats per token")
    axis.set_ylabel("KL after it, nats per token")
    figure.legend(frameon=False, fontsize=7, loc="outside lower center")
    return figure


def pareto(metrics: pd.DataFrame, timings: pd.DataFrame) -> Figure:
    """Quality against speed and against the cost of making a model: mean accuracy, or KL if there are no tasks.

    A model that was not timed has the time of one of the same shape. The title of a panel names the models that it
    cannot show.

    Args:
        metrics: rows of metrics.csv.
        timings: see `paper_sheets.read_timings`.
    """
    quality, title, scale = _quality(metrics)
    quality = with_sizes(quality, metrics)
    prefill = timings[timings["metric"] == "prefill_seconds"]
    tokens = prefill["task"].iloc[0].split()[-1]
    flops = pd.MultiIndex.from_frame(quality[MODEL]).map(operations(metrics).groupby(MODEL, dropna=False).mean())
    flops = flops.to_series(quality.index).astype(float).mask(quality["stage"] == "dense", 0.0)  # nothing was made
    panels = {
        f"Prefill of {tokens} tokens (ms)": ("timed", 1e3 * timed(quality, prefill)),
        "Scoring, cutting and training (TFLOP)": ("counted", flops / 1e12),
    }
    differing, sizes = varying(quality), quality[quality["method"] != DENSE]["ratio"]
    common = sizes.mode().max()  # NaN where nothing was cut
    labels = [name_of(row, differing) for _, row in quality.iterrows()]
    markers = MARKERS[:-1]  # one fewer than colours: no look twice
    looks = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    height = 3.1 + 0.18 * (-(-len(looks) // 2))  # the legend stands below
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, height), sharey=True, layout="constrained")
    for axis, (name, (measured, costs)) in zip(axes, panels.items(), strict=True):
        left_out = []
        places, counts = costs.groupby(costs).cumcount(), costs.groupby(costs).transform("size")
        for (index, row), label, x in zip(quality.iterrows(), labels, costs, strict=True):
            removed = f"{row['ratio']:.0%}" if row["ratio"] else ""
            if not np.isfinite(x):
                left_out.append(f"{label}, {removed}" if removed else label)
                continue
            look, y = looks[label], scale * row["value"]
            color, marker = COLORS[look % len(COLORS)], markers[look % len(markers)]
            offset = OFFSET * (places[index] - (counts[index] - 1) / 2)
            moved = axis.transData + ScaledTranslation(offset / 72, 0, figure.dpi_scale_trans)
            bar = {"color": color, "marker": marker, "markersize": 5, "lw": 0.8, "transform": moved}
            bars = _bars(row, scale)
            axis.errorbar(x, y, yerr=bars, **bar)
            axis.update_datalim([(x, y - bars[0, 0]), (x, y + bars[1, 0])])  # matplotlib ignores what has a transform
            if removed and row["ratio"] != common:
                axis.annotate(removed, (x, y), (4 + offset, 4), textcoords="offset points", fontsize=6)
        axis.margins(x=0.15)
        axis.autoscale_view()
        axis.set_xlabel(name)
        if left_out:
            axis.set_title(fill(f"Not {measured}: {'; '.join(left_out)}", 60), fontsize=6, loc="left")
    axes[0].set_ylabel(title.replace(", ", ",\n"))
    if len(sizes):
        elsewhere = ", unless marked" if sizes.nunique() > 1 else ""
        of = shares_of(quality[quality["method"] != DENSE]["method"])
        figure.suptitle(f"Cut models: {common:.0%} {of} removed{elsewhere}")
    handles = [
        plt.Line2D([], [], color=COLORS[n % len(COLORS)], marker=markers[n % len(markers)], ls="", label=label)
        for label, n in looks.items()
    ]
    figure.legend(handles=handles, frameon=False, fontsize=7, loc="outside lower center", ncols=2)
    return figure


def _quality(metrics: pd.DataFrame) -> tuple[pd.DataFrame, str, float]:
    """Mean accuracy of all models, or KL if there are no tasks; its title, and the scale that this is in."""
    if len(accuracies := headline(metrics)):
        return mean_accuracy(accuracies), "Mean accuracy (%)", 100
    heldout = on_headline_text(metrics)
    return estimates(heldout[heldout["metric"] == "kl"]), KL_LABEL, 1


def deployment(files: pd.DataFrame) -> Figure:
    """KL of GGUF files against their size and their rate of decoding: a line a model, a marker a type.

    Args:
        files: see `deployment.read_files`.
    """
    table = by_file(files)
    panels = {"bytes": ("File (MB)", 1e-6), "decode_tokens_per_second": ("Decoding (tokens/s)", 1)}
    markers = {kind: MARKERS[number % len(MARKERS)] for number, kind in enumerate(table["type"].unique())}
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 3.0), sharey=True, layout="constrained")
    for axis, (column, (name, scale)) in zip(axes, panels.items(), strict=True):
        for number, (label, of_model) in enumerate(table.groupby("label", sort=False)):
            of_model = of_model.sort_values(column)
            color = COLORS[number % len(COLORS)]
            axis.plot(scale * of_model[column], of_model["kl"], color=color, lw=0.8, label=label)
            for file in of_model.to_dict("records"):
                marker = markers[file["type"]]
                axis.plot(scale * file[column], file["kl"], marker, color=color, markersize=5, clip_on=False)
        axis.set_yscale("symlog", linthresh=KL_LINEAR, linscale=0.5)  # the dense model in float16 is almost at 0
        axis.margins(0.1)
        axis.set_xlabel(name)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel(KL_LABEL.replace("pruned", "file").replace(", ", ",\n"))
    figure.suptitle(f"Held-out text: {files['text'].iloc[0]}")
    _name_lines(axes[1])
    handles = [plt.Line2D([], [], color="0.3", marker=marker, ls="", label=kind) for kind, marker in markers.items()]
    figure.legend(handles=handles, frameon=False, fontsize=7, loc="outside lower center", ncols=len(handles))
    return figure


def leaderboard(board: pd.DataFrame, speed: str, distance: str) -> Figure:
    """Distance from the dense model against speed, a panel for each size; the models' names stand right of the points.

    The title of a panel names the models of a shape that was not timed.

    Args:
        board: columns `name`, `ratio`, `structure`, `allocation`, `speed`, `distance`, `best` and `tied`; the rows of
            one size sorted.
        speed, distance: the columns, which are also the titles of the axes.
    """
    cut = board[board["ratio"] > 0]
    sizes = list(cut.groupby("ratio"))
    height = max(2.5, 0.12 * max((len(rows) for _, rows in sizes), default=1) + 0.7)
    columns = 1 if len(sizes) == 1 else 2
    lines = math.ceil(len(sizes) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=((COLUMN + 1) * columns, height * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(sizes) :]:
        axis.remove()
    for axis, (ratio, rows) in zip(axes.flat, sizes, strict=False):
        known = rows[rows[speed].notna()]
        stock = (known["allocation"] == "uniform") & ~known["structure"].str.contains("sublayers")
        for color, group, label in ((COLORS[0], stock, "stock class"), (COLORS[1], ~stock, "widths per layer")):
            axis.plot(speed, distance, "o", data=known[group], color=color, markersize=4, label=label)
        axis.set_yscale("log")
        axis.margins(0.08)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        low, high = np.log(axis.get_ylim())
        gap = 8 / (72 * (height - 0.7))  # a line of text, as a share of the axis
        places = spread([(y - low) / (high - low) for y in np.log(known[distance])], gap, lowest=0)
        for (_, row), place in zip(known.iterrows(), places, strict=True):
            mark = "*" if row["best"] else NOT_WORSE if row["tied"] else ""
            thread = THREAD | {"color": "0.6", "lw": 0.3, "shrinkB": 0}
            axis.annotate(
                f"{row['name']} {mark}", (row[speed], row[distance]), (1.06, place), textcoords="axes fraction",
                fontsize=6, va="center", annotation_clip=False, arrowprops=thread,
            )  # fmt: skip
        title = f"{ratio:.0%} {shares_of(rows['name'])} removed"
        if len(known) < len(rows):
            title = fill(f"{title}; not timed: {'; '.join(rows[rows[speed].isna()]['name'])}", 60)
        axis.set_title(title, loc="left")
        axis.set_xlabel(speed)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=7, loc="outside lower center", ncols=2)
    figure.supylabel(f"{distance}, nats per token")
    return figure


def agreement(agreements: pd.DataFrame) -> Figure:
    """Two heat maps, criterion by criterion: rank correlation of the scores, and overlap of the kept neurons."""
    tables = {
        "Spearman\nrank correlation": between_criteria(agreements, "spearman"),
        f"Overlap of the\nbest {KEPT:.0%} of neurons": between_criteria(agreements, "overlap"),
    }
    count = len(next(iter(tables.values())))
    figure, axes = plt.subplots(
        1, 2, figsize=(PAGE if count > 3 else COLUMN, 1.6 + 0.35 * count), layout="constrained", sharey=True
    )
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        image = axis.imshow(table, cmap="viridis", vmin=min(0, np.nanmin(table)), vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            if np.isfinite(value):
                color = "black" if image.norm(value) > 0.6 else "white"
                axis.text(column, row, f"{value:z.2f}", ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(range(count), table.columns, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(count), table.index)
        axis.set_title(title)
        axis.grid(False)
        axis.spines[:].set_visible(False)
    figure.supxlabel(
        "Two criteria at the same calibration seed; on the diagonal, one criterion at two seeds", fontsize=8
    )
    return figure


def _curves(axis: plt.Axes, models: pd.DataFrame, scale: float = 1) -> None:
    """A line for each method and training through what was measured, with 95 % intervals.

    The dense model, trained alike, is a hollow point of the line's colour at 0. No line leads from it, because nothing
    was measured between.
    """
    dense, pruned = models[models["method"] == DENSE], models[models["method"] != DENSE]
    differing = varying(models)
    for number, (_, line) in enumerate(pruned.groupby(["method", *BESIDE_METHOD], sort=False)):
        _line(axis, line, name_of(line.iloc[0], differing), number, number, number // len(COLORS), scale)
        control = dense[(dense["stage"] != "dense") & (dense["recovery"] == line["recovery"].iloc[0])]
        for _, model in control.iterrows():
            look = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "mfc": "white"}
            axis.errorbar(0, scale * model["value"], yerr=_bars(model, scale), markersize=4, elinewidth=1, **look)


def _line(
    axis: plt.Axes, models: pd.DataFrame, label: str, color: int, marker: int, line: int, scale: float = 1
) -> None:
    """Values against the share of parameters removed, with 95 % intervals."""
    models = models.sort_values("ratio_achieved")
    removed, value = 100 * models["ratio_achieved"], models["value"]
    low, high = (scale * models[end].fillna(value) for end in ("low", "high"))
    look = {"color": COLORS[color % len(COLORS)], "linestyle": LINES[line % len(LINES)], "lw": 1.2}
    axis.plot(removed, scale * value, label=label, marker=MARKERS[marker % len(MARKERS)], markersize=4, **look)
    axis.vlines(removed, low, high, color=look["color"], lw=1)


def _name_lines(axis: plt.Axes) -> None:
    """Write the names of an axis's lines right of it, at their last points that are numbers; none meets another."""
    points = {line: line.get_xydata() for line in axis.get_legend_handles_labels()[0]}
    known = {line: place[np.isfinite(place).all(axis=1)] for line, place in points.items()}
    lines = [line for line, place in known.items() if len(place)]
    axis.autoscale_view()
    size = 7  # points
    height = 72 * axis.figure.get_size_inches()[1] * axis.get_position().height
    in_axis = axis.transData + axis.transAxes.inverted()
    ends = [known[line][-1] for line in lines]
    places = spread([in_axis.transform(end)[1] for end in ends], 1.35 * size / height)
    for line, end, place in zip(lines, ends, places, strict=True):
        thread = THREAD | {"color": line.get_color(), "lw": 0.5, "shrinkB": 3}
        axis.annotate(
            line.get_label(), end, (1.03, place), textcoords=axis.transAxes, va="center", fontsize=size,
            color=line.get_color(), arrowprops=thread, annotation_clip=False,
        )  # fmt: skip


def _bars(model: pd.Series, scale: float = 1) -> np.ndarray:
    """(2, 1) how far a model's interval reaches below and above its value; 0 if it has none."""
    reach = [[model["value"] - model["low"]], [model["high"] - model["value"]]]
    return scale * np.nan_to_num(np.array(reach, float)).clip(min=0)

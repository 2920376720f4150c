"""What a figure shows, as a sentence: computed from what it is drawn from, so true whatever was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hfprune.models.units import UNITS
from hfprune.pruning.methods import DENSE
from hfprune.reporting.agreement import KEPT, between_criteria, correlation_in_words
from hfprune.reporting.deployment import by_file, instead
from hfprune.reporting.labels import name_of
from hfprune.reporting.statistics import MODEL, varying
from hfprune.reporting.summary import MEAN, summary

KL = "KL (nats/token)"
ACCURACY_CHANGE = "Change of mean accuracy (points)"
EVEN = 1  # points by which the layers' kept shares may differ because widths are whole numbers
MOST_TOLD = 3
NOT_COMPARED = "No cut model was compared with the dense one."


def named_models(metrics: pd.DataFrame) -> pd.DataFrame:
    """`summary` with the column `name`: the model's method and training, without its size."""
    models = summary(metrics)
    return models.assign(name=names(models))


def names(models: pd.DataFrame) -> list[str]:
    """Names of models among each other, without their sizes."""
    differing = varying(models)
    return [name_of(model, differing) for _, model in models.iterrows()]


def whole_name(model: Mapping[str, Any]) -> str:
    """A model's name with its size."""
    return model["name"] if model["method"] == DENSE else f"{model['name']}, {model['ratio']:.0%}"


def listed(words: Sequence[str]) -> str:
    """Words with commas between them, or semicolons if there are commas inside, and `and` before the last."""
    if len(words) < 2:
        return "".join(words)
    if any("," in word for word in words):
        return f"{'; '.join(words[:-1])}; and {words[-1]}"
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _first(words: Sequence[str]) -> str:
    """The first few words, and how many more there are."""
    rest = len(words) - MOST_TOLD
    return listed([*words[:MOST_TOLD], f"{rest} more"] if rest > 0 else words)


def fidelity(models: pd.DataFrame) -> str:
    """How far the cut models are from the dense one: before any training, unless all were trained.

    Args:
        models: see `named_models`. One whose KL is NaN was not compared.
    """
    cut = models[(models["method"] != DENSE) & models[KL].notna()]
    if cut.empty:
        return NOT_COMPARED
    if (cut["stage"] == "pruned").any():
        cut = cut[cut["stage"] == "pruned"]
    ratio = cut["ratio"].mode().iloc[-1]
    ranked = cut[cut["ratio"] == ratio].sort_values(KL)
    best, worst = ranked.iloc[0], ranked.iloc[-1]
    if len(ranked) == 1:
        line = cut[cut["name"] == best["name"]].sort_values("ratio")
        values = listed([f"{row[KL]:.2f} at {row['ratio']:.0%}" for _, row in line.iterrows()])
        if len(line) > 1 and line[KL].is_monotonic_increasing:
            return f"The more {best['name']} removes, the farther the model is from the dense one: KL {values}."
        return f"{best['name']} leaves the model at a distance from the dense one: KL {values}."
    second = ranked.iloc[1]
    rest = f", {second['name']} at {second[KL]:.2f}"
    if len(ranked) > 2:
        rest += f"; of {len(ranked)} methods, {worst['name']} is farthest with {worst[KL]:.2f}"
    overlap = second[f"{KL} low"] <= best[f"{KL} high"]
    chance = f" The intervals of {best['name']} and {second['name']} overlap." if overlap else ""
    kept = f"At {ratio:.0%} {best['name']} keeps the model at {best[KL]:.2f} nats per token from the dense one"
    return f"{kept}{rest}.{chance}"


def training(models: pd.DataFrame) -> str:
    """What training after the cut changes; empty if no model was measured before and after it.

    Args:
        models: see `named_models`.
    """
    cut = models[(models["method"] != DENSE) & models[KL].notna()]
    changes = []
    for _, after in cut[cut["stage"] == "recovered"].iterrows():
        alike = (cut[["method", "ratio", "parent"]] == after[["method", "ratio", "parent"]]).all(axis=1)
        changes += [
            f"{after['recovery']} takes {whole_name(before)} from KL {before[KL]:.2f} to {after[KL]:.2f}"
            for _, before in cut[alike & (cut["stage"] == "pruned")].iterrows()
        ]
    return f"Training after the cut: {_first(changes)}." if changes else ""


def accuracy(models: pd.DataFrame) -> str:
    """Where the models' mean accuracy is beside the dense one's. It is no test: `accuracy_changes` is of paired ones.

    Args:
        models: see `named_models`.
    """
    if MEAN not in models:
        return "No task has an accuracy."
    others = models[models["stage"] != "dense"]
    dense = models[models["stage"] == "dense"][MEAN].iloc[0]
    below, above = others[f"{MEAN} high"] < dense, others[f"{MEAN} low"] > dense
    told = [f"Mean accuracy of the dense model is {dense:.1f} %."]
    for where, chosen in (("below", below), ("above", above)):
        if chosen.any():
            outside = _first([whole_name(model) for _, model in others[chosen].iterrows()])
            told.append(f"Models whose interval is {where} that: {outside}.")
    if around := int((~below & ~above).sum()):
        told.append(f"It is inside the interval of {'the other' if len(told) > 1 else 'all'} {around}.")
    return " ".join(told)


def accuracy_changes(changes: pd.DataFrame) -> str:
    """Which models differ from the dense one in mean accuracy.

    Args:
        changes: paired differences from the dense model: `name`, `ACCURACY_CHANGE`, `distinguishable`.
    """
    if changes.empty:
        return NOT_COMPARED
    held = changes[changes["distinguishable"]]
    told = [f"{row['name']} ({row[ACCURACY_CHANGE]:+.1f} points)" for _, row in held.iterrows()]
    corrected = "after correction for many tests"
    if not told:
        return f"Mean accuracy tells none of {len(changes)} models from the dense one {corrected}."
    rest = len(changes) - len(told)
    others = f" The other {rest} cannot be told from it {corrected}." if rest else ""
    return f"Mean accuracy differs from the dense model's for {listed(told)}.{others}"


def widths(table: pd.DataFrame) -> str:
    """How differently layers were cut.

    Args:
        table: see `curves.kept_widths`.
    """
    told = []
    for part, rows in table.groupby("part", sort=False):
        unit = UNITS.get(part, part)
        share = 100 * rows["kept"] / rows["dense"]
        rows = rows.assign(
            share=share, name=[f"{m}, {r:.0%}" for m, r in zip(rows["model"], rows["ratio"], strict=True)]
        )
        spreads = rows.groupby("name", sort=False)["share"].agg(lambda kept: kept.max() - kept.min())
        if spreads.max() < EVEN:
            told.append(f"Every layer keeps the same share of its {unit}.")
            continue
        layers = rows[rows["name"] == spreads.idxmax()].sort_values("share")
        least, most = layers.iloc[0], layers.iloc[-1]
        told.append(
            f"{least['name']} keeps {least['share']:.0f}% of the {unit} of layer {least['layer']} and "
            f"{most['share']:.0f}% of those of layer {most['layer']}."
        )
        even = list(spreads[spreads < EVEN].index)
        if even:
            told[-1] += f" With {_first(even)} every layer keeps the same share."
    return " ".join(told)


def losses(curves: pd.DataFrame) -> str:
    """Where the loss of every training begins and ends.

    Args:
        curves: see `curves.training_curves`.
    """
    ends = [
        f"{name} from {steps['loss'].iloc[0]:.2f} to {steps['loss'].iloc[-1]:.2f}"
        for name, steps in curves.groupby("model", sort=False)
    ]
    return f"The loss of the first step and of the last: {_first(ends)}."


def profile(bins: pd.DataFrame) -> str:
    """Where models are far from the dense one, on the first text.

    Args:
        bins: see `samples.read_profiles`.
    """
    text = bins["text"].iloc[0]
    kl = bins[(bins["metric"] == "kl") & (bins["stage"] != "dense") & (bins["text"] == text)].dropna(subset="value")
    if kl.empty:
        return NOT_COMPARED
    told = []
    for by, where in (("entropy", "an entropy of {:.1f} to {:.1f} nats"), ("position", "tokens {:.0f} to {:.0f}")):
        means = kl[kl["by"] == by].groupby(["low", "high"])["value"].mean()
        ends = [f"{where.format(*place)} ({means[place]:.2f})" for place in (means.idxmax(), means.idxmin())]
        told.append(f"highest at {ends[0]} and lowest at {ends[1]}")
    count = len(kl.drop_duplicates(MODEL))
    return f"KL on {text}, mean of {count} models: by the dense model's entropy {told[0]}; by position {told[1]}."


def importance(scores: Mapping[str, Mapping[int, np.ndarray]]) -> str:
    """Which layers hold the neurons that score highest.

    Args:
        scores: (neurons,) by layer, by criterion.
    """
    told = []
    for criterion, layers in scores.items():
        medians = {number: float(np.median(layer)) for number, layer in layers.items()}
        high, low = max(medians, key=medians.get), min(medians, key=medians.get)
        ends = f"highest in layer {high} ({medians[high]:.2g}) and lowest in layer {low} ({medians[low]:.2g})"
        if medians[high] == medians[low]:
            ends = f"{medians[high]:.2g} in every layer"
        told.append(f"{ends} by {criterion}")
    return f"The median score of a layer's neurons is {_first(told)}."


def agreement(agreements: pd.DataFrame) -> str:
    """Which criteria rank neurons alike.

    Args:
        agreements: see `agreement.compare`.
    """
    spearman, overlap = (between_criteria(agreements, measure) for measure in ("spearman", "overlap"))
    pairs = [
        (spearman.loc[one, other], overlap.loc[one, other], one, other)
        for place, one in enumerate(spearman)
        for other in spearman.columns[place + 1 :]
        if np.isfinite(spearman.loc[one, other])
    ]
    alone = {name: spearman.loc[name, name] for name in spearman if np.isfinite(spearman.loc[name, name])}
    told = []
    if pairs:
        (most, shared, one, other), (least, *_, two, three) = max(pairs), min(pairs)
        told.append(
            f"{one} and {other} rank neurons {'most alike' if len(pairs) > 1 else 'alike'} by {most:.2f} and have "
            f"{shared:.0%} of the kept ones in common (by chance {KEPT:.0%})"
        )
        if len(pairs) > 1:
            told.append(f"{two} and {three} least, by {least:z.2f}")
    if alone:
        steady, shaky = max(alone, key=alone.get), min(alone, key=alone.get)
        told.append(f"{steady} agrees with itself at another seed by {alone[steady]:.2f}")
        if steady != shaky:
            told[-1] += f", {shaky} by {alone[shaky]:.2f}"
    return f"{'; '.join(told)}." if told else "No two of these scores rank the same units."


def ranks(correlations: Mapping[int, float]) -> str:
    """How entropy and cross-entropy agree, by layer."""
    values = listed([f"{value:.2f} in layer {layer}" for layer, value in correlations.items() if np.isfinite(value)])
    if not values:
        return "Entropy or cross-entropy ranks no neurons in these layers: all scores are equal."
    return f"Ranks of neurons by entropy and by cross-entropy correlate by {values}."


def before_after(pairs: pd.DataFrame) -> str:
    """Whether KL before training predicts KL after it.

    Args:
        pairs: columns `recovery`, `before` and `after`.
    """
    told = []
    for recovery, cuts in pairs.groupby("recovery", sort=False):
        nearer = int((cuts["after"] < cuts["before"]).sum())
        rank = correlation_in_words(cuts["before"], cuts["after"])
        told.append(f"{recovery} brings {nearer} of {len(cuts)} models nearer to the dense one")
        if rank:
            told[-1] += f", and their ranks correlate by {rank}"
    return f"{'; '.join(told)}."


def speed(quality: pd.DataFrame, seconds: pd.Series) -> str:
    """How much faster than the dense model the fastest is.

    Args:
        quality: columns of `MODEL`, a row for each model.
        seconds: of the prefill, with the same index; NaN where it was not timed.
    """
    is_dense = quality["stage"] == "dense"
    dense, cut = seconds[is_dense].dropna(), seconds[~is_dense].dropna()
    if dense.empty or cut.empty:
        return "The dense model and a smaller one were not both timed."
    named = quality.assign(name=names(quality)).loc[cut.idxmin()]
    times = dense.iloc[0] / cut.min()
    fastest = f"The fastest, {whole_name(named)}, takes {1e3 * cut.min():.0f} ms"
    return f"{fastest}: {times:.2f} times as fast as the dense model."


def best_of_board(board: pd.DataFrame, distance: str) -> str:
    """Who is nearest to the dense model at each size.

    Args:
        board: see `leaderboard.board`.
        distance: the column of KL.
    """
    told = []
    for ratio, rows in board[board["ratio"] > 0].dropna(subset=distance).groupby("ratio"):
        best, tied = rows.loc[rows[distance].idxmin()], int(rows["tied"].sum())
        others = f" ({tied} cannot be told from it)" if tied else ""
        told.append(f"at {ratio:.0%} {best['name']}, {best[distance]:.2f} nats per token{others}")
    return f"Nearest to the dense model is {listed(told)}." if told else NOT_COMPARED


def files(table: pd.DataFrame) -> str:
    """Whether pruning makes better small files than a smaller type does.

    Args:
        table: see `deployment.read_files`.
    """
    by_model = by_file(table)
    pruned = by_model[by_model["stage"] != "dense"]
    if pruned.empty:
        return NOT_COMPARED
    verdicts = [instead(file, by_model) for _, file in pruned.iterrows()]
    if not any(verdicts):
        return "There is no dense file to compare a pruned one with."
    worse = sum(verdict not in ("", "none") for verdict in verdicts)
    found = f"For {worse} of {len(verdicts)} pruned files"
    return f"{found} there is a file of the dense model that is no larger and nearer to it."

"""How far criteria, and calibration seeds, agree on which neurons matter."""

import math
from collections.abc import Container
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import norm, rankdata, spearmanr

from hfprune.models.units import UNITS, read_scores
from hfprune.reporting.statistics import LEVEL
from hfprune.store.artifacts import Artifact
from hfprune.store.filenames import SCORES

KEPT = 2 / 3  # the share of a layer's neurons that stays when 20 % of a small model's parameters go
FEWEST_RANKED = 3  # below which a rank correlation says nothing


def compare(artifacts: list[Artifact]) -> pd.DataFrame:
    """Agreement of every pair of scores, per layer and overall.

    Args:
        artifacts: of stage `score`, all of one model.

    Returns:
        Columns `criterion`, `seed`, `other_criterion`, `other_seed`, `layer`, `spearman`, `overlap`. `spearman` is the
        rank correlation of the scores; `overlap` the share of one's kept neurons that the other keeps too, where each
        keeps the best `KEPT` of every layer (a random choice overlaps by `KEPT`). Layer -1 is the mean over layers, of
        `spearman` over those that both rank.
    """
    rows = []
    ranked = {artifact.key: read_scores(artifact.folder / SCORES).keys() for artifact in artifacts}
    for one, other in combinations(artifacts, 2):
        common = ranked[one.key] & ranked[other.key]
        if not common:  # neurons by one, whole experts by the other
            continue
        (criterion, seed), (other_criterion, other_seed) = (
            (artifact.parameters["criterion"], artifact.parameters["seed"]) for artifact in (one, other)
        )
        mine, others = layers(one, common), layers(other, common)
        by_layer = {
            number: (correlation(scores, others[number]), overlap(scores, others[number]))
            for number, scores in mine.items()
        }
        pair = {"criterion": criterion, "seed": seed, "other_criterion": other_criterion, "other_seed": other_seed}
        for layer, (spearman, shared) in by_layer.items():
            rows.append({**pair, "layer": layer, "spearman": spearman, "overlap": shared})
        spearman, shared = pd.DataFrame(by_layer.values()).mean()
        rows.append({**pair, "layer": -1, "spearman": spearman, "overlap": shared})
    columns = ["criterion", "seed", "other_criterion", "other_seed", "layer", "spearman", "overlap"]
    return pd.DataFrame(rows, columns=columns)


def convergence(artifacts: list[Artifact]) -> pd.DataFrame:
    """How far two halves of the calibration text agreed whenever they were compared, see `pruning.convergence`.

    Returns:
        Columns `criterion`, `seed`, `samples`, `agreement`; no rows of scores that took all samples unasked.
    """
    rows = [
        {name: artifact.parameters[name] for name in ("criterion", "seed")} | comparison
        for artifact in artifacts
        for comparison in artifact.manifest["details"].get("convergence", [])
    ]
    return pd.DataFrame(rows, columns=["criterion", "seed", "samples", "agreement"])


def layers(artifact: Artifact, parts: Container[str] = UNITS) -> dict[int, np.ndarray]:
    """The scores of the units of the first of these parts that an artifact ranks, neurons if it can.

    By the number of the layer. Those without such units, as of a mixture of experts the dense ones, are left out.
    """
    scores = read_scores(artifact.folder / SCORES)
    part = next(part for part in UNITS if part in scores and part in parts)
    return {number: layer.flatten().numpy() for number, layer in enumerate(scores[part]) if layer.numel()}


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation of the scores of one layer; NaN if all are equal by one of them."""
    return float("nan") if np.ptp(one) == 0 or np.ptp(other) == 0 else float(spearmanr(one, other).statistic)


def correlation_interval(value: float, count: int) -> tuple[float, float]:
    """The 95 % interval of Spearman's rank correlation of `count` independent pairs, by Fisher's z; NaN if it has none.

    atanh of it has a variance near (1 + value**2 / 2) / (count - 3): Bonett and Wright, Psychometrika 65, 2000. Three
    pairs, or ranks that are all the same or all reversed, leave it open.
    """
    if count <= 3 or not abs(value) < 1 - 1e-9:
        return float("nan"), float("nan")
    half = norm.ppf(0.5 + LEVEL / 2) * math.sqrt((1 + value**2 / 2) / (count - 3))
    return math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half)


def correlation_in_words(one: np.ndarray, other: np.ndarray) -> str:
    """Spearman's rank correlation with its interval, where it has one; empty if there is none, or too few values."""
    if len(one) < FEWEST_RANKED or not np.isfinite(value := correlation(one, other)):
        return ""
    low, high = correlation_interval(value, len(one))
    return f"{value:.2f}" + (f" ({low:.2f} to {high:.2f})" if np.isfinite(low) else "")


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """The share of the best `KEPT` of `one` that is among the best `KEPT` of `other`."""
    count = round(KEPT * len(one))
    best = [rankdata(-scores, method="ordinal") <= count for scores in (one, other)]
    return float((best[0] & best[1]).sum() / count)


def between_criteria(agreement: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A square table, criterion by criterion, of the mean overall agreement over pairs of seeds.

    Two criteria are compared at the same seed; a criterion with itself, on the diagonal, at different seeds (NaN where
    there is one seed only).
    """
    overall = agreement[agreement["layer"] == -1]
    names = list(dict.fromkeys([*overall["criterion"], *overall["other_criterion"]]))
    table = pd.DataFrame(np.nan, index=names, columns=names)
    for (a, b), pairs in overall.groupby(["criterion", "other_criterion"]):
        same_seed = pairs["seed"] == pairs["other_seed"]
        chosen = pairs[~same_seed] if a == b else pairs[same_seed]
        if len(chosen):
            table.loc[a, b] = table.loc[b, a] = chosen[measure].mean()
    return table

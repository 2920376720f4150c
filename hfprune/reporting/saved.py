"""Latency as it was predicted for a cut, and as it was measured."""

from collections.abc import Sequence

import pandas as pd

from hfprune.reporting.identity import lineage
from hfprune.store.artifacts import Artifact, Store

TASK, SPEED = "decode batch 1", "decode_tokens_per_second"


def saved_latency(timed: pd.DataFrame, models: Sequence[Artifact], store: Store) -> pd.DataFrame:
    """Rows for the models that were cut to a ratio of latency, of a dense model that was timed beside them.

    Args:
        timed: rows of `timing.time_models`, `model` a key.
        models: the artifacts that were timed.
        store: holds the manifests of what they were made from.

    Returns:
        Rows as in `timed`, metrics `latency_saved_predicted` and `latency_saved`: shares of the dense model's time to
        decode a token.
    """
    speed = timed[(timed["task"] == TASK) & (timed["metric"] == SPEED)].set_index("model")
    rows = []
    for model in models:
        dense, *steps = lineage(model.key, store)
        saved = [step["details"].get("saved", {}) for step in steps if step["stage"] == "prune"]
        if not saved or saved[-1].get("of") != "latency" or dense["key"] not in speed.index:
            continue
        achieved = 1 - speed["value"][dense["key"]] / speed["value"][model.key]
        values = {"latency_saved_predicted": saved[-1]["share"], "latency_saved": achieved}
        rows += [(model.key, TASK, metric, value, speed["n"][model.key]) for metric, value in values.items()]
    return pd.DataFrame(rows, columns=["model", "task", "metric", "value", "n"])

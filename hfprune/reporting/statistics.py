"""Estimates with their uncertainty."""

import numpy as np
import pandas as pd

MODEL = ["model", "stage", "criterion", "allocation", "refit", "structure", "ratio", "recovery", "parent"]

WITHIN = 1.96  # standard errors to either side hold 95 % of a normal distribution
WAYS = ["allocation", "refit", "structure", "recovery", "parent"]  # how a model was made, beside criterion and ratio


def varying(models: pd.DataFrame) -> list[str]:
    """Those of `WAYS` in which the models differ: what a table or a legend has to say beside the criterion.

    Args:
        models: rows with the columns of `MODEL`. How models were cut is read of those that were.
    """
    cut = models[models["criterion"] != "none"]
    return [way for way in WAYS if (models if way == "recovery" else cut)[way].nunique() > 1]


def over_seeds(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row for each model setting and metric: the mean over calibration seeds, with its standard error.

    The same documents serve all seeds, so averaging over seeds does not make the error over documents smaller; only
    the variance between seeds falls with their number s: stderr**2 = mean(stderr_documents**2) + var_seeds / s.

    Args:
        metrics: rows of metrics.csv.

    Returns:
        Columns of `MODEL`, group, task, metric, value, stderr, seeds, ratio_achieved, parameters.
    """
    rows = []
    for setting, found in metrics.groupby([*MODEL, "group", "task", "metric"], dropna=False, sort=False):
        seeds = len(found)
        between = found["value"].var(ddof=1) / seeds if seeds > 1 else 0.0
        estimate = {
            "value": found["value"].mean(),
            "stderr": np.sqrt((found["stderr"] ** 2).mean() + between),
            "seeds": seeds,
            "ratio_achieved": found["ratio_achieved"].mean(),
            "parameters": round(found["parameters"].mean()),
        }
        rows.append(dict(zip([*MODEL, "group", "task", "metric"], setting, strict=True)) | estimate)
    columns = [*MODEL, "group", "task", "metric", "value", "stderr", "seeds", "ratio_achieved", "parameters"]
    return pd.DataFrame(rows, columns=columns)


def mean_accuracy(estimates: pd.DataFrame) -> pd.DataFrame:
    """The mean over tasks of each model's headline accuracy; the tasks' errors count as independent.

    Args:
        estimates: rows of `over_seeds`, of group `task`, one metric per task (see `tables.headline`).

    Returns:
        Columns of `MODEL`, value, stderr.
    """
    rows = []
    for setting, found in estimates.groupby(MODEL, dropna=False, sort=False):
        stderr = np.sqrt((found["stderr"] ** 2).sum()) / len(found)
        rows.append(dict(zip(MODEL, setting, strict=True)) | {"value": found["value"].mean(), "stderr": stderr})
    return pd.DataFrame(rows, columns=[*MODEL, "value", "stderr"])

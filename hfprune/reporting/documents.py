"""What every document says of every model: the values from which paired comparisons are made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hfprune.errors import UserError
from hfprune.reporting.statistics import MODEL
from hfprune.reporting.tables import Names, headline, heldout_texts, measured_models
from hfprune.store.artifacts import Artifact, Store, read
from hfprune.store.filenames import PROFILE, SAMPLES

VALUES = [*MODEL, "seed", "group", "task", "metric", "document", "value"]
BINS = [*MODEL, "seed", "text", "by", "bin", "low", "high", "metric", "n", "value"]


def read_documents(artifacts: list[Artifact], store: Store, names: Names) -> pd.DataFrame:
    """What every document says of every model: of a task its headline metric, of a held-out text every measure.

    Args:
        artifacts: of the stages `measure` and `evaluate`, see `tables.collect`.
        store: where the tasks' results, and everything that they were made from, are.
        names: what methods and texts are called.

    Returns:
        Columns `VALUES`. Group `perplexity` has the metric `loss`, nats per token: a perplexity is exp of its mean.
        `document` is its number in the task or the held-out text, the same for all models. Texts come in the order of
        `names`. Left out are tasks without a headline metric, and metrics that are no single number for a document
        (a perplexity of lm-eval's).

    Raises:
        UserError: a task's artifact is gone, or damaged; or see `tables.measured_models`.
    """
    models = measured_models(artifacts, store, names.methods)
    texts = heldout_texts(artifacts, store, names.texts)
    order = {key: place for place, key in enumerate(texts)}
    parts = []
    for artifact in sorted(artifacts, key=lambda each: order.get(each.key, len(order))):
        inputs = dict(artifact.manifest["inputs"])
        about = models[inputs.pop("model")]
        if artifact.key in texts:
            parts.append(_values(artifact.folder / SAMPLES, about, "fidelity", texts[artifact.key]))
            continue
        for task, key in inputs.items():
            if not store.has("evaluate-task", key):
                raise UserError(
                    f"{store.root / 'evaluate-task' / key}: the documents of task {task} are no longer in the store. "
                    f"Remove {artifact.folder} and run again."
                )
            done = read(store.root / "evaluate-task" / key)
            parts.append(_values(done.folder / SAMPLES, about, "task", task))
    found = pd.concat(parts, ignore_index=True)
    found.loc[found["metric"] == "loss", "group"] = "perplexity"
    return pd.concat([found[found["group"] != "task"], headline(found)], ignore_index=True)[VALUES]


def _values(file: Path, about: Mapping[str, Any], group: str, task: str) -> pd.DataFrame:
    """The numbers in a file of samples, one a row."""
    with file.open(encoding="utf-8") as lines:
        samples = [json.loads(line) for line in lines]
    rows = [
        (sample["doc_id"], metric, float(value))
        for sample in samples
        for metric, value in sample.items()
        if metric != "doc_id" and isinstance(value, int | float)
    ]
    columns = {name: about[name] for name in (*MODEL, "seed")} | {"group": group, "task": task}
    return pd.DataFrame(rows, columns=["document", "metric", "value"]).assign(**columns)


def read_profiles(artifacts: list[Artifact], store: Store, names: Names) -> pd.DataFrame:
    """Where models fail: `fidelity.Profile` of every model and held-out text, in the order of `names`.

    Args:
        artifacts: of the stage `measure`.
        store: where everything that they were made from has its manifests.
        names: what methods and texts are called.

    Returns:
        Columns `BINS`.

    Raises:
        UserError: only the dense model was measured.
    """
    models = measured_models(artifacts, store, names.methods)
    if all(about["stage"] == "dense" for about in models.values()):
        raise UserError("only the dense model was measured: none to compare with it. Give others' measures too.")
    texts = heldout_texts(artifacts, store, names.texts)
    by_key = {artifact.key: artifact for artifact in artifacts}
    parts = []
    for key, text in texts.items():
        about = models[by_key[key].manifest["inputs"]["model"]]
        bins = pd.read_csv(by_key[key].folder / PROFILE)
        parts.append(bins.assign(text=text, **{name: about[name] for name in (*MODEL, "seed")}))
    return pd.concat(parts, ignore_index=True)[BINS]

"""Values of single documents, from which models are compared in pairs, and of bins of tokens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hfprune.errors import UserError
from hfprune.reporting.identity import Names, heldout_texts, measured_models
from hfprune.reporting.metrics import headline
from hfprune.reporting.statistics import MODEL
from hfprune.store.artifacts import Artifact, Store, read
from hfprune.store.filenames import PROFILE, SAMPLES

VALUES = [*MODEL, "seed", "group", "task", "metric", "document", "value"]
BINS = [*MODEL, "seed", "text", "by", "bin", "low", "high", "metric", "n", "value"]


def read_samples(artifacts: Sequence[Artifact], store: Store, names: Names) -> pd.DataFrame:
    """Every model's values on every document: of a task its headline metric, of a held-out text every measure.

    Args:
        artifacts: of the stages `measure` and `evaluate`, see `metrics.collect`.
        store: holds the tasks' results, and the manifests of everything that they were made from.
        names: of methods and texts.

    Returns:
        Columns `VALUES`. Group `perplexity` has the metric `loss`, nats per token: a perplexity is exp of its mean.
        `document` is its number in the task or the held-out text, the same for all models. Texts come in the order of
        `names`. Not included: tasks without a headline metric, and metrics that are no single number for a document
        (such as lm-eval's perplexities).

    Raises:
        UserError: a task's artifact is gone, or damaged; or see `identity.measured_models`.
    """
    models = measured_models(artifacts, store, names.methods)
    texts = heldout_texts(artifacts, store, names.texts)
    order = {key: place for place, key in enumerate(texts)}
    parts = []
    for artifact in sorted(artifacts, key=lambda artifact: order.get(artifact.key, len(order))):
        inputs = dict(artifact.manifest["inputs"])
        model = models[inputs.pop("model")]
        if artifact.key in texts:
            parts.append(_values(artifact.folder / SAMPLES, model, "fidelity", texts[artifact.key]))
            continue
        for task, key in inputs.items():
            if not store.has("evaluate-task", key):
                raise UserError(
                    f"{store.root / 'evaluate-task' / key}: the documents of task {task} are no longer in the store. "
                    f"Remove {artifact.folder} and run again."
                )
            parts.append(_values(read(store.root / "evaluate-task" / key).folder / SAMPLES, model, "task", task))
    samples = pd.concat(parts, ignore_index=True)
    samples.loc[samples["metric"] == "loss", "group"] = "perplexity"
    return pd.concat([samples[samples["group"] != "task"], headline(samples)], ignore_index=True)[VALUES]


def _values(file: Path, model: Mapping[str, Any], group: str, task: str) -> pd.DataFrame:
    """The numbers in a file of samples, one a row."""
    with file.open(encoding="utf-8") as lines:
        samples = [json.loads(line) for line in lines]
    rows = [
        (sample["doc_id"], metric, float(value))
        for sample in samples
        for metric, value in sample.items()
        if metric != "doc_id" and isinstance(value, int | float)
    ]
    columns = {name: model[name] for name in (*MODEL, "seed")} | {"group": group, "task": task}
    return pd.DataFrame(rows, columns=["document", "metric", "value"]).assign(**columns)


def read_profiles(artifacts: Sequence[Artifact], store: Store, names: Names) -> pd.DataFrame:
    """Where models differ from the dense one: `fidelity.Profile` of every model and text, in the order of `names`.

    Args:
        artifacts: of the stage `measure`.
        store: holds the manifests of everything that they were made from.
        names: of methods and texts.

    Returns:
        Columns `BINS`.

    Raises:
        UserError: only the dense model was measured.
    """
    models = measured_models(artifacts, store, names.methods)
    if all(model["stage"] == "dense" for model in models.values()):
        raise UserError("only the dense model was measured: none to compare with it. Give others' measures too.")
    texts = heldout_texts(artifacts, store, names.texts)
    by_key = {artifact.key: artifact for artifact in artifacts}
    parts = []
    for key, text in texts.items():
        model = models[by_key[key].manifest["inputs"]["model"]]
        bins = pd.read_csv(by_key[key].folder / PROFILE)
        parts.append(bins.assign(text=text, **{name: model[name] for name in (*MODEL, "seed")}))
    return pd.concat(parts, ignore_index=True)[BINS]

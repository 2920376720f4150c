"""What is drawn as lines: the steps of every training, and how much every layer keeps."""

import json
import math
from collections.abc import Mapping, Sequence

import pandas as pd

from hfprune.models.history import kept_shapes
from hfprune.pruning.methods import DENSE
from hfprune.reporting.identity import described
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.filenames import LOSSES, PRUNING


def training_curves(artifacts: Sequence[Artifact], store: Store, methods: Mapping[str, str]) -> pd.DataFrame:
    """Every step of every training, in the order of the artifacts.

    Args:
        artifacts: of the stage `recover`.
        store: holds the manifests of everything that they were made from.
        methods: see `identity.described`.

    Returns:
        Columns `model` (a label: its method and training), `loss_name`, `key`, those of `losses.jsonl`, and
        `tokens_per_second`.
    """
    models = described([artifact.key for artifact in artifacts], store, methods)
    curves = []
    labels = _labels(models, ("ratio", "seed"))
    for artifact, label, recovery in zip(artifacts, labels, models["recovery"], strict=True):
        steps = pd.read_json(artifact.folder / LOSSES, lines=True)
        steps["tokens_per_second"] = steps["tokens"].diff().fillna(steps["tokens"]) / steps["seconds"]
        about = {"model": f"{label}, {recovery}", "loss_name": artifact.parameters["loss"], "key": artifact.key}
        curves.append(steps.assign(**about)[[*about, *steps.columns]])
    return pd.concat(curves, ignore_index=True)


def kept_widths(artifacts: Sequence[Artifact], store: Store, methods: Mapping[str, str]) -> pd.DataFrame:
    """How much every layer of every pruned model keeps.

    Args:
        artifacts: of the stage `prune`, in any order.
        store: holds the manifests of everything that they were made from.
        methods: see `identity.described`.

    Returns:
        Columns `model` (a label: its method), `ratio`, `part`, `layer`, `kept` and `dense` (units; see `units.UNITS`),
        `key`.
    """
    models = described([artifact.key for artifact in artifacts], store, methods)
    rows = []
    for artifact, label, ratio in zip(artifacts, _labels(models, ("seed",)), models["ratio"], strict=True):
        pruning = json.loads((artifact.folder / PRUNING).read_text(encoding="utf-8"))
        for part, layers in pruning["kept"].items():
            if part == "experts" and pruning["structure"] == "layers":  # with their layers, as attention
                continue
            shapes = kept_shapes(part, layers)
            dense_units = pruning["units_dense"][part] // len(shapes)
            for layer, shape in shapes.items():
                about = {"model": label, "ratio": ratio, "part": part, "layer": layer}
                rows.append(about | {"kept": math.prod(shape), "dense": dense_units, "key": artifact.key})
    return pd.DataFrame(rows).sort_values("ratio", kind="stable", ignore_index=True)


def _labels(models: pd.DataFrame, columns: tuple[str, ...]) -> list[str]:
    """A label for each model: its method and, of `columns` ("ratio", "seed"), those in which the models differ."""
    cut = models[models["method"] != DENSE]
    differing = [name for name in columns if cut[name].nunique() > 1]
    labels = []
    for _, model in models.iterrows():
        words = {"ratio": f"{model['ratio']:.0%}", "seed": f"seed {model['seed']:.0f}"}
        labels.append(", ".join([model["method"], *(words[name] for name in differing if model["method"] != DENSE)]))
    return labels

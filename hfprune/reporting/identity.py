"""Which model a checkpoint is: what it was made from, by which method and training, and how results name it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import pandas as pd

from hfprune.errors import UserError
from hfprune.pruning.methods import DENSE, method_name
from hfprune.reporting.statistics import MODEL
from hfprune.store.artifacts import Artifact, Store


@dataclass(frozen=True)
class Names:
    """An experiment's own names for its methods and texts.

    Attributes:
        methods: names of methods by the keys of the pruned models, in the experiment's order.
        texts: names of held-out texts by their keys, the headline text first.
    """

    methods: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


NO_NAMES = Names()


def lineage(key: str, store: Store) -> list[dict[str, Any]]:
    """The manifests of a model and of its ancestors, the oldest first.

    The first is that of a download. The others are of `prune`, each after those of its `search`, `order` and `score`,
    as far as it has them, the last of them what its units or layers were ranked by; and of `recover`.

    Raises:
        UserError: the store lacks one of them.
    """
    stage = next((name for name in ("recover", "prune") if store.has(name, key)), "model")
    manifest = store.manifest(stage, key)
    if stage == "model":
        return [manifest]
    inputs = manifest["inputs"]
    ranked = [
        _scores(inputs[name], store) for name in ("widths", "order", "scores") if name in inputs and stage == "prune"
    ]
    return [*lineage(inputs["model"], store), *ranked, manifest]


def _scores(key: str, store: Store) -> dict[str, Any]:
    """The manifest of what a cut was ranked by, or of the search for its widths."""
    return store.manifest(next(stage for stage in ("search", "order", "score") if store.has(stage, key)), key)


def described(keys: Sequence[str], store: Store, methods: Mapping[str, str] = MappingProxyType({})) -> pd.DataFrame:
    """A row for each checkpoint that says which model it is: columns of `MODEL`, seed, both shares achieved, key.

    Args:
        keys: of artifacts of `model`, `prune` and `recover`.
        store: holds the manifests of everything that they were made from.
        methods: names of methods by the keys of artifacts of `prune`. A method without a name gets one from its recipe,
            see `methods.method_name`.
    """
    lineages = {key: lineage(key, store) for key in keys}
    recovered = {key: steps[-1] for key, steps in lineages.items() if steps[-1]["stage"] == "recover"}
    recoveries = recovery_names(recovered, store)
    rows = [
        _model_columns(steps, methods) | {"recovery": recoveries.get(key, "none"), "key": key}
        for key, steps in lineages.items()
    ]
    return pd.DataFrame(rows, columns=[*MODEL, "seed", "ratio_achieved", "ratio_achieved_parent", "key"])


def _model_columns(steps: Sequence[Mapping[str, Any]], methods: Mapping[str, str]) -> dict[str, Any]:
    """The columns of `described` without `recovery` and `key`, from a `lineage`."""
    download = steps[0]["details"]
    stage = {"model": "dense", "prune": "pruned", "recover": "recovered"}[steps[-1]["stage"]]
    columns = {"model": download["name"], "stage": stage}
    last_cut = max((place for place, manifest in enumerate(steps) if manifest["stage"] == "prune"), default=0)
    if not last_cut:
        none = dict.fromkeys(("criterion", "allocation", "refit", "structure"), "none")
        shares = {"ratio": 0.0, "ratio_achieved": download.get("ratio_achieved", 0.0), "ratio_achieved_parent": 0.0}
        return columns | {"method": DENSE} | none | shares | {"seed": None, "parent": _history(steps[1:-1], methods)}
    details, scores = steps[last_cut]["details"], steps[last_cut - 1]["parameters"]
    names = ("allocation", "refit", "structure", "ratio", "ratio_achieved", "ratio_achieved_parent")
    cut = {name: details[name] for name in names}
    trained_before = steps[last_cut + 1 : -1]
    parent = _history([*steps[1 : last_cut - 1], *trained_before], methods)
    method = _method(steps[last_cut], steps[last_cut - 1], methods)
    return (
        columns
        | {"method": method, "criterion": scores["criterion"]}
        | cut
        | {"seed": scores["seed"], "parent": parent}
    )


def _method(prune: Mapping[str, Any], score: Mapping[str, Any], methods: Mapping[str, str]) -> str:
    """The name of the method that made a cut, from the manifests of its `prune` and `score`."""
    recipe = prune["parameters"] | prune["details"] | {"criterion": score["parameters"]["criterion"]}
    return methods.get(prune["key"]) or method_name(recipe)


def _history(steps: Sequence[Mapping[str, Any]], methods: Mapping[str, str]) -> str:
    """Steps of a lineage in a few words, without seeds: results are averaged over them."""
    words = []
    for previous, manifest in pairwise([{}, *steps]):
        if manifest["stage"] == "prune":
            words.append(f"{_method(manifest, previous, methods)} {manifest['details']['ratio']:.4g}")
        elif manifest["stage"] == "recover":
            words.append(manifest["parameters"]["method"])
    return " then ".join(words) or "none"


def recovery_names(manifests: Mapping[str, Mapping[str, Any]], store: Store) -> dict[str, str]:
    """Names of trainings after the cut, by the models' keys.

    A name is the training's method, `+distillation` if that is its loss, and the parameters that differ between
    trainings of one name, where it has them.

    Args:
        manifests: those of `recover`, by the models' keys.
        store: holds the manifests of the texts that they were trained on.
    """
    if not manifests:
        return {}
    parameters = {key: manifest["parameters"] for key, manifest in manifests.items()}
    table = pd.DataFrame.from_dict(parameters, orient="index").astype(str)
    texts = {key: manifest["inputs"]["text"] for key, manifest in manifests.items()}
    files = text_names(texts.values(), store)
    table["text"] = [files[text] for text in texts.values()]
    table["name"] = table["method"] + table["loss"].map(lambda loss: "+distillation" if loss == "distillation" else "")
    names: dict[str, str] = {}
    for name, group in table.groupby("name"):
        differing = [column for column in group if group[column].nunique(dropna=False) > 1]
        for key, row in group.iterrows():
            own = [f"{column} {row[column]}" for column in differing if pd.notna(row[column])]
            names[key] = ", ".join([name, *own])
    return names


def text_names(texts: Iterable[str], store: Store) -> dict[str, str]:
    """By key, the file name of each text, with the start of its key if two texts come from files of one name."""
    stages = {text: "mix" if store.has("mix", text) else "text" for text in texts}
    files = {text: store.manifest(stage, text)["details"]["name"] for text, stage in stages.items()}
    repeated = [name for name, count in Counter(files.values()).items() if count > 1]  # such as parts of one file
    return {text: f"{name} {text[:6]}" if name in repeated else name for text, name in files.items()}


def measured_models(
    artifacts: Sequence[Artifact], store: Store, methods: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """By key, the columns that say which model it is: those of `MODEL`, seed, both shares achieved, parameters.

    Args:
        artifacts: of the stages `measure` and `evaluate`.
        store: holds the manifests of everything that they were made from.
        methods: see `described`.

    Raises:
        UserError: a model was evaluated but not measured (the measurement counts its parameters), or measured against
            a dense model that it does not come from.
    """
    measures = {
        artifact.manifest["inputs"]["model"]: artifact
        for artifact in artifacts
        if artifact.manifest["stage"] == "measure"
    }
    for artifact in artifacts:
        if (model := artifact.manifest["inputs"]["model"]) not in measures:
            raise UserError(f"{artifact.folder}: model {model} has no measure among the artifacts given.")
    for model, measure in measures.items():
        dense = lineage(model, store)[0]["key"]
        other = store.manifest("reference", measure.manifest["inputs"]["reference"])["inputs"]["model"]
        if other != dense:
            raise UserError(
                f"{measure.folder}: measured against model {other}, but {model} comes from the dense model {dense}. "
                "Give a measure whose reference was made with that."
            )
    models = described(list(measures), store, methods).astype(object).where(lambda table: table.notna(), None)
    return {
        model.pop("key"): model | {"parameters": measure.manifest["details"]["parameters"]}
        for model, measure in zip(models.to_dict("records"), measures.values(), strict=True)
    }


def heldout_texts(artifacts: Sequence[Artifact], store: Store, names: Mapping[str, str]) -> dict[str, str]:
    """By the key of each artifact of `measure`, the name of its text; in the order of `names`, then of the artifacts.

    Args:
        artifacts: those of other stages are skipped.
        store: holds the manifests of their references and texts.
        names: names of texts by their keys, the headline text first; a text without a name gets that of its file.
    """
    texts = {
        artifact.key: store.manifest("reference", artifact.manifest["inputs"]["reference"])["inputs"]["text"]
        for artifact in artifacts
        if artifact.manifest["stage"] == "measure"
    }
    order = list(dict.fromkeys([*names, *texts.values()]))
    all_names = text_names(texts.values(), store) | names
    return {key: all_names[text] for key, text in sorted(texts.items(), key=lambda item: order.index(item[1]))}

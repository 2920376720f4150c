"""From artifacts to `metrics.csv`, and from that to the tables."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from hfprune.errors import UserError
from hfprune.pruning.methods import DENSE, method_name
from hfprune.reporting.statistics import MODEL, estimates, mean_accuracy, note, varying, with_sizes
from hfprune.reporting.typeset import Cell, Row, Sheet
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.filenames import LOSSES, PRUNING, RESULTS

# One value a row; other people's scripts read these.
COLUMNS = [
    "model", "stage", "method", "criterion", "allocation", "refit", "structure", "ratio", "ratio_achieved",
    "ratio_achieved_parent", "parameters", "recovery", "parent", "seed", "group", "task", "metric", "value", "stderr",
    "n", "key",
]  # fmt: skip
HELDOUT = ("perplexity", "fidelity")  # groups whose task is a held-out text
REMOVED, PARAMETERS = "Removed (%)", "Parameters (M)"
SCALES = {REMOVED: 100, PARAMETERS: 1e-6}
DIGITS = {"KL (nats/token)": 3, "Top-1 agreement": 3}
OWN_COST = (
    "Criteria that were scored in one pass have its seconds by their shares of its operations, and its memory. A "
    "criterion that needs another's scores first is charged for them too."
)


@dataclass(frozen=True)
class Names:
    """What an experiment calls what its artifacts were made by and from.

    Attributes:
        methods: names of methods by the keys of the pruned models, in the experiment's order.
        texts: names of held-out texts by their keys, the headline's first.
    """

    methods: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


NO_NAMES = Names()
# The metric that the paper reports for a task, the first that it has.
HEADLINE = ("pct_stereotype", "acc_norm", "acc", "exact_match,strict-match")
TASK_TITLES = {
    "arc_challenge": "ARC-c",
    "arc_easy": "ARC-e",
    "boolq": "BoolQ",
    "crows_pairs_english": "CrowS",
    "openbookqa": "OBQA",
    "piqa": "PIQA",
    "race": "RACE",
    "social_iqa": "SIQA",
    "truthfulqa_mc2": "TfQA",
    "winogrande": "Wino",
}


def collect(artifacts: list[Artifact], store: Store, names: Names = NO_NAMES) -> pd.DataFrame:
    """The rows of `metrics.csv`: what the artifacts say, and what they were made from according to their manifests.

    Args:
        artifacts: of the stages `measure` and `evaluate`, in any order.
        store: where everything that they were made from has its manifests.
        names: what methods and texts are called. Models, and a model's texts, come in their order, so the first text is
            the headline's.

    Raises:
        UserError: a model was evaluated but not measured (the measurement counts its parameters).
    """
    models = measured_models(artifacts, store, names.methods)
    texts = heldout_texts(artifacts, store, names.texts)
    rows: list[dict[str, Any]] = []
    counted: set[str] = set()  # models whose efficiency has its rows
    for artifact in artifacts:
        model = artifact.manifest["inputs"]["model"]
        results = json.loads((artifact.folder / RESULTS).read_text(encoding="utf-8"))
        if artifact.key in texts:
            text, details = texts[artifact.key], artifact.manifest["details"]
            found = [
                ("perplexity" if name == "perplexity" else "fidelity", text, name, results[name]) for name in results
            ]
            if model not in counted:
                counted.add(model)
                found += [
                    ("efficiency", "inference", name, {"value": details[name], "stderr": None, "n": 1})
                    for name in ("flops_per_token", "bytes")
                ]
        else:
            found = [("task", task, name, each[name]) for task, each in results.items() for name in each]
        for group, task, metric, estimate in found:
            value = {"group": group, "task": task, "metric": metric, **estimate, "key": artifact.key}
            rows.append(models[model] | value)
    for key, columns in models.items():
        rows += [columns | cost for cost in _costs(lineage(key, store), store)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["order"] = table["stage"].map(["dense", "pruned", "recovered"].index)
    listed = list(dict.fromkeys(names.methods.values()))
    table["place"] = [listed.index(name) if name in listed else len(listed) for name in table["method"]]
    order = list(texts.values())
    table["text"] = [order.index(task) if group in HELDOUT else 0 for group, task in table[["group", "task"]].values]
    by = ["order", "parent", "place", "method", "ratio", "recovery", "seed", "group", "text", "task", "metric"]
    return table.sort_values(by, kind="stable", ignore_index=True)[COLUMNS]


def measured_models(
    artifacts: list[Artifact], store: Store, methods: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """By key, the columns that say which model it is: those of `MODEL`, seed, both shares achieved, parameters.

    Args:
        artifacts: of the stages `measure` and `evaluate`.
        store: where everything that they were made from has its manifests.
        methods: see `described`.

    Raises:
        UserError: a model was evaluated but not measured (the measurement counts its parameters).
    """
    measured = {each.manifest["inputs"]["model"]: each for each in artifacts if each.manifest["stage"] == "measure"}
    for artifact in artifacts:
        if (model := artifact.manifest["inputs"]["model"]) not in measured:
            raise UserError(f"{artifact.folder}: model {model} has no measure among the artifacts given.")
    for model, measure in measured.items():
        dense = lineage(model, store)[0]["key"]
        other = store.manifest("reference", measure.manifest["inputs"]["reference"])["inputs"]["model"]
        if other != dense:
            raise UserError(
                f"{measure.folder}: measured against model {other}, but {model} comes from the dense model {dense}. "
                "Give a measure whose reference was made with that."
            )
    models = described(list(measured), store, methods).astype(object).where(lambda each: each.notna(), None)
    return {
        model.pop("key"): model | {"parameters": measure.manifest["details"]["parameters"]}
        for model, measure in zip(models.to_dict("records"), measured.values(), strict=True)
    }


def heldout_texts(artifacts: list[Artifact], store: Store, called: Mapping[str, str]) -> dict[str, str]:
    """By the key of each artifact of `measure`, what its text is called; in the order of `called`, then as given.

    Args:
        artifacts: others than those of `measure` are passed over.
        store: where their references and texts have their manifests.
        called: names of texts by their keys, the headline's first; a text that has none is called after its file.
    """
    keys = {
        each.key: store.manifest("reference", each.manifest["inputs"]["reference"])["inputs"]["text"]
        for each in artifacts
        if each.manifest["stage"] == "measure"
    }
    order = list(dict.fromkeys([*called, *keys.values()]))
    names = text_names(keys.values(), store) | called
    return {key: names[text] for key, text in sorted(keys.items(), key=lambda item: order.index(item[1]))}


def text_names(texts: Iterable[str], store: Store) -> dict[str, str]:
    """By key, the file that each text was taken from; the key's beginning too where that is not enough to tell."""
    files = {text: store.manifest("text", text)["details"]["name"] for text in texts}
    alike = [name for name, count in Counter(files.values()).items() if count > 1]  # parts of one file, say
    return {text: f"{name} {text[:6]}" if name in alike else name for text, name in files.items()}


def training_curves(artifacts: list[Artifact], store: Store, methods: Mapping[str, str]) -> pd.DataFrame:
    """Every step of every training, in the order of the artifacts.

    Args:
        artifacts: of the stage `recover`.
        store: where what they were made from has its manifests.
        methods: see `described`.

    Returns:
        Columns `model` (its method, for people), `loss_name`, `key`, those of `losses.jsonl`, and
        `tokens_per_second`.
    """
    models = described([artifact.key for artifact in artifacts], store, methods)
    curves = []
    for artifact, label, way in zip(artifacts, _labels(models, ("ratio", "seed")), models["recovery"], strict=True):
        label = f"{label}, {way}"
        steps = pd.read_json(artifact.folder / LOSSES, lines=True)
        steps["tokens_per_second"] = steps["tokens"].diff().fillna(steps["tokens"]) / steps["seconds"]
        about = {"model": label, "loss_name": artifact.parameters["loss"], "key": artifact.key}
        curves.append(steps.assign(**about)[[*about, *steps.columns]])
    return pd.concat(curves, ignore_index=True)


def kept_widths(artifacts: list[Artifact], store: Store, methods: Mapping[str, str]) -> pd.DataFrame:
    """How much every layer of every pruned model keeps.

    Args:
        artifacts: of the stage `prune`, in any order.
        store: where what they were made from has its manifests.
        methods: see `described`.

    Returns:
        Columns `model` (its method, for people), `ratio`, `part`, `layer`, `kept` and `dense` (units; see
        `structures.UNITS`), `key`.
    """
    models = described([artifact.key for artifact in artifacts], store, methods)
    rows = []
    for artifact, label, ratio in zip(artifacts, _labels(models, ("seed",)), models["ratio"], strict=True):
        pruning = json.loads((artifact.folder / PRUNING).read_text(encoding="utf-8"))
        for part, kept in pruning["kept"].items():
            whole = pruning["units_dense"][part] // len(kept)
            for layer, units in enumerate(kept):
                about = {"model": label, "ratio": ratio, "part": part, "layer": layer}
                rows.append(about | {"kept": len(units), "dense": whole, "key": artifact.key})
    return pd.DataFrame(rows).sort_values("ratio", kind="stable", ignore_index=True)


def _labels(models: pd.DataFrame, others: tuple[str, ...]) -> list[str]:
    """Models' methods, and of `others`, "ratio" and "seed", those in which the models differ."""
    cut = models[models["method"] != DENSE]
    shown = [name for name in others if cut[name].nunique() > 1]
    labels = []
    for _, model in models.iterrows():
        words = {"ratio": f"{model['ratio']:.0%}", "seed": f"seed {model['seed']:.0f}"}
        words["parent"] = f"after {model['parent']}"
        labels.append(", ".join([model["method"], *(words[name] for name in shown if model["method"] != DENSE)]))
    return labels


def lineage(key: str, store: Store) -> list[dict[str, Any]]:
    """The manifests of a model and of all models that it was made from, in the order in which they were made.

    The first is that of a download; the others are of `prune`, each after that of its `score`, and of `recover`.

    Raises:
        UserError: the store lacks one of them.
    """
    stage = next((name for name in ("recover", "prune") if store.has(name, key)), "model")
    manifest = store.manifest(stage, key)
    if stage == "model":
        return [manifest]
    scores = [store.manifest("score", manifest["inputs"]["scores"])] if stage == "prune" else []
    return [*lineage(manifest["inputs"]["model"], store), *scores, manifest]


def recovery_names(trained: dict[str, dict[str, Any]], store: Store) -> dict[str, str]:
    """What the trainings of several models are called in results, by the models' keys.

    The method, `+distillation` where that is the loss, and whatever else tells two of them apart.

    Args:
        trained: the models' manifests of `recover`.
        store: where the texts that they were trained on have theirs.
    """
    if not trained:
        return {}
    table = pd.DataFrame.from_dict({key: each["parameters"] for key, each in trained.items()}, orient="index").astype(
        str
    )
    texts = {key: manifest["inputs"]["text"] for key, manifest in trained.items()}
    called = text_names(texts.values(), store)
    table["text"] = [called[text] for text in texts.values()]
    table["name"] = table["method"] + table["loss"].map(lambda loss: "+distillation" if loss == "distillation" else "")
    names: dict[str, str] = {}
    for name, group in table.groupby("name"):
        varies = [column for column in group if group[column].nunique() > 1]
        for key, row in group.iterrows():
            names[key] = ", ".join([name, *(f"{column} {row[column]}" for column in varies)])
    return names


def described(keys: list[str], store: Store, methods: Mapping[str, str] = MappingProxyType({})) -> pd.DataFrame:
    """Which models some checkpoints are, a row each: columns of `MODEL`, seed, both shares achieved, the key.

    Args:
        keys: of artifacts of `model`, `prune` and `recover`.
        store: where everything that they were made from has its manifests.
        methods: names of methods by the keys of artifacts of `prune`. One that has none is called after its recipe, see
            `methods.method_name`.
    """
    made = {key: lineage(key, store) for key in keys}
    trained = recovery_names({key: line[-1] for key, line in made.items() if line[-1]["stage"] == "recover"}, store)
    rows = [
        _model_columns(line, methods) | {"recovery": trained.get(key, "none"), "key": key} for key, line in made.items()
    ]
    return pd.DataFrame(rows, columns=[*MODEL, "seed", "ratio_achieved", "ratio_achieved_parent", "key"])


def _model_columns(made: list[dict[str, Any]], methods: Mapping[str, str]) -> dict[str, Any]:
    """The columns that say which model it is, of its `lineage`, without `recovery` and `parameters`."""
    download = made[0]["details"]
    stage = {"model": "dense", "prune": "pruned", "recover": "recovered"}[made[-1]["stage"]]
    columns = {"model": download["name"], "stage": stage}
    last = max((place for place, each in enumerate(made) if each["stage"] == "prune"), default=0)
    if not last:
        none = dict.fromkeys(("criterion", "allocation", "refit", "structure"), "none")
        shares = {"ratio": 0.0, "ratio_achieved": download.get("ratio_achieved", 0.0), "ratio_achieved_parent": 0.0}
        return columns | {"method": DENSE} | none | shares | {"seed": None, "parent": _called(made[1:-1], methods)}
    details, scores = made[last]["details"], made[last - 1]["parameters"]
    names = ("allocation", "refit", "structure", "ratio", "ratio_achieved", "ratio_achieved_parent")
    cut = {name: details[name] for name in names}
    trained_before = made[last + 1 : -1]
    parent = _called([*made[1 : last - 1], *trained_before], methods)
    about = {"method": _method_of(made[last], made[last - 1], methods), "criterion": scores["criterion"]}
    return columns | about | cut | {"seed": scores["seed"], "parent": parent}


def _method_of(cut: Mapping[str, Any], scores: Mapping[str, Any], methods: Mapping[str, str]) -> str:
    """What the method is called that made a cut, by its manifest of `prune` and that of its `score`."""
    recipe = cut["parameters"] | cut["details"] | {"criterion": scores["parameters"]["criterion"]}
    return methods.get(cut["key"]) or method_name(recipe)


def _called(made: list[dict[str, Any]], methods: Mapping[str, str]) -> str:
    """Steps of a lineage in few words; without their seeds, over which models made in one way are averaged."""
    words = []
    for scores, manifest in pairwise([{}, *made]):
        if manifest["stage"] == "prune":
            words.append(f"{_method_of(manifest, scores, methods)} {manifest['details']['ratio']:.4g}")
        elif manifest["stage"] == "recover":
            words.append(manifest["parameters"]["method"])
    return " then ".join(words) or "none"


def _costs(made: list[dict[str, Any]], store: Store) -> list[dict[str, Any]]:
    """What it cost to make a model, of its `lineage`: seconds, peak bytes, tokens and FLOPs of each step.

    Step `light_cut` is the scoring by which a criterion had neurons silenced before its own.
    """
    steps = []
    for manifest in made[1:]:
        if manifest["stage"] == "score" and (cut := manifest["inputs"].get("light_cut")):
            steps.append(("light_cut", store.manifest("score", cut)))
        steps.append((manifest["stage"], manifest))
    rows = []
    for stage, manifest in steps:
        details = {name.removeprefix("refit_"): value for name, value in manifest["details"].items()}
        # Criteria scored in one pass share its time; their artifacts' own seconds are those of writing a file. A
        # training that was killed and went on has the seconds of all attempts.
        seconds = details.get("seconds_together", manifest["seconds"])
        if "flops_together" in details:
            seconds *= details["flops"] / details["flops_together"]
        found = {"seconds": seconds, "peak_bytes": manifest["peak_memory_bytes"]}
        found |= {name: details[name] for name in ("tokens", "flops") if name in details}
        for metric, value in found.items():
            estimate = {"metric": metric, "value": value, "stderr": None, "n": 1}
            rows.append({"group": "cost", "task": stage, **estimate, "key": manifest["key"]})
    return rows


def read_metrics(path: Path) -> pd.DataFrame:
    """A metrics.csv.

    Raises:
        UserError: it is missing, or not one.
    """
    try:
        metrics = pd.read_csv(path, keep_default_na=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as metrics: {error}") from None
    if missing := [column for column in COLUMNS if column not in metrics]:
        raise UserError(f"{path}: not a metrics.csv: it lacks the columns {', '.join(missing)}.")
    return metrics


def headline(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of each task's headline metric, see `HEADLINE`; none of a task that has no such metric."""
    tasks = metrics[metrics["group"] == "task"]
    chosen = {
        task: next((name for name in HEADLINE if name in set(found)), None)
        for task, found in tasks.groupby("task")["metric"]
    }
    return tasks[tasks["metric"] == tasks["task"].map(chosen)]


def on_headline_text(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of perplexity and fidelity on one text, the first: the first that the config names."""
    found = metrics[metrics["group"].isin(HELDOUT)]
    return found[found["task"] == found["task"].iloc[0]]


def summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per model: size, accuracy of each task and their mean in per cent, perplexity, KL, top-1 agreement.

    The last three are of the headline text. Beside each `value` stand the ends of its interval, `value low` and
    `value high`; `seeds` is the number of calibration seeds.
    """
    others = {"perplexity": "Perplexity", "kl": "KL (nats/token)", "top1_agreement": "Top-1 agreement"}
    heldout = on_headline_text(metrics)
    measures = estimates(heldout[heldout["metric"].isin(others)])
    measures["task"] = measures["metric"].map(others)
    accuracy = _accuracy(metrics)
    both = pd.concat([accuracy, measures]) if len(accuracy) else measures
    table = with_sizes(measures.drop_duplicates(MODEL)[[*MODEL, "seeds"]], metrics)
    table = table.rename(columns={"ratio_achieved": REMOVED, "parameters": PARAMETERS}).set_index(MODEL)
    for column in [*dict.fromkeys(accuracy["task"]), *others.values()]:
        found = both[both["task"] == column].set_index(MODEL)
        for name, end in zip(_with_ends(column), ("value", "low", "high"), strict=True):
            table[name] = found[end]
    return table.reset_index()


def _with_ends(column: str) -> list[str]:
    return [column, f"{column} low", f"{column} high"]


def _accuracy(metrics: pd.DataFrame) -> pd.DataFrame:
    """The accuracy of each task and their mean, in per cent; nothing where no task was evaluated."""
    rows = headline(metrics)
    accuracy = estimates(rows)
    if len(rows):
        accuracy["task"] = accuracy["task"].map(lambda name: TASK_TITLES.get(name, name))
        accuracy = pd.concat([accuracy, mean_accuracy(rows).assign(task="Mean")])
        accuracy[["value", "low", "high"]] *= 100
    return accuracy


def cost(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per model: what making it took, beside what it is worth.

    Seconds of scoring (of the scores that its criterion needs first, too), of cutting with its refit, and of training;
    the FLOPs counted for the passes of all three (see docs/recovery.md), and the most memory that one of them took.
    """
    rows = metrics[metrics["group"] == "cost"]
    by = [*MODEL, "seed"]
    kept = [REMOVED, PARAMETERS, "seeds", *_with_ends("KL (nats/token)")]
    table = summary(metrics).set_index(MODEL)[kept]
    stages = {"Scoring (s)": ["light_cut", "score"], "Cutting (s)": ["prune"], "Training (s)": ["recover"]}
    found = {
        title: rows[rows["task"].isin(names) & (rows["metric"] == "seconds")].groupby(by, dropna=False)["value"].sum()
        for title, names in stages.items()
    }
    found["TFLOP"] = operations(metrics) / 1e12
    found["Peak memory (GiB)"] = rows[rows["metric"] == "peak_bytes"].groupby(by, dropna=False)["value"].max() / 2**30
    for name, values in found.items():
        table[name] = values.groupby(MODEL, dropna=False).mean()
    return table.reset_index()


def operations(metrics: pd.DataFrame) -> pd.Series:
    """FLOPs that making each model took, by its setting and seed: of all stages together."""
    flops = metrics[(metrics["group"] == "cost") & (metrics["metric"] == "flops")]
    return flops.groupby([*MODEL, "seed"], dropna=False)["value"].sum()


def write_tables(metrics: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `summary` and `cost`, each as csv (full precision), md and tex, into `folder`; their paths."""
    sheets = {
        "summary": _sheet("Every model.", summary(metrics)),
        "cost": _sheet("What each model took to make.", cost(metrics), OWN_COST),
    }
    return [path for name, sheet in sheets.items() for path in sheet.write(folder, name)]


def _sheet(caption: str, table: pd.DataFrame, *notes: str) -> Sheet:
    ways = varying(table)
    ends = {name for column in table for name in _with_ends(column)[1:]}
    columns = [name for name in table if name not in (*MODEL, "seeds", *ends)]
    rows = []
    for _, model in table.iterrows():
        cells = {}
        for name in columns:
            scale = SCALES.get(name, 1)
            cells[name] = Cell(*(scale * model.get(each, math.nan) for each in _with_ends(name)))
        rows.append(Row([model["stage"], model["method"], *model[ways]], cells))
    digits = {name: DIGITS.get(name, 1) for name in columns}
    return Sheet(caption, ["Model", "Method", *map(str.capitalize, ways)], digits, rows, [note(table), *notes])

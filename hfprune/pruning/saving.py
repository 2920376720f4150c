"""Budgets of memory and of latency: what a model takes by its widths, as a share of what the dense model takes.

Widths say how many units each layer keeps. *Memory* is that of the weights and of the keys and values of a context; it
is counted. *Latency* is the time to decode a token; it is read from a table of measured times, see `hfprune latency`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfprune.errors import UserError
from hfprune.models.families import head_size, setting
from hfprune.models.units import STRUCTURES, WITH_EXPERTS

if TYPE_CHECKING:
    from hfprune.pruning.budget import Shape

SAVINGS = {"memory": "context", "latency": "latencies"}  # what a ratio can be of, and the setting that it needs
UNITS_OF = {  # by what a ratio is of, the structures that save it by the number of their units
    "memory": ("mlp", "attention", "mlp+attention", "experts", WITH_EXPERTS),
    "latency": ("mlp", "attention", "mlp+attention"),  # a token is sent to as many experts as before
}
COLUMNS = ("part", "units", "seconds", "parameters", "device", "threads")  # of a table of latencies, those read here
Widths = Mapping[str, Sequence[int]]  # by part that is cut: the units of each layer, counted as in `Shape.units`


@dataclass(frozen=True)
class Memory:
    """The numbers that a model holds: its parameters, and the keys and values of a context.

    Weights and cache are of one type, so that numbers count and their bytes do not.

    Attributes:
        shape: of the dense model.
        context: tokens.
        held: of each layer, the numbers that a key-value group holds of the context.
    """

    shape: Shape
    context: int
    held: Sequence[int]

    def share(self, widths: Widths) -> float:
        """What a model of these widths takes, as a share of what the dense model takes."""
        return self._numbers(widths) / self._numbers({})

    def _numbers(self, widths: Widths) -> int:
        gone = sum(
            self._unit(part, number, widths) * (before - kept)
            for part, layers in widths.items()
            for number, (before, kept) in enumerate(zip(self.shape.units[part], layers, strict=True))
        )
        groups = widths.get("attention", self.shape.units["attention"])
        return self.shape.total - gone + sum(count * held for count, held in zip(groups, self.held, strict=True))

    def _unit(self, part: str, number: int, widths: Widths) -> int:
        """Parameters of a unit in layer `number`; of neurons only those inside the experts that stay."""
        size = self.shape.parameters[part]
        if part != "mlp" or "experts" not in widths or not self.shape.units["experts"][number]:
            return size
        return size * widths["experts"][number] // self.shape.units["experts"][number]

    @property
    def record(self) -> dict[str, Any]:
        """What the share rests on."""
        return {"of": "memory", "context": self.context}


@dataclass(frozen=True)
class Latencies:
    """Measured times of models of one width.

    Attributes:
        seconds: by part, by the number of units that every layer has of it: seconds to decode a token.
        parameters: of the dense model.
        device: that computed, and the number of threads.
    """

    seconds: Mapping[str, Mapping[int, float]]
    parameters: int
    device: str


@dataclass(frozen=True)
class Latency:
    """The time to decode a token: what each layer saves is the mean of what all of its width save together.

    Attributes:
        shape: of the dense model.
        table: measured times, of which those between are interpolated.
    """

    shape: Shape
    table: Latencies

    def share(self, widths: Widths) -> float:
        """What a model of these widths takes, as a share of what the dense model takes."""
        import numpy as np

        saved = 0.0
        for part, layers in widths.items():
            units, seconds = zip(*sorted(self.table.seconds[part].items()), strict=True)
            kept = [width for width, whole in zip(layers, self.shape.units[part], strict=True) if whole]
            saved += 1 - float(np.mean(np.interp(kept, units, seconds))) / seconds[-1]
        return 1 - saved

    @property
    def record(self) -> dict[str, Any]:
        """What the share rests on."""
        return {"of": "latency", "device": self.table.device, "seconds": self.table.seconds}


def fault(ratio_of: str, structure: str, settings: Mapping[str, Any]) -> str | None:
    """What does not go with a ratio of memory or latency, or only with one, for a message; None if all does.

    Args:
        ratio_of: what the ratio counts.
        structure: what is cut.
        settings: `context` and `latencies`; and of `pad`, `attention_share` and `experts_share` those that there are.
    """
    examples = {"context": "the tokens whose keys and values count, such as 4096", "latencies": "see `hfprune latency`"}
    for of, needed in SAVINGS.items():
        if ratio_of == of and settings[needed] is None:
            return f"'ratio_of: {of}' needs {needed!r}: {examples[needed]}"
        if ratio_of != of and settings[needed] is not None:
            return f"{needed!r} goes with 'ratio_of: {of}' alone, not {ratio_of}"
    if ratio_of not in SAVINGS:
        return None
    if structure not in (usable := UNITS_OF[ratio_of]):
        return f"'ratio_of: {ratio_of}' goes with structure {', '.join(usable)}, not {structure}"
    unread = [name for name in ("pad", "attention_share", "experts_share") if settings.get(name) not in (None, False)]
    return f"{unread[0]!r} does not go with 'ratio_of: {ratio_of}'" if unread else None


def saving_of(
    shape: Shape, ratio_of: str, structure: str, config: Any, context: int | None, latencies: str | Path | None
) -> Memory | Latency | None:
    """What a ratio is a share of; None where that is a number of parameters or of neurons.

    Args:
        shape: of the dense model.
        ratio_of: what the ratio counts.
        structure: what is cut.
        config: of the dense model, one of transformers; read for memory alone.
        context: for memory: tokens.
        latencies: for latency: the table of `hfprune latency`.

    Raises:
        UserError: this cannot be said of the model.
    """
    if ratio_of == "memory":
        if "cache" in shape.refusals:
            raise UserError(f"ratio_of 'memory': {shape.refusals['cache']}")
        return Memory(shape, context, _held(config, len(shape.layers), context))
    if ratio_of == "latency":
        table = read_latencies(Path(latencies))
        _refuse_other_model(shape, table, structure, latencies)
        return Latency(shape, table)
    return None


def _held(config: Any, layers: int, context: int) -> list[int]:
    """See `Memory`: a key and a value for each token, in a layer with a window at most for those in it."""
    window = setting(config, "sliding_window")
    kinds = setting(config, "layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    return [
        2 * head_size(config) * (min(context, window) if window and kind == "sliding_attention" else context)
        for kind in kinds
    ]


def read_latencies(path: Path) -> Latencies:
    """The table that `hfprune latency` wrote to `path`.

    Raises:
        UserError: there is none.
    """
    remedy = "Write one with `hfprune latency --model store/model/KEY --output latency.csv`"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read as a table of latencies: {reason}. {remedy}.") from None
    seconds: dict[str, dict[int, float]] = {}
    try:
        for row in rows:
            seconds.setdefault(row["part"], {})[int(row["units"])] = float(row["seconds"])
        parameters, device = int(rows[0]["parameters"]), f"{rows[0]['device']}, {int(rows[0]['threads'])} threads"
    except (KeyError, IndexError, ValueError, TypeError):
        raise UserError(
            f"{path}: not a table of latencies; expected rows with {', '.join(COLUMNS)}. {remedy}."
        ) from None
    if faults := [f"{part} {units}" for part, times in seconds.items() for units in times if not times[units] > 0]:
        raise UserError(f"{path}: {faults[0]} units: expected seconds above 0. {remedy}.")
    return Latencies(seconds, parameters, device)


def _refuse_other_model(shape: Shape, table: Latencies, structure: str, path: str | Path) -> None:
    """Refuse a table that is of another model, or lacks what is cut."""
    remedy = "Measure this model: `hfprune latency`."
    if table.parameters != shape.total:
        raise UserError(
            f"latencies {path}: of a model of {table.parameters:,} parameters; this one has {shape.total:,}. {remedy}"
        )
    for part in STRUCTURES[structure]:
        if part not in table.seconds or {*filter(None, shape.units[part])} != {max(table.seconds[part])}:
            raise UserError(f"latencies {path}: no times of {part} at the widths of this model. {remedy}")


def largest_within(limit: float, low: int, high: int, share: Callable[[int], float]) -> int:
    """The largest number in [low, high] whose share is at most `limit`, by halving.

    Args:
        limit: a share.
        low: whose share is at most `limit`.
        high: at least `low`.
        share: of a number. It should not fall as the number grows. Where it does, the result is within the limit, and
            the next larger number is not.
    """
    if share(high) <= limit:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle) <= limit else (low, middle)
    return low

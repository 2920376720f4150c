"""How long a token takes to decode with narrower layers: the table that a ratio of latency is met with."""

import statistics
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hfprune.errors import UserError
from hfprune.evaluation.timing import PROMPT, decode, on_gpu
from hfprune.models.context import check_checkpoint
from hfprune.models.loading import load_model
from hfprune.models.units import PARTS
from hfprune.pruning.budget import DEFAULT_STEPS, EXPERT_STEPS, Shape, default_step, shape_of, units_shapes
from hfprune.pruning.surgery import cut
from hfprune.runtime.progress import bar

POINTS = 12  # widths of a part that are measured at most; `saving.Latency` interpolates between them


def time_widths(
    folder: Path, dtype: str, round_to: int | None, rounds: int, new_tokens: int
) -> tuple[Shape, list[dict[str, object]]]:
    """Time a model whose layers all have one width, for several widths of its MLPs, then of its attentions.

    Every width is that of a whole model, so that its weights come from where they come from in use, and what does not
    shrink counts. Widths take turns: in every round each is measured once.

    Args:
        folder: of the dense checkpoint.
        dtype: type to compute in, as for `load_model`.
        round_to: MLP widths are multiples of it; None for `budget.default_step`.
        rounds: rounds to measure, after one that is not measured.
        new_tokens: tokens to decode after a prompt of `PROMPT`, one sequence at a time.

    Returns:
        The model's shape; and rows `part`, `units` (of every layer), `seconds` (of a token, the median over the
        rounds), `n`. The widest of each part is the dense model.

    Raises:
        UserError: the model's layers have several widths, or the GPUs do not hold it.
    """
    check_checkpoint(folder, {f"tokens, after a prompt of {PROMPT},": PROMPT + new_tokens})
    model = on_gpu(load_model(folder, dtype), folder.name)
    shape = shape_of(model)
    widths = widths_to_time(shape, round_to)
    seconds: dict[tuple[str, int], list[float]] = {}
    with bar("time widths", (rounds + 1) * sum(map(len, widths.values())), "turn") as shown:
        for number in range(rounds + 1):
            for part, counts in widths.items():
                if number or part != next(iter(widths)):
                    model = on_gpu(load_model(folder, dtype), folder.name)
                for count in counts:
                    if count < counts[0]:
                        _narrow(model, shape, part, count)
                    value = _seconds_of_token(model, new_tokens)
                    if number:
                        seconds.setdefault((part, count), []).append(value)
                    shown.update()
                del model
    dense = [value for part, counts in widths.items() for value in seconds[part, counts[0]]]
    medians = {
        (part, count): statistics.median(dense if count == widths[part][0] else values)
        for (part, count), values in seconds.items()
    }
    return shape, [
        {"part": part, "units": count, "seconds": value, "n": rounds} for (part, count), value in medians.items()
    ]


def widths_to_time(shape: Shape, round_to: int | None) -> dict[str, list[int]]:
    """By part that can be cut, the widths to measure: at most `POINTS` of the multiples of the step, the widest first.

    Raises:
        UserError: a part has several widths, or none can be cut.
    """
    step = round_to or default_step(shape.hidden, EXPERT_STEPS if shape.mixture else DEFAULT_STEPS)
    steps = {"mlp": step, "attention": 1}
    widths = {}
    for part in [name for name in PARTS if name not in shape.refusals]:
        units = {*filter(None, shape.units[part])}
        if len(units) > 1:
            raise UserError(
                f"the layers keep several widths of {part}, {min(units)} to {max(units)}: a table of latencies is of a "
                "model whose layers have one. Measure the dense model."
            )
        (whole,) = units
        multiples = whole // steps[part]
        points = min(POINTS, multiples)
        counts = {whole, *(steps[part] * round(point * multiples / points) for point in range(1, points + 1))}
        if len(counts) > 1:
            widths[part] = sorted(counts, reverse=True)
    if not widths:
        raise UserError("the model has no part of which a table of latencies can be measured: none can be narrower.")
    return widths


def _narrow(model: PreTrainedModel, shape: Shape, part: str, count: int) -> None:
    """Keep the first `count` units of a part in every layer, in place. Which they are makes no difference to time."""
    kept = [torch.arange(count).expand(*units[:-1], count) for units in units_shapes(shape, part)]
    cut(model, {part: kept})


def _seconds_of_token(model: PreTrainedModel, new_tokens: int) -> float:
    """Seconds to decode a token, after a step that is not timed: the first of a width sets things up."""
    prompt = torch.arange(PROMPT, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        decode(model, prompt, 1)
        return decode(model, prompt, new_tokens) / new_tokens

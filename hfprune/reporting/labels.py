"""Names of models in figures, and their places beside lines."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def name_of(model: Mapping[str, Any], differing: list[str]) -> str:
    """A model's method and, if the models differ in them, its earlier cuts and its training.

    Args:
        model: with the columns of `MODEL`.
        differing: the columns of `varying`.
    """
    before = [f"after {model['parent']}"] if "parent" in differing and model["parent"] != "none" else []
    trained = [model["recovery"]] if "recovery" in differing and model["recovery"] != "none" else []
    return ", ".join([model["method"], *before, *trained])


def spread(values: Sequence[float], gap: float, lowest: float = -math.inf) -> list[float]:
    """Places for texts beside `values`, in their order: at least `gap` apart, and none below `lowest`."""

    def middle_of(members: list[int]) -> float:
        middle = sum(values[member] for member in members) / len(members)
        return max(middle, lowest + gap * (len(members) - 1) / 2)

    order = sorted(range(len(values)), key=lambda index: values[index])
    groups: list[tuple[list[int], float]] = []  # indices of texts that touch, and the place of their middle
    for index in order:
        groups.append(([index], middle_of([index])))
        while len(groups) > 1:
            (before, below), (after, above) = groups[-2:]
            if above - below >= gap * (len(before) + len(after)) / 2:
                break
            groups[-2:] = [(before + after, middle_of(before + after))]
    places = list(values)
    for members, middle in groups:
        for number, index in enumerate(members):
            places[index] = middle + gap * (number - (len(members) - 1) / 2)
    return places

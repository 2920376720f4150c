"""All stages that the modules of this package declare."""

import importlib
import pkgutil

from hfprune import stages
from hfprune.stages.declaration import Stage


def _declared() -> dict[str, Stage]:
    """Every stage by name, ordered so that the stages of its inputs come first."""
    modules = [
        importlib.import_module(f"hfprune.stages.{module.name}") for module in pkgutil.iter_modules(stages.__path__)
    ]
    by_name = {
        value.name: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, Stage) and value.module == module.__name__
    }
    ordered: dict[str, Stage] = {}
    visited: set[str] = set()  # stops the recursion: scores may be the input of other scores

    def add(name: str) -> None:
        if name not in visited:
            visited.add(name)
            for source in by_name[name].inputs.values():
                add(source.stages[0])
            ordered[name] = by_name[name]

    for name in by_name:
        add(name)
    return ordered


STAGES = _declared()

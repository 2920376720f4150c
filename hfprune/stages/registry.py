"""All stages: whatever the modules beside this one declare."""

import importlib
import pkgutil

from hfprune import stages
from hfprune.stages.declaration import Stage


def _declared() -> dict[str, Stage]:
    """Every stage by name, each after those that usually fill its inputs."""
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
    on_the_way: set[str] = set()  # scores may be read to make other scores

    def add(name: str) -> None:
        if name not in on_the_way:
            on_the_way.add(name)
            for source in by_name[name].inputs.values():
                add(source.stages[0])
            ordered[name] = by_name[name]

    for name in by_name:
        add(name)
    return ordered


STAGES = _declared()

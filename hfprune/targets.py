"""Which models of an experiment each of the paper's tables compares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hfprune.errors import UserError
from hfprune.plan import Model

METHODS = "methods and sizes"
CRITERIA = "criteria, with nothing else done: structure mlp, allocation uniform, no refit, no recovery"
STRUCTURES = "structures, the rest alike: `structures: [mlp, mlp+attention]` in a grid of `pruning`, without recovery"


@dataclass(frozen=True)
class Target:
    """What a table compares.

    Attributes:
        compares: in words.
        tasks: whether it shows accuracy.
        choose: of all models, those that it compares, beside the dense one; none where there is nothing to compare.
    """

    compares: str
    tasks: bool
    choose: Callable[[Sequence[Model]], list[Model]]


def chosen(table: str, models: Sequence[Model], tasks: bool) -> list[Model]:
    """The models that a table of the paper needs, the dense one among them.

    Args:
        table: a name in `TABLES`.
        models: all of the experiment.
        tasks: whether they are evaluated on tasks.

    Raises:
        UserError: the experiment does not have them; it says what to write into the config.
    """
    target = TABLES[table]
    if target.tasks and not tasks:
        raise UserError(f"{table} shows accuracy: name tasks in `evaluation.tasks`.")
    found = target.choose(models)
    if not found:
        raise UserError(f"{table} compares {target.compares}. The experiment has fewer than two to compare.")
    return [model for model in models if model in found or (model.cut is None and model.recovery == "none")]


def _all(models: Sequence[Model]) -> list[Model]:
    return list(models)


def _criteria(models: Sequence[Model]) -> list[Model]:
    found = [model for model in models if model.cut and model.recovery == "none" and model.cut.plain]
    return found if len({model.criterion for model in found}) > 1 else []


def _structures(models: Sequence[Model]) -> list[Model]:
    structures: dict[tuple, set[str]] = {}
    untrained = [model for model in models if model.cut and model.recovery == "none"]
    for model in untrained:
        structures.setdefault(_but_structure(model), set()).add(model.cut.structure)
    return [model for model in untrained if len(structures[_but_structure(model)]) > 1]


def _but_structure(model: Model) -> tuple:
    way = model.cut.model_dump(exclude={"structure", "attention_share"})
    return model.criterion, *way.values()


# Tables of what stands in files: of several experiments' metrics, of timings, of the cost of scoring.
OF_FILES = ("table3", "table4", "table5")

TABLES = {
    "table1": Target(METHODS, True, _all),
    "table2": Target(METHODS, True, _all),
    "table6": Target(CRITERIA, True, _criteria),
    "table7": Target(CRITERIA, False, _criteria),
    "table8": Target(STRUCTURES, True, _structures),
}

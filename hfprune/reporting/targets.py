"""Which models of an experiment each of the paper's tables compares."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from hfprune.errors import UserError


@dataclass(frozen=True)
class Setting:
    """How a model was made, as results name it; all "none" for the dense model."""

    criterion: str
    structure: str
    allocation: str
    refit: str
    recovery: str
    budget: Hashable

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model, not trained either."""
        return self.criterion == self.recovery == "none"


@dataclass(frozen=True)
class Target:
    """What a table compares.

    Attributes:
        compares: in words.
        tasks: whether it shows accuracy.
        choose: of the cut models, those that it compares; none where there is nothing to compare.
    """

    compares: str
    tasks: bool
    choose: Callable[[Sequence[Setting]], list[Setting]]


def compared(table: str, settings: Sequence[Setting], tasks: bool) -> list[bool]:
    """Which of an experiment's models a table of the paper shows: those that it compares, and the dense one.

    Args:
        table: a name in `TABLES`.
        settings: of the models.
        tasks: whether they are evaluated on tasks.

    Raises:
        UserError: there is nothing to compare; it says what to write into the config.
    """
    target = TABLES[table]
    if target.tasks and not tasks:
        raise UserError(f"{table} shows accuracy: name tasks in `evaluation.tasks`.")
    chosen = set(target.choose([setting for setting in settings if not setting.is_dense]))
    if not chosen:
        raise UserError(f"{table} compares {target.compares}. The experiment has fewer than two to compare.")
    return [setting in chosen or setting.is_dense for setting in settings]


def _criteria(settings: Sequence[Setting]) -> list[Setting]:
    usual = ("mlp", "uniform", "none", "none")
    found = [each for each in settings if (each.structure, each.allocation, each.refit, each.recovery) == usual]
    return found if len({each.criterion for each in found}) > 1 else []


def _structures(settings: Sequence[Setting]) -> list[Setting]:
    untrained = [each for each in settings if each.recovery == "none"]
    structures: dict[Setting, set[str]] = {}
    for each in untrained:
        structures.setdefault(replace(each, structure=""), set()).add(each.structure)
    return [each for each in untrained if len(structures[replace(each, structure="")]) > 1]


# Tables of what stands in files: of several experiments' metrics, of timings, of the cost of scoring.
OF_FILES = ("table3", "table4", "table5")

CRITERIA = "criteria, with nothing else done: structure mlp, allocation uniform, no refit, no recovery"
STRUCTURES = (
    "structures, the rest alike: in `methods` also one with `structure: mlp+attention`, such as "
    "`- HFPrune + attention: {like: HFPrune, structure: mlp+attention}`, without recovery"
)
TABLES = {
    "table1": Target("methods and sizes", True, list),
    "table2": Target("methods and sizes", True, list),
    "table6": Target(CRITERIA, True, _criteria),
    "table7": Target(CRITERIA, False, _criteria),
    "table8": Target(STRUCTURES, True, _structures),
}

"""The paper's tables, each declared once: which models it compares, and what it shows of them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from hfprune.errors import UserError


@dataclass(frozen=True)
class Setting:
    """How a model was made, in the words of the results; all "none" for the dense model."""

    criterion: str
    structure: str
    allocation: str
    refit: str
    recovery: str
    budget: Hashable

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model, untrained."""
        return self.criterion == self.recovery == "none"


@dataclass(frozen=True)
class Column:
    """A column of values: which estimate it shows, and how.

    Attributes:
        title: with its unit.
        metric: the name of a task, `mean`, `mean_without_crows`, or a measure on held-out text.
        digits: after the decimal point.
        scale: factor from the estimate to the title's unit.
    """

    title: str
    metric: str
    digits: int = 1
    scale: float = 1


@dataclass(frozen=True)
class Table:
    """A table of an experiment's models.

    Attributes:
        caption: the first sentence of its caption.
        compares: what it compares, for messages.
        columns: its values.
        differ_in: the setting in which the models that it compares differ, see `_differing`; by default it shows all.
        has_accuracy: whether it needs tasks.
        has_task_columns: whether a column for each task comes first.
        has_text_rows: whether there is a row for each held-out text, not only for the first.
    """

    caption: str
    compares: str
    columns: Sequence[Column]
    differ_in: str = ""
    has_accuracy: bool = True
    has_task_columns: bool = False
    has_text_rows: bool = False


def compared(table: str, settings: Sequence[Setting], has_tasks: bool) -> list[bool]:
    """Which of an experiment's models a table shows: those that it compares, and the dense one.

    Args:
        table: a name in `TABLES`.
        settings: of the models.
        has_tasks: whether they are evaluated on tasks.

    Raises:
        UserError: there is nothing to compare; it says what to write into the config.
    """
    declared = TABLES[table]
    if declared.has_accuracy and not has_tasks:
        raise UserError(f"{table} shows accuracy: name tasks in `evaluation.tasks`.")
    cut = [setting for setting in settings if not setting.is_dense]
    chosen = set(_differing(cut, declared.differ_in) if declared.differ_in else cut)
    if not chosen:
        raise UserError(f"{table} compares {declared.compares}. The experiment has fewer than two to compare.")
    return [setting in chosen or setting.is_dense for setting in settings]


def _differing(settings: Sequence[Setting], name: str) -> list[Setting]:
    """The untrained models beside which another one differs in the setting `name`, and in nothing else."""
    untrained = [setting for setting in settings if setting.recovery == "none"]
    values: dict[Setting, set[str]] = {}
    for setting in untrained:
        values.setdefault(replace(setting, **{name: ""}), set()).add(getattr(setting, name))
    return [setting for setting in untrained if len(values[replace(setting, **{name: ""})]) > 1]


METHODS = "methods and sizes"
CRITERIA = "criteria, the rest alike: in `methods` two such as `- HFPrune` and `- LLM-Pruner`, without recovery"
STRUCTURES = (
    "structures, the rest alike: in `methods` also one with `structure: mlp+attention`, such as "
    "`- HFPrune + attention: {like: HFPrune, structure: mlp+attention}`, without recovery"
)
MEAN = Column("Mean (%)", "mean", scale=100)
MEANS = (MEAN, Column("Mean w/o CrowS (%)", "mean_without_crows", scale=100))
PERPLEXITY = Column("Perplexity", "perplexity")
KL = Column("KL (nats/token)", "kl", 3)
FIDELITY = (
    Column("JS distance", "js", 3),
    Column("Top-15 Jaccard", "top15_jaccard", 3),
    KL,
    Column("Top-1 agreement", "top1_agreement", 3),
)
TABLES = {
    "table1": Table("Zero-shot accuracy (%).", METHODS, MEANS, has_task_columns=True),
    "table2": Table("Perplexity of held-out text, and mean zero-shot accuracy.", METHODS, (PERPLEXITY, *MEANS)),
    "table6": Table("Mean zero-shot accuracy by criterion, without recovery.", CRITERIA, MEANS, "criterion"),
    "table7": Table(
        "Fidelity to the dense model by criterion, on held-out text.",
        CRITERIA, FIDELITY, "criterion", has_accuracy=False, has_text_rows=True,
    ),
    "table8": Table("The MLPs alone, and attention with them.", STRUCTURES, (*MEANS, KL, PERPLEXITY), "structure"),
}  # fmt: skip
# The others are made from csv files, not from an experiment's artifacts: which files.
FILE_TABLES = {
    "table3": "the metrics.csv of several experiments",
    "table4": "the csv of `hfprune efficiency`",
    "table5": "the csv of `hfprune scoring-cost`",
}

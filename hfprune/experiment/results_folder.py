"""An experiment's folder of results, and the config file that it belongs to."""

from collections.abc import Sequence
from pathlib import Path

from hfprune.errors import UserError
from hfprune.experiment.schema import Experiment, load
from hfprune.store.results import publish

OWNERS = ".config"  # file in an experiment's folder of results: its config files, one per line


class ResultsFolder:
    """An experiment's folder of results.

    A config file may change: its results follow. But another config file with the same `experiment` would overwrite
    them.

    Args:
        results: folder of the results of all experiments.
        files: the experiment's config files.
        experiment: the experiment that they describe.
    """

    def __init__(self, results: Path, files: Sequence[Path], experiment: Experiment) -> None:
        self.folder, self.files, self.experiment = results / experiment.experiment, list(files), experiment

    def check(self) -> None:
        """Refuse a second config file if the first still exists and describes another experiment of the same name.

        Raises:
            UserError: the folder belongs to another config file.
        """
        if self._is_among_results or not (self.folder / OWNERS).is_file():
            return
        others = [Path(line) for line in (self.folder / OWNERS).read_text(encoding="utf-8").splitlines()]
        if _resolved(others) == _resolved(self.files) or not all(file.is_file() for file in others):
            return
        if len(others) == 1:
            try:
                other = load(others[0])
            except UserError:
                return  # the other file is no valid config
            if other == self.experiment or other.experiment != self.experiment.experiment:
                return
        raise UserError(
            f"{_named(self.files)}: experiment = {self.experiment.experiment!r}: {self.folder} has the results of "
            f"another config file, {_named(others)}, which has the same `experiment` and would be overwritten. Give "
            f"this one another name, or remove {self.folder}."
        )

    def record(self) -> None:
        """Record that the folder belongs to this experiment's config files."""
        if not self._is_among_results:
            with publish() as aside:
                aside.path(self.folder / OWNERS).write_text(
                    "".join(f"{file}\n" for file in self.files), encoding="utf-8"
                )

    @property
    def _is_among_results(self) -> bool:
        """Whether the config is itself a result: the config with every default, from which the report is made."""
        return all(file.resolve().is_relative_to(self.folder.resolve()) for file in self.files)


def _resolved(files: Sequence[Path]) -> list[Path]:
    return [file.resolve() for file in files]


def _named(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))

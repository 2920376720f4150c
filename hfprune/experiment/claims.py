"""Whose results a folder holds: of which config file."""

from collections.abc import Sequence
from pathlib import Path

from hfprune.errors import UserError
from hfprune.experiment.schema import Experiment, load
from hfprune.store.results import publish

CLAIM = ".config"  # in an experiment's folder of results: its config files, one a line


class Claim:
    """That of an experiment to its folder of results.

    A config file may change as it likes: its own results follow. Another file with the same `experiment` would
    overwrite them.

    Args:
        results: the folder of all experiments' results.
        files: the config files that state the experiment.
        experiment: what they state.
    """

    def __init__(self, results: Path, files: Sequence[Path], experiment: Experiment) -> None:
        self.folder, self.files, self.experiment = results / experiment.experiment, list(files), experiment

    def refuse(self) -> None:
        """Refuse a second file, while the first is there and states another experiment of that name.

        Raises:
            UserError: it is so.
        """
        if self._is_among_results or not (self.folder / CLAIM).is_file():
            return
        others = [Path(line) for line in (self.folder / CLAIM).read_text(encoding="utf-8").splitlines()]
        if _places(others) == _places(self.files) or not all(file.is_file() for file in others):
            return
        if len(others) == 1:
            try:
                other = load(others[0])
            except UserError:
                return  # it states nothing
            if other == self.experiment or other.experiment != self.experiment.experiment:
                return
        raise UserError(
            f"{_named(self.files)}: experiment = {self.experiment.experiment!r}: {self.folder} has the results of "
            f"another config file, {_named(others)}, which has the same `experiment` and would be overwritten. Give "
            f"this one another name, or remove {self.folder}."
        )

    def record(self) -> None:
        """Write down that the folder is this experiment's."""
        if not self._is_among_results:
            with publish() as aside:
                aside.path(self.folder / CLAIM).write_text(
                    "".join(f"{file}\n" for file in self.files), encoding="utf-8"
                )

    @property
    def _is_among_results(self) -> bool:
        """Whether the file is a result itself: the config with every default, which the report is made with."""
        return all(file.resolve().is_relative_to(self.folder.resolve()) for file in self.files)


def _places(files: Sequence[Path]) -> list[Path]:
    return [file.resolve() for file in files]


def _named(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))

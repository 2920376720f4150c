"""Commands for the report: overlap of texts, pages, and the origin of results."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hfprune.cli.commands import POSITIONAL, Command, NamedPath, Option, StoreCommand
from hfprune.cli.results import results
from hfprune.errors import UserError
from hfprune.experiment.schema import as_yaml, load
from hfprune.stages.run import open_artifact
from hfprune.store.artifacts import Store
from hfprune.store.filenames import MANIFEST
from hfprune.store.results import publish, withdraw

NamedTexts = Annotated[list[NamedPath], Option(metavar="NAME=PATH")]
USES = ("calibration", "recovery", "fidelity", "task")  # of documents
HELP = "name for the table, and the artifact's folder or manifest"


class Overlap(Command):
    """Check for contamination: find test documents that share 13 words in a row with calibration or training text."""

    words = ("overlap",)
    examples = (
        "hfprune overlap --calibration xsum=store/text/KEY --fidelity quac=store/text/KEY \\\n"
        "    --task boolq=store/task/KEY --output overlap.csv",
    )
    calibration: NamedTexts = Field([], description=HELP)
    recovery: NamedTexts = Field([], description=HELP)
    fidelity: NamedTexts = Field([], description=HELP)
    task: NamedTexts = Field([], description=HELP)
    strict: bool = Field(False, description="fail if any document overlaps")
    output: Path = Field(description="csv file to write")

    def run(self) -> None:
        """Write the table. With `strict`, refuse an overlap."""
        from hfprune.data.contamination import Corpus, compare, refusal, write

        opened = {
            use: [(name, open_artifact(path, "task" if use == "task" else "text")) for name, path in getattr(self, use)]
            for use in USES
        }
        by_use = {
            use: [Corpus(use, name, artifact.folder) for name, artifact in named] for use, named in opened.items()
        }
        pairs = compare(by_use["calibration"] + by_use["recovery"], by_use["fidelity"] + by_use["task"])
        # The table at `--output` is the verdict: where a strict experiment has an overlap, there is none.
        refused = self.output.with_name(f"{self.output.stem}.refused.csv")
        message = refusal(pairs) if self.strict else ""
        place, other = (refused, self.output) if message else (self.output, refused)
        withdraw(other)
        with results([artifact for named in opened.values() for _, artifact in named]) as aside:
            write(pairs, aside.path(place))
        if message:
            raise UserError(f"{message} {place} is the whole table.")


class Page(Command):
    """Make one HTML page of the report: a table or a figure, with title and caption."""

    words = ("page",)
    examples = (
        "hfprune page --title 'Every model' --caption 'In per cent.' --output summary.html summary.csv summary.md",
    )
    title: str = Field(description="title of the page")
    caption: str = Field(description="text below the title")
    output: Path = Field(description="HTML file to write")
    files: Annotated[list[Path], POSITIONAL] = Field(
        description="a figure's svg; a table's csv, with its md if there is one; or a yaml"
    )

    def run(self) -> None:
        """Write the page."""
        from hfprune.reporting.pages import page

        try:
            content = page(self.title, self.caption, self.files)
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}.") from None
        with publish() as aside:
            aside.path(self.output).write_text(content, encoding="utf-8")


class Index(Command):
    """Make the overview page of an experiment: one HTML file for readers who were not there."""

    words = ("index",)
    examples = (
        "hfprune index config.yaml store/*/*/manifest.json \\\n"
        "    --results results/default --output results/default/index.html",
    )
    results: Path = Field(description="the experiment's folder, with metrics.csv and tables/")
    config: Annotated[Path, POSITIONAL] = Field(description="the experiment's config file")
    output: Path = Field(description="HTML file to write")
    manifests: Annotated[list[Path], POSITIONAL] = Field(description="manifests or folders of the artifacts behind it")

    def run(self) -> None:
        """Write the page from the tables; the losses of trainings are shown if they are there."""
        from hfprune.reporting.overview import overview

        with results(self.sources) as aside:
            aside.path(self.output).write_text(overview(self.read()), encoding="utf-8")

    @property
    def sources(self) -> list[Path]:
        """The files that the page is made from."""
        names = ("differences", "widths", "overlap", "losses")
        files = [self.results / "metrics.csv", *(self.results / "tables" / f"{name}.csv" for name in names)]
        return [file for file in files if file.stem != "losses" or file.is_file()]

    def read(self) -> Any:
        """What they say, an `overview.Results`."""
        import pandas as pd

        from hfprune.reporting.metrics import read_metrics
        from hfprune.reporting.overview import Results

        experiment = load(self.config)
        metrics, *tables = self.sources
        try:
            values = {file.stem: pd.read_csv(file) for file in tables}
        except (OSError, ValueError) as error:
            raise UserError(f"{error}: expected the tables of a finished experiment in {self.results}.") from None
        config = json.loads(experiment.model_dump_json(exclude_none=True))
        return Results(read_metrics(metrics), config, as_yaml(experiment), _manifests(self.manifests), **values)


class Leaderboard(Index):
    """Rank all models of an experiment by fidelity, beside speed and cost: a table, a figure, and one HTML page."""

    words = ("leaderboard",)
    examples = (
        "hfprune leaderboard config.yaml store/*/*/manifest.json \\\n"
        "    --results results/default --timings results/default/efficiency.csv --output results/default",
    )
    timings: Path | None = Field(None, description="csv from `hfprune efficiency`; without it, no speeds and no figure")
    output: Path = Field(description="folder for leaderboard.html, tables/ and figures/")

    def run(self) -> None:
        """Write all three."""
        from hfprune.reporting.figures import draw_leaderboard
        from hfprune.reporting.leaderboard import PREFILL, board, first_kl, leaderboard_sheet
        from hfprune.reporting.overview import overview
        from hfprune.reporting.paper_sheets import read_timings

        timed = [self.timings] if self.timings else []
        with results([*self.sources, *timed]) as aside:
            read = self.read()
            table = board(read.metrics, read_timings(timed) if timed else None, read.differences)
            leaderboard_sheet(table).write(aside.folder(self.output / "tables"), "leaderboard")
            if timed:
                draw_leaderboard(table, PREFILL, first_kl(table), aside.folder(self.output / "figures"))
            page = overview(replace(read, board=table))
            aside.path(self.output / "leaderboard.html").write_text(page, encoding="utf-8")


class Artifacts(Command):
    """List artifacts with their inputs, code and library versions, in artifacts.csv and versions.csv."""

    words = ("artifacts",)
    examples = ("hfprune artifacts --output results/default/provenance store/*/*/manifest.json",)
    output: Path = Field(description="folder to write to")
    manifests: Annotated[list[Path], POSITIONAL] = Field(description="manifests or folders of artifacts")

    def run(self) -> None:
        """Write both tables from the manifests alone. The stages that used the artifacts have verified their files."""
        from hfprune.reporting.pages import list_artifacts

        manifests = _manifests(self.manifests)
        with results() as aside:
            list_artifacts(manifests, aside.folder(self.output))


def _manifests(paths: list[Path]) -> list[dict]:
    """What the manifests say; a path is a manifest or its folder.

    Raises:
        UserError: there is none.
    """
    try:
        files = [path / MANIFEST if path.is_dir() else path for path in paths]
        return [json.loads(path.read_text(encoding="utf-8")) for path in files]
    except (OSError, ValueError) as error:
        raise UserError(f"{error}: expected the manifests, or the folders, of artifacts.") from None


class Provenance(StoreCommand):
    """Print how a figure, a table or a number was made, back to the sources."""

    words = ("provenance",)
    examples = (
        "hfprune provenance results/default/figures/kl.svg",
        "hfprune provenance results/default/metrics.csv --where ratio=0.2 metric=kl",
        "hfprune provenance KEY --crate crate",
    )
    result: Annotated[str, POSITIONAL] = Field(
        description="a result file, an artifact's folder, or the first characters of a key"
    )
    where: Annotated[list[str], Option(metavar="COLUMN=VALUE")] = Field(
        [], description="only these rows of a csv with a column `key`"
    )
    crate: Annotated[Path | None, Option(metavar="FOLDER")] = Field(
        None, description="also write an RO-Crate into this folder"
    )

    def run(self) -> None:
        """Print the provenance."""
        from hfprune.store.provenance import ProvenanceGraph, as_text

        nodes = ProvenanceGraph(Store(self.store)).trace(self.result, self.where)
        print(as_text(nodes))
        if self.crate:
            from hfprune.store.ro_crate import write

            with publish() as aside:
                metadata = write(nodes, aside.folder(self.crate))
            print(self.crate / metadata.name)


COMMANDS = (Overlap, Page, Index, Leaderboard, Artifacts, Provenance)

"""Commands of the report: what was compared with what, pages, and where everything came from."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hfprune.cli.commands import POSITIONAL, Command, NamedPath, Option, StoreCommand
from hfprune.cli.results import results
from hfprune.errors import UserError
from hfprune.stages.making import open_artifact
from hfprune.store.artifacts import Store
from hfprune.store.filenames import MANIFEST
from hfprune.store.results import withdraw, written

NamedTexts = Annotated[list[NamedPath], Option(metavar="NAME=PATH")]
USES = ("calibration", "recovery", "fidelity", "task")  # of documents
HELP = "an artifact's folder or manifest, and what the table calls it"


class Overlap(Command):
    """Compare what is calibrated or trained on with what is tested on: documents that share 13 words in a row."""

    words = ("overlap",)
    examples = (
        "hfprune overlap --calibration xsum=store/text/KEY --fidelity quac=store/text/KEY \\\n"
        "    --task boolq=store/task/KEY --output overlap.csv",
    )
    calibration: NamedTexts = Field([], description=HELP)
    recovery: NamedTexts = Field([], description=HELP)
    fidelity: NamedTexts = Field([], description=HELP)
    task: NamedTexts = Field([], description=HELP)
    strict: bool = Field(False, description="fail where any document overlaps")
    output: Path = Field(description="the csv to write")

    def run(self) -> None:
        """Write the table; refuse an overlap where that is asked for."""
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
    """Make a page of the report: a table or a figure with its title and caption."""

    words = ("page",)
    examples = (
        "hfprune page --title 'Every model' --caption 'In per cent.' --output summary.html summary.csv summary.md",
    )
    title: str = Field(description="what it is")
    caption: str = Field(description="what a reader must know to read it")
    output: Path = Field(description="the html to write")
    files: Annotated[list[Path], POSITIONAL] = Field(description="a figure's svg; a table's csv, and its md; or a yaml")

    def run(self) -> None:
        """Write it."""
        from hfprune.reporting.pages import page

        try:
            content = page(self.title, self.caption, self.files)
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}.") from None
        with written() as aside:
            aside.path(self.output).write_text(content, encoding="utf-8")


class Artifacts(Command):
    """List artifacts, what each was made from, by which code and versions: artifacts.csv and versions.csv."""

    words = ("artifacts",)
    examples = ("hfprune artifacts --output results/default/provenance store/*/*/manifest.json",)
    output: Path = Field(description="the folder to write into")
    manifests: Annotated[list[Path], POSITIONAL] = Field(description="artifacts of any stage")

    def run(self) -> None:
        """Write both tables, from the manifests alone: whoever used the artifacts has verified their files."""
        from hfprune.reporting.pages import list_artifacts

        try:
            files = [path / MANIFEST if path.is_dir() else path for path in self.manifests]
            manifests = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        except (OSError, ValueError) as error:
            raise UserError(f"{error}: expected the manifests, or the folders, of artifacts.") from None
        with results() as aside:
            list_artifacts(manifests, aside.folder(self.output))


class Provenance(StoreCommand):
    """Print how a figure, a table or a number came to be, back to the sources."""

    words = ("provenance",)
    examples = (
        "hfprune provenance results/default/figures/kl.svg",
        "hfprune provenance results/default/metrics.csv --where ratio=0.2 metric=kl",
        "hfprune provenance KEY --crate crate",
    )
    result: Annotated[str, POSITIONAL] = Field(
        description="a file of results; an artifact's folder, or how its key begins"
    )
    where: Annotated[list[str], Option(metavar="COLUMN=VALUE")] = Field(
        [], description="which rows of a csv that has a column `key`"
    )
    crate: Annotated[Path | None, Option(metavar="FOLDER")] = Field(None, description="write it as an RO-Crate too")

    def run(self) -> None:
        """Print it."""
        from hfprune.store.provenance import Trail, text

        nodes = Trail(Store(self.store)).of(self.result, self.where)
        print(text(nodes))
        if self.crate:
            from hfprune.store.ro_crate import write

            with written() as aside:
                metadata = write(nodes, aside.folder(self.crate))
            print(self.crate / metadata.name)


COMMANDS = (Overlap, Page, Artifacts, Provenance)

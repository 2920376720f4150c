"""Commands that make tables and figures from measurements."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hfprune.cli.commands import POSITIONAL, Command, Option, StoreCommand
from hfprune.errors import UserError
from hfprune.reporting import paper_tables
from hfprune.stages.run import open_artifact
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.filenames import LOSSES, PRUNING
from hfprune.store.results import ScratchFolders, publish

Metrics = Annotated[Path, Field(description="metrics.csv from `hfprune collect`")]
Folder = Annotated[Path, Field(description="folder to write to")]
TablesAndFigures = Annotated[Path, Field(description="folder to write tables/ and figures/ into")]


@contextmanager
def results(sources: Sequence[Artifact | Path] | None = None) -> Iterator[ScratchFolders]:
    """`publish`, which prints the paths of the results."""
    with publish(sources) as aside:
        yield aside
    for path in aside.places:
        print(path)


def write_and_draw(
    output: Path, name: str, table: Any, draw: Callable[[Any, Path], object], sources: list[Artifact]
) -> None:
    """Write a table (a DataFrame) made from `sources` to tables/`name`.csv, and draw its figures into figures/."""
    with results(sources) as aside:
        table.to_csv(aside.folder(output / "tables") / f"{name}.csv", index=False)
        draw(table, aside.folder(output / "figures"))


def by_key(option: str, words: Sequence[str]) -> dict[str, str]:
    """Read words NAME=KEY as a dict: artifact key -> name.

    Raises:
        UserError: a word does not have this form.
    """
    names = {}
    for word in words:
        name, equals, key = word.rpartition("=")
        if not (name and equals and key):
            raise UserError(f"--{option} {word}: expected NAME=KEY, a name and the key of an artifact in the store.")
        names[key] = name
    return names


class WithMethods(StoreCommand):
    """A command whose results show method names."""

    method: Annotated[list[str], Option(metavar="NAME=KEY", is_repeated=True)] = Field(
        [],
        description="name of the method that cut the model KEY; repeat for each (default: the preset of its recipe)",
    )

    def methods(self) -> dict[str, str]:
        """Method names by the keys of the cut models."""
        return by_key("method", self.method)


class WithTexts(WithMethods):
    """A command whose results also show names of held-out texts."""

    text: Annotated[list[str], Option(metavar="NAME=KEY", is_repeated=True)] = Field(
        [],
        description="name of the held-out text KEY; repeat for each, the main text of the tables first "
        "(default: its file's name)",
    )

    def names(self) -> Any:
        """Names of methods and held-out texts, a `identity.Names`."""
        from hfprune.reporting.identity import Names

        return Names(self.methods(), by_key("text", self.text))


class Collect(WithTexts):
    """Collect the results of measure and evaluate in one metrics.csv."""

    words = ("collect",)
    examples = ("hfprune collect --output metrics.csv store/measure/*/manifest.json store/evaluate/*/manifest.json",)
    output: Path = Field(description="metrics.csv to write")
    manifests: Annotated[list[Path], POSITIONAL] = Field(description="artifacts of measure and evaluate")

    def run(self) -> None:
        """Write the file."""
        from hfprune.reporting.metrics import collect

        artifacts = [open_artifact(path, "measure", "evaluate") for path in self.manifests]
        metrics = collect(artifacts, Store(self.store), self.names())
        with publish(artifacts) as aside:
            metrics.to_csv(aside.path(self.output), index=False)
        print(f"{self.output}: {len(metrics)} values of {metrics['key'].nunique()} artifacts")


class Headline(WithTexts):
    """Write and draw the first results: fidelity and perplexity of models before any training."""

    words = ("headline",)
    examples = ("hfprune headline --output results/default store/measure/*/",)
    output: TablesAndFigures
    manifests: Annotated[list[Path], POSITIONAL] = Field(description="artifacts of measure")

    def run(self) -> None:
        """Write the table and its figure."""
        from hfprune.reporting.figures import draw_headline
        from hfprune.reporting.metrics import collect
        from hfprune.reporting.summary import write_headline

        artifacts = [open_artifact(path, "measure") for path in self.manifests]
        metrics = collect(artifacts, Store(self.store), self.names())
        with results(artifacts) as aside:
            write_headline(metrics, aside.folder(self.output / "tables"))
            draw_headline(metrics, aside.folder(self.output / "figures"))


class Differences(WithTexts):
    """Compare models document by document: confidence intervals, paired differences and their tests."""

    words = ("differences",)
    examples = ("hfprune differences --output results/default/tables store/measure/*/ store/evaluate/*/",)
    output: Folder
    manifests: Annotated[list[Path], POSITIONAL] = Field(description="artifacts of measure and evaluate")

    def run(self) -> None:
        """Write both tables."""
        from hfprune.reporting.comparison import Comparison
        from hfprune.reporting.samples import read_samples

        artifacts = [open_artifact(path, "measure", "evaluate") for path in self.manifests]
        compared = Comparison(read_samples(artifacts, Store(self.store), self.names()))
        with results(artifacts) as aside:
            for name, table in {"intervals": compared.intervals(), "differences": compared.differences()}.items():
                table.to_csv(aside.folder(self.output) / f"{name}.csv", index=False)


class Profile(WithTexts):
    """Show where models fail: fidelity by position and by the dense model's entropy."""

    words = ("profile",)
    examples = ("hfprune profile --output results/default store/measure/*/",)
    output: TablesAndFigures
    manifests: Annotated[list[Path], POSITIONAL] = Field(description="artifacts of measure")

    def run(self) -> None:
        """Write the table and its figure."""
        from hfprune.reporting.figures import draw_profile
        from hfprune.reporting.samples import read_profiles

        artifacts = [open_artifact(path, "measure") for path in self.manifests]
        bins = read_profiles(artifacts, Store(self.store), self.names())
        write_and_draw(self.output, "profile", bins, draw_profile, artifacts)


class Tables(Command):
    """Write the summary and cost tables as csv, md and tex."""

    words = ("tables",)
    examples = ("hfprune tables --metrics results/default/metrics.csv --output results/default/tables",)
    metrics: Metrics
    output: Folder

    def run(self) -> None:
        """Write the tables."""
        from hfprune.reporting.metrics import read_metrics
        from hfprune.reporting.summary import write_tables

        with results([self.metrics]) as aside:
            write_tables(read_metrics(self.metrics), aside.folder(self.output))


class Figures(Command):
    """Draw accuracy and KL divergence against the pruning ratio, as png, pdf and svg."""

    words = ("figures",)
    examples = ("hfprune figures --metrics results/default/metrics.csv --output results/default/figures",)
    metrics: Metrics
    output: Folder

    def run(self) -> None:
        """Draw the figures."""
        from hfprune.reporting.figures import draw
        from hfprune.reporting.metrics import read_metrics

        with results([self.metrics]) as aside:
            draw(read_metrics(self.metrics), aside.folder(self.output))


class Pareto(Command):
    """Draw the quality of models against their speed, and against the cost of making them."""

    words = ("pareto",)
    examples = (
        "hfprune pareto --metrics results/default/metrics.csv --timings results/default/efficiency.csv \\\n"
        "    --output results/default/figures",
    )
    timings: Path = Field(description="csv from `hfprune efficiency`")
    metrics: Metrics
    output: Folder

    def run(self) -> None:
        """Draw the figure."""
        from hfprune.reporting.figures import draw_pareto
        from hfprune.reporting.metrics import read_metrics
        from hfprune.reporting.paper_sheets import read_timings

        with results([self.metrics, self.timings]) as aside:
            draw_pareto(read_metrics(self.metrics), read_timings([self.timings]), aside.folder(self.output))


class Compare(Command):
    """Compare scores: importance per layer, and agreement between criteria and between seeds."""

    words = ("compare",)
    examples = ("hfprune compare --output results/default store/score/*/manifest.json",)
    output: TablesAndFigures
    scores: Annotated[list[Path], POSITIONAL] = Field(description="artifacts of score, all of one model")

    def run(self) -> None:
        """Write the tables and the figure."""
        from hfprune.reporting.agreement import compare, convergence
        from hfprune.reporting.figures import draw_scores

        scores = [open_artifact(path, "score") for path in self.scores]
        if len(models := {score.manifest["inputs"]["model"] for score in scores}) > 1:
            raise UserError(f"scores of {len(models)} models ({', '.join(sorted(models))}); compare those of one.")
        agreements, converged = compare(scores), convergence(scores)
        with results(scores) as aside:
            tables = aside.folder(self.output / "tables")
            agreements.to_csv(tables / "agreement.csv", index=False)
            if len(converged):
                converged.to_csv(tables / "convergence.csv", index=False)
            draw_scores(scores, agreements, aside.folder(self.output / "figures"))


class Table(WithTexts):
    """Write one of the paper's tables as csv, md and tex, with the published rows below ours."""

    words = ("table",)
    examples = (
        "hfprune table table6 --output results/default/tables store/measure/*/ store/evaluate/*/",
        "hfprune table table3 --output tables results/default/metrics.csv results/qwen2.5-0.5b/metrics.csv",
    )
    name: Annotated[Literal[tuple(sorted([*paper_tables.TABLES, *paper_tables.FILE_TABLES]))], POSITIONAL] = Field(
        description="table to write"
    )
    output: Folder
    published: Path = Field(Path("results/published"), description="folder with the published values")
    sources: Annotated[list[Path], POSITIONAL] = Field(
        description="artifacts of measure and evaluate; for tables 3, 4 and 5 the csv files"
    )

    def run(self) -> None:
        """Write the table."""
        from hfprune.reporting import paper_sheets

        published = self.published / f"{self.name}.csv"
        is_of_files = self.name in paper_tables.FILE_TABLES
        sources = self.sources if is_of_files else [open_artifact(path, "measure", "evaluate") for path in self.sources]
        with results([*sources, *([published] if published.exists() else [])]) as aside:
            if is_of_files:
                sheet = paper_sheets.FILE_SHEETS[self.name](sources, published)
            else:
                from hfprune.reporting.samples import read_samples

                samples = read_samples(sources, Store(self.store), self.names())
                estimates = paper_sheets.estimates(paper_sheets.select(self.name, samples))
                sheet = paper_sheets.model_sheet(self.name, estimates, published)
            sheet.write(aside.folder(self.output), self.name)


class Widths(WithMethods):
    """Draw how many units each layer of pruned models keeps."""

    words = ("widths",)
    examples = ("hfprune widths --output results/default store/prune/*/manifest.json",)
    output: TablesAndFigures
    manifests: Annotated[list[Path], POSITIONAL] = Field(description="artifacts of prune")

    def run(self) -> None:
        """Write the table and its figure."""
        from hfprune.reporting.curves import kept_widths
        from hfprune.reporting.figures import draw_widths

        models = [open_artifact(path, "prune", files=[PRUNING]) for path in self.manifests]
        table = kept_widths(models, Store(self.store), self.methods())
        write_and_draw(self.output, "widths", table, draw_widths, models)


class Losses(WithMethods):
    """Draw the loss curves of recovery training."""

    words = ("losses",)
    examples = ("hfprune losses --output results/default store/recover/*/manifest.json",)
    output: TablesAndFigures
    manifests: Annotated[list[Path], POSITIONAL] = Field(description="artifacts of recover")

    def run(self) -> None:
        """Write the table and its figure."""
        from hfprune.reporting.curves import training_curves
        from hfprune.reporting.figures import draw_losses

        models = [open_artifact(path, "recover", files=[LOSSES]) for path in self.manifests]
        table = training_curves(models, Store(self.store), self.methods())
        write_and_draw(self.output, "losses", table, draw_losses, models)


COMMANDS = (Headline, Collect, Differences, Profile, Tables, Figures, Pareto, Compare, Table, Widths, Losses)

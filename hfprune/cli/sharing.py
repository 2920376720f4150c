"""Commands that hand a checkpoint on."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from hfprune.cli.commands import Option, StoreCommand
from hfprune.stages.making import open_artifact
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.results import publish

MEASURED = "--results store/measure/*/ store/evaluate/*/"


class Shared(StoreCommand):
    """A command that hands on a checkpoint with what was measured of it."""

    model: Path = Field(description="checkpoint: an artifact's folder or manifest")
    results: list[Path] = Field(
        description="artifacts of measure and evaluate; those of this model and of its dense one are used"
    )

    def opened(self) -> tuple[Artifact, list[Artifact]]:
        """The model and its results."""
        results = [open_artifact(path, "measure", "evaluate") for path in self.results]
        return open_artifact(self.model, "prune", "recover"), results


class Export(Shared):
    """Copy a pruned or recovered checkpoint out of the store, its model card with what was measured of it."""

    words = ("export",)
    examples = (f"hfprune export --model store/prune/KEY {MEASURED} --output SmolLM2-107M",)
    output: Path = Field(description="the folder to make")

    def run(self) -> None:
        """Copy it."""
        from hfprune.sharing.export import check_new, contents, export, listing

        model, results = self.opened()
        files = contents(model, results, Store(self.store), self.output.resolve().name)
        check_new(self.output)
        print(listing(files))
        with publish() as aside:
            export(files, aside.path(self.output.resolve()))
        print(self.output)


class Push(Shared):
    """Upload a pruned or recovered checkpoint, what was measured of it in its model card, to the Hugging Face hub."""

    words = ("push",)
    examples = (f"hfprune push --model store/prune/KEY {MEASURED} --to me/SmolLM2-107M --private",)
    to: Annotated[str, Option(metavar="OWNER/NAME")] = Field(description="the repository, made where there is none")
    private: bool = Field(False, description="a new repository is private")

    def run(self) -> None:
        """Upload it."""
        from hfprune.sharing.export import contents, listing, push

        model, results = self.opened()
        files = contents(model, results, Store(self.store), self.to)
        print(f"to {self.to}:\n{listing(files)}", flush=True)
        print(push(files, self.to, self.private, model.key))


COMMANDS = (Export, Push)

"""Commands that share a checkpoint."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from hfprune.cli.commands import Option, StoreCommand
from hfprune.stages.run import open_artifact
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.results import publish

MEASURED = "--results store/measure/*/ store/evaluate/*/"


class SharingCommand(StoreCommand):
    """A command that shares a checkpoint together with its results."""

    model: Path = Field(description="checkpoint: an artifact's folder or manifest")
    results: list[Path] = Field(
        description="artifacts of measure and evaluate; those of this model and its dense model go into the card"
    )

    def opened(self) -> tuple[Artifact, list[Artifact]]:
        """Open the model and the results."""
        results = [open_artifact(path, "measure", "evaluate") for path in self.results]
        return open_artifact(self.model, "prune", "recover"), results


class Export(SharingCommand):
    """Copy a pruned or recovered checkpoint out of the store, with its results in the model card."""

    words = ("export",)
    examples = (f"hfprune export --model store/prune/KEY {MEASURED} --output SmolLM2-107M",)
    output: Path = Field(description="folder to create")

    def run(self) -> None:
        """Copy the checkpoint."""
        from hfprune.sharing.export import check_new, contents, export, listing

        model, results = self.opened()
        files = contents(model, results, Store(self.store), self.output.resolve().name)
        check_new(self.output)
        print(listing(files))
        with publish() as aside:
            export(files, aside.path(self.output.resolve()))
        print(self.output)


class Push(SharingCommand):
    """Upload a pruned or recovered checkpoint to the Hugging Face hub, with its results in the model card."""

    words = ("push",)
    examples = (f"hfprune push --model store/prune/KEY {MEASURED} --to me/SmolLM2-107M --private",)
    to: Annotated[str, Option(metavar="OWNER/NAME")] = Field(description="repository; created if it does not exist")
    private: bool = Field(False, description="make a new repository private")

    def run(self) -> None:
        """Upload the checkpoint."""
        from hfprune.sharing.export import contents, listing, push

        model, results = self.opened()
        files = contents(model, results, Store(self.store), self.to)
        print(f"to {self.to}:\n{listing(files)}", flush=True)
        print(push(files, self.to, self.private, model.key))


COMMANDS = (Export, Push)

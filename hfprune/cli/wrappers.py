"""Commands for models with other parts beside a language model, such as models that read images."""

from pathlib import Path

from pydantic import Field

from hfprune.cli.commands import Command
from hfprune.store.results import publish


class Unwrap(Command):
    """Take the language model out of a model with other parts, such as one that reads images, to prune it."""

    words = ("unwrap",)
    examples = ("hfprune unwrap --model gemma-3-4b-it --output gemma-3-4b-text",)
    model: Path = Field(description="folder of the whole model")
    output: Path = Field(description="folder to create")

    def run(self) -> None:
        """Write the language model."""
        from hfprune.models.wrappers import unwrap
        from hfprune.sharing.export import check_new

        check_new(self.output)
        with publish() as aside:
            unwrap(self.model, aside.path(self.output.resolve()))
        print(self.output)


class Rewrap(Command):
    """Put a pruned language model into the model that it was taken out of; its other parts stay as they are."""

    words = ("rewrap",)
    examples = ("hfprune rewrap --model gemma-3-4b-it --text store/prune/KEY --output gemma-3-3b-it",)
    model: Path = Field(description="folder of the whole model")
    text: Path = Field(description="folder of the pruned language model")
    output: Path = Field(description="folder to create")

    def run(self) -> None:
        """Write the whole model and reload it."""
        from hfprune.models.wrappers import rewrap
        from hfprune.sharing.export import check_new

        check_new(self.output)
        with publish() as aside:
            difference = rewrap(self.model, self.text, aside.path(self.output.resolve()))
        print(f"{self.output}: reloaded; logits differ by {difference:.3g} from those of {self.text}")


COMMANDS = (Unwrap, Rewrap)

"""Commands about a whole experiment, and about the machine that it runs on."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hfprune.cli.commands import POSITIONAL, Command, Count, Option
from hfprune.cli.results import results
from hfprune.errors import UserError
from hfprune.experiment.schema import load, schema


class Config(Command):
    """Check a config file and print it with every default filled in."""

    words = ("config",)
    examples = ("hfprune config config.yaml",)
    file: Annotated[Path, POSITIONAL] = Field(Path("config.yaml"), description="the config")
    output: Path | None = Field(None, description="the yaml to write it into, instead of printing it")
    schema_file: Annotated[Path | None, Option(alone="workflow/schemas/config.schema.json")] = Field(
        None, alias="schema", description="write the JSON schema"
    )

    def run(self) -> None:
        """Print or write it."""
        if self.schema_file:
            with results() as aside:
                aside.path(self.schema_file).write_text(schema(), encoding="utf-8")
            return
        experiment = load(self.file)
        import yaml

        text = yaml.safe_dump(json.loads(experiment.model_dump_json(exclude_none=True)), sort_keys=False)
        if not self.output:
            print(text, end="")
            return
        with results() as aside:
            aside.path(self.output).write_text(text, encoding="utf-8")


class New(Command):
    """Write a short config to start from."""

    words = ("new",)
    examples = ("hfprune new mine.yaml --model Qwen/Qwen2.5-0.5B",)
    file: Annotated[Path, POSITIONAL] = Field(description="the config to write; never overwritten")
    model: str = Field(description="owner/name on the hub, a checkpoint's folder, or a GGUF file")

    def run(self) -> None:
        """Write it."""
        from hfprune.experiment.new import write_config

        write_config(self.file, self.model)
        print(f"{self.file}: written. Now: hfprune config {self.file}")


class Methods(Command):
    """List the methods that configs know by name, or explain one."""

    words = ("methods",)
    examples = ("hfprune methods hfprune-best",)
    name: Annotated[str | None, Option(is_positional=True, metavar="NAME")] = Field(
        None, description="the one to explain"
    )

    def run(self) -> None:
        """Print it."""
        from hfprune.pruning.methods import explain, overview

        print(explain(self.name) if self.name else overview())


class Plan(Command):
    """Print what an experiment will take, before anything is downloaded: jobs, operations, hours, memory, disk."""

    words = ("plan",)
    examples = ("hfprune plan --config configs/llama-2-7b.yaml --gpu h100",)
    config: Path = Field(Path("config.yaml"), description="the experiment's")
    gpu: str = Field("h100", description="to count hours on, or cpu: this machine")
    utilisation: float = Field(0.4, description="share of its peak in use")
    shape: Path | None = Field(None, description="a config.json that stands for the model's, where the hub is far")

    def run(self) -> None:
        """Print it."""
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation {self.utilisation}: expected a share of the peak, above 0 and at most 1.")
        experiment = load(self.config)
        from hfprune.experiment.estimate import report

        print(report(experiment, self.gpu, self.utilisation, self.shape))


class OnGpus(Command):
    """Run a command on GPUs that no other such command holds, for as long as it runs; wait until there are some."""

    words = ("on-gpus",)
    examples = ("hfprune on-gpus 2 hfprune score --model store/model/KEY --text store/text/KEY",)
    count: Annotated[Count, POSITIONAL] = Field(description="of those that CUDA_VISIBLE_DEVICES lists, or else of all")
    rest: Annotated[list[str], Option(is_positional=True, metavar="COMMAND", takes_rest=True)] = Field(
        [], description="what to run"
    )

    def run(self) -> None:
        """Run it."""
        from hfprune.runtime.gpus import run_on

        if not self.rest:
            raise UserError("no command to run.")
        run_on(self.count, self.rest)


COMMANDS = (Config, New, Methods, Plan, OnGpus)

"""Commands for a whole experiment, and for the machine that it runs on."""

import os
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hfprune.cli.commands import POSITIONAL, Command, Count, Option, StoreCommand
from hfprune.cli.results import results
from hfprune.errors import UserError
from hfprune.experiment.schema import as_yaml, load, schema


class Config(Command):
    """Check a config file, and print it with every default filled in."""

    words = ("config",)
    examples = ("hfprune config config.yaml",)
    file: Annotated[Path, POSITIONAL] = Field(Path("config.yaml"), description="config file to check")
    output: Path | None = Field(None, description="YAML file to write instead of printing")
    schema_file: Annotated[Path | None, Option(alone="workflow/schemas/config.schema.json")] = Field(
        None, alias="schema", description="write the JSON schema of config files to this file"
    )

    def run(self) -> None:
        """Print or write the config."""
        if self.schema_file:
            with results() as aside:
                aside.path(self.schema_file).write_text(schema(), encoding="utf-8")
            return
        text = as_yaml(load(self.file))
        if not self.output:
            print(text, end="")
            return
        with results() as aside:
            aside.path(self.output).write_text(text, encoding="utf-8")


class New(Command):
    """Write a short config to start from."""

    words = ("new",)
    examples = ("hfprune new mine.yaml --model Qwen/Qwen2.5-0.5B",)
    file: Annotated[Path, POSITIONAL] = Field(description="config file to write; an existing file is never overwritten")
    model: str = Field(description="owner/name on the hub, a checkpoint's folder, or a GGUF file")

    def run(self) -> None:
        """Write the config."""
        from hfprune.experiment.new import write_config

        write_config(self.file, self.model)
        print(f"{self.file}: written. Now: hfprune run {self.file}")


class Run(Command):
    """Run an experiment: Snakemake with this package's workflow, in the current folder."""

    words = ("run",)
    examples = ("hfprune run mine.yaml", "hfprune run mine.yaml --dry-run", "hfprune run mine.yaml agreement")
    config: Annotated[Path, POSITIONAL] = Field(description="the experiment's config file")
    rest: Annotated[list[str], Option(is_positional=True, metavar="OPTION", takes_rest=True)] = Field(
        [], description="options and targets for Snakemake"
    )

    def run(self) -> None:
        """Become Snakemake."""
        from hfprune.experiment.workflow_files import snakefile

        words = ["--snakefile", str(snakefile()), "--configfile", str(self.config), "--cores", "all", *self.rest]
        try:
            os.execv(sys.executable, [sys.executable, "-m", "snakemake", *words])
        except OSError as error:
            raise UserError(f"{sys.executable}: {error.strerror}.") from None


class Doctor(StoreCommand):
    """Tell what this machine has, and which sizes of models fit."""

    words = ("doctor",)
    examples = ("hfprune doctor",)

    def run(self) -> None:
        """Print it."""
        from hfprune.experiment.doctor import examination

        print(examination(self.store))


class Methods(Command):
    """List the pruning methods that a config can name, or explain one."""

    words = ("methods",)
    examples = ("hfprune methods hfprune-best",)
    name: Annotated[str | None, Option(is_positional=True, metavar="NAME")] = Field(
        None, description="method to explain (default: list all)"
    )

    def run(self) -> None:
        """Print the list or the explanation."""
        from hfprune.pruning.methods import explain, overview

        print(explain(self.name) if self.name else overview())


class Plan(Command):
    """Estimate an experiment's jobs, operations, hours, memory and disk, before anything is downloaded."""

    words = ("plan",)
    examples = ("hfprune plan configs/llama-2-7b.yaml --gpu h100",)
    config: Annotated[Path, POSITIONAL] = Field(Path("config.yaml"), description="the experiment's config file")
    gpu: str = Field("h100", description="GPU to count hours for, such as h100, a100 or rtx4090; or cpu: this machine")
    utilisation: float = Field(0.4, description="share of the peak speed that jobs reach")
    shape: Path | None = Field(None, description="config.json of a model of the same shape, to work without the hub")

    def run(self) -> None:
        """Print the estimate."""
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation {self.utilisation}: expected a share of the peak, above 0 and at most 1.")
        experiment = load(self.config)
        from hfprune.experiment.estimate import report

        print(report(experiment, self.gpu, self.utilisation, self.shape))


class OnGpus(Command):
    """Run a command on free GPUs: wait for them, and reserve them against other `hfprune on-gpus` while it runs."""

    words = ("on-gpus",)
    examples = ("hfprune on-gpus 2 hfprune score --model store/model/KEY --text store/text/KEY",)
    count: Annotated[Count, POSITIONAL] = Field(
        description="number of GPUs, out of CUDA_VISIBLE_DEVICES if set, or else of all"
    )
    rest: Annotated[list[str], Option(is_positional=True, metavar="COMMAND", takes_rest=True)] = Field(
        [], description="command to run"
    )

    def run(self) -> None:
        """Run the command."""
        from hfprune.runtime.gpus import run_on

        if not self.rest:
            raise UserError("no command to run.")
        run_on(self.count, self.rest)


COMMANDS = (Config, New, Run, Doctor, Methods, Plan, OnGpus)

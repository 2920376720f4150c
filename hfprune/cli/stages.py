"""A command for each stage, from its declaration."""

import argparse
from functools import partial
from typing import Any

from hfprune.cli.commands import StoreCommand, add_command, add_options, given, spelled
from hfprune.experiment.schema import parse
from hfprune.runtime.paths import expanded
from hfprune.stages.declaration import Stage
from hfprune.stages.making import make, open_artifact
from hfprune.stages.registry import STAGES
from hfprune.store.artifacts import Store


def add_stages(commands: Any) -> None:
    """The commands of all stages; those that use the network stand below `download`."""
    download = commands.add_parser("download", help="get a model, a text or a task's documents: the only stage online")
    kinds = download.add_subparsers(dest="kind", metavar="KIND", required=True)
    for stage in STAGES.values():
        if not stage.is_inner:
            parsers = kinds if stage.is_online else commands
            _add_options(
                add_command(parsers, stage.name, stage.description, stage.examples, partial(_make, stage)), stage
            )


def _add_options(parser: argparse.ArgumentParser, stage: Stage) -> None:
    """The options of a stage's command: its inputs, its parameters, and where the artifact goes."""
    for name, source in stage.inputs.items():
        parser.add_argument(
            spelled(name),
            type=expanded,
            nargs="+" if source.several else None,
            required=not source.optional,
            help=source.description + ("" if source.several else ": an artifact's folder or manifest"),
        )
    if stage.together:
        parser.add_argument(
            "--together",
            nargs="+",
            default=[],
            metavar=stage.together.upper(),
            help="these too, if missing, in the same pass",
        )
    add_options(parser, stage.parameters)
    add_options(parser, StoreCommand)
    parser.add_argument("--key", help="refuse to work if the artifact's key is not this one")


def _make(stage: Stage, args: argparse.Namespace) -> None:
    """Make a stage's artifact, and print its folder."""
    parameters, store = given(args, stage.parameters), Store(given(args, StoreCommand).store)
    together = [
        parse(stage.parameters, parameters.model_dump() | {stage.together: value}, f"hfprune {args.command}")
        for value in getattr(args, "together", [])
        if value != getattr(parameters, stage.together)
    ]
    inputs: dict[str, Any] = {}
    for name, source in stage.inputs.items():
        words = getattr(args, name)
        paths = words if isinstance(words, list) else [words] if words else []
        artifacts = [open_artifact(path, *source.stages) for path in paths]
        inputs[name] = artifacts if source.several else artifacts[0] if artifacts else None
    artifact = make(stage, parameters, inputs, store, args.key, together)
    if artifact:  # else another process makes it
        print(artifact.folder)
        if stage.after:
            stage.after(artifact)

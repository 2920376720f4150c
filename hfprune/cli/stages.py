"""The stages' commands, made from the stages' declarations."""

import argparse
from functools import partial
from typing import Any

from hfprune.cli.commands import StoreCommand, add_command, add_options, flag, path_option, validated
from hfprune.experiment.schema import parse
from hfprune.stages.declaration import Stage
from hfprune.stages.registry import STAGES
from hfprune.stages.run import make, open_artifact
from hfprune.store.artifacts import Store


def add_stages(commands: Any) -> None:
    """Add the commands of all stages. Those that use the network go below `download`."""
    download_help = "Get a model, a text or a task's documents. No other stage uses the network."
    download = commands.add_parser("download", help=download_help, description=download_help)
    kinds = download.add_subparsers(dest="kind", metavar="KIND", required=True)
    for stage in STAGES.values():
        if not stage.is_internal:
            parsers = kinds if stage.is_online else commands
            _add_options(
                add_command(parsers, stage.name, stage.description, stage.examples, partial(_make, stage)), stage
            )


def _add_options(parser: argparse.ArgumentParser, stage: Stage) -> None:
    """Add the options of a stage's command: its inputs, its parameters, the store and the key."""
    for name, source in stage.inputs.items():
        parser.add_argument(
            flag(name),
            type=path_option,
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
            help="further ones to make in the same pass, if missing in the store",
        )
    add_options(parser, stage.parameters)
    add_options(parser, StoreCommand)
    parser.add_argument("--key", help="fail if the artifact would not have this key")


def _make(stage: Stage, args: argparse.Namespace) -> None:
    """Make a stage's artifact and print its folder."""
    parameters, store = validated(args, stage.parameters), Store(validated(args, StoreCommand).store)
    together = [
        parse(stage.parameters, parameters.model_dump() | {stage.together: value})
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
    if artifact:  # None in a process that only helps another one
        print(artifact.folder)
        if stage.after:
            stage.after(artifact)

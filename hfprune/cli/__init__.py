"""The console command: one subcommand a stage, each usable by hand, and those that make results of artifacts.

Nothing heavy is imported here: a command imports what it needs when it runs.
"""

import argparse
import os
import sys

from hfprune.cli import experiment, report, results, sharing, store, timing
from hfprune.cli.commands import add_typed
from hfprune.cli.stages import add_stages
from hfprune.errors import UserError
from hfprune.runtime.signals import STATUS, Stopped
from hfprune.store import artifacts

ONLINE = ("download", "push", "plan", "on-gpus")

WELCOME = """\
hfprune prunes LLaMA-like language models and measures what is left of them.

First, the default experiment (a real 135M model, two CPU cores, no account):

    snakemake --cores all              all of config.yaml: tables and figures in results/default
    snakemake --cores all -n           what that would run

Your own: copy config.yaml, change it, and run `snakemake --cores all --configfile FILE`.
Each stage is also a command of its own: `hfprune --help` lists them, `hfprune score --help` explains one.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 2 on a user's mistake, with one message on stderr."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.run is None:
        print(WELCOME, end="")
        return 0
    if args.command not in ONLINE:  # what is not downloaded by then is missing: say so, do not fetch it
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    try:
        _run(args)
    except UserError as error:
        if _is_first():
            print(f"hfprune {args.command}: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if _is_first():
            print(f"hfprune {args.command}: stopped by SIGTERM: {stopped}; run again to go on.", file=sys.stderr)
        return STATUS
    except KeyboardInterrupt:
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    """Run a subcommand; that the disk or the memory is full is a user's to mend, whatever it was that met it."""
    try:
        args.run(args)
    except OSError as error:  # of what is printed, or of locks: the store and results have words of their own
        if error.errno not in artifacts.FULL_DISK:
            raise
        raise UserError(f"{error.filename or 'output'}: {error.strerror}. Free space there and run again.") from None
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory: {str(error).partition('.')[0] or 'the system gave none'}. What is finished is kept. Free "
            "some, or take a device with more memory, several "
            f"(`snakemake --resources gpu=2 --set-resources {args.command}:gpu=2`), or `dtype: bfloat16`."
        ) from None


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from hfprune.runtime.memory import is_out_of_memory

    return is_out_of_memory(error)


def _is_first() -> bool:
    """Whether this is the one, of several processes, that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hfprune", description="High-fidelity pruning of language models, by stages.")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(dest="command", metavar="STAGE")
    add_stages(commands)
    for module in (results, report, timing, sharing, experiment):
        for command in module.COMMANDS:
            add_typed(commands, command)
    held = commands.add_parser("store", help="what the store holds: list it, verify it, remove what no experiment uses")
    actions = held.add_subparsers(dest="action", metavar="ACTION", required=True)
    for command in store.COMMANDS:
        add_typed(actions, command)
    return parser

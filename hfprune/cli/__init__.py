"""The console command: a subcommand for each stage, and subcommands that make results from artifacts.

Nothing heavy is imported here. A command imports what it needs when it runs.
"""

import argparse
import os
import sys

from hfprune.cli import deploy, experiment, families, report, results, sharing, store, timing, wrappers
from hfprune.cli.commands import add_typed
from hfprune.cli.stages import add_stages
from hfprune.errors import UserError
from hfprune.runtime.signals import STATUS, Stopped
from hfprune.store import artifacts

ONLINE = ("download", "push", "plan", "on-gpus")

WELCOME = """\
hfprune prunes language models and measures the pruned models.

Start with the default experiment (a real 135M model; two CPU cores are enough; no account):

    snakemake --cores all              run config.yaml; tables and figures go to results/default
    snakemake --cores all -n           list the jobs without running them

Your own: copy config.yaml, change it, and run `snakemake --cores all --configfile FILE`.
Each stage is also a command of its own: `hfprune --help` lists them, `hfprune score --help` explains one.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Returns 0 on success, and 2 after a user's mistake, which gets one message on stderr."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.run is None:
        print(WELCOME, end="")
        return 0
    if args.command not in ONLINE:  # a missing download is an error here, not fetched silently
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
    """Run a subcommand. A full disk or memory becomes a UserError, wherever it happens: only the user can fix it."""
    try:
        args.run(args)
    except OSError as error:  # from printing or locks; the store and results have their own messages
        if error.errno not in artifacts.FULL_DISK:
            raise
        raise UserError(f"{error.filename or 'output'}: {error.strerror}. Free space there and run again.") from None
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory: {str(error).partition('.')[0] or 'the system gave none'}. What is finished is kept. Free "
            "some, or take a device with more memory, several "
            f"(`snakemake --resources gpu=2 --set-resources {args.command}:gpu=2`), `dtype: bfloat16`, or `memory: "
            "streamed`, which reads weights layer by layer (no training does)."
        ) from None


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from hfprune.runtime.memory import is_out_of_memory

    return is_out_of_memory(error)


def _is_first() -> bool:
    """Whether this process prints messages: of several, only the first does."""
    return int(os.environ.get("RANK", "0")) == 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfprune",
        description="Prune language models and measure the pruned models. `snakemake --cores all` runs a "
        "whole experiment; the commands below run single steps.",
        epilog="`hfprune COMMAND --help` explains a command and shows an example.",
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add_stages(commands)
    for module in (results, report, timing, deploy, sharing, experiment, families, wrappers):
        for command in module.COMMANDS:
            add_typed(commands, command)
    store_help = "List or verify the artifacts in the store, or remove those that no experiment uses."
    store_parser = commands.add_parser("store", help=store_help, description=store_help)
    actions = store_parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for command in store.COMMANDS:
        add_typed(actions, command)
    return parser

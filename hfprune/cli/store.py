"""Commands that manage the store."""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hfprune.cli.commands import Command, Option
from hfprune.errors import UserError
from hfprune.experiment.plan import Plan, store_root
from hfprune.experiment.schema import load
from hfprune.store.artifacts import Store

CONFIGS = Option(is_positional=True, metavar="config")


class ManageStore(Command):
    """A command on a store, which `--store` or the experiments' configs name."""

    store: Path | None = Field(
        None, description="folder of the store (default: the configs' store, $HFPRUNE_STORE, or else store)"
    )

    def opened(self, configs: list[Path]) -> tuple[Store, list[Plan]]:
        """Open the store, and plan the experiments."""
        plans = [Plan(load(file)) for file in configs]
        roots = {self.store} if self.store else {plan.store.root for plan in plans} or {store_root(Path("store"))}
        if len(roots) > 1:
            raise UserError(f"these experiments have {len(roots)} stores, {', '.join(sorted(map(str, roots)))}.")
        return Store(roots.pop()), plans


class List(ManageStore):
    """List every artifact with its inputs, its size and the experiments that use it."""

    words = ("store", "list")
    examples = ("hfprune store list config.yaml configs/llama-2-7b.yaml",)
    configs: Annotated[list[Path], CONFIGS] = Field([], description="the experiments' config files")

    def run(self) -> None:
        """Print the list."""
        from hfprune.experiment import inventory

        store, plans = self.opened(self.configs)
        print(inventory.listing(inventory.entries(store), inventory.users(plans, store)))


class Verify(ManageStore):
    """Compare every file with the SHA-256 in its manifest, and set damaged artifacts aside."""

    words = ("store", "verify")
    examples = ("hfprune store verify --store /group/store",)
    keys: Annotated[list[str], Option(is_positional=True, metavar="KEY")] = Field(
        [], description="verify only these artifacts (default: all)"
    )

    def run(self) -> None:
        """Print the damaged artifacts."""
        from hfprune.experiment import inventory

        store, _ = self.opened([])
        entries = inventory.entries(store)
        if unknown := set(self.keys) - {entry.key for entry in entries}:
            raise UserError(
                f"{store.root}: no artifact {', '.join(sorted(unknown))}; `hfprune store list` shows all keys."
            )
        chosen = [entry for entry in entries if not self.keys or entry.key in self.keys]
        wrong = inventory.verify(chosen)
        for message in wrong:
            print(message)
        if wrong:
            raise UserError(
                f"{len(wrong)} artifacts are not whole. Run their experiments again: that makes them again."
            )
        print(f"{sum(entry.kind == 'artifact' for entry in chosen)} artifacts: every file is as its manifest says")


class Prune(ManageStore):
    """List the artifacts that none of these experiments uses, and remove them after you confirm."""

    words = ("store", "prune")
    examples = ("hfprune store prune config.yaml configs/llama-2-7b.yaml",)
    yes: bool = Field(False, description="remove without asking")
    configs: Annotated[list[Path], CONFIGS] = Field(description="the experiments' config files")

    def run(self) -> None:
        """Ask, then remove."""
        from hfprune.experiment import inventory

        store, plans = self.opened(self.configs)
        used = inventory.users(plans, store)
        unused = inventory.unused(inventory.entries(store), used)
        print(inventory.listing(unused, used))
        if not unused:
            return
        if not self.yes and not sys.stdin.isatty():
            print("Nothing is removed: no terminal to ask on. Give --yes to remove all this.")
            return
        if not self.yes and input("Remove all this for good? Only `yes` does: ").strip() != "yes":
            print("Nothing is removed.")
            return
        for entry in unused:
            if not store.remove(entry.stage, entry.key, entry.folder):
                print(f"{entry.stage} {entry.key}: stays, a process is making it")


COMMANDS = (List, Verify, Prune)

"""A checkpoint to share: its files, and a model card with what was measured of it."""

import shutil
from pathlib import Path

from hfprune.errors import UserError
from hfprune.reporting.identity import lineage
from hfprune.reporting.metrics import collect, headline
from hfprune.sharing.model_card import Estimate, Figure, card, read_made
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.filenames import CARD, is_shared

WEIGHTS = (".safetensors", ".safetensors.index.json")

Contents = dict[str, Path | bytes]  # by its path in the checkpoint's folder, a file of the store or what to write


def contents(model: Artifact, results: list[Artifact], store: Store, address: str) -> Contents:
    """All that leaves the store when a checkpoint is shared: named files of its manifest, and a card with figures.

    The manifest, which names this host, stays; and so does whatever else lies in the folder.

    Args:
        model: an artifact of `prune` or `recover`.
        results: artifacts of `measure` and `evaluate`; those of this model and of its dense one are used.
        store: where everything that they were made from has its manifests.
        address: what the card says to load it by.

    Raises:
        UserError: see `figures`.
    """
    written = card(read_made(model.folder), figures(model, results, store), address).encode()
    return {CARD: written} | {
        name: model.folder / name for name in model.manifest["files"] if name != CARD and is_shared(name)
    }


def listing(files: Contents) -> str:
    """The files and their sizes, a line each, and how much they are together."""
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in sorted(files.items())
    }
    lines = [f"{size:>15,} bytes  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()):>15,} bytes  in {len(sizes)} files"])


def check_new(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        UserError: it does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not empty. Name a new folder, or empty this one.")


def export(files: Contents, folder: Path) -> None:
    """Write `contents` into `folder`, which is made."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)


def push(files: Contents, repository: str, private: bool, key: str) -> str:
    """Upload `contents` to a repository of the Hugging Face hub, made where there is none; the commit's address.

    Weights that stand there already are replaced. The token is that of `hf auth login` or HF_TOKEN.

    Args:
        files: what to upload; nothing else is.
        repository: owner/name.
        private: a new repository is private; else it is what the owner's settings say.
        key: the model's, for the commit's message.

    Raises:
        UserError: the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private or None, exist_ok=True)
        there = hub.list_repo_files(repository)
        stale = [name for name in there if "/" not in name and name.endswith(WEIGHTS) and name not in files]
        done = hub.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f"hfprune: {key}",
        )
    except (errors.HTTPError, errors.HFValidationError, ConnectionError) as error:
        raise UserError(
            f"{repository}: the hub refused it: {str(error).splitlines()[0].rstrip('.')}. The name is owner/name, "
            "the owner you or a group of yours; log in with `hf auth login`, or set HF_TOKEN, to a token that may "
            "write there."
        ) from None
    return done.commit_url


def figures(model: Artifact, results: list[Artifact], store: Store) -> list[Figure]:
    """What `results` say of `model`, beside what they say of the dense model that it was cut from.

    Raises:
        UserError: they say nothing of it, two of them say the same thing, or a model was evaluated but not measured.
    """
    dense = lineage(model.key, store)[0]["key"]
    ours = [each for each in results if each.manifest["inputs"]["model"] in (model.key, dense)]
    if not any(each.manifest["inputs"]["model"] == model.key for each in ours):
        raise UserError(
            f"{model.folder}: none of the {len(results)} results is of this model. Give its artifacts of measure and "
            "evaluate: those whose manifest has this key under inputs."
        )
    table = collect(ours, store)
    table = table[table["group"].isin(["fidelity", "perplexity"]) | table.index.isin(headline(table).index)]
    by = ["stage", "task", "metric"]
    if (twice := table[table.duplicated(by)]).size:
        row = twice.iloc[0]
        raise UserError(
            f"{model.folder}: two results give {row['metric']} on {row['task']} of the {row['stage']} model, one of "
            f"them {row['key']}. Give one."
        )
    estimates = {
        tuple(row[name] for name in by): Estimate(
            row["value"], None if row["stderr"] != row["stderr"] else row["stderr"], int(row["n"])
        )
        for _, row in table.iterrows()
    }
    return [
        Figure(metric, task, estimate, estimates.get(("dense", task, metric)))
        for (stage, task, metric), estimate in estimates.items()
        if stage != "dense"
    ]

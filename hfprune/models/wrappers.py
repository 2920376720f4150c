"""Language models inside others, such as models that read images: taken out to be pruned, and put back.

    text = take_out(whole)
    ... prune it, so that its own class holds the result ...
    put_back(whole, text)

What is beside the language model is not touched.
"""

import shutil
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from hfprune.errors import UserError
from hfprune.models.checkpoint import is_tied, probe
from hfprune.models.files import is_out_of_folder, model_files
from hfprune.models.loading import LOCAL, check_family
from hfprune.store.filenames import is_companion

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # of images
SAME = ("model_type", "hidden_size", "vocab_size")  # keys of the text's config that pruning does not change
TOLERANCE = 1e-4  # of logits, beside two units in the last place of the largest: sums may have another order


def load_whole(folder: Path) -> PreTrainedModel:
    """The model in `folder` with all of its parts.

    Raises:
        UserError: transformers has no class for it, or none for its language model alone.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **LOCAL)
    except Exception as error:  # of any class: a file that is missing, an unknown model_type
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder}: no model that reads images and text: {reason}") from None
    config = model.config.get_text_config()
    if config is model.config or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{folder}: transformers makes no language model of {config.model_type!r} alone.")
    return model.eval().requires_grad_(False)


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


def unwrap(source: Path, folder: Path) -> None:
    """Write the language model of the model in `source` into `folder`, with its tokenizer."""
    take_out(load_whole(source)).save_pretrained(folder)
    _copy(source, folder, ())


def rewrap(source: Path, text: Path, folder: Path) -> float:
    """Write the model in `source` with the language model in `text` into `folder`, and reload it.

    Returns:
        The largest difference between the logits of the language model alone and of the reloaded model.

    Raises:
        UserError: see `put_back`; or the difference is larger than rounding.
    """
    config, whole = check_family(text), load_whole(source)
    try:
        _refuse_misfit(whole.config.get_text_config(), config)
    except UserError as error:
        raise UserError(f"{text}: {error}") from None
    small = AutoModelForCausalLM.from_pretrained(text, dtype="auto", **LOCAL).eval()
    tokens = probe(config)
    with torch.no_grad():
        expected = small(tokens).logits
    put_back(whole, small)
    whole.save_pretrained(folder)
    _copy(source, folder, PROCESSORS)
    with torch.no_grad():
        difference = (load_whole(folder)(input_ids=tokens).logits - expected).abs().max().item()
    if difference > max(TOLERANCE, 2 * torch.finfo(expected.dtype).eps * expected.abs().max().item()):
        raise UserError(f"{source}: with {text} in it, it reloads as another model: logits differ by {difference:.3g}.")
    return difference


def _copy(source: Path, folder: Path, others: tuple[str, ...]) -> None:
    """Copy the tokenizer, other companions and files of these names."""
    found = [name for name in others if (source / name).is_file() and not is_out_of_folder(source / name, source)]
    for name in [*filter(is_companion, model_files(source)), *found]:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)

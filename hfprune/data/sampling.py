"""Sampling of token sequences from documents. Only the seed decides which documents and which tokens."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hfprune.data.readers import RANDOM, read_records
from hfprune.errors import UserError
from hfprune.models.context import check_lengths
from hfprune.store.filenames import DOCUMENTS


def check_vocabulary(largest: int, vocabulary: int) -> None:
    """Refuse a tokenizer with token ids that the model does not know.

    Raises:
        UserError: the `largest` id is not below `vocabulary`.
    """
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer gives token id {largest}, but the model knows ids up to {vocabulary - 1}: "
            "the tokenizer is another model's."
        )


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids that a tokenizer adds before and after every text.

    Raises:
        UserError: it changes the text's own tokens too.
    """
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise UserError(f"the tokenizer gives {whole} for 'a' and without special tokens {plain}: no part of that.")


def sample_sequences(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, folder: Path, samples: int, length: int, seed: int
) -> Tensor:
    """Token sequences of a text: see `draw_sequences`, of random tokens `random_sequences`.

    Of a mixture, each text gives as many sequences, the first ones one more where that does not come out even. They
    take turns, so that any first part of the sequences is as mixed as the whole.

    Raises:
        UserError: the text consists of instructions; there are fewer samples than texts in the mixture; and see there.
    """
    records = read_records(folder)
    if records == [RANDOM]:
        return random_sequences(tokenizer, config, samples, length, seed)
    if any("text" not in record for record in records):
        raise UserError(f"{folder / DOCUMENTS}: holds instructions; plain text is needed here. Download it by `field`.")
    texts: dict[int, list[str]] = {}
    for record in records:
        texts.setdefault(record.get("source", 0), []).append(record["text"])
    if samples < len(texts):
        raise UserError(f"{folder / DOCUMENTS}: mixes {len(texts)} texts; ask for at least as many samples.")
    drawn = []
    for number, documents in texts.items():
        share = len(range(number, samples, len(texts)))
        origin = f"{folder / DOCUMENTS}" + (f", text {number + 1} of the mixture" if len(texts) > 1 else "")
        drawn.append(draw_sequences(tokenizer, config, documents, share, length, seed, origin))
    return torch.stack([drawn[turn % len(drawn)][turn // len(drawn)] for turn in range(samples)])


def random_sequences(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, samples: int, length: int, seed: int
) -> Tensor:
    """Tokens drawn by the seed, each with the same probability, from all of the vocabulary that are not special.

    The control of SPA (arXiv 2403.18955): what calibration is worth without a text.

    Returns:
        (samples, length) int64 token ids.

    Raises:
        UserError: the model has a shorter context, or the tokenizer is not the model's.
    """
    check_lengths(config.to_dict(), {"length": length})
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    vocabulary = sorted({*tokenizer.get_vocab().values()} - special - {*tokenizer.all_special_ids})
    check_vocabulary(vocabulary[-1], config.vocab_size)
    drawn = random.Random(seed).choices(vocabulary, k=samples * length)
    return torch.tensor(drawn).view(samples, length)


def draw_sequences(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    documents: Sequence[str],
    samples: int,
    length: int,
    seed: int,
    origin: str,
) -> Tensor:
    """Sample one sequence of `length` tokens from each of `samples` documents.

    Documents are shuffled by the seed, and those shorter than `length` tokens are skipped. A sequence begins at a
    random token of its document. There is no padding, no special token, and no sequence crosses a document's end.

    Args:
        tokenizer: the model's.
        config: the model's.
        documents: the text.
        samples: how many sequences.
        length: tokens of each.
        seed: decides which.
        origin: what messages call the text.

    Returns:
        (samples, length) int64 token ids.

    Raises:
        UserError: the model has a shorter context, too few documents are long enough, or the
            tokenizer is not the model's.
    """
    check_lengths(config.to_dict(), {"length": length})
    generator = random.Random(seed)  # Mersenne Twister: the same on every machine and version
    order = list(range(len(documents)))
    generator.shuffle(order)
    sequences: list[list[int]] = []
    for index in order:
        if len(sequences) == samples:
            break
        ids = tokenizer(documents[index], add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            start = generator.randrange(len(ids) - length + 1)
            sequences.append(ids[start : start + length])
    if len(sequences) < samples:
        raise UserError(
            f"{origin}: only {len(sequences)} of its {len(documents)} documents have {length} tokens, and "
            f"{samples} are asked for. Set a smaller `samples` or `length`, or give a longer text."
        )
    tokens = torch.tensor(sequences)
    check_vocabulary(int(tokens.max()), config.vocab_size)
    return tokens

"""Log-likelihoods for lm-eval. The common beginning of several requests is computed once.

The choices of a question share its context, and often their first words too. lm-eval's class runs every choice as a
separate row, with logits and their softmax at every position. Here the token sequences of a question are merged into
one tree, which holds a common beginning once. A row of a batch is a tree. Every token attends to the tokens on its path
from the root, and its position counts along that path. Logits are computed only where a token of a continuation is
predicted.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfprune.data.sampling import added_tokens, check_vocabulary
from hfprune.errors import UserError
from hfprune.models.activations import forward_bytes
from hfprune.models.families import layout_of
from hfprune.models.head import Head, head_of
from hfprune.models.loading import LINEAR
from hfprune.models.streamed import device_of
from hfprune.models.units import layers_of, parts
from hfprune.runtime.memory import empty_cache, free_bytes, is_out_of_memory

TOKENS = {"cpu": 2**11, "cuda": 2**15}  # largest batch: larger ones are no faster, even with free memory
ROWS = 64  # rows in lm-eval's batches
FILLED = 0.75  # shortest row of a batch, as a share of the longest: padding is computed too
LOGITS = 2**24  # logits to compute at once

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (context, continuation) as text; tokens of both
Answer = tuple[float, bool]  # log-likelihood, and whether every token is the likeliest one
Result = TypeVar("Result")


class Stock(HFLM):
    """lm-eval's class for a model, with batches that fit into memory."""

    def __init__(self, pretrained: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(pretrained=pretrained, tokenizer=_open_ended(tokenizer), batch_size=ROWS)
        self._device = device_of(pretrained)  # lm-eval takes the weights' own: that of streamed weights is "meta"
        self.rows = ROWS  # largest batch; smaller after memory has run out

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's method. It adds a beginning-of-sequence token itself, so the tokenizer must not add another."""
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = None

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        """As lm-eval's method.

        Raises:
            UserError: the tokenizer returns an id outside the model's vocabulary.
        """
        tokens = super().tok_encode(string, *args, **options)
        check_vocabulary(max(tokens, default=0), self.model.config.vocab_size)
        return tokens

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **_: Any) -> list[Answer]:
        compute = super()._loglikelihood_tokens
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
        return self._in_batches(len(requests), min(longest, self.max_length), lambda: compute(requests, disable_tqdm))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's method.

        Raises:
            UserError: one prompt alone does not fit into memory.
        """
        compute = super().generate_until
        longest = max(
            (len(self.tok_encode(text)) + settings.get("max_gen_toks", self.max_gen_toks))
            for text, settings in (request.args for request in requests)
        )
        return self._in_batches(len(requests), min(longest, self.max_length), lambda: compute(requests, disable_tqdm))

    def _in_batches(self, count: int, length: int, compute: Callable[[], Result]) -> Result:
        """Run `compute` with as many of `count` rows of `length` tokens as fit. Retry with half if memory runs out.

        lm-eval takes the longest rows first. So memory runs out early, if at all, and little work is lost.
        """
        fitting = free_bytes(self.device) // 2 // forward_bytes(self.model, length, whole=True)
        try:
            while True:
                self.batch_size_per_gpu = max(1, min(self.rows, fitting, count))
                try:
                    return compute()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if self.batch_size_per_gpu == 1:
                        raise _too_large(f"a row of {length} tokens", self.model) from None
                empty_cache(self.device)
                self.rows = self.batch_size_per_gpu // 2
                print(f"out of memory: again, with {self.rows} rows at a time", flush=True)
        finally:
            self.batch_size_per_gpu = ROWS


def _open_ended(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer without a token after the text: lm-eval scores how a text continues.

    Raises:
        UserError: the tokenizer adds such a token, and this cannot be switched off.
    """
    before, after = added_tokens(tokenizer)
    if not after:
        return tokenizer
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"the tokenizer puts {tokenizer.decode(after)!r} behind every text, which no task can be asked with. "
            "Switch that off in its tokenizer_config.json (add_eos_token)."
        )
    changed = copy.deepcopy(tokenizer)
    tokens = list(zip(tokenizer.convert_ids_to_tokens(before), before, strict=True))
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*(token for token, _ in tokens), "$A"], special_tokens=tokens
    )
    return changed


class Shared(Stock):
    """The same answers in less time. In float32 they differ by up to 1e-4, since sums have another order.

    Logits are normalised in float32 for any type of model; lm-eval's class uses the model's type.
    """

    def __init__(self, pretrained: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(pretrained, tokenizer)
        self.tokens = TOKENS[self.device.type]  # largest batch; smaller after memory has run out

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **_: Any) -> list[Answer]:
        answers: list[Answer] = [(0.0, True)] * len(requests)
        waiting = self._trees(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            while waiting:
                batch = self._next_batch(waiting)
                batch_answers = self._try(batch)
                if batch_answers is None:
                    waiting[: len(batch)] = self._smaller(batch)
                    continue
                for line, answer in zip((line for tree in batch for line in tree.lines), batch_answers, strict=True):
                    answers[line.request] = answer
                    if (text := requests[line.request][0]) is not None:  # a window of a longer text has none
                        self.cache_hook.add_partial("loglikelihood", text, answer)
                    bar.update()
                del waiting[: len(batch)]
        return answers

    def _trees(self, requests: Iterable[Request]) -> list["Tree"]:
        """The largest first: neighbours have similar sizes, and memory runs out early, if at all."""
        return sorted(trees(self._lines(requests), self.model), key=lambda tree: -tree.size)

    def _next_batch(self, waiting: Sequence["Tree"]) -> list["Tree"]:
        """The first trees, as many as are computed at once."""
        longest = waiting[0].size
        return [tree for tree in waiting[: self._batch_size(longest)] if tree.size >= FILLED * longest]

    def _lines(self, requests: Iterable[Request]) -> list["Line"]:
        """The model's input for each request. Input that is too long is cut at its beginning, as in lm-eval's class.

        Raises:
            UserError: the context or the continuation is empty, or the continuation is longer than the model's context.
        """
        lines, cut = [], 0
        for number, (text, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"{len(continuation)} tokens to predict from {len(context)}: expected 1 to {self.max_length} from "
                    f"at least 1, in {_excerpt(text)}."
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            cut += len(tokens) < len(context) + len(continuation)
            lines.append(Line(number, tuple(tokens[:-1]), tuple(continuation), _excerpt(text)))
        if cut:
            print(f"{cut} of {len(lines)} rows are cut at their beginning to {self.max_length} tokens", flush=True)
        return lines

    def _batch_size(self, size: int) -> int:
        """The number of trees of `size` tokens to compute at once."""
        fitting = free_bytes(self.device) // 2 // forward_bytes(self.model, size)
        return max(1, min(self.tokens // size, fitting))

    def _try(self, batch: Sequence["Tree"]) -> list[Answer] | None:
        """The batch's answers, or None if memory runs out."""
        try:
            return forward(self.model, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        empty_cache(self.device)
        return None

    def _smaller(self, batch: list["Tree"]) -> list["Tree"]:
        """Make batches smaller from now on, and return this batch's trees, a single tree split into two.

        Raises:
            UserError: the batch is a single line, which cannot be split.
        """
        if len(batch) == len(batch[0].lines) == 1:
            raise _too_large(f"{batch[0].size} tokens, {batch[0].lines[0].excerpt},", self.model)
        self.tokens = len(batch) * batch[0].size // 2
        print(f"out of memory: going on with {self.tokens} tokens at a time", flush=True)
        if len(batch) > 1:
            return batch
        lines, middle = batch[0].lines, len(batch[0].lines) // 2
        return [Tree(lines[:middle]), Tree(lines[middle:])]


@dataclass(frozen=True)
class Line:
    """One path from a tree's root to a leaf.

    Attributes:
        request: number of the request.
        tokens: token ids of the model's input.
        targets: token ids that the last input tokens predict.
        excerpt: the request's text, for messages.
    """

    request: int
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    excerpt: str


class Tree:
    """Lines, sorted by their tokens. Every line shares its beginning with the line before.

    Attributes:
        lines: one line or more.
        size: number of tokens; shared tokens count once.
        is_chain: whether the tree has no branches: every line is a beginning of the last one.
    """

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines
        self.size = len(lines[0].tokens) + sum(
            len(line.tokens) - _common(before.tokens, line.tokens) for before, line in pairwise(lines)
        )
        self.is_chain = self.size == len(lines[-1].tokens)

    def layout(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The tree as a row of a batch.

        Returns:
            (size,) token ids; (size,) their positions; (size, size) bool, whether a token attends to another; and for
            each line the indices of its tokens in the row.
        """
        tokens, positions = torch.zeros(2, self.size, dtype=torch.int64)
        visible = torch.zeros(self.size, self.size, dtype=torch.bool)
        paths: list[Tensor] = []
        used, before = 0, ()
        for line in self.lines:
            common, length = _common(before, line.tokens), len(line.tokens)
            new = torch.arange(used, used + length - common)
            path = torch.cat([paths[-1][:common], new]) if paths else new
            tokens[new] = torch.tensor(line.tokens[common:], dtype=torch.int64)
            positions[new] = torch.arange(common, length)
            visible[new[:, None], path] = torch.ones(length, length, dtype=torch.bool).tril()[common:]
            paths.append(path)
            used, before = used + len(new), line.tokens
        return tokens, positions, visible, paths


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens in the common beginning of two lines."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))  # noqa: B905


def trees(lines: Iterable[Line], model: PreTrainedModel) -> list[Tree]:
    """Group lines into trees wherever a common beginning saves more than it costs.

    A row of n tokens costs n times the weights' products and n squared times attention, since every token of a row
    attends, masked, to the whole row. So lines that share a question form one tree; lines that share only a first word
    do not. Where the model has no branches (`layout.Layout.branches`), every line is a tree.
    """
    if not layout_of(model).branches:
        return [Tree([line]) for line in lines]
    pairs = _pairs_per_token(model)

    def cost(size: int) -> float:
        return size + size * size / pairs

    groups: list[list[Line]] = []
    size, largest = 0, TOKENS[device_of(model).type]
    for line in sorted(lines, key=lambda line: line.tokens):
        length = len(line.tokens)
        together = size + length - _common(groups[-1][-1].tokens, line.tokens) if groups else 0
        if groups and together <= largest and cost(together) < cost(size) + cost(length):
            groups[-1].append(line)
            size = together
        else:
            groups.append([line])
            size = length
    return [Tree(group) for group in groups]


def _pairs_per_token(model: PreTrainedModel) -> float:
    """The number of attended tokens that cost as much as the weights' products of one token.

    A token costs two operations for each weight of a layer, and four for each head dimension and attended token.
    """
    weights = sum(module.weight.numel() for module in layers_of(model).modules() if isinstance(module, LINEAR))
    return weights / sum(2 * part.width for part in parts(model, "attention"))


class Rows:
    """Some trees as the rows of a batch, padded at the end.

    Attributes:
        tokens: (batch, length) int64.
    """

    def __init__(self, batch: Sequence[Tree]) -> None:
        length = max(tree.size for tree in batch)
        self.tokens, self._positions = torch.zeros(2, len(batch), length, dtype=torch.int64)
        visible = torch.eye(length, dtype=torch.bool).repeat(len(batch), 1, 1)  # padding attends to itself
        places, targets, owners = [], [], []  # of every predicted token: index in the batch, token id, line
        for row, tree in enumerate(batch):
            part = slice(tree.size)
            self.tokens[row, part], self._positions[row, part], visible[row, part, part], paths = tree.layout()
            for line, path in zip(tree.lines, paths, strict=True):
                owners += [len(places)] * len(line.targets)
                places.append(row * length + path[-len(line.targets) :])
                targets += line.targets
        # Chains are ordinary rows: no mask needed.
        self._visible = None if all(tree.is_chain for tree in batch) else visible
        self._lines = len(places)
        self._places, self._targets, self._owners = torch.cat(places), torch.tensor(targets), torch.tensor(owners)

    def inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        """What the model is given beside the tokens."""
        if self._visible is None:
            return {}
        masks = _masks(model, self._visible, self._positions)
        return {"position_ids": self._positions.to(device_of(model)), "attention_mask": masks}

    def answers(self, hidden: Tensor, head: Head) -> list[Answer]:
        """The answers of all lines, in order, from the final hidden states (batch, length, hidden)."""
        log_likelihoods, likeliest = _predicted(hidden.flatten(0, 1), head, self._places, self._targets)
        sums = torch.zeros(self._lines, dtype=torch.float64).index_add_(0, self._owners, log_likelihoods)
        misses = torch.zeros(self._lines, dtype=torch.int64).index_add_(0, self._owners, (~likeliest).long())
        return [(total, missed == 0) for total, missed in zip(sums.tolist(), misses.tolist(), strict=True)]


@torch.no_grad()
def forward(model: PreTrainedModel, batch: Sequence[Tree]) -> list[Answer]:
    """The answers of all lines of some trees, in order."""
    rows = Rows(batch)
    tokens = rows.tokens.to(model.device)
    hidden = model.base_model(input_ids=tokens, use_cache=False, **rows.inputs(model)).last_hidden_state
    with head_of(model) as head:
        return rows.answers(hidden, head)


def _masks(model: PreTrainedModel, visible: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """Additive attention masks, (batch, 1, length, length); a dict by kind of layer if the model has several kinds.

    Args:
        model: gives the type of the masks and the window of sliding attention.
        visible: (batch, length, length) bool, the tokens on each token's path.
        positions: (batch, length) positions of the tokens.
    """

    def additive(allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill_(~allowed, torch.finfo(model.dtype).min)
        return mask[:, None].to(device_of(model))

    window = getattr(model.config, "sliding_window", None)
    near = visible if window is None else visible & (positions[:, :, None] - positions[:, None] < window)
    if not layout_of(model).masks_by_kind:
        return additive(near)
    return {"full_attention": additive(visible), "sliding_attention": additive(near)}


def _predicted(hidden: Tensor, head: Head, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and which of them are the likeliest tokens, computed in chunks of places.

    Args:
        hidden: (tokens, hidden size) final hidden states.
        head: the model's head.
        places: (predictions,) indices in `hidden`; several lines may share one place.
        targets: (predictions,) token ids.

    Returns:
        (predictions,) float64 and (predictions,) bool, on the CPU.
    """
    distinct, owner = places.unique(return_inverse=True)
    log_likelihoods = torch.zeros(len(targets), dtype=torch.float64)
    likeliest = torch.zeros(len(targets), dtype=torch.bool)
    size = max(1, LOGITS // head.vocabulary)
    for start in range(0, len(distinct), size):
        chunk = distinct[start : start + size].to(hidden.device)
        # As in lm-eval's class. On a CPU this rounds 1e-6 per token more than a sum in float64.
        log_p = head.logits(hidden[chunk].to(head.weight.device)).log_softmax(-1)
        in_chunk = ((owner >= start) & (owner < start + size)).nonzero()[:, 0]
        rows, labels = (owner[in_chunk] - start).to(log_p.device), targets[in_chunk].to(log_p.device)
        log_likelihoods[in_chunk] = log_p[rows, labels].double().cpu()
        likeliest[in_chunk] = (log_p.argmax(-1)[rows] == labels).cpu()
    return log_likelihoods, likeliest


def _excerpt(text: tuple[str, str] | None) -> str:
    """A request's text, shortened for a message."""
    words = "a window of a longer text" if text is None else repr("".join(text))
    return words if len(words) < 100 else f"{words[:60]} ... {words[-30:]}"


def _too_large(what: str, model: PreTrainedModel) -> UserError:
    device = device_of(model)
    return UserError(
        f"out of memory: {what} does not fit on {device}, where {free_bytes(device) / 2**30:.1f} GiB are free. Take a "
        "device with more memory, `dtype: bfloat16`, or documents that are not so long."
    )

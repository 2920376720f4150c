"""Log-likelihoods for lm-eval that compute what questions have in common once.

The choices of a question share its context, and often their own first words. lm-eval's class runs every choice as a row
of its own, with logits and their softmax at every position. Here the token sequences of a question are merged into one
tree, in which a common beginning stands once. A row of a batch is a tree: every token sees those on its way from the
root, its position counts along that way, and logits are computed only where a token of a continuation is predicted.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfprune.data.sampling import added_tokens, check_vocabulary
from hfprune.errors import UserError
from hfprune.models.loading import logits_of, weights_in_memory
from hfprune.runtime.memory import empty_cache, forward_bytes, free_bytes, is_out_of_memory

# What a batch holds at most, however much memory is free: more is no faster.
TOKENS = {"cpu": 2**11, "cuda": 2**15}
ROWS = 64  # of lm-eval's own batches
FILLED = 0.75  # of the longest row of a batch is in every other one, at least: what pads it is computed too
LOGITS = 2**24  # computed at once

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # context and continuation, and the tokens of each
Answer = tuple[float, bool]  # log-likelihood, and whether every token is the likeliest one
Result = TypeVar("Result")


class Stock(HFLM):
    """lm-eval's own class around a model, with batches that fit into memory."""

    def __init__(self, pretrained: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(pretrained=pretrained, tokenizer=_open_ended(tokenizer), batch_size=ROWS)
        self.rows = ROWS  # at most; fewer once memory has run out

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's own, which puts a token of beginning before a text: the tokenizer's own is not put there too."""
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = None

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        """As lm-eval's own.

        Raises:
            UserError: the tokenizer gives an id that the model does not know.
        """
        tokens = super().tok_encode(string, *args, **options)
        check_vocabulary(max(tokens, default=0), self.model.config.vocab_size)
        return tokens

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **_: Any) -> list[Answer]:
        compute = super()._loglikelihood_tokens
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
        return self._halving(len(requests), min(longest, self.max_length), lambda: compute(requests, disable_tqdm))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's own.

        Raises:
            UserError: one prompt alone does not fit into memory.
        """
        compute = super().generate_until
        longest = max(
            (len(self.tok_encode(text)) + how.get("max_gen_toks", self.max_gen_toks))
            for text, how in (request.args for request in requests)
        )
        return self._halving(len(requests), min(longest, self.max_length), lambda: compute(requests, disable_tqdm))

    def _halving(self, count: int, length: int, compute: Callable[[], Result]) -> Result:
        """`compute` with as many of `count` rows of `length` tokens as fit; again with half as many if memory runs out.

        lm-eval takes the longest first, so that it runs out, if at all, before much is done.
        """
        fitting = free_bytes(self.model.device) // 2 // forward_bytes(self.model, length, whole=True)
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
                empty_cache(self.model.device)
                self.rows = self.batch_size_per_gpu // 2
                print(f"out of memory: again, with {self.rows} rows at a time", flush=True)
        finally:
            self.batch_size_per_gpu = ROWS


def _open_ended(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, which puts nothing behind a text: what lm-eval asks about is how a text goes on.

    Raises:
        UserError: this tokenizer does, and cannot be told not to.
    """
    before, behind = added_tokens(tokenizer)
    if not behind:
        return tokenizer
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"the tokenizer puts {tokenizer.decode(behind)!r} behind every text, which no task can be asked with. "
            "Switch that off in its tokenizer_config.json (add_eos_token)."
        )
    changed = copy.deepcopy(tokenizer)
    tokens = list(zip(tokenizer.convert_ids_to_tokens(before), before, strict=True))
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*(token for token, _ in tokens), "$A"], special_tokens=tokens
    )
    return changed


class Shared(Stock):
    """The same answers in less time: within 1e-4 in float32, since sums are in another order.

    Whatever the model's type, logits are normalised in float32; lm-eval's class keeps to the model's type.
    """

    def __init__(self, pretrained: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(pretrained, tokenizer)
        self.tokens = TOKENS[pretrained.device.type]  # in a batch at most; fewer once memory has run out

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **_: Any) -> list[Answer]:
        answers: list[Answer] = [(0.0, True)] * len(requests)
        # The largest first: neighbours are alike; memory runs out, if at all, before much is done.
        waiting = sorted(trees(self._lines(requests), self.model), key=lambda tree: -tree.size)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            while waiting:
                longest = waiting[0].size
                batch = [tree for tree in waiting[: self._fitting(longest)] if tree.size >= FILLED * longest]
                found = self._try(batch)
                if found is None:
                    waiting[: len(batch)] = self._halved(batch)
                    continue
                for line, answer in zip((line for tree in batch for line in tree.lines), found, strict=True):
                    answers[line.request] = answer
                    if (text := requests[line.request][0]) is not None:  # a window of a longer text has none
                        self.cache_hook.add_partial("loglikelihood", text, answer)
                    bar.update()
                del waiting[: len(batch)]
        return answers

    def _lines(self, requests: Iterable[Request]) -> list["Line"]:
        """What goes into the model for each request, without what is too long at its beginning, as in lm-eval's class.

        Raises:
            UserError: nothing is to be predicted, or from nothing, or more than the model can see.
        """
        lines, cut = [], 0
        for number, (text, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"{len(continuation)} tokens to predict from {len(context)}: expected 1 to {self.max_length} from "
                    f"at least 1, in {_shown(text)}."
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            cut += len(tokens) < len(context) + len(continuation)
            lines.append(Line(number, tuple(tokens[:-1]), tuple(continuation), _shown(text)))
        if cut:
            print(f"{cut} of {len(lines)} rows are cut at their beginning to {self.max_length} tokens", flush=True)
        return lines

    def _fitting(self, size: int) -> int:
        """How many trees of that size to take at once."""
        free = free_bytes(self.model.device) // 2 // forward_bytes(self.model, size)
        return max(1, min(self.tokens // size, free))

    def _try(self, batch: Sequence["Tree"]) -> list[Answer] | None:
        """The batch's answers; None where memory runs out."""
        try:
            return forward(self.model, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        empty_cache(self.model.device)
        return None

    def _halved(self, batch: list["Tree"]) -> list["Tree"]:
        """The same batch to be taken in smaller parts.

        Raises:
            UserError: it is one line, which has no parts.
        """
        if len(batch) == len(batch[0].lines) == 1:
            raise _too_large(f"{batch[0].size} tokens, {batch[0].lines[0].shown},", self.model)
        self.tokens = len(batch) * batch[0].size // 2
        print(f"out of memory: going on with {self.tokens} tokens at a time", flush=True)
        if len(batch) > 1:
            return batch
        lines, middle = batch[0].lines, len(batch[0].lines) // 2
        return [Tree(lines[:middle]), Tree(lines[middle:])]


@dataclass(frozen=True)
class Line:
    """One way through a tree.

    Attributes:
        request: number of the request that it answers.
        tokens: what goes into the model.
        targets: what the last tokens predict.
        shown: its words, for a message.
    """

    request: int
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    shown: str


class Tree:
    """Lines, sorted by their tokens, of which each shares its beginning with the one before.

    Attributes:
        lines: at least one.
        size: how many tokens it has, what is shared counted once.
        is_chain: no two lines part: all are beginnings of the last.
    """

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines
        self.size = len(lines[0].tokens) + sum(
            len(line.tokens) - _common(before.tokens, line.tokens) for before, line in pairwise(lines)
        )
        self.is_chain = self.size == len(lines[-1].tokens)

    def layout(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The tree as a row.

        Returns:
            (size,) tokens, (size,) their positions, (size, size) bool, which token sees which, and for each line the
            places of its tokens.
        """
        tokens, positions = torch.zeros(2, self.size, dtype=torch.int64)
        seen = torch.zeros(self.size, self.size, dtype=torch.bool)
        ways: list[Tensor] = []
        used, before = 0, ()
        for line in self.lines:
            common, length = _common(before, line.tokens), len(line.tokens)
            new = torch.arange(used, used + length - common)
            way = torch.cat([ways[-1][:common], new]) if ways else new
            tokens[new] = torch.tensor(line.tokens[common:], dtype=torch.int64)
            positions[new] = torch.arange(common, length)
            seen[new[:, None], way] = torch.ones(length, length, dtype=torch.bool).tril()[common:]
            ways.append(way)
            used, before = used + len(new), line.tokens
        return tokens, positions, seen, ways


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lines have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))  # noqa: B905


def trees(lines: Iterable[Line], model: PreTrainedModel) -> list[Tree]:
    """Lines in trees, of one or more, wherever a common beginning saves more than it costs.

    A row of n tokens costs n times the weights' products and n squared times attention: what stands in a row attends,
    masked, to all of it. So lines that share a question come together, and those that share a first word do not.
    """
    pairs = _pairs_per_token(model)

    def cost(size: int) -> float:
        return size + size * size / pairs

    found: list[list[Line]] = []
    size, most = 0, TOKENS[model.device.type]
    for line in sorted(lines, key=lambda line: line.tokens):
        length = len(line.tokens)
        together = size + length - _common(found[-1][-1].tokens, line.tokens) if found else 0
        if found and together <= most and cost(together) < cost(size) + cost(length):
            found[-1].append(line)
            size = together
        else:
            found.append([line])
            size = length
    return [Tree(each) for each in found]


def _pairs_per_token(model: PreTrainedModel) -> float:
    """To how many tokens one may attend for the arithmetic of the weights' products of one token.

    Two operations for each weight of a layer, four for each dimension of each head and each token attended to.
    """
    weights = sum(each.weight.numel() for each in model.model.layers.modules() if isinstance(each, nn.Linear))
    return weights / sum(2 * layer.self_attn.q_proj.out_features for layer in model.model.layers)


@torch.no_grad()
def forward(model: PreTrainedModel, batch: Sequence[Tree]) -> list[Answer]:
    """The answers of all lines of some trees, in their order."""
    length = max(tree.size for tree in batch)
    tokens, positions = torch.zeros(2, len(batch), length, dtype=torch.int64)
    seen = torch.eye(length, dtype=torch.bool).repeat(len(batch), 1, 1)  # padding sees itself
    places, targets, owners = [], [], []  # of every token that is predicted: where, what, for which line
    for row, tree in enumerate(batch):
        part = slice(tree.size)
        tokens[row, part], positions[row, part], seen[row, part, part], ways = tree.layout()
        for line, way in zip(tree.lines, ways, strict=True):
            owners += [len(places)] * len(line.targets)
            places.append(row * length + way[-len(line.targets) :])
            targets += line.targets
    given = {"input_ids": tokens.to(model.device)}
    if not all(tree.is_chain for tree in batch):  # else the rows are such as the model knows, with padding behind
        given |= {"position_ids": positions.to(model.device), "attention_mask": _masks(model, seen, positions)}
    hidden = model.model(**given, use_cache=False).last_hidden_state.flatten(0, 1)  # (batch * length, hidden)
    with weights_in_memory(output := model.get_output_embeddings()):
        found, likeliest = _predicted(hidden, output.weight, torch.cat(places), torch.tensor(targets))
    lines = torch.tensor(owners)
    sums = torch.zeros(len(places), dtype=torch.float64).index_add_(0, lines, found)
    misses = torch.zeros(len(places), dtype=torch.int64).index_add_(0, lines, (~likeliest).long())
    return [(total, missed == 0) for total, missed in zip(sums.tolist(), misses.tolist(), strict=True)]


def _masks(model: PreTrainedModel, seen: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """What the model adds to attention's scores, (batch, 1, length, length), by kind of layer where it has kinds.

    Args:
        model: says in which type, and how far back its layers see.
        seen: (batch, length, length) bool, the tokens on each token's way.
        positions: (batch, length) of the tokens.
    """

    def added(visible: Tensor) -> Tensor:
        zero = torch.zeros(visible.shape, dtype=model.dtype).masked_fill_(~visible, torch.finfo(model.dtype).min)
        return zero[:, None].to(model.device)

    window = getattr(model.config, "sliding_window", None)
    near = seen if window is None else seen & (positions[:, :, None] - positions[:, None] < window)
    if not hasattr(model.model, "has_sliding_layers"):  # one kind
        return added(near)
    sliding = {"sliding_attention": added(near)} if model.model.has_sliding_layers else {}
    return {"full_attention": added(seen)} | sliding


def _predicted(hidden: Tensor, head: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and which of them are the likeliest tokens, a chunk of places at a time.

    Args:
        hidden: (tokens, hidden size) final hidden states.
        head: (vocabulary, hidden size) output projection.
        places: (predictions,) where in `hidden`; one place may predict for several lines.
        targets: (predictions,) token ids.

    Returns:
        (predictions,) float64 and (predictions,) bool, on the CPU.
    """
    distinct, owner = places.unique(return_inverse=True)
    found, likeliest = torch.zeros(len(targets), dtype=torch.float64), torch.zeros(len(targets), dtype=torch.bool)
    size = max(1, LOGITS // head.shape[0])
    for start in range(0, len(distinct), size):
        chunk = distinct[start : start + size].to(hidden.device)
        # As lm-eval's class does it: on a CPU this rounds by 1e-6 a token more than a sum in float64 would.
        log_p = logits_of(hidden[chunk].to(head.device), head).log_softmax(-1)
        mine = ((owner >= start) & (owner < start + size)).nonzero()[:, 0]
        rows, wanted = (owner[mine] - start).to(log_p.device), targets[mine].to(log_p.device)
        found[mine] = log_p[rows, wanted].double().cpu()
        likeliest[mine] = (log_p.argmax(-1)[rows] == wanted).cpu()
    return found, likeliest


def _shown(text: tuple[str, str] | None) -> str:
    """The words of a request, for a message."""
    words = "a window of a longer text" if text is None else repr("".join(text))
    return words if len(words) < 100 else f"{words[:60]} ... {words[-30:]}"


def _too_large(what: str, model: PreTrainedModel) -> UserError:
    free = free_bytes(model.device) / 2**30
    return UserError(
        f"out of memory: {what} does not fit on {model.device}, where {free:.1f} GiB are free. Take a device with more "
        "memory, `dtype: bfloat16`, or documents that are not so long."
    )

"""Log-likelihoods from streamed weights: all requests, of all tasks, pass one layer before the next."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hfprune.errors import UserError
from hfprune.evaluation.shared_prefix import Answer, Request, Rows, Shared
from hfprune.models.head import head_of
from hfprune.models.streamed import in_memory
from hfprune.models.units import layers_of
from hfprune.models.walk import enter, entrance, exit_norm, layers_in_turn, run_layer
from hfprune.runtime.scratch import Scratch

Known = tuple[tuple[int, ...], tuple[int, ...]]  # the tokens of a request: context, continuation


class LayerByLayer(Shared):
    """The answers of `Shared`, from a model whose weights stay in files.

    Attributes:
        folder: for the hidden states of all tokens; None: the system's temporary folder.
    """

    folder: Path | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._answers: dict[Known, Answer] = {}
        self._collected: dict[Known, Request] | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect the requests of the block, which get answers without meaning. At its end answer them all at once."""
        self._collected = {}
        try:
            yield
            collected = list(self._collected.values())
        finally:
            self._collected = None
        self._loglikelihood_tokens(collected)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse.

        Raises:
            UserError: always.
        """
        raise UserError(
            "the task has the model write text, and every written token would read all weights from the disk. Set "
            "`memory: resident`, or leave the task out."
        )

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **_: Any) -> list[Answer]:
        known = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        wanted = {key: request for key, request in zip(known, requests, strict=True) if key not in self._answers}
        if self._collected is not None:
            self._collected |= wanted
            return [(0.0, True)] * len(requests)
        if wanted:
            self._answers |= zip(wanted, self._compute(list(wanted.values())), strict=True)
        return [self._answers[key] for key in known]

    @torch.no_grad()
    def _compute(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers of all requests, by one walk over the layers."""
        waiting, batches = self._trees(requests), []
        while waiting:
            batches.append(self._next_batch(waiting))
            del waiting[: len(batches[-1])]
        rows, model = [Rows(batch) for batch in batches], self.model
        sizes = [each.tokens.numel() for each in rows]
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch, in_memory(*entrance(model)):
            everything = Scratch(Path(scratch, "states"), (sum(sizes), model.config.hidden_size), model.dtype).tensor
            stream = [
                states.view(*each.tokens.shape, -1) for states, each in zip(everything.split(sizes), rows, strict=True)
            ]
            for states, each in zip(stream, rows, strict=True):
                states.copy_(enter(model, each.tokens, **each.inputs(model))[0])
            for number in layers_in_turn(model, "evaluate"):
                for states, each in zip(stream, rows, strict=True):
                    _, arguments = enter(model, each.tokens, **each.inputs(model))  # masks take more room than time
                    layer = layers_of(model)[number]
                    states.copy_(run_layer(layer, states.to(self.device), arguments[number]))
            answers: list[Answer] = [(0.0, True)] * len(requests)
            norm = exit_norm(model)
            with in_memory(norm), head_of(model) as head:
                for states, each, batch in zip(stream, rows, batches, strict=True):
                    lines = [line for tree in batch for line in tree.lines]
                    for line, answer in zip(lines, each.answers(norm(states.to(self.device)), head), strict=True):
                        answers[line.request] = answer
        return answers

"""The search for the width of every layer, by what widths cost, measured.

Scores of units say what a unit costs before the refit. A search measures what is left after it: the KL divergence from
the dense model's predictions to those of a cut and refitted model, on calibration sequences that the refits did not
see. It starts from the widths of one ranking of all units, and exchanges: one layer gives a step, another takes it.
Both steps are of the same part, so as many parameters go as before. (After EvoPress, arXiv 2410.14649, and
Týr-the-Pruner, arXiv 2503.09657, which exchange at random.)

- *Library.* One pass of the calibration text through the dense model gives, for every part, the sums from which
  least squares solves the refit of any width (`Library`). So a width is refitted anew in a moment, and no layer's refit
  depends on another's width.
- *Round.* Every layer is measured one step narrower and one step wider. Pairs of a layer that loses little and one that
  wins much are made, best first, each layer in one pair. The best 1, 2, 4, ... of the pairs, and all of them, are then
  measured together. If the best of these beats the present widths, the next round starts from it; if none does, the
  search ends.

What is measured is kept, so a search that was killed goes on where it was. It draws nothing at random.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hfprune.data.sampling import sample_sequences
from hfprune.errors import UserError
from hfprune.models.families import layout_of
from hfprune.models.loading import flops_of_layers, flops_per_token, load_model, load_tokenizer
from hfprune.models.run_part import run_part
from hfprune.models.streamed import device_of, is_streamed, memory_of
from hfprune.models.units import IN_TURN, Part, Scores, Sublayer, layers_of, matrix, part_of, parts, read_scores
from hfprune.models.units import STRUCTURES as PARTS_OF
from hfprune.models.walk import layers_in_turn, run_layer
from hfprune.pruning.allocation import fewest_kept
from hfprune.pruning.budget import Budget, Shape, refuse_method, refuse_saving, shape_of, units_to_keep
from hfprune.pruning.candidates import Walk, batches, dense_states, divergences, flops_of_walk
from hfprune.pruning.refit import Repair, Space, Streams, flops_of_solution
from hfprune.pruning.saving import Widths, saving_of
from hfprune.pruning.searched import SEARCHED, held_out, save_widths, too_few
from hfprune.pruning.surgery import best_units, units_within, widths_of
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.progress import bar
from hfprune.runtime.signals import Stopped, sigterm_deferred
from hfprune.store.filenames import RESUME, SCORES, WIDTHS

FINEST = 32  # a step is the smallest multiple of `round_to` that is at least this part of an MLP
TOGETHER = 16  # candidates that ride along in one walk
MEASURED = "measured.json"  # in `.resume`: the KL of all that was measured

Change = tuple[Sublayer, int]  # a part of a layer, and its new width


def write_widths(
    folder: Path, model: Path, scores: Path, text: Path, calibration: Mapping[str, Any], structure: str, ridge: float,
    rounds: int, dtype: str, memory: str, **budget: Any,
) -> dict[str, Any]:  # fmt: skip
    """Stage `search`: write the widths found into `folder`.

    Args:
        folder: the artifact's; what is measured is kept in its `.resume`, to go on after a kill.
        model: folder of the checkpoint.
        scores: folder of its scores.
        text: folder of the text that they were made on.
        calibration: `criterion`, `samples`, `length` and `seed` of the scores.
        structure: see `searched.STRUCTURES`.
        ridge: of the refits.
        rounds: the most rounds.
        dtype: of the model's arithmetic.
        memory: "resident" or "auto".
        budget: see `start`.

    Returns:
        Details for the record, see `search`, and the `memory` used.

    Raises:
        UserError: the budget cannot be met, or the model has to be streamed.
    """
    network = load_model(model, dtype, memory, spread=False)
    ranked = read_scores(scores / SCORES)
    refuse_method(shape_of(network), structure, calibration["criterion"], "least_squares")
    sampling = {name: calibration[name] for name in ("samples", "length", "seed")}
    tokens = sample_sequences(load_tokenizer(model), network.config, text, **sampling)
    found, details = search(network, ranked, tokens, structure, ridge, rounds, folder, folder / RESUME, **budget)
    save_widths(folder / WIDTHS, found)
    return details | {"memory": memory_of(network)}


def search(
    model: PreTrainedModel, scores: Scores, tokens: Tensor, structure: str, ridge: float, rounds: int,
    folder: Path | None = None, resume: Path | None = None, **budget: Any,
) -> tuple[list[tuple[Widths, float]], dict[str, Any]]:  # fmt: skip
    """The widths that each round came to, and their KL in nats per token; first those that the search starts from.

    Args:
        model: the dense model, in memory. It is the same afterwards.
        scores: its scores.
        tokens: (sequences, length) int64 calibration tokens, of which `searched.held_out` are measured on.
        structure, ridge, rounds: see `write_widths`.
        folder: for hidden states that do not fit into memory; by default the system's temporary folder.
        resume: folder in which what is measured is kept, to go on after a kill.
        budget: see `start`.

    Returns:
        These, and for the record: `tokens` and `flops`; how many sequences were `held_out`; how many models were
        `measured`; and `forward_passes`, the operations of that as a multiple of one pass over these sequences.

    Raises:
        UserError: the budget cannot be met, or the model's weights are streamed.
    """
    if is_streamed(model):
        raise UserError(
            f"allocation {SEARCHED!r}: a search changes and reads all weights many times, so they cannot be streamed. "
            "Use a machine with more memory, `dtype: bfloat16`, or allocation 'global'."
        )
    if reason := too_few(len(tokens)):
        raise UserError(f"samples {len(tokens)}: {reason}.")
    begun, widths, fits = start(shape_of(model), model.config, scores, structure, **budget)
    searching = WidthSearch(model, scores, tokens, ridge, begun.round_to, fits, folder, resume)
    return searching.run(widths, rounds), searching.details


def start(
    shape: Shape, config: PreTrainedConfig, scores: Scores, structure: str, ratio: float | None, ratio_of: str,
    target_parameters: int | None, round_to: int | None, attention_share: float | None, context: int | None,
    latencies: Path | None,
) -> tuple[Budget, Widths, Callable[[Widths], bool]]:  # fmt: skip
    """What a search starts from: the budget, the widths, and whether others meet it.

    Widths that hold as many parameters meet a budget of parameters, so all of these do. Of memory and latency they may
    take more than asked.

    Args:
        shape, config: of the dense model.
        scores, structure: see `search`.
        ratio, ratio_of, target_parameters, round_to, attention_share: see `budget.units_to_keep`.
        context, latencies: see `saving.saving_of`.

    Raises:
        UserError: the budget cannot be met.
    """
    if saving := saving_of(shape, ratio_of, structure, config, context, latencies):
        refuse_saving(shape, saving, ratio, structure, SEARCHED, round_to)
        budget, kept = units_within(shape, saving, ratio, structure, SEARCHED, round_to, scores)
        return budget, widths_of(kept, budget), lambda widths: saving.share(widths) <= 1 - ratio
    budget = units_to_keep(
        shape, ratio, ratio_of, target_parameters, structure, attention_share, SEARCHED, round_to, scores
    )
    return budget, widths_of(best_units(budget, scores, SEARCHED), budget), lambda _widths: True


class Library:
    """The refits of one part to any number of its units, those with the best scores.

    Args:
        repair: sums over the calibration tokens of the whole part, none of whose units goes.
        scores: (units,) of the part.
        ridge: see `refit.Repair.solve`.
    """

    def __init__(self, repair: Repair, scores: Tensor, ridge: float) -> None:
        self.part, self.ridge, self._about = repair.part, ridge, (repair.name, repair.layer, repair.space)
        self.best_first = scores.sort(descending=True, stable=True).indices
        self.whole, self.gram = matrix(self.part.output).clone(), repair.gram.float().cpu()

    @property
    def weight(self) -> Tensor:
        """(hidden, columns) of the output layer, as it is in the model."""
        return matrix(self.part.output)

    def put(self, width: int) -> None:
        """Refit the part to so many units, in the model, as `refit` with `least_squares` does."""
        self.weight.copy_(self.whole)
        if width == self.part.units:
            return
        repair = Repair(self.part, self.best_first[:width], *self._about)
        gram = self.gram.to(self.weight.device).double()
        repair.gram = gram[repair.kept][:, repair.kept]
        repair.cross = repair.removed_weights.double() @ gram[repair.removed][:, repair.kept]
        repair.silence() if repair.idle else repair.solve(self.ridge)


class WidthSearch:
    """A search.

    Args:
        model, scores, tokens, ridge, folder, resume: see `search`.
        round_to: what MLP widths are multiples of.
        fits: whether widths meet the budget.

    Attributes:
        known: the KL of widths that are measured, by `_key`.
        details: for the record, see `search`.
    """

    def __init__(
        self, model: PreTrainedModel, scores: Scores, tokens: Tensor, ridge: float, round_to: int,
        fits: Callable[[Widths], bool], folder: Path | None = None, resume: Path | None = None,
    ) -> None:  # fmt: skip
        count = held_out(*tokens.shape)
        self.model, self.scores, self.ridge, self.fits = model, scores, ridge, fits
        self.refitted_on, self.tokens, self.folder = tokens[:-count], tokens[-count:], folder
        self.units, self.round_to = shape_of(model).units, round_to
        self.file = resume / MEASURED if resume else None
        self.known: dict[str, float] = {}
        if self.file and self.file.exists():
            self.known = json.loads(self.file.read_text(encoding="utf-8"))
        self.measured, self._flops = 0, 0
        self._each = flops_of_layers(model, tokens.shape[1])
        self._libraries: dict[Sublayer, Library] = {}
        self._present: dict[Sublayer, int] = {}  # the widths that are in the model

    @property
    def details(self) -> dict[str, Any]:
        """See `search`."""
        names = {name for name, _ in self._libraries}
        before = flops_of_libraries(self.model, names, tuple(self.refitted_on.shape))
        one = flops_of_walk(self.model, self.tokens.numel(), self._each, [])
        return {
            "tokens": self.refitted_on.numel() + self.tokens.numel(),
            "flops": before + one + self._flops,
            "held_out": len(self.tokens),
            "measured": self.measured,
            "forward_passes": round(self._flops / one, 1),
        }

    @torch.no_grad()
    def run(self, widths: Widths, rounds: int) -> list[tuple[Widths, float]]:
        """See `search`."""
        with ExitStack() as stack:
            self._sigterm = stack.enter_context(sigterm_deferred())
            self._dense = dense_states(self.model, self.tokens)
            self._libraries = self._made_libraries(tuple(widths))
            whole = {name: self.units[name] for name in widths}
            stack.callback(self._put, whole)
            most = 1 + rounds * sum(most_of_a_round(whole))
            self._shown = stack.enter_context(bar("widths", most, "model"))
            found = [(widths, self._divergence(widths))]
            for number in range(1, rounds + 1):
                widths, last = found[-1]
                measured = [(self._divergence(trial), trial) for trial in self._trials(widths, last)]
                divergence, better = min(measured, key=lambda each: each[0], default=(last, widths))
                if divergence >= last:
                    self._tell(f"round {number} of {rounds}: no exchange is better")
                    break
                self._tell(f"round {number} of {rounds}: KL {divergence:.4g}, it was {last:.4g}")
                found.append((better, divergence))
        return found

    def _tell(self, line: str) -> None:
        """Print a line beside the bar."""
        self._shown.write(line, file=sys.stderr)

    def _made_libraries(self, names: Sequence[str]) -> dict[Sublayer, Library]:
        """The refits of every part of these names, by one pass of the calibration text through the dense model."""
        layout, config, device = layout_of(self.model), self.model.config, device_of(self.model)
        libraries: dict[Sublayer, Library] = {}
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            streams = Streams(self.model, self.refitted_on, False, layout.parallel, Path(place))
            for number in layers_in_turn(self.model, "refits"):
                streams.enter_layer()
                for name in IN_TURN:
                    part, how = part_of(self.model, name, number), (layout, config, layers_of(self.model)[number], name)
                    repair = Repair(part, torch.arange(part.units), name, number, Space(*how))
                    with fast_products(device):
                        for read, stored in zip(streams.read_by(name)[0], streams.states, strict=True):
                            passed = run_part(*how, streams.arguments[number], read.to(device))
                            stored.copy_(stored.to(device) + passed.written)
                            if name in names:
                                repair.add(passed)
                    if name in names:
                        libraries[name, number] = Library(repair, self.scores[name][number], self.ridge)
        return libraries

    def _trials(self, widths: Widths, last: float) -> list[Widths]:
        """Widths after the best 1, 2, 4, ... exchanges, and after all of them, by what single steps cost.

        Args:
            widths: to begin with.
            last: their KL.
        """
        cost = self._costs(widths)
        rises = sorted(
            (cost[narrower] + cost[wider] - 2 * last, narrower, wider)
            for narrower in cost
            for wider in cost
            if narrower[0][0] == wider[0][0]  # of one part
            and narrower[1] < width_of(widths, narrower[0])
            and wider[1] > width_of(widths, wider[0])
        )
        made, trial, exchanged = [], widths, set()
        for rise, narrower, wider in rises:
            further = changed(changed(trial, narrower), wider)
            if rise < 0 and not exchanged & {narrower[0], wider[0]} and self.fits(further):
                exchanged |= {narrower[0], wider[0]}
                trial = further
                made.append(trial)
        return [made[count - 1] for count in counts_tried(len(made))]

    def _costs(self, widths: Widths) -> dict[Change, float]:
        """The KL where one part of one layer is a step narrower or wider, by the change."""
        changes = changes_of(widths, self.units, self.round_to)
        for first in range(0, len(changes), TOGETHER):
            group = changes[first : first + TOGETHER]
            keys = [_key(changed(widths, change)) for change in group]
            if not self.known.keys() >= {*keys}:
                self._put(widths)
                self._keep(dict(zip(keys, self._walk(group), strict=True)))
            self._count(group)
        return {change: self.known[_key(changed(widths, change))] for change in changes}

    def _divergence(self, widths: Widths) -> float:
        """The KL where the layers have these widths."""
        if _key(widths) not in self.known:
            self._put(widths)
            self._keep({_key(widths): self._walk([])[0]})
        self._count([])
        return self.known[_key(widths)]

    def _walk(self, changes: Sequence[Change]) -> list[float]:
        """The KL of the model that is put, with each of the changes; without any, its own."""
        layers = layers_of(self.model)

        def passed(number: int, states: Tensor, candidate: int | None) -> Tensor:
            library = None if candidate is None else self._libraries[changes[candidate][0]]
            if library:
                present = library.weight.clone()
                library.put(changes[candidate][1])
            left = torch.cat([run_layer(layers[number], rows, walk.arguments[number]) for rows in batches(states)])
            if library:
                library.weight.copy_(present)
            return left

        walk = Walk(self.model, self.tokens, [number for (_, number), _ in changes], passed)
        for number in range(len(layers)):
            walk.advance(number)
        return divergences(self.model, self._dense, walk.riders if changes else [walk.states])

    def _put(self, widths: Widths) -> None:
        """Refit the parts to these widths, in the model."""
        for sublayer, library in self._libraries.items():
            width = width_of(widths, sublayer)
            if self._present.get(sublayer, library.part.units) != width:
                library.put(width)
            self._present[sublayer] = width

    def _keep(self, measured: Mapping[str, float]) -> None:
        """Keep what is measured, and end if SIGTERM has come.

        Raises:
            Stopped: it has.
        """
        self.known |= measured
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(self.known), encoding="utf-8")
            partial.replace(self.file)
        if self._sigterm.received:
            raise Stopped(f"the KL of {len(self.known)} widths is kept")

    def _count(self, changes: Sequence[Change]) -> None:
        """Count a walk, measured now or before a kill: its models and operations."""
        count = max(1, len(changes))
        self.measured += count
        self._flops += flops_of_walk(
            self.model, self.tokens.numel(), self._each, [number for (_, number), _ in changes]
        )
        self._flops += sum(flops_of_put(part_of(self.model, *sublayer), width) for sublayer, width in changes)
        self._shown.update(count)


def changes_of(widths: Widths, units: Mapping[str, Sequence[int]], round_to: int) -> list[Change]:
    """Every single step from these widths, narrower and wider, in the order of the layers.

    Args:
        widths: by part, of each layer.
        units: by part, those of each layer of the dense model.
        round_to: what MLP widths are multiples of.
    """
    changes: list[Change] = []
    for number in range(max(map(len, widths.values()))):
        for name in (name for name in IN_TURN if name in widths):
            width, whole = widths[name][number], units[name][number]
            finest = round_to if name == "mlp" else 1
            step = finest * math.ceil(max(units[name]) / FINEST / finest) if name == "mlp" else 1
            (fewest,) = fewest_kept(SEARCHED, [whole], finest)
            changes += [((name, number), new) for new in (width - step, width + step) if fewest <= new <= whole]
    return changes


def width_of(widths: Widths, sublayer: Sublayer) -> int:
    """The width of one part of one layer."""
    name, number = sublayer
    return widths[name][number]


def changed(widths: Widths, change: Change) -> Widths:
    """Widths with one of them changed."""
    (name, number), width = change
    return {**widths, name: [*widths[name][:number], width, *widths[name][number + 1 :]]}


def counts_tried(exchanges: int) -> list[int]:
    """How many of the best exchanges are tried together: 1, 2, 4, ..., and all."""
    powers = [2**power for power in range(exchanges.bit_length())]
    return powers if exchanges in powers or not exchanges else [*powers, exchanges]


def _key(widths: Widths) -> str:
    """Widths as a word."""
    return " ".join(f"{name}:{','.join(map(str, layers))}" for name, layers in widths.items())


def most_of_a_round(units: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """The most single steps that a round measures, and the most exchanges that it tries.

    Args:
        units: by part that is cut, those of each layer.
    """
    steps = sum(2 * len(layers) for layers in units.values())
    return steps, len(counts_tried(sum(len(layers) // 2 for layers in units.values())))


def flops_of_put(part: Part, width: int) -> int:
    """Floating-point operations of solving the refit to so many units."""
    columns, hidden = width * part.columns, len(matrix(part.output))
    return flops_of_solution(0, columns, hidden) + 2 * hidden * (part.width - columns) * columns


def flops_of_libraries(model: PreTrainedModel, names: Collection[str], tokens: tuple[int, int]) -> int:
    """Floating-point operations of a pass over (sequences, length) tokens and of the sums for every refit."""
    count, cut = tokens[0] * tokens[1], [part for name in names for part in parts(model, name)]
    sums = sum(2 * count * part.width * (part.width + len(matrix(part.output))) for part in cut)
    return count * flops_per_token(model, tokens[1]) + sums


def bytes_of_libraries(model: PreTrainedModel, names: Collection[str]) -> int:
    """Bytes of what is kept for the refits: sums in float32, and the output layers as they were."""
    cut = [part for name in names for part in parts(model, name)]
    return sum(4 * part.width**2 + matrix(part.output).nbytes for part in cut)


def most_operations(model: PreTrainedModel, tokens: tuple[int, int], structure: str, rounds: int) -> dict[str, float]:
    """What a search takes at most: `flops`, and of these `forward_passes` over the sequences that are held out.

    Args:
        model: the dense model; its shapes are enough.
        tokens: (sequences, length) of the calibration.
        structure, rounds: see `search`.
    """
    count, length = held_out(*tokens), tokens[1]
    units, each = {name: shape_of(model).units[name] for name in PARTS_OF[structure]}, flops_of_layers(model, length)
    one = flops_of_walk(model, count * length, each, [])
    steps = sorted(number for layers in units.values() for number in range(len(layers)) for _ in range(2))
    walks = [steps[first : first + TOGETHER] for first in range(0, len(steps), TOGETHER)]
    a_round = sum(flops_of_walk(model, count * length, each, walk) for walk in walks)
    a_round += 2 * sum(flops_of_put(part, part.units) for name in units for part in parts(model, name))
    measuring = one + rounds * (a_round + most_of_a_round(units)[1] * one)
    before = flops_of_libraries(model, tuple(units), (tokens[0] - count, length))
    return {"flops": before + one + measuring, "forward_passes": measuring / one}

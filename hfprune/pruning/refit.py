"""Refit output layers so that the remaining units replace what the removed units wrote.

An MLP or an attention block writes W h into the residual stream, where h are the activations that enter its output
layer (Llama's down_proj, o_proj) at a token. Let S be the columns that stay, P the columns that go, and r the target of
the repair at a token. With sums over all calibration tokens,

    G = sum h[S] h[S]^T,    C = sum r h[S]^T,    L = ridge * diag G,

the correction D that minimises sum ||r - D h[S]||^2 + sum ||D_i||^2 L_ii, with D_i its columns, is C (G + L)^-1. It is
added to W[:, S]. Each column has a ridge in proportion to its own activations, so that rescaling a neuron (its row of
up_proj times c, its column of down_proj divided by c) rescales its correction and changes nothing else.

- `least_squares`: h comes from the intact model, and r = W[:, P] h[P] is what the cut loses in this layer.
- `sequential`: h comes from the model whose lower layers are cut and refitted already, r = W[:, P] h[P] + a (y - y').
  Here y is the residual stream of the dense model after this part, and y' that of the cut model if this part lost
  nothing, so their difference is the error of the layers below. a is `DRIFT`: repairing all of that error would fit
  noise. The output layers of all parts are refitted, also of parts that keep all their units.
- `trained`: as `sequential`. Then every MLP that loses neurons is trained, the rows and columns of those that stay, to
  write what the whole MLP would, with the same share of the drift; see `part_training`. Last, the logits are divided by
  the `temperature` with which the model is nearest to the dense one.
- `local_search`: as `sequential`, but which neurons of an MLP stay is decided anew, starting from those with the best
  scores: `greedy.swapped` fits W h + a (y - y') with as many neurons (OSSCAR, arXiv 2403.12983).
- `bias`: h comes from the intact model. The output layer's bias repairs the mean of r (FLAP, arXiv 2312.11983).

A part that loses all of its units has nothing left to repair with. The next part that stays takes over: what the parts
gone before it would have written is added to its r.

Some families norm what a block writes, or multiply it by m, before it is added. The repair is of the output W h all the
same, and right to first order: an RMS norm divides a token's error by the RMS of its output, so tokens are weighted by
1 / RMS(W h)^2, and the drift is carried back through norm and m (`Space`).

Inside experts, each expert is a part of its own, whose tokens are those that are sent to it. A token counts with the
square of its weight, by which what the expert writes is multiplied. Where experts go as well, tokens and weights are
those of the router without them, on the same hidden states. With `sequential`, what the layer has lost with experts
that are gone, and a (y - y'), are shared among the experts of a token in proportion to their weights; so is what layers
that are gone before it would have written. Attention and shared experts are not refitted.

Parts are refitted from the first layer to the last, attention before the MLP, each with all tokens. The weights of one
layer are needed at a time, and the hidden states of the calibration tokens at one place (with `sequential` also the
dense model's, and the activations of one part), see `Streams`; and G and C of one part.
"""

import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune.errors import UserError
from hfprune.models.families import layout_of
from hfprune.models.layout import Layout
from hfprune.models.loading import flops_per_token
from hfprune.models.mixtures import Experts, experts_in
from hfprune.models.run_part import Passed, factor, run_part, written
from hfprune.models.streamed import device_of, in_memory, is_streamed
from hfprune.models.units import (
    IN_TURN,
    LAYER_OF_EXPERTS,
    PARTS,
    UNITS,
    Kept,
    Part,
    layers_of,
    layers_that_stay,
    matrix,
    part_of,
    parts,
)
from hfprune.models.walk import enter, entrance, layers_in_turn, run_layer
from hfprune.pruning.budget import NO_REFIT
from hfprune.pruning.greedy import others, swapped
from hfprune.pruning.part_training import train_part, training_flops
from hfprune.pruning.refit_names import IN_EXPERTS, SEQUENTIAL
from hfprune.pruning.temperature import set_temperature, temperature_flops
from hfprune.runtime.matmul import fast_products
from hfprune.runtime.memory import free_bytes
from hfprune.runtime.scratch import Scratch

TOKENS_PER_BATCH = 4096
DRIFT = 0.5
SEARCH_RIDGE = 0.01  # of `local_search`, as of criterion `obs`
SMALLEST_GAIN = 1e-2  # of a norm, as a share of its largest, that drift is carried back through

Stream = list[Tensor]  # batches of hidden states at one place, (batch, length, hidden) each, of all tokens


@torch.no_grad()
def refit(
    model: PreTrainedModel,
    kept: Kept,
    tokens: Tensor,
    method: str,
    ridge: float,
    folder: Path | None = None,
    finished: Callable[[int], None] = lambda _layer: None,
    what: str = "refit",
) -> dict[str, Any]:
    """Refit every output layer in place for a cut to `kept`, and set the columns of the removed units to 0.

    Args:
        model: the intact model, in memory or streamed.
        kept: for each part, the int64 indices of the units to keep, per layer. `local_search` replaces those of MLPs.
        tokens: (sequences, length) int64 calibration tokens.
        method: "bias", "least_squares", "sequential", "trained" or "local_search"; for a mixture of experts see
            `refit_names.IN_EXPERTS`.
        ridge: at least 0; not used by `bias`.
        folder: for hidden states that do not fit into memory; by default the system's temporary folder.
        finished: called with the number of each layer when it is refitted. The weights of a streamed model are in
            memory only until then.
        what: name of the work, for its progress.

    Returns:
        Details for the record: `refit_tokens` and `refit_flops` of the passes and solved systems. Except for `bias`,
        also `ridge` and `starved_layers`, the layers that keep more columns than there are tokens; of `trained`, the
        `temperature`.

    Raises:
        UserError: `bias` where an output layer has none; a layer's system cannot be solved; the disk is too small; the
            model is a mixture of experts, of which something else is cut, or with another method.
    """
    if layout_of(model).mixture:
        structure = "layers" if {*kept} == LAYER_OF_EXPERTS else "+".join(sorted(kept, reverse=True))
        if method not in IN_EXPERTS.get(structure, ()):
            raise UserError(NO_REFIT.format(refit=method))
        return _refit_inside_experts(model, kept, tokens, method, ridge, folder, finished, what)
    for name in kept:
        if method == "bias" and any(part.output.bias is None for part in parts(model, name)):
            where = {"mlp": "the MLPs", "attention": "the attention blocks"}[name]
            raise UserError(
                f"refit 'bias': {where} of this {model.config.model_type} model have no bias in the output layer, and "
                "a plain checkpoint cannot hold one. Use 'least_squares' or 'sequential'."
            )
    sequential, trains, starved = method in SEQUENTIAL, method == "trained", set()
    flops = tokens.numel() * flops_per_token(model, tokens.shape[1]) * (1 + sequential)
    layout, config = layout_of(model), model.config
    layers, device = layers_of(model), device_of(model)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        carries = any(not len(units) for layers_kept in kept.values() for units in layers_kept)
        streams, carrying = Streams(model, tokens, sequential, layout.parallel, place, carries, trains), False
        for number in layers_in_turn(model, what):
            with fast_products(device):
                layer = layers[number]
                streams.enter_layer()
                for name in IN_TURN:
                    part = part_of(model, name, number)
                    how = (layout, config, layer, name, streams.arguments[number])
                    units = kept[name][number] if name in kept else torch.arange(part.units)
                    searches = method == "local_search" and name == "mlp" and name in kept
                    repair = (LocalSearch if searches else Repair)(
                        part, units, name, number, Space(layout, config, layer, name)
                    )
                    seen = streams.activations(part) if sequential else []
                    train = trains and name == "mlp" and repair.lossy
                    read, dense_read = streams.read_by(name)
                    for i, stored in enumerate(streams.states):
                        states, entering = stored.to(device), read[i].to(device)
                        passed = run_part(*how, entering)
                        if sequential:
                            dense = streams.dense[i].to(device).float()  # the drift may be less than their rounding
                            dense = dense + run_part(*how, dense_read[i].to(device)).written
                            streams.dense[i].copy_(dense)
                        else:
                            stored.copy_(states + passed.written)
                        if not len(units):
                            streams.carried[i].add_(passed.written.to(streams.carried[i].device))
                            continue
                        carried = streams.carried[i].to(device).float() if carrying else None
                        if sequential:
                            ahead = states.float() + passed.written  # where this part loses nothing,
                            ahead = ahead if carried is None else ahead + carried  # and those gone before it
                            drift = DRIFT * (dense - ahead)
                            drift = drift if carried is None else drift + carried
                            repair.add(passed, drift)
                            seen[i].copy_(passed.activations)
                            if train:
                                streams.targets[i].copy_(repair.space.target(passed, drift))
                        elif repair.lossy or carrying:
                            repair.add(passed, carried, mean=method == "bias")
                    if not len(units):
                        carrying = True
                        continue
                    if (repair.lossy or carrying) and method == "bias":
                        repair.shift()
                    elif repair.lossy or carrying or sequential:
                        repair.skip() if repair.idle else repair.solve(ridge)
                        if searches:
                            kept[name][number] = repair.kept.cpu()
                        flops += repair.flops
                        if len(repair.kept) > tokens.numel():
                            starved.add(number)
                    if train:
                        train_part(part, repair.kept, partial(_output, *how), read, streams.targets)
                        flops += training_flops(part, len(units), tokens.numel())
                    if sequential:  # the layers above must see this part as it is now
                        for i, stored in enumerate(streams.states):
                            if train:
                                now = run_part(*how, read[i].to(device)).written
                            else:
                                output = part.output(seen[i].to(device))
                                now = written(layout, config, layer, name, output)
                            stored.copy_(stored.to(device) + now)
                    if carrying:
                        streams.empty_carried()
                        carrying = False
            finished(number)
        temperature = {}
        if trains:
            temperature = {"temperature": set_temperature(model, streams.states[0], streams.dense[0])}
            flops += temperature_flops(model, streams.states[0][..., 0].numel())
    details = {"refit_tokens": tokens.numel(), "refit_flops": flops} | temperature
    if method == "bias":
        return details
    if starved:
        print(
            f"refit {method!r}: only {tokens.numel()} calibration tokens, fewer than the columns that stay in layers "
            f"{', '.join(map(str, sorted(starved)))}. `ridge` decides what the tokens do not determine. Use more "
            "samples.",
            file=sys.stderr,
        )
    return details | {"ridge": ridge, "starved_layers": sorted(starved)}


def _refit_inside_experts(
    model: PreTrainedModel,
    kept: Kept,
    tokens: Tensor,
    method: str,
    ridge: float,
    folder: Path | None,
    finished: Callable[[int], None],
    what: str,
) -> dict[str, Any]:
    """`refit` of the experts that stay: `kept` has their numbers, or (experts, kept) neurons of them, for each layer.

    An expert to which no token is sent loses its neurons without a repair. What a layer that is gone would have written
    is made up for in the next one with experts.
    """
    sequential, starved, staying = method in SEQUENTIAL, set(), layers_that_stay(kept)
    passes = _passes_inside_experts(kept, sequential)
    flops = tokens.numel() * flops_per_token(model, tokens.shape[1]) * passes
    layout, layers, device = layout_of(model), layers_of(model), device_of(model)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        carries = len(staying) < len(layers)
        streams = Streams(model, tokens, sequential, layout.parallel, Path(place), carries)
        for number in layers_in_turn(model, what):
            experts = experts_in(model, number) if number in staying else None
            arguments, run, repairs = streams.arguments[number], partial(run_layer, layers[number]), {}
            if experts:
                space = Space(layout, model.config, layers[number], "mlp")
                stay = kept["experts"][number].tolist() if "experts" in kept else range(experts.count)
                neurons = kept["mlp"][number] if "mlp" in kept else torch.arange(experts.width).expand(len(stay), -1)
                repairs = {
                    expert: Repair(experts.neurons_of(expert), units, "mlp", number, space)
                    for expert, units in zip(stay, neurons, strict=True)
                }
            with fast_products(device):
                for i, stored in enumerate(streams.states):
                    entering = stored.to(device)
                    with _reading(experts, repairs, sequential) as read:
                        left = run(entering, arguments)
                    drift = None
                    if sequential:
                        dense = run(streams.dense[i].to(device), arguments)
                        whole = run(entering, arguments) if experts and len(repairs) < experts.count else left
                        ahead = whole.float()  # where this layer loses nothing,
                        ahead = ahead + streams.carried[i].to(device) if carries else ahead  # and those that are gone
                        drift = ahead - left + DRIFT * (dense.float() - ahead)
                        streams.dense[i].copy_(dense)
                    if number not in staying:
                        streams.carried[i].add_((left.float() - entering).to(streams.carried[i]))
                    elif experts:
                        _add_routed(experts, repairs, *read, drift)
                    if number in staying and not (experts and sequential):
                        stored.copy_(left)
                for repair in repairs.values():
                    if (repair.lossy or sequential) and repair.tokens and not repair.idle:
                        repair.solve(ridge)
                        flops += repair.flops
                    else:
                        repair.silence()
                    if repair.tokens < len(repair.kept):
                        starved.add(number)
                for stored in streams.states if experts and sequential else ():  # the layers above see it as it is now
                    with _reading(experts, repairs, sequential):
                        stored.copy_(run(stored.to(device), arguments))
                if experts:
                    streams.empty_carried()
            finished(number)
    if starved:
        print(
            f"refit {method!r}: in layers {', '.join(map(str, sorted(starved)))} some experts read fewer calibration "
            "tokens than they keep neurons. `ridge` decides what the tokens do not determine. Use more samples.",
            file=sys.stderr,
        )
    return {"refit_tokens": tokens.numel(), "refit_flops": flops, "ridge": ridge, "starved_layers": sorted(starved)}


def _passes_inside_experts(kept: Kept, sequential: bool) -> int:
    """How often all tokens pass a model whose experts are refitted, once more where some of a layer's experts go."""
    return 3 + ("experts" in kept and "attention" not in kept) if sequential else 1


@contextmanager
def _reading(experts: Experts | None, stay: Collection[int], without: bool) -> Iterator[list[Tensor]]:
    """A context in which it is put down what the experts that stay read: the router chooses among these alone.

    Args:
        experts: of the layer, all of them; None if it has none.
        stay: the numbers of those that stay.
        without: the layer computes so, too; else it computes with all of its experts.

    Yields:
        What the last pass puts there: (tokens, hidden) states, and the (tokens, chosen) experts and weights.
    """
    read: list[Tensor] = []
    if experts is None:
        yield read
        return
    gone = torch.ones(experts.count, dtype=torch.bool).index_fill_(0, torch.tensor([*stay]), False)
    rerouted: list[Tensor] = []

    def route(_module: nn.Module, _inputs: tuple[Tensor, ...], routed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, before, _ = routed
        weights, chosen = experts.route(logits.float().masked_fill(gone.to(logits.device), -torch.inf))
        rerouted[:] = chosen, weights
        return (logits, weights.to(before.dtype), chosen) if without else routed

    def remember(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read[:] = inputs[0], *(rerouted or inputs[1:])

    with ExitStack() as stack:
        stack.callback(experts.experts.register_forward_pre_hook(remember).remove)
        if gone.any():
            stack.callback(experts.router.register_forward_hook(route).remove)
        yield read


def _add_routed(
    experts: Experts, repairs: dict[int, "Repair"], states: Tensor, chosen: Tensor, weights: Tensor,
    drift: Tensor | None,
) -> None:  # fmt: skip
    """Add to every expert's repair the tokens that are sent to it.

    Args:
        experts: of the layer.
        repairs: by the number of the expert.
        states, chosen, weights: see `_reading`.
        drift: (batch, length, hidden) float32, what the experts of a token have to make up for together, each in
            proportion to its weight; None for nothing.
    """
    shares = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    for expert, repair in repairs.items():
        routed, places = (chosen == expert).nonzero(as_tuple=True)
        if not len(routed):
            continue
        weighted = experts.activations(expert, states[routed]).float() * weights[routed, places, None]
        own = None if drift is None else drift.flatten(0, 1)[routed] * shares[routed, places, None]
        passed = Passed(weighted, weighted, weighted)  # no norm follows: the output is not read
        repair.add(passed, None if own is None else own[None])


def flops_of_refit(model: PreTrainedModel, kept: Kept, tokens: tuple[int, int], method: str) -> int:
    """Floating-point operations of `refit` over (sequences, length) tokens. The model's shapes are enough."""
    sequential, count = method in SEQUENTIAL, tokens[0] * tokens[1]
    if layout_of(model).mixture:
        flops = count * flops_per_token(model, tokens[1]) * _passes_inside_experts(kept, sequential)
        for experts in filter(None, (experts_in(model, number) for number in layers_that_stay(kept))):
            stay = len(next(filter(len, kept["experts"]))) if "experts" in kept else experts.count
            width = max(units.shape[-1] for units in kept["mlp"]) if "mlp" in kept else experts.width
            flops += stay * flops_of_solution(count * experts.chosen // stay, width, experts.router.weight.shape[1])
        return flops
    flops, carrying = count * flops_per_token(model, tokens[1]) * (1 + sequential), False
    for number in range(len(layers_of(model))):
        for name in IN_TURN:
            part = part_of(model, name, number)
            units = len(kept[name][number]) if name in kept else part.units
            if method != "bias" and units and (units < part.units or carrying or sequential):
                flops += flops_of_solution(count, units * part.columns, matrix(part.output).shape[0])
            if method == "trained" and name == "mlp" and units < part.units:
                flops += training_flops(part, units, count)
            carrying = not units
    if method == "trained":
        flops += temperature_flops(model, min(tokens[0], sequences_together(tokens[1])) * tokens[1])
    return flops


def sequences_together(length: int) -> int:
    """How many sequences of so many tokens pass a part at once."""
    return max(1, TOKENS_PER_BATCH // length)


def flops_of_solution(tokens: int, kept: int, hidden: int) -> int:
    """Floating-point operations for G, C and the solution by Cholesky's method."""
    return 2 * tokens * kept * (kept + hidden) + kept**3 // 3 + 2 * kept**2 * hidden


def _output(*how_and_states: Any) -> Tensor:
    """What a part's output layer gives: the arguments of `run_part` -> (batch, length, hidden)."""
    return run_part(*how_and_states).output.view(how_and_states[-1].shape)


class Space:
    """Where the error of a block's output is measured: after the norm and the factor that follow it, to first order.

    A norm of root mean squares writes g * z / s, with s = RMS(z) and gains g. A small change dz writes
    g * (dz - the part of dz along z) / s.
    """

    def __init__(self, layout: Layout, config: Any, layer: nn.Module, name: str) -> None:
        self.factor, after = factor(layout, config), layout.block(name).after
        self.norm = layer.get_submodule(after) if after else None

    def weights(self, output: Tensor) -> Tensor | None:
        """(tokens, hidden) float32 outputs -> (tokens, 1), 1 / RMS of each; None without a norm."""
        if self.norm is None:
            return None
        return output.square().mean(1, keepdim=True).clamp(min=torch.finfo(output.dtype).tiny).rsqrt()

    def back(self, drift: Tensor, output: Tensor) -> Tensor:
        """The change of the output that the hidden states see as `drift`, to first order.

        Args:
            drift: (tokens, hidden) float32, wanted behind norm and factor.
            output: (tokens, hidden) float32, of the output layer.

        Returns:
            (tokens, hidden) float32.
        """
        if self.factor != 1:
            drift = drift / self.factor
        if self.norm is None:
            return drift
        gains = self.norm(torch.ones_like(output[:1], dtype=self.norm.weight.dtype)).float()  # of a token of RMS 1
        small = gains.abs() < SMALLEST_GAIN * gains.abs().max()  # where the norm hides what the output does
        change = torch.where(small, 0, drift / gains.masked_fill(small, 1)) / self.weights(output)
        along = (change * output).sum(1, keepdim=True) / output.square().sum(1, keepdim=True).clamp(min=1e-30)
        return change - along * output

    def target(self, passed: Passed, drift: Tensor) -> Tensor:
        """(batch, length, hidden) float32, what the output layer would have to give so that `drift` is added."""
        output = passed.output.flatten(0, -2).float()
        return (output + self.back(drift.flatten(0, 1), output)).view(drift.shape)


class Streams:
    """What is kept of all calibration tokens between one part and the next.

    It stands on the model's device, or in files if the model is streamed or less than half of the memory would be left.

    Attributes:
        states: the residual stream of the model that is refitted.
        dense: that of the intact model, for `sequential`.
        carried: what the parts that are gone would have written, since the last part that stays.
        targets: what the output layer of the present part should give, if MLPs are trained.
        arguments: the arguments of each layer, see `walk.enter`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        sequential: bool,
        parallel: bool,
        folder: Path,
        carries: bool = False,
        trains: bool = False,
    ) -> None:
        self._shape, self._batch = tuple(tokens.shape), sequences_together(tokens.shape[1])
        self._dtype, self._device, hidden = model.dtype, device_of(model), model.config.hidden_size
        keeps = sequential and not layout_of(model).mixture  # of experts no activations are kept
        widest = max(part.width for name in PARTS for part in parts(model, name)) if keeps else 0
        size = tokens.numel() * (hidden * ((1 + sequential) * (1 + parallel) + carries + trains) + widest)
        size *= model.dtype.itemsize
        self._folder = folder if is_streamed(model) or size > free_bytes(self._device) / 2 else None
        self.states, self.dense = self._room("states", hidden), self._room("dense", hidden * sequential)
        self.carried = self._room("carried", hidden * carries)
        self.empty_carried()
        self.targets, self._activations = self._room("targets", hidden * trains), self._room("activations", widest)
        # With a parallel MLP, which reads what attention read, also what entered the layer.
        self._entered = self._room("entered", hidden * parallel)
        self._dense_entered = self._room("dense-entered", hidden * sequential * parallel)
        self._parallel = parallel
        with in_memory(*entrance(model)):
            _, self.arguments = enter(model, tokens[:1])
            for i, rows in enumerate(tokens.split(self._batch)):
                self.states[i].copy_(enter(model, rows)[0])
                self.dense[i].copy_(self.states[i]) if sequential else None

    def empty_carried(self) -> None:
        """What is gone has been taken over."""
        for batch in self.carried:
            batch.zero_()

    def enter_layer(self) -> None:
        """Keep what enters a layer, if its MLP reads that."""
        for kept, states in ((self._entered, self.states), (self._dense_entered, self.dense)):
            for room, batch in zip(kept, states, strict=True):
                if room.shape == batch.shape:
                    room.copy_(batch)

    def read_by(self, name: str) -> tuple[Stream, Stream]:
        """The hidden states that a part reads: of the model that is refitted, and of the intact one."""
        if self._parallel and name == "mlp":
            return self._entered, self._dense_entered
        return self.states, self.dense

    def activations(self, part: Part) -> Stream:
        """Room for the input of a part's output layer."""
        columns = part.width
        rooms = [room.flatten()[: room[..., 0].numel() * columns] for room in self._activations]
        return [room.view(-1, self._shape[1], columns) for room in rooms]

    def _room(self, name: str, width: int) -> Stream:
        """Room for so many values of each token, in the batches that run together."""
        shape = (*self._shape, width)
        if self._folder and width:
            whole = Scratch(self._folder / name, shape, self._dtype).tensor
        else:
            whole = torch.empty(shape, dtype=self._dtype, device=self._device)
        return list(whole.split(self._batch))


class Repair:
    """The refit of one part of a layer: sums over calibration tokens, and the solution.

    Attributes:
        part: the part, with all its units still in place.
        kept, removed: int64 columns of its output layer.
        name: the part's name.
        layer: the layer's number.
        space: where errors are measured; None: in the output itself.
        tokens: how many tokens the sums contain.
    """

    def __init__(self, part: Part, units: Tensor, name: str, layer: int, space: Space | None = None) -> None:
        self.part, self.name, self.layer, self.space = part, name, layer, space
        is_removed = torch.ones(part.units, dtype=torch.bool).index_fill_(0, units.cpu(), False)
        device = part.output.weight.device
        self.kept, self.removed = (
            part.columns_of(mask.nonzero()[:, 0]).to(device) for mask in (~is_removed, is_removed)
        )
        self.removed_weights = matrix(part.output)[:, self.removed].float()
        self.gram: Tensor | float = 0.0  # G
        self.cross: Tensor | float = 0.0  # C
        self.lost: Tensor | float = 0.0  # sum of W[:, P] h[P], each token times its squared weight
        self.weight: Tensor | float = 0.0  # sum of the squared weights
        self.tokens = 0

    @property
    def lossy(self) -> bool:
        """Whether any unit is removed."""
        return len(self.removed) > 0

    @property
    def flops(self) -> int:
        """See `flops_of_solution`."""
        return flops_of_solution(self.tokens, len(self.kept), matrix(self.part.output).shape[0])

    def add(self, passed: Passed, drift: Tensor | None = None, mean: bool = False) -> None:
        """Add a batch to the sums. Products are float32, sums float64.

        Args:
            passed: the part's pass over (batch, length) tokens, with all its units.
            drift: (batch, length, hidden) float32, the target beside what the cut loses here, in the hidden states.
            mean: only sum the target, which is all that `shift` needs.
        """
        flat, output = passed.activations.flatten(0, -2).float(), passed.output.flatten(0, -2).float()
        target = flat[:, self.removed] @ self.removed_weights.T
        if drift is not None:
            target += self.space.back(drift.flatten(0, 1), output)
        kept = flat[:, self.kept]
        self.tokens += len(flat)
        weights = self.space.weights(output)
        if mean:
            self.lost += (target if weights is None else target * weights.square()).sum(0).double()
            self.weight += len(flat) if weights is None else weights.square().sum().double()
            return
        if weights is not None:
            target, kept = target * weights, kept * weights
        self.gram += (kept.T @ kept).double()
        self.cross += (target.T @ kept).double()

    def shift(self) -> None:
        """Repair the mean of the loss, with the bias."""
        bias = self.part.output.bias
        bias += (self.lost / self.weight).to(bias.dtype)
        self.silence()

    @property
    def idle(self) -> bool:
        """Whether no unit writes anything at any token, so that none can make up for anything."""
        return not self.gram.diagonal().any()

    def skip(self) -> None:
        """Leave the weights that stay as they are, and say so."""
        print(
            f"layer {self.layer}, {self.name}: not refitted: all activations of its {UNITS[self.name]} are zero",
            file=sys.stderr,
        )
        self.silence()

    def solve(self, ridge: float) -> None:
        """Repair the loss, with the weights that stay. Solved in float64.

        Raises:
            UserError: G + L is not positive definite, or not finite.
        """
        own = self.gram.diagonal()
        own += ridge * torch.where(own > 0, own, own.mean())  # a silent column has no size of its own
        factor, failed = torch.linalg.cholesky_ex(self.gram)
        if failed or not factor.isfinite().all():
            raise UserError(
                f"layer {self.layer}, {self.name}: cannot be refitted with ridge {ridge}: the activations of its "
                f"{UNITS[self.name]} are linearly dependent or not finite. Set a larger `ridge`, take more samples, or "
                "compute in float32."
            )
        weight = matrix(self.part.output)
        correction = torch.cholesky_solve(self.cross.T, factor).T
        weight[:, self.kept] = (weight[:, self.kept] + correction).to(weight.dtype)
        self.silence()

    def silence(self) -> None:
        """Set the columns of the removed units to 0."""
        matrix(self.part.output)[:, self.removed] = 0


class LocalSearch(Repair):
    """The refit of an MLP that also chooses which neurons stay. Its sums are over all of them."""

    def __init__(self, part: Part, units: Tensor, *about: Any) -> None:
        super().__init__(part, torch.arange(part.units), *about)
        self.start, self.rounds = units.to(part.output.weight.device), 0

    @property
    def flops(self) -> int:
        """As of the refit, with the sums over all neurons and, of each round of the search, two systems."""
        columns, hidden = self.part.units, matrix(self.part.output).shape[0]
        sums = 2 * self.tokens * (columns - len(self.kept)) * (columns + len(self.kept) + hidden)
        return super().flops + sums + self.rounds * 4 * len(self.kept) ** 3

    def skip(self) -> None:
        """As of the refit; the neurons with the best scores stay."""
        self.kept, self.removed = self.start, others(self.start, self.part.units)
        super().skip()

    def solve(self, ridge: float) -> None:
        """Choose, and repair the loss with the weights that stay."""
        weight, gram = matrix(self.part.output).double(), self.gram
        wanted = weight @ gram + self.cross
        damped = gram.clone()
        damped.diagonal().add_(SEARCH_RIDGE * gram.diagonal().mean())
        self.kept, self.rounds = swapped(damped, wanted, self.start)
        self.removed = others(self.kept, len(gram))
        self.gram = gram[self.kept][:, self.kept]
        self.cross = wanted[:, self.kept] - weight[:, self.kept] @ self.gram
        super().solve(ridge)

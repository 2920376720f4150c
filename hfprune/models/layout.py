"""The description of a family: where its layers are, and what a unit of each part of a layer consists of.

Everything that scores, cuts, refits, saves or sizes a model reads it, and nothing else knows a module's name. It is
made of plain values and imports no torch. `families.py` declares one for every family.

A decoder layer adds what its two *blocks*, attention and MLP, write to the hidden states x:

    x + m * after(output(...rows(norm(x))))

`norm` and `after` may be absent, m is 1 in most families. With `parallel`, the MLP reads the same x as attention;
otherwise what attention has left.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

QUERIES = "queries"  # in `Rows.sections`: as many parts as there are query heads to a key-value head


@dataclass(frozen=True)
class Rows:
    """The rows of a linear layer through which units read.

    The rows are divided into sections of relative size, and every section equally among the units. So fused matrices
    differ in their sections alone: [gate; up] has (1, 1), [q; k; v] has (QUERIES, 1, 1). Where each head's rows stand
    together, as [q, k, v] of one head after the other, or where the layer is not fused, there is one section.

    Attributes:
        path: of the linear layer, below the decoder layer.
        sections: relative sizes.
    """

    path: str
    sections: tuple[int | str, ...] = (1,)


@dataclass(frozen=True)
class Block:
    """A part of a decoder layer. Paths are below the layer.

    Attributes:
        rows: the linear layers that its units read through. Without any, the block is one unit.
        output: the linear layer that they write through, with equally many neighbouring columns each.
        module: computes the block from the normed hidden states; None if the layer itself does, as
            output(activation(rows)).
        norm: of the block's input; None if it has none.
        after: norm of what the block writes, before that is added to the hidden states; None if it has none.
        per_head: modules whose weight has a row for every head: (heads, head size). Some models of the family may
            lack them.
        activation: of a block without a module.
        size: of an MLP, key of the config with the number of neurons, or how many times the hidden size that always is;
            of attention, "heads" if the stock config holds any number of heads, or else None.
        settings: further keys of the config with the values that let `size` be any number.
        others: in a hybrid, the output layers of what stands in some layers in place of attention: linear attention,
            a convolution. They read all of its columns as one unit.
        refused: why its units cannot be removed, and what can be instead; None if they can.
    """

    rows: tuple[Rows, ...]
    output: str
    module: str | None
    norm: str | None
    after: str | None = None
    per_head: tuple[str, ...] = ()
    activation: str | None = None
    size: str | int | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    others: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def is_free(self) -> bool:
        """Whether the stock class can have any number of units."""
        return isinstance(self.size, str)

    def output_among(self, modules: Container[str]) -> str:
        """The path of the output layer in a decoder layer that has these modules."""
        return next((path for path in self.others if path in modules), self.output)


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer, and the router that sends every token to a few of them. Paths are below the layer.

    The router's scores of all experts are the softmax or the sigmoid of its logits. The experts with the best scores,
    after a correction if there is one, are chosen; their scores are the weights of what they write.

    Attributes:
        block: the module of router and experts; a layer without it has a dense MLP.
        router: the module with a row of weights for each expert. It returns (logits, weights, experts).
        experts: the module that holds the experts' weights, each matrix as one parameter for all of them.
        stored: the name of the router's weight in a checkpoint's files, below the layer.
        size: key of the config with the number of neurons of an expert.
        scores: "softmax" or "sigmoid".
        correction: of the choice alone: path of a number for each expert; None if there is none.
        counts: whether the correction is a parameter, which counts for a budget, and no buffer.
        normalised: whether the weights are divided by their sum; or the key of the config that says so.
        scale: key of the config with the factor of the weights; None for 1.
        groups: how many of the best scores in a group of experts (`n_group`) make the score of the group, of which the
            best (`topk_group`) are chosen first; 0 without groups.
        biased: whether router and experts have biases.
        refused: why neurons of the experts cannot be removed, and what can be instead; None if they can.
    """

    block: str = "mlp"
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    stored: str = "mlp.gate.weight"
    size: str = "moe_intermediate_size"
    scores: str = "softmax"
    correction: str | None = None
    counts: bool = False
    normalised: bool | str = True
    scale: str | None = None
    groups: int = 0
    biased: bool = False
    refused: str | None = None


@dataclass(frozen=True)
class Layout:
    """The layout of a family.

    Attributes:
        attention, mlp: the parts of every layer.
        mixture: what stands in place of the MLP in some or all layers; None in a dense model.
        layers: path of the list of layers, below the base model (`model.base_model`).
        final_norm: path of the norm after the last layer, below the base model.
        parallel: whether the MLP reads the same hidden states as attention.
        multiplier: key of the config with m, by which what a block writes is multiplied; None for 1.
        carried: key of the config with a factor, where the MLP's normed input times that factor is what its output is
            added to, in place of the hidden states themselves; None elsewhere.
        logit_scale, logit_divisor: key of the config with the factor or divisor of the logits; None for 1.
        logit_cap: key of the config with c in c * tanh(logits / c); None, there or here, if logits are not capped.
        masks_by_kind: whether the base model takes a dictionary of attention masks, by kind of layer.
        layers_return_tuples: whether a layer returns its hidden states as the first of several values.
        branches: whether tokens take positions and masks of their own, so that several lines share their beginning.
        keeps_documents_apart: whether documents in one row do not see one another when positions begin anew.
        queries: query heads to a key-value head; None: as the config's numbers of heads say.
        repeated: keyword of a layer's argument that has rows for every sequence of a batch; None if none has.
        numbered: why layers cannot go: what a layer computes follows from its number; None if they can.
    """

    attention: Block
    mlp: Block
    mixture: Mixture | None = None
    layers: str = "layers"
    final_norm: str = "norm"
    parallel: bool = False
    multiplier: str | None = None
    carried: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    logit_cap: str | None = None
    masks_by_kind: bool = False
    layers_return_tuples: bool = False
    branches: bool = True
    keeps_documents_apart: bool = True
    queries: int | None = None
    repeated: str | None = None
    numbered: str | None = None

    def block(self, name: str) -> Block:
        """The block of a part, by its name in `units.PARTS`."""
        return self.mlp if name == "mlp" else self.attention

    def depth_refused(self, structure: str) -> str | None:
        """Why a structure in `units.DEPTH` cannot be removed, and what can be instead; None if it can."""
        reason = None
        if structure == "layers":
            reason = self.numbered
        elif self.mixture or self.attention.others:
            reason = "neither its class nor one of hfprune's knows a layer without one of its parts."
        return reason and f"{reason} Cut {self._others_than(structure)}."

    def _others_than(self, structure: str) -> str:
        """What can be cut if this structure in `units.DEPTH` cannot, in words."""
        can = {
            "layers": structure != "layers" and not self.numbered,
            "experts": self.mixture is not None,
            "mlp": not (self.mixture or self.mlp).refused,
        }
        *names, last = [name for name, is_free in can.items() if is_free]
        return f"{', '.join(names)} or {last}" if names else last

    @property
    def norms(self) -> Iterator[str]:
        """The paths of all norms of hidden states in a layer."""
        for block in (self.attention, self.mlp):
            yield from (path for path in (block.norm, block.after) if path)

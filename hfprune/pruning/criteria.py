"""How important a unit is: a registry of criteria, each a few lines with its formula and source.

A unit (see `models.units`) is a neuron of an MLP or a key-value group of attention. It writes through input columns of
one linear layer, with the activations h_t at token t. A neuron has one column. There are three kinds of criteria:

- A *gradient* criterion gives the gradient dS/dlogits of a scalar function S of the logits, in closed form. It says how
  the products g_t = h_t . dS/dh_t are summed over tokens. g_t is the first-order change of S when the unit is silent at
  token t. `scoring.py` carries the gradient from the logits to h.
- A *static* criterion is a function of the weights and of the moments of h over the calibration tokens.

- An *expert* criterion is a function of how the router of a mixture sends the tokens, and of what the experts write.

Some criteria choose units together: what a unit costs depends on those that are gone already, see `greedy.py`.

To add one: write its function and a line in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

from hfprune.models.units import matrix

if TYPE_CHECKING:  # the config reads the names of the criteria without paying for torch
    import torch
    from torch import Generator, Tensor

    from hfprune.models.units import Part


@dataclass(frozen=True)
class Positions:
    """Inputs of a gradient beside the logits, for the same positions.

    Attributes:
        next_tokens: (tokens,) int64, the next token of the text; -1 at the end of a sequence.
        uniforms: (tokens,) float32 in [0, 1), seeded random numbers.
        dense_logits: (tokens, vocabulary) float32 logits of the intact model, if neurons are silenced.
    """

    next_tokens: Tensor
    uniforms: Tensor
    dense_logits: Tensor | None = None


@dataclass(frozen=True)
class GradientCriterion:
    """The first-order change of S when a unit goes, or what it makes of the gradients of a unit's weights.

    Attributes:
        logit_gradient: maps (tokens, vocabulary) float32 logits, which it may overwrite, and their positions to
            dS/dlogits of the same shape, for S summed over positions.
        products: how the products g_t are summed: `absolute` sum_t |g_t|, `square` sum_t g_t**2, `square_of_sum`
            (sum_t g_t)**2, `pairs` sum_t g_t g_t^T of all units of a part, who then go one by one. Or what is summed of
            weights times their gradients, see `weight_recorder.py`: `elements`, `element_squares`, `vectors`.
        source: where it comes from.
        sampled: whether it reads `Positions.uniforms`, so that it gains from several draws.
        light_cut: another criterion, by whose scores the lowest `LIGHT_CUT` of every MLP's neurons are silenced before
            this one is taken; the model then differs from the intact one, whose logits are in `Positions`.
    """

    logit_gradient: Callable[[Tensor, Positions], Tensor]
    products: Literal["absolute", "square", "square_of_sum", "pairs", "elements", "element_squares", "vectors"]
    source: str
    sampled: bool = False
    light_cut: str | None = None


@dataclass(frozen=True)
class Moments:
    """Sums of a part's activations over the calibration tokens, per column.

    Attributes:
        count: number of tokens.
        total: (columns,) float64, sum of h.
        squares: (columns,) float64, sum of h**2.
        products: (columns, columns) float64, sum of h h^T, for criteria that read it.
        norms: (units,) float64, sum over sequences of the l2 norm of a unit's h, for criteria that read it.
    """

    count: int
    total: Tensor
    squares: Tensor
    products: Tensor | None = None
    norms: Tensor | None = None


@dataclass(frozen=True)
class StaticCriterion:
    """A score that needs no gradient.

    Attributes:
        score: maps a part, the moments of its activations and a seeded generator on the CPU to (units,) scores.
        source: the publication.
        moments: the names of the `Moments` that it reads. `products` takes memory for the square of a part's columns.
        ranks_experts: whether it ranks whole experts, too. They have no activations of their own: moments are 0.
    """

    score: Callable[[Part, Moments, Generator], Tensor]
    source: str
    moments: tuple[str, ...] = ("total", "squares")
    ranks_experts: bool = False
    sampled: ClassVar[bool] = False
    light_cut: ClassVar[None] = None


@dataclass(frozen=True)
class ExpertCriterion:
    """A score of whole experts alone, from a forward pass.

    Attributes:
        score: maps (experts,) float64 sums over the tokens that are sent to each expert to (experts,) scores.
        source: the publication.
        moments: the sums, as `score` takes them: `routed` 1, `written` weight * ||output||, `turned` the same times
            1 - cosine between the hidden states before and after all routed experts. The weight is the router's.
    """

    score: Callable[..., Tensor]
    source: str
    moments: tuple[str, ...]
    sampled: ClassVar[bool] = False
    light_cut: ClassVar[None] = None


def entropy_gradient(logits: Tensor, _positions: Positions) -> Tensor:
    """Gradient of the entropy H = -sum_j p_j log p_j of the output distribution p = softmax(z): -p (log p + H).

    It needs neither a label nor a teacher. As log p = z - log sum_j exp z_j, the bracket is z - sum_j p_j z_j.
    """
    p = logits.softmax(-1)
    mean = (p[:, None, :] @ logits[:, :, None])[:, 0]  # (tokens, 1), without a product of the logits' size
    return logits.neg_().add_(mean).mul_(p)


TOP_K = 15  # as the paper's top-15 agreement


def entropy_top_k_gradient(logits: Tensor, positions: Positions) -> Tensor:
    """Gradient of the entropy of the `TOP_K` likeliest tokens, their probabilities renormalised."""
    top = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    return logits.new_zeros(logits.shape).scatter_(-1, top.indices, entropy_gradient(top.values, positions))


def cross_entropy_gradient(logits: Tensor, positions: Positions) -> Tensor:
    """Gradient of the loss -log p(next token): p - onehot(next token); 0 where the next token is not known."""
    known = (positions.next_tokens >= 0).to(logits.dtype)[:, None]
    labels = positions.next_tokens.clamp(min=0)[:, None]
    return logits.softmax(-1).mul_(known).scatter_add_(-1, labels, -known)


VALUES_PER_CHUNK = 2**22  # of a matrix that is read in float64: 32 MiB
RIDGE = 0.01  # of `leverage` and `obs`, as in DarwinLM's version of ZipLM
LIGHT_CUT = 0.025  # share of a layer's neurons: SDMPrune keeps 3.9 of 4.0 times the hidden size of Llama-3.2-1B
# SDMPrune's settings for 20 %; the temperature is the teacher's.
DISTILLATION_WEIGHT = 0.4
DISTILLATION_TEMPERATURE = 0.2


def self_distillation_gradient(logits: Tensor, positions: Positions) -> Tensor:
    """Gradient of (1 - a) * loss + a * KL(t || q), q the lightly cut model's output, t the intact one's, sharpened.

    a = `DISTILLATION_WEIGHT`, t = softmax(dense logits / `DISTILLATION_TEMPERATURE`); the gradient of the KL is q - t.
    """
    assert positions.dense_logits is not None
    teacher = (positions.dense_logits / DISTILLATION_TEMPERATURE).softmax(-1)
    distillation = logits.softmax(-1).sub_(teacher).mul_(DISTILLATION_WEIGHT)
    return cross_entropy_gradient(logits, positions).mul_(1 - DISTILLATION_WEIGHT).add_(distillation)


def fisher_gradient(logits: Tensor, positions: Positions) -> Tensor:
    """Gradient of log p(y) with a label y drawn from the model's own output p: onehot(y) - p.

    KL(p || p_cut) has no first-order term at the intact model; its second-order term is the Fisher information of the
    cut, the expectation over y of the squared derivative of log p(y).
    """
    p = logits.softmax(-1)
    drawn = (p / race_times(positions.uniforms, p.shape[-1])).argmax(-1, keepdim=True)
    return p.neg_().scatter_add_(-1, drawn, logits.new_ones(drawn.shape))


def race_times(uniforms: Tensor, vocabulary: int) -> Tensor:
    """(tokens, vocabulary) float32 exponential times E. The label with the largest p / E is a draw from p.

    Each position reads the window of one table that its number in `uniforms` says. A little noise in p, as that of
    bfloat16, changes a label only where two are about level; the inverse of the cumulative distribution would change
    many, since there the noise of all labels adds up.
    """
    table = _exponentials(uniforms.device)
    starts = (uniforms.double() * (len(table) - vocabulary + 1)).long()
    return table.unfold(0, vocabulary, 1)[starts]


@cache
def _exponentials(device: torch.device) -> Tensor:
    """(4,194,304,) float32 numbers of the exponential distribution, the same on every machine, never 0."""
    import torch

    drawn = torch.rand(2**22, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (-torch.log1p(-drawn)).clamp(min=1e-30).float().to(device)


def _of_rows(weights: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of each row of a matrix, from rows in float64: (rows, columns) -> (rows,).

    Some rows at a time, since a copy of all in float64 is four times a matrix in bfloat16.
    """
    from torch import cat

    return cat([function(rows) for rows in _in_float64(weights)])


def _in_float64(weights: Tensor) -> Iterator[Tensor]:
    """The rows of a matrix, some at a time."""
    return (rows.double() for rows in weights.split(max(1, VALUES_PER_CHUNK // weights.shape[1])))


def _norms(weights: Tensor, order: int = 2) -> Tensor:
    """(rows,) float64 norms of the rows of a matrix. With a `dtype`, torch's own norm copies the whole matrix."""
    return _of_rows(weights, lambda rows: rows.norm(order, dim=1))


def wanda(part: Part, moments: Moments, _generator: Generator) -> Tensor:
    """Norm of the activation times the l1 norm of the weights that it meets, ||h|| * sum_j |W[j, i]|, over columns.

    Wanda's |W[j, i]| * ||h_i||, summed over all weights that a unit writes through.
    """
    return part.per_unit(moments.squares.sqrt() * _norms(matrix(part.output).T, 1))


def _fluctuation(part: Part, moments: Moments) -> Tensor:
    """(columns,) FLAP's WIFV: the variance of the activation times the squared l2 norm of the column."""
    variance = (moments.squares - moments.total**2 / moments.count) / (moments.count - 1)
    return variance.clamp(min=0) * _norms(matrix(part.output).T) ** 2


def flap(part: Part, moments: Moments, _generator: Generator) -> Tensor:
    """Weighted fluctuation (WIFV): variance of the activation times ||W[:, i]||**2, summed over columns."""
    return part.per_unit(_fluctuation(part, moments))


def flap_standardized(part: Part, moments: Moments, _generator: Generator) -> Tensor:
    """FLAP's score for one ranking of all units (AL-AM): the mean z-score of a unit's columns, times its parameters.

    The z-score of a column's WIFV is taken among all columns of its layer's part. As in FLAP's code, the WIFV of
    attention is squared first. The factor makes allocation `global`, which ranks by score per parameter, rank by
    z-score. Half of the scores are negative.
    """
    fluctuation = _fluctuation(part, moments)
    if part.columns > 1:  # attention
        fluctuation = fluctuation**2
    z = (fluctuation - fluctuation.mean()) / (fluctuation.std() or 1)  # nothing fluctuates: all are as unimportant
    return part.per_unit(z) / part.columns * part.parameters


def activation_norm(part: Part, moments: Moments, _generator: Generator) -> Tensor:
    """The l2 norm of a unit's activations over all tokens.

    CFSP's fine score (`three_w_one_wa`) is this. It divides each |W[j, i]| r_i by its sum over j, and the weights of
    up_proj and gate_proj likewise, adds the three, multiplies by r_i, the root mean square of h_i, and takes the mean
    over the hidden dimensions j: 3 r_i / d, whatever the weights.
    """
    return part.per_unit(moments.squares).sqrt()


def sequence_norms(_part: Part, moments: Moments, _generator: Generator) -> Tensor:
    """The l2 norm of a unit's activations over one sequence, summed over sequences.

    2SSP's first stage, which takes the mean: all units have as many sequences, so that it ranks the same.
    """
    return moments.norms


def ppm_activation(part: Part, moments: Moments, _generator: Generator) -> Tensor:
    """Ranges of a unit's weights, each matrix's divided by the layer's largest, times the norm of the activation.

    The range of a set of weights is max(w) + |min(w)|. (optipfair adds up the norms of its batches; here is one norm.
    Its rule is one for MLPs; for attention this is the same formula.)
    """
    ranges = [weights.amax(1).double() + weights.amin(1).double().abs() for weights in part.matrices()]
    return sum(per_matrix / (per_matrix.max() or 1) for per_matrix in ranges) * part.per_unit(moments.squares).sqrt()


def magnitude(part: Part, _moments: Moments, _generator: Generator) -> Tensor:
    """The l2 norm of all the weights of a unit."""
    return sum(_norms(weights).square() for weights in part.matrices()).sqrt()


def spectral(part: Part, _moments: Moments, _generator: Generator) -> Tensor:
    """Ridge leverage of a unit's rows in the first matrix X that it reads through (gate_proj, q_proj); no data.

    The sum over the unit's rows of diag(X (X^T X + lambda I)^-1 X^T), lambda = trace(X^T X) / columns of X: how much
    the unit contributes to the row space. (PruneNet, arXiv 2501.15296, compares spectra of such matrices to train a
    policy; this is the closed form nearest to its idea.)
    """
    weights = part.matrices()[0].reshape(-1, matrix(part.inputs[0]).shape[1])
    squares = sum(rows.T @ rows for rows in _in_float64(weights))
    squares.diagonal().add_(squares.diagonal().mean())
    inverse = squares.inverse()
    of_rows = _of_rows(weights, lambda rows: (rows @ inverse * rows).sum(1))
    return of_rows.unflatten(0, (part.units, -1)).sum(1)


def _damped(moments: Moments) -> tuple[Tensor, Tensor]:
    """A + lambda I and lambda, where A = mean of h h^T, and lambda `RIDGE` times the mean of A's diagonal."""
    damped = moments.products / moments.count
    ridge = RIDGE * damped.diagonal().mean()
    damped.diagonal().add_(ridge)
    return damped, ridge


def leverage(part: Part, moments: Moments, _generator: Generator) -> Tensor:
    """MoDeGPT's ridge leverage scores: diag(A (A + lambda I)^-1), summed over columns.

    A is the mean of h h^T, and lambda `RIDGE` times the mean of A's diagonal. The weights do not enter.
    """
    damped, ridge = _damped(moments)
    return part.per_unit(1 - ridge * damped.inverse().diagonal())


def contribution(part: Part, moments: Moments, _generator: Generator) -> Tensor:
    """What a unit adds to the squared error of the part's output if units go one by one, the cheapest first.

    ModelOpt's iterative channel contribution. The error of a set P is the mean over tokens of ||sum_P W[:, i] h_i||**2
    = sum_{i, k in P} A_ik (W^T W)_ik, where A is the mean of h h^T. Nothing makes up for what goes.
    """
    from hfprune.pruning.greedy import one_by_one

    weights = matrix(part.output).double()
    per_pair = part.per_unit(part.per_unit(moments.products * (weights.T @ weights)).T)
    return one_by_one(per_pair / moments.count)


def obs(part: Part, moments: Moments, _generator: Generator) -> Tensor:
    """What a unit adds to the squared error of the part's output if the weights that stay make up for it.

    Optimal Brain Surgeon for whole units, as in ZipLM, OSSCAR's fast prune and SlimGPT: with C = (A + lambda I)^-1, A
    the mean of h h^T, unit u costs trace(W_u (C_uu)^-1 W_u^T). The cheapest units go, W and C are updated, and so on,
    see `greedy.with_repair`.
    """
    from hfprune.pruning.greedy import with_repair

    return with_repair(_damped(moments)[0].inverse(), matrix(part.output).double(), part.units)


def random(part: Part, moments: Moments, generator: Generator) -> Tensor:
    """Uniform random numbers: what any criterion has to beat."""
    return moments.squares.new_empty(part.units, device="cpu").uniform_(generator=generator)


def reap(routed: Tensor, written: Tensor) -> Tensor:
    """REAP: mean over the tokens that are sent to an expert of weight * ||output||; 0 if there are none."""
    return written / routed.clamp(min=1)


def expert_frequency(routed: Tensor) -> Tensor:
    """How many tokens are sent to an expert."""
    return routed


def easy_ep(turned: Tensor) -> Tensor:
    """EASY-EP: sum over tokens of weight * ||output|| * (1 - cosine of the states before and after all experts)."""
    return turned


WITH_PRODUCTS = ("total", "squares", "products")
CRITERIA: dict[str, GradientCriterion | StaticCriterion | ExpertCriterion] = {
    "entropy": GradientCriterion(entropy_gradient, "absolute", "High-Fidelity Pruning, arXiv 2603.08083"),
    "entropy_top_k": GradientCriterion(entropy_top_k_gradient, "absolute", "asked for by reviewers of 2603.08083"),
    "cross_entropy": GradientCriterion(cross_entropy_gradient, "absolute", "LLM-Pruner, arXiv 2305.11627"),
    "self_distillation": GradientCriterion(
        self_distillation_gradient, "absolute", "SDMPrune, arXiv 2506.11120", light_cut="cross_entropy"
    ),
    "fisher_token": GradientCriterion(fisher_gradient, "square", "Fisher information, labels of the model", True),
    "fisher_sequence": GradientCriterion(
        fisher_gradient, "square_of_sum", "Fisher information, labels of the model", True
    ),
    "fisher_pairs": GradientCriterion(fisher_gradient, "pairs", "Fisher information between units, after iCBS", True),
    "llm_pruner_element_1": GradientCriterion(
        cross_entropy_gradient, "elements", "LLM-Pruner's param_first, arXiv 2305.11627"
    ),
    "llm_pruner_element_2": GradientCriterion(
        cross_entropy_gradient, "element_squares", "LLM-Pruner's param_second, arXiv 2305.11627"
    ),
    "llm_pruner_vector": GradientCriterion(
        cross_entropy_gradient, "vectors", "LLM-Pruner's vectorize, arXiv 2305.11627"
    ),
    "wanda": StaticCriterion(wanda, "Wanda-sp, arXiv 2306.11695 and 2312.11983"),
    "flap": StaticCriterion(flap, "FLAP, arXiv 2312.11983"),
    "flap_standardized": StaticCriterion(flap_standardized, "FLAP's AL-AM, arXiv 2312.11983"),
    "activation_norm": StaticCriterion(activation_norm, "CFSP's fine score, arXiv 2409.13199"),
    "sequence_norms": StaticCriterion(
        sequence_norms, "2SSP's first stage, arXiv 2501.17771", ("total", "squares", "norms")
    ),
    "ppm_activation": StaticCriterion(ppm_activation, "optipfair 0.4.2, arXiv 2512.22671"),
    "contribution": StaticCriterion(contribution, "ModelOpt's iterative channel contribution", WITH_PRODUCTS),
    "obs": StaticCriterion(obs, "ZipLM, arXiv 2302.04089; OSSCAR; SlimGPT, arXiv 2412.18110", WITH_PRODUCTS),
    "leverage": StaticCriterion(leverage, "MoDeGPT's type I, arXiv 2408.09632", WITH_PRODUCTS),
    "magnitude": StaticCriterion(magnitude, "weights alone", ranks_experts=True),
    "spectral": StaticCriterion(spectral, "weights alone, after PruneNet, arXiv 2501.15296"),
    "random": StaticCriterion(random, "none", ranks_experts=True),
    "reap": ExpertCriterion(reap, "REAP, arXiv 2510.13999", ("routed", "written")),
    "easy_ep": ExpertCriterion(easy_ep, "EASY-EP, arXiv 2504.06792", ("turned",)),
    "expert_frequency": ExpertCriterion(expert_frequency, "how often the router chooses an expert", ("routed",)),
}
BESIDE_EXPERTS = {"products", "norms"}  # moments that are not taken inside experts
BY_NEURON = ("absolute", "square", "square_of_sum")  # products that keep a number for each unit


def ranks(name: str, part: str, mixture: bool) -> bool:
    """Whether a criterion ranks the units of a part.

    Inside an expert, only criteria that keep a few numbers for each neuron do; not those that need all pairs of
    neurons, every weight, or the sequences, of which an expert reads single tokens.

    Args:
        name: of the criterion.
        part: a name in `units.UNITS`.
        mixture: whether the model is a mixture of experts.
    """
    criterion = CRITERIA[name]
    if isinstance(criterion, ExpertCriterion):
        return part == "experts"
    is_gradient = isinstance(criterion, GradientCriterion)
    if part == "experts":
        return criterion.products in (*BY_NEURON, "pairs") if is_gradient else criterion.ranks_experts
    if part == "mlp" and mixture:
        return criterion.products in BY_NEURON if is_gradient else not BESIDE_EXPERTS & {*criterion.moments}
    return True


def rankers(parts: Sequence[str], mixture: bool) -> list[str]:
    """The criteria that rank the units of all these parts, see `ranks`."""
    return [name for name in CRITERIA if all(ranks(name, part, mixture) for part in parts)]


def passes(names: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """The passes over the calibration text that these criteria need: (light cut before the pass, its criteria).

    The first pass uses the intact model. It also scores the criteria that light cuts need.
    """
    cuts = {name: CRITERIA[name].light_cut for name in names}
    needed = list(dict.fromkeys(cut for cut in cuts.values() if cut))
    intact = dict.fromkeys([*(name for name in names if not cuts[name]), *needed])
    return [(None, list(intact)), *((cut, [name for name in names if cuts[name] == cut]) for cut in needed)]

"""hfprune in Python, for a notebook: the engine of the stages on a model that is loaded already.

    import hfprune

    small = hfprune.prune(model, tokenizer, texts, ratio=0.2, method="hfprune-best")

`prune` is these pieces one after the other, which can be called alone:

    tokens = hfprune.sample(model, tokenizer, texts)
    scores = hfprune.score(model, tokens, "fisher_token")
    kept = hfprune.allocate(model, scores, ratio=0.2, allocation="global")
    hfprune.refit(model, kept, tokens)  # in place
    hfprune.cut(model, kept)            # in place
    hfprune.fidelity(model, dense, tokens)["kl"]

The same model, texts and settings keep the same units as `hfprune score` and `hfprune prune`. Nothing is written.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfprune.data.sampling import draw_sequences
from hfprune.errors import UserError
from hfprune.evaluation.fidelity import hidden_states, position_measures, summary
from hfprune.models import checkpoint
from hfprune.models.head import head_of
from hfprune.models.loading import LINEAR, check_config
from hfprune.models.units import DEPTH, MIXED, PARTS, STRUCTURES, UNITS, Kept, Part, Scores, parts
from hfprune.pruning import surgery
from hfprune.pruning.allocation import ALLOCATIONS
from hfprune.pruning.budget import STEPS, refuse_method, refuse_saving, shape_of, units_to_keep
from hfprune.pruning.criteria import CRITERIA, passes
from hfprune.pruning.depth import order
from hfprune.pruning.influence import layer_influence
from hfprune.pruning.methods import MethodRecipe, preset
from hfprune.pruning.order import best_steps, kept_without, ordered
from hfprune.pruning.refit import refit as refit_kept
from hfprune.pruning.refit_names import RIDGE
from hfprune.pruning.saving import SAVINGS, fault, saving_of
from hfprune.pruning.scoring import unit_scores
from hfprune.pruning.searched import SEARCHED
from hfprune.pruning.width_search import search

SAMPLES, LENGTH = 32, 256  # an experiment's defaults


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    ratio: float | None = None,
    method: str | Mapping[str, Any] = "hfprune-best",
    *,
    target_parameters: int | None = None,
    ratio_of: str = "all",
    context: int | None = None,
    latencies: str | Path | None = None,
    round_to: int | None = None,
    pad: bool = False,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
    draws: int = 1,
) -> PreTrainedModel:
    """A smaller model, cut from a copy; `model` itself stays as it is, so memory holds both.

    Args:
        model: of a supported family (docs/families.md), whole and on one device.
        tokenizer: the model's.
        texts: documents to score on, and to refit on; `samples` of them must have `length` tokens.
        ratio: the share to remove, of what `ratio_of` says.
        method: a preset's name (`hfprune methods` lists them), or a recipe: {"criterion": "entropy", "refit":
            "sequential"}, with keys as in a config.
        target_parameters: instead of a ratio: how many parameters to leave.
        ratio_of: "all" parameters, tied embeddings once; "mlp": the MLPs' neurons; "memory" of weights and cache;
            "latency": the time to decode a token.
        context: for memory: tokens in the cache.
        latencies: for latency: the file that `hfprune latency` wrote.
        round_to: every MLP keeps a multiple of so many neurons: 1, 8, 32, 64, 128 or 256. By default 64; 256 from
            hidden size 2048 on, 1 below hidden size 256.
        pad: make layers of several widths as wide as the widest, with zeros.
        samples, length: sequences to score on, and tokens of each.
        seed: draws the sequences and the labels of `fisher_*`.
        draws: labels per position for these.

    Returns:
        A model of the stock class where all layers keep one width, else of a class that `save_pretrained` saves the
        code of. In training mode, and asking for gradients, where `model` is.

    Raises:
        UserError: the model is not supported, the texts are too short, or the budget cannot be met.
    """
    recipe = _recipe(method)
    check_model(model)
    _check_budget(model, recipe, ratio, target_parameters, ratio_of, round_to, context, latencies, pad)
    refuse_method(shape_of(model), recipe.structure, recipe.criterion, recipe.refit)
    small = copy.deepcopy(model).eval().requires_grad_(False)
    tokens = sample(small, tokenizer, texts, samples, length, seed)
    if recipe.structure in DEPTH:
        kept = _without_sublayers(small, tokens, recipe, ratio, target_parameters)
    elif recipe.structure in MIXED:
        scores = score(small, tokens, recipe.criterion, seed, draws)
        kept = _without_and_narrower(small, tokens, scores, recipe, ratio, target_parameters, round_to)
    elif recipe.allocation == SEARCHED:
        scores = score(small, tokens, recipe.criterion, seed, draws)
        found, _ = search(
            small, scores, tokens, recipe.structure, recipe.ridge, recipe.rounds, ratio=ratio, ratio_of=ratio_of,
            target_parameters=target_parameters, round_to=round_to, attention_share=recipe.attention_share,
            context=context, latencies=latencies,
        )  # fmt: skip
        kept = surgery.of_widths(scores, found[-1][0])
    else:
        scores = score(small, tokens, recipe.criterion, seed, draws)
        kept = allocate(
            small,
            scores,
            ratio,
            recipe.structure,
            recipe.allocation,
            target_parameters=target_parameters,
            ratio_of=ratio_of,
            context=context,
            latencies=latencies,
            attention_share=recipe.attention_share,
            experts_share=recipe.experts_share,
            round_to=round_to,
            tokens=tokens,
        )
    if recipe.refit != "none":
        refit(small, kept, tokens, recipe.refit, recipe.ridge)
    cut(small, kept)
    if pad:
        checkpoint.pad(small)
    return small.train(model.training).requires_grad_(any(each.requires_grad for each in model.parameters()))


def _without_sublayers(
    model: PreTrainedModel,
    tokens: Tensor,
    recipe: MethodRecipe,
    ratio: float | None,
    target_parameters: int | None,
) -> Kept:
    """All units but those of the sublayers or layers that a recipe removes."""
    shape = shape_of(model)
    budget = units_to_keep(shape, ratio, target_parameters=target_parameters, structure=recipe.structure)
    with _as_scored(model):
        steps, _, _ = order(model, tokens, recipe.criterion, recipe.structure, recipe.refit, recipe.ridge, budget.share)
    return kept_without(shape, best_steps(shape, steps, budget.share * shape.total))


def _without_and_narrower(
    model: PreTrainedModel, tokens: Tensor, scores: Scores, recipe: MethodRecipe, ratio: float | None,
    target_parameters: int | None, round_to: int | None,
) -> Kept:  # fmt: skip
    """All units but those of whole sublayers or layers that a recipe removes, and of neurons beside them."""
    shape, measure = shape_of(model), ALLOCATIONS[recipe.allocation].influence
    budget = partial(
        units_to_keep, shape, ratio, target_parameters=target_parameters, structure=recipe.structure,
        allocation=recipe.allocation, round_to=round_to, depth_share=recipe.depth_share,
    )  # fmt: skip
    structure, share = ordered(recipe.structure, recipe.depth_share), budget().share * (recipe.depth_share or 1)
    with _as_scored(model):
        steps, _, _ = order(model, tokens, recipe.order_criterion, structure, recipe.refit, recipe.ridge, share)
        influence = layer_influence(model, tokens, measure) if measure else None
    return surgery.without_and_narrower(shape, budget(order=steps), scores, recipe.allocation, influence)


def _check_budget(
    model: PreTrainedModel, recipe: MethodRecipe, ratio: float | None, target_parameters: int | None, ratio_of: str,
    round_to: int | None, context: int | None, latencies: str | Path | None, pad: bool = False,
) -> None:  # fmt: skip
    """Refuse a budget that is none, or that the model cannot meet, before anything is scored. See `prune`."""
    structure, allocation = recipe.structure, recipe.allocation
    if (ratio is None) == (target_parameters is None):
        raise UserError(f"give one of ratio and target_parameters, not {'none' if ratio is None else 'both'}.")
    if ratio is not None and not 0 < ratio < 1:
        raise UserError(f"ratio {ratio}: expected a share between 0 and 1, such as 0.2.")
    if ratio_of not in ("all", "mlp", *SAVINGS) or (ratio_of == "mlp" and structure != "mlp"):
        raise UserError(
            f"ratio_of {ratio_of!r} with structure {structure!r}: expected 'all', {', '.join(map(repr, SAVINGS))}, or "
            "'mlp' with 'mlp'."
        )
    if ratio is None and ratio_of in SAVINGS:
        raise UserError(f"ratio_of {ratio_of!r} goes with a ratio, not with target_parameters.")
    shares = {"attention_share": recipe.attention_share, "experts_share": recipe.experts_share}
    further = {"context": context, "latencies": latencies, "pad": pad, **shares}
    if reason := fault(ratio_of, structure, further):
        raise UserError(f"{reason}.")
    if round_to not in (None, *STEPS):
        raise UserError(f"round_to {round_to}: expected one of {', '.join(map(str, STEPS))}.")
    shape = shape_of(model)
    if saving := saving_of(shape, ratio_of, structure, model.config, context, latencies):
        refuse_saving(shape, saving, ratio, structure, allocation, round_to)
    else:
        units_to_keep(
            shape, ratio, ratio_of, target_parameters, structure, recipe.attention_share, allocation, round_to,
            depth_share=recipe.depth_share, experts_share=recipe.experts_share,
        )  # fmt: skip


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
) -> Tensor:
    """(samples, length) int64 token ids: a stretch of each of so many texts, drawn by the seed.

    Raises:
        UserError: too few texts have `length` tokens, or the tokenizer is not the model's.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UserError("texts: expected a list of strings, one a document.")
    return draw_sequences(tokenizer, model.config, list(texts), samples, length, seed, "texts")


def score(model: PreTrainedModel, tokens: Tensor, criterion: str = "entropy", seed: int = 0, draws: int = 1) -> Scores:
    """The importance of every unit: {"mlp": [(neurons,) per layer], "attention": [(key-value groups,) per layer]}.

    Args:
        model: stays as it is.
        tokens: (sequences, length) int64, see `sample`.
        criterion: a name in docs/criteria.md.
        seed: of drawn labels and of `random`.
        draws: labels per position for `fisher_*`.

    Returns:
        float32 on the CPU, the more important the higher.

    Raises:
        UserError: the model is not supported, the criterion not known, or a layer's scores are not finite or all zero.
    """
    if criterion not in CRITERIA:
        raise UserError(f"criterion {criterion!r}: expected one of {', '.join(CRITERIA)}.")
    check_model(model)
    scores: dict[str, Scores] = {}
    with _as_scored(model):
        for light_cut, names in passes([criterion]):
            silenced = scores[light_cut]["mlp"] if light_cut else None
            scores |= unit_scores(model, tokens, names, seed, draws, silenced, products="auto")
    return scores[criterion]


def allocate(
    model: PreTrainedModel,
    scores: Scores,
    ratio: float | None = None,
    structure: str = "mlp",
    allocation: str = "uniform",
    *,
    target_parameters: int | None = None,
    ratio_of: str = "all",
    context: int | None = None,
    latencies: str | Path | None = None,
    attention_share: float | None = None,
    experts_share: float | None = None,
    round_to: int | None = None,
    tokens: Tensor | None = None,
) -> Kept:
    """The units to keep: {part: [(kept,) int64, ascending, per layer]} for each part that `structure` cuts.

    Args:
        model: that the scores are of; read for its size.
        scores: see `score`.
        ratio, target_parameters, ratio_of, context, latencies, round_to: see `prune`.
        structure: "mlp", "attention", "mlp+attention", "experts" or "mlp+experts".
        allocation: a name in docs/pruning.md: "uniform" widths, or "global": one ranking over all layers.
        attention_share, experts_share: of what mlp+attention or mlp+experts removes; by default the scores decide.
        tokens: (sequences, length) int64, for allocations that measure the layers' influence ("angular", "cosine",
            "entropic"); best those that the scores were made on.

    Raises:
        UserError: the budget cannot be met, or is given twice or not at all; the allocation needs `tokens`.
    """
    check_model(model)
    if structure in (*DEPTH, *MIXED):
        depth = MIXED.get(structure, structure)
        raise UserError(f"structure {structure!r}: no scores choose {depth}. Use `hfprune.prune`, which searches.")
    if allocation == SEARCHED:
        raise UserError(f"allocation {SEARCHED!r}: no scores give its widths. Use `hfprune.prune`, which searches.")
    recipe = _recipe(
        {"criterion": "entropy", "structure": structure, "allocation": allocation}
        | ({} if attention_share is None else {"attention_share": attention_share})
        | ({} if experts_share is None else {"experts_share": experts_share})
    )
    _check_budget(model, recipe, ratio, target_parameters, ratio_of, round_to, context, latencies)
    if absent := [name for name in STRUCTURES[structure] if name not in scores]:
        raise UserError(
            f"structure {structure!r}: the scores do not rank its {UNITS[absent[0]]}. Take another criterion, see "
            "docs/criteria.md."
        )
    influence = None
    if measure := ALLOCATIONS[allocation].influence:
        if tokens is None:
            raise UserError(f"allocation {allocation!r} measures the layers on text: give `tokens`, see `sample`.")
        with _as_scored(model):
            influence = layer_influence(model, tokens, measure)
    shape = shape_of(model)
    if saving := saving_of(shape, ratio_of, structure, model.config, context, latencies):
        return surgery.units_within(shape, saving, ratio, structure, allocation, round_to, scores, influence)[1]
    budget = units_to_keep(
        shape, ratio, ratio_of, target_parameters, structure, attention_share, allocation, round_to, scores,
        experts_share=experts_share,
    )  # fmt: skip
    return surgery.best_units(budget, scores, recipe.allocation, influence)


def refit(
    model: PreTrainedModel, kept: Kept, tokens: Tensor, refit: str = "sequential", ridge: float = RIDGE
) -> dict[str, Any]:
    """Let the units that stay make up for those that go, *in place*; `cut` the model to `kept` afterwards.

    Args:
        model: the intact model, no parameter of which asks for a gradient afterwards.
        kept: see `allocate`.
        tokens: (sequences, length) int64, best those that the scores were made on.
        refit: "sequential", "trained", "local_search" (which replaces the neurons in `kept`), "least_squares" or
            "bias".
        ridge: how strongly weights keep to what they were.

    Returns:
        `refit_tokens`, `refit_flops`; except for `bias` `ridge` and `starved_layers`; of `trained` `temperature`.

    Raises:
        UserError: the model cannot be refitted so.
    """
    recipe = _recipe({"criterion": "entropy", "refit": refit, "ridge": ridge})
    if recipe.refit == "none":
        raise UserError("refit 'none': expected 'sequential', 'trained', 'local_search', 'least_squares' or 'bias'.")
    check_model(model)
    model.requires_grad_(False)
    return refit_kept(model, kept, tokens, recipe.refit, recipe.ridge)


def cut(model: PreTrainedModel, kept: Kept) -> None:
    """Remove every unit that is not in `kept`, *in place*; config and class then state the widths left.

    Args:
        model: of a supported family.
        kept: see `allocate`.
    """
    check_model(model)
    surgery.cut(model, kept)


def fidelity(model: PreTrainedModel, dense: PreTrainedModel, tokens: Tensor) -> dict[str, float]:
    """How far a model's predictions are from the dense model's, and its perplexity: means over the sequences.

    Args:
        model: any causal language model with the dense one's vocabulary, a pruned one say.
        dense: the model to compare with.
        tokens: (sequences, length) int64, best of text that was not scored on; see `sample`.

    Returns:
        `kl` (nats per token), `js`, `top1_agreement`, `top15_jaccard`, `acceptance`, `entropy_change` and `perplexity`,
        as in docs/statistics.md. The dense model with itself has kl 0.
    """
    documents = []
    with _as_scored(model), _as_scored(dense):
        both = zip(hidden_states(model, tokens, "measure"), hidden_states(dense, tokens, "dense"), strict=True)
        for sequence, (hidden, dense_hidden) in zip(tokens, both, strict=True):
            with head_of(model) as head, head_of(dense) as dense_head:
                place = head.weight.device
                moved = [each.to(place) for each in (dense_hidden[0], dense_head, sequence)]
                measures = position_measures(hidden[0].to(place), head, *moved)
            documents.append({name: values.mean().item() for name, values in measures.items()})
    return {name: estimate["value"] for name, estimate in summary(documents).items()}


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that the engine would get wrong.

    Raises:
        UserError: of another family, wrapped by adapters, quantised, or not whole on one device.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{type(model).__name__} is no model of transformers. Of a model with adapters of peft: merge them first, "
            "`model = model.merge_and_unload()`."
        )
    check_config(model.config, type(model).__name__)
    if model.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__}: no language model with an output layer. Load it by AutoModelForCausalLM."
        )
    dense = [part for name in PARTS for part in parts(model, name) if isinstance(part, Part)]
    linears = [linear for part in dense for linear in part.linears]
    if odd := [each for each in linears if not isinstance(each, LINEAR) or not each.weight.is_floating_point()]:
        raise UserError(
            f"{type(model).__name__}: its layers hold {type(odd[0]).__name__}, adapters or quantised weights. Merge "
            "adapters, and load the model without quantisation."
        )
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1 or "meta" in places:
        raise UserError(
            f"{type(model).__name__} is spread over {', '.join(sorted(places))}: load it whole, on one device."
        )


@contextmanager
def _as_scored(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, and no parameter that asks for a gradient; as before afterwards."""
    training, asking = model.training, [each for each in model.parameters() if each.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in asking:
            parameter.requires_grad_(True)


def _recipe(method: str | Mapping[str, Any]) -> MethodRecipe:
    """The recipe of a preset, or one that is written out.

    Raises:
        UserError: there is no such preset, or the recipe is wrong.
    """
    if isinstance(method, str):
        return preset(method).recipe
    try:
        return MethodRecipe.model_validate(dict(method))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc'])) or 'method'}: {each['msg']}" for each in error.errors()]
        raise UserError("; ".join(faults).removesuffix(".") + ".") from None

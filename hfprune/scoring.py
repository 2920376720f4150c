"""The engine: one pass over calibration tokens gives every criterion's score of every neuron of every layer."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hfprune.criteria import CRITERIA, GradientCriterion, Moments, Positions
from hfprune.errors import UserError
from hfprune.layout import RESUME, SCORES, layer_name
from hfprune.models import load_model, load_tokenizer, logits_of, mlps
from hfprune.progress import progress
from hfprune.texts import sample_sequences

TOKENS_PER_BATCH = 1024
# How many logits are held at once, in float32: 32 MiB on a CPU, where more is no faster; 256 MiB on a GPU.
LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**26}
SECONDS_BETWEEN_SAVES = 120
PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {  # (batch, length, neurons) products -> (neurons,) their sum
    "absolute": lambda products: products.abs().sum((0, 1)),
    "square": lambda products: products.square().sum((0, 1)),
    "square_of_sum": lambda products: products.sum(1).square().sum(0),
}


def score(
    folder: Path, model: Path, text: Path, criteria: Sequence[str], samples: int, length: int, seed: int, draws: int,
    dtype: str,
) -> dict[str, list[Tensor]]:  # fmt: skip
    """Stage `score`: the scores of every criterion in `criteria`, by one pass over the calibration text.

    Args:
        folder: the artifact's; the pass keeps its partial sums in its `.resume`, to go on after a kill.
        model: folder of the checkpoint.
        text: folder of the calibration text.
        criteria: names in `CRITERIA`.
        samples: sequences, see `texts.sample_sequences`.
        length: tokens of each.
        seed: draws the sequences, the labels of sampled criteria, and `random`.
        draws: labels per position for sampled criteria.
        dtype: of the model's arithmetic; scores are summed in float32 and float64 whatever it is.

    Returns:
        By criterion one float32 tensor (neurons,) per layer, on the CPU.
    """
    network = load_model(model, dtype)
    tokens = sample_sequences(load_tokenizer(model), network.config.vocab_size, text, samples, length, seed)
    return neuron_scores(network, tokens, criteria, seed, draws, resume=folder / RESUME)


def save_scores(folder: Path, scores: list[Tensor]) -> None:
    """Write `scores.safetensors` into `folder`: one criterion's scores, one tensor (neurons,) per layer."""
    save_file({layer_name(i): layer for i, layer in enumerate(scores)}, folder / SCORES)


class Sums:
    """What one pass adds up, in float64: moments of the activations, and each gradient criterion's products.

    Attributes:
        sequences: how many sequences it has seen.
        tensors: moments `total.<layer>` and `squares.<layer>`, products `<criterion>.<layer>`, each (neurons,).
    """

    def __init__(self, widths: Sequence[int], criteria: Sequence[str], device: torch.device) -> None:
        self.sequences = 0
        names = ["total", "squares", *criteria]
        self.tensors = {
            f"{name}.{layer}": torch.zeros(width, dtype=torch.float64, device=device)
            for name in names
            for layer, width in enumerate(widths)
        }

    def save(self, file: Path) -> None:
        """Write all sums to `file`, whole or not at all."""
        partial = file.with_suffix(".partial")
        save_file(self.tensors, partial, metadata={"sequences": str(self.sequences)})
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Read what `save` wrote."""
        with safe_open(file, "pt") as stored:
            self.sequences = int(stored.metadata()["sequences"])
            for name, tensor in self.tensors.items():
                tensor.copy_(stored.get_tensor(name))


def neuron_scores(
    model: PreTrainedModel,
    tokens: Tensor,
    criteria: Sequence[str],
    seed: int = 0,
    draws: int = 1,
    batch: int | None = None,
    resume: Path | None = None,
) -> dict[str, list[Tensor]]:
    """The importance of every MLP neuron by each criterion.

    One forward pass serves all; each gradient function costs one backward pass, times `draws` where it is sampled.
    Only activations carry gradients. A gradient criterion's score is the mean over sequences (and draws) of its summed
    products divided by the length; S is summed over a sequence's positions.

    Args:
        model: on its device, no parameter requiring a gradient.
        tokens: (sequences, length) int64.
        criteria: names in `CRITERIA`.
        seed: of sampled labels and of `random`.
        draws: labels per position for sampled criteria.
        batch: sequences at once; by default as many as make `TOKENS_PER_BATCH`. It does not change the scores.
        resume: folder for partial sums, saved every few minutes and read at the start.

    Returns:
        By criterion one float32 tensor (neurons,) per layer, on the CPU.

    Raises:
        UserError: a layer's scores are not finite, or all zero.
    """
    sums = add_up(model, tokens, criteria, seed, draws, batch, resume)
    found: dict[str, list[Tensor]] = {}
    for name in criteria:
        found[name] = []
        for layer, mlp in enumerate(mlps(model)):
            criterion = CRITERIA[name]
            if isinstance(criterion, GradientCriterion):
                times = tokens.numel() * (draws if criterion.sampled else 1)
                scores = sums.tensors[f"{name}.{layer}"] / times
            else:
                total, squares = (sums.tensors[f"{moment}.{layer}"] for moment in ("total", "squares"))
                scores = criterion.score(mlp, Moments(tokens.numel(), total, squares), generator(seed, name, layer))
            if not scores.isfinite().all():
                raise UserError(f"layer {layer}: scores by {name} are not finite; compute in float32 or bfloat16.")
            if not scores.any():
                raise UserError(f"layer {layer}: all scores by {name} are zero: nothing reached it.")
            found[name].append(scores.float().cpu())
    return found


def add_up(
    model: PreTrainedModel,
    tokens: Tensor,
    criteria: Sequence[str],
    seed: int,
    draws: int,
    batch: int | None,
    resume: Path | None,
) -> Sums:
    """One pass over `tokens`; arguments as for `neuron_scores`."""
    by_gradient: dict[tuple, list[str]] = defaultdict(list)  # criteria of one gradient share its backward passes
    for name in criteria:
        if isinstance(criterion := CRITERIA[name], GradientCriterion):
            by_gradient[(criterion.logit_gradient, draws if criterion.sampled else 1)].append(name)
    downs = [mlp.down_proj for mlp in mlps(model)]
    gradient_criteria = [name for names in by_gradient.values() for name in names]
    sums = Sums([down.in_features for down in downs], gradient_criteria, model.device)
    # The file's name says what it sums: a pass over other criteria, or with other draws, does not go on with it.
    summed = [f"{name}x{count}" for (_, count), names in by_gradient.items() for name in names]
    state = resume / f"{'-'.join(['sums', *sorted(summed)])}.safetensors" if resume else None
    if state and state.exists():
        sums.load(state)
    size = batch or max(1, TOKENS_PER_BATCH // tokens.shape[1])
    head = model.get_output_embeddings().weight
    current: list[str] = []  # the criteria whose gradient the running backward pass carries

    def watch(layer: int) -> Callable:
        def before_down_proj(_module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            activation = inputs[0]  # (batch, length, neurons)
            values = activation.detach().float()
            sums.tensors[f"total.{layer}"] += values.sum((0, 1))
            sums.tensors[f"squares.{layer}"] += values.square().sum((0, 1))

            def add(gradient: Tensor) -> None:
                products = gradient.float() * values
                for name in current:
                    sums.tensors[f"{name}.{layer}"] += PRODUCTS[CRITERIA[name].products](products)

            if by_gradient:
                if not activation.requires_grad:  # the first layer's: nothing before it needs a gradient
                    activation = activation.detach().requires_grad_()
                activation.register_hook(add)
            return (activation,)

        return before_down_proj

    hooks = [down.register_forward_pre_hook(watch(layer)) for layer, down in enumerate(downs)]
    batches = tokens[sums.sequences :].split(size)
    saved = time.monotonic()
    try:
        for part in progress(batches, "score", len(batches), "batch"):
            with torch.set_grad_enabled(bool(by_gradient)):
                hidden = model.model(input_ids=part.to(model.device), use_cache=False).last_hidden_state
            passes = [(names, each, draw) for (each, count), names in by_gradient.items() for draw in range(count)]
            for number, (names, logit_gradient, draw) in enumerate(passes):
                current[:] = names
                positions = positions_of(part, sums.sequences, seed, draw, model.device)
                gradient = hidden_gradient(hidden.detach(), head, logit_gradient, positions)
                hidden.backward(gradient, retain_graph=number + 1 < len(passes))
            sums.sequences += len(part)
            if state and time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                state.parent.mkdir(exist_ok=True)
                sums.save(state)
                saved = time.monotonic()
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def generator(*names: object) -> torch.Generator:
    """A generator on the CPU whose numbers depend on `names` alone, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def positions_of(tokens: Tensor, first: int, seed: int, draw: int, device: torch.device) -> Positions:
    """The positions of (batch, length) `tokens`, of which the first sequence is number `first`.

    A sequence's random numbers depend on its own number, not on the batch that it is in.
    """
    ends = torch.full((len(tokens), 1), -1)
    following = torch.cat([tokens[:, 1:], ends], dim=1).flatten()
    uniforms = [
        torch.rand(tokens.shape[1], generator=generator(seed, draw, first + number)) for number in range(len(tokens))
    ]
    return Positions(following.to(device), torch.cat(uniforms).to(device))


def hidden_gradient(
    hidden: Tensor, head: Tensor, logit_gradient: Callable[[Tensor, Positions], Tensor], positions: Positions
) -> Tensor:
    """Carry a criterion's gradient from the logits to the final hidden states, a chunk of tokens at a time.

    Args:
        hidden: (batch, length, hidden) final hidden states.
        head: (vocabulary, hidden) output projection.
        logit_gradient: see `criteria.GradientCriterion`.
        positions: what it may read beside the logits, batch * length of them.

    Returns:
        dS/dhidden of the shape and dtype of `hidden`, S summed over all positions.
    """
    flat = hidden.flatten(0, 1)
    gradient = torch.empty_like(flat)
    size = max(1, LOGITS_PER_CHUNK[hidden.device.type] // head.shape[0])
    for first in range(0, len(flat), size):
        chunk = slice(first, first + size)
        here = Positions(positions.next_tokens[chunk], positions.uniforms[chunk])
        gradient[chunk] = logit_gradient(logits_of(flat[chunk], head), here).to(head.dtype) @ head
    return gradient.view_as(hidden)

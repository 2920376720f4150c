"""Scoring by entropy-Taylor: our engine against a faithful model of the published procedure, and against the limit.

    python benchmarks/scoring.py                      the embedded model, on this machine's CPU or GPU
    python benchmarks/scoring.py --shape llama-2-7b   random weights of that shape, bfloat16, for a GPU
    python benchmarks/scoring.py --cost               how seconds grow with tokens and with criteria

The published procedure (read in the paper's code, written here anew): one sequence at a time, the MLP's weights require
gradients, two full-vocabulary float32 softmaxes under autograd, sums in bfloat16.

The limit is 4 x parameters floating-point operations a token (forward, and backward to the activations) at the rate of
a large matrix product of the model's own type, measured in the same run. On a CPU that rate is PyTorch's own, by MKL;
`onednn_limit_fraction` takes the rate of oneDNN, which our engine uses. Where the CPU multiplies bfloat16, our engine
runs as stage `score` does by default, and once more with `products: float32`.
"""

import argparse
import multiprocessing
import resource
from functools import partial

import torch
from common import alternate, record
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hfprune.models.loading import count_parameters, device
from hfprune.models.units import parts
from hfprune.pruning.scoring import unit_scores
from hfprune.runtime.matmul import fast_products, product_dtype

SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "llama-2-7b-8-layers": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": False,
    },
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "llama-2-13b": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip


def build(shape: str, **changes: int) -> PreTrainedModel:
    """A Llama of that shape, but for `changes`, with random weights: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = AutoConfig.for_model("llama", max_position_embeddings=4096, **SHAPES[shape] | changes)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def published(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Entropy-Taylor as the paper's code goes about it."""
    downs = [mlp.output for mlp in parts(model, "mlp")]
    sums = [torch.zeros(down.in_features, dtype=torch.bfloat16, device=model.device) for down in downs]
    for layer in model.model.layers:
        layer.mlp.requires_grad_(True)
    activations: list[torch.Tensor] = []

    def keep(_module, inputs):
        inputs[0].retain_grad()
        activations.append(inputs[0])

    hooks = [down.register_forward_pre_hook(keep) for down in downs]
    for sequence in tokens:
        activations.clear()
        logits = model(sequence[None].to(model.device), use_cache=False).logits.float()
        entropy = -(torch.softmax(logits, -1) * torch.log_softmax(logits, -1)).sum(-1).mean()
        entropy.backward()
        for total, h in zip(sums, activations, strict=True):
            total += (h * h.grad).abs().sum((0, 1)).to(torch.bfloat16)
        model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    return sums


def ours(model: PreTrainedModel, tokens: torch.Tensor, products: str = "auto") -> dict[str, list[torch.Tensor]]:
    """Our engine."""
    return unit_scores(model, tokens, ["entropy"], products=products)["entropy"]


SECONDS = 600  # a process that takes longer, or has died, ends the run
PROCEDURES = {"published": published, "ours": ours}
if not torch.cuda.is_available():
    PROCEDURES["ours_float32"] = partial(ours, products="float32")


def peak_beyond_weights(name: str, shape: str, length: int, results) -> None:
    """Peak bytes that a procedure takes beside the weights, in a process of its own."""
    model = build(shape)
    tokens = torch.randint(0, model.config.vocab_size, (2, length))
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        PROCEDURES[name](model, tokens)
        results.put(torch.cuda.max_memory_allocated() - before)
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        PROCEDURES[name](model, tokens)
        results.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def matrix_product_rates(dtype: torch.dtype) -> dict[str, float]:
    """Floating-point operations a second of a large matrix product: PyTorch's own, and as our engine does it."""
    size = 8192 if torch.cuda.is_available() else 2048
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))

    def fast() -> None:
        with fast_products(device()):
            a @ b

    seconds = alternate({"torch": lambda: a @ b, "ours": fast}, 9)
    return {name: 2 * size**3 / each for name, each in seconds.items()}


def cost(model: PreTrainedModel, length: int, rounds: int) -> dict[str, float]:
    """Seconds by number of sequences and by gradient functions, relative to one of each."""
    tokens = torch.randint(0, model.config.vocab_size, (4, length))
    functions = ["entropy", "cross_entropy", "fisher_token", "entropy_top_k"]
    work = {f"sequences_{n}": lambda n=n: unit_scores(model, tokens[:n], functions[:1], batch=1) for n in (1, 2, 4)}
    work |= {f"functions_{n}": lambda n=n: unit_scores(model, tokens[:1], functions[:n]) for n in (1, 2, 4)}
    work |= {"static_only": lambda: unit_scores(model, tokens[:1], ["wanda", "flap", "ppm_activation"])}
    seconds = alternate(work, rounds)
    return {name: each / seconds["sequences_1"] for name, each in seconds.items()}


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=2, help="in each measured call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cost", action="store_true", help="measure how cost grows instead")
    args = parser.parse_args()
    if args.cost:
        shape = {"shape": args.shape, "length": args.length}
        record("scoring-cost", shape | cost(build(args.shape), args.length, args.rounds))
        return

    context = multiprocessing.get_context("spawn")
    memory = {}
    for name in PROCEDURES:
        results = context.Queue()
        process = context.Process(target=peak_beyond_weights, args=(name, args.shape, args.length, results))
        process.start()
        memory[name] = results.get(timeout=SECONDS)
        process.join()

    model = build(args.shape)
    tokens = torch.randint(0, model.config.vocab_size, (args.sequences, args.length))
    work = {name: lambda run=run: run(model, tokens) for name, run in PROCEDURES.items()}
    before = matrix_product_rates(model.dtype)
    seconds = alternate(work, args.rounds)
    after = matrix_product_rates(model.dtype)
    rates = {name: (before[name] + after[name]) / 2 for name in before}
    limit = {name: 4 * count_parameters(model) * tokens.numel() / rate for name, rate in rates.items()}
    record(
        "scoring",
        {
            "shape": args.shape,
            "dtype": str(model.dtype),
            "length": args.length,
            "threads": torch.get_num_threads(),
            "products": str(product_dtype("auto", model.dtype, model.device)),
            **{f"matrix_product_flops_{name}": rate for name, rate in rates.items()},
            **{f"tokens_per_second_{name}": tokens.numel() / each for name, each in seconds.items()},
            **{f"peak_bytes_{name}": each for name, each in memory.items()},
            "speed_ratio": seconds["published"] / seconds["ours"],
            **{
                f"speed_ratio_{name.removeprefix('ours_')}": seconds["published"] / seconds[name]
                for name in PROCEDURES.keys() - {"published", "ours"}
            },
            "memory_ratio": memory["ours"] / memory["published"],
            "limit_fraction": limit["torch"] / seconds["ours"],
            "onednn_limit_fraction": limit["ours"] / seconds["ours"],
        },
    )


if __name__ == "__main__":
    main()

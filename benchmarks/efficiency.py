"""What pruning saves when the model runs: dense beside 10, 20 and 30 % of all parameters pruned, random weights.

    python benchmarks/efficiency.py                      the embedded model's shape, on this machine's CPU or GPU
    python benchmarks/efficiency.py --shape llama-2-7b   for a GPU, bfloat16

Which neurons go does not matter for speed, so they are the first that are not kept. Widths are the same in all layers.
All models run in turn in every round: `hfprune efficiency` does the same with checkpoints of a store.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import record
from scoring import SHAPES, build

from hfprune.evaluation.timing import time_models
from hfprune.models.loading import PREFILL, count_parameters, flops_per_token, weight_bytes
from hfprune.pruning.budget import shape_of, units_to_keep
from hfprune.pruning.surgery import cut

RATIOS = (0.0, 0.1, 0.2, 0.3)


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens to decode")
    args = parser.parse_args()

    figures = {"shape": args.shape, "prefill_tokens": PREFILL, "new_tokens": args.tokens}
    figures |= {"threads": torch.get_num_threads(), "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for ratio in RATIOS:
            model = build(args.shape)
            if ratio:
                layers = model.config.num_hidden_layers
                width = round(units_to_keep(shape_of(model), ratio).keep["mlp"] / layers)
                cut(model, {"mlp": [torch.arange(width)] * layers})
            name = f"{ratio:.0%} pruned" if ratio else "dense"
            folders[name] = Path(scratch) / name
            model.save_pretrained(folders[name])
            figures |= {f"{name}, dtype": str(model.dtype), f"{name}, parameters": count_parameters(model)}
            figures |= {
                f"{name}, flops_per_token": flops_per_token(model, PREFILL),
                f"{name}, bytes": weight_bytes(folders[name]),
            }
            del model
        for row in time_models(folders, "auto", args.rounds, args.tokens):
            figures[f"{row['model']}, {row['task']}, {row['metric']}"] = row["value"]
    record("efficiency", figures)


if __name__ == "__main__":
    main()

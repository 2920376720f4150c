"""Log-likelihoods for lm-eval: choices that share their context against lm-eval's own class.

    python benchmarks/evaluation.py --arc-easy FILE       the embedded model and tasks, on this machine's CPU or GPU

Both answer the same requests of the same documents, in turn in every round. lm-eval's class runs as its users have it,
in batches of 16 rows; ours as stage `evaluate` runs it. `product_ratio` is against lm-eval's class with the matrix
products that our stages use (`hfprune/runtime/matmul.py`), which a CPU gains from: what sharing and few logits alone
give.
`operations_ratio` is what torch's counter says of both: how much of the work sharing and few logits leave.
`max_difference`, of log-likelihoods, is against the same; `product_difference` is what the other products alone make of
lm-eval's class, by rounding.
"""

import argparse
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import alternate, record
from lm_eval.models.huggingface import HFLM
from torch.utils.flop_counter import FlopCounterMode

from hfprune.data.lm_eval_tasks import stock_task
from hfprune.data.readers import read_records
from hfprune.evaluation.shared_prefix import Shared
from hfprune.experiment.plan import Plan, store_root
from hfprune.experiment.schema import load
from hfprune.models.loading import load_model, load_tokenizer
from hfprune.runtime.matmul import fast_products

REPOSITORY = Path(__file__).parent.parent
CONFIG = REPOSITORY / "configs" / "smollm2-135m.yaml"
TASKS = ("openbookqa", "social_iqa", "piqa")  # of that config


def download(kind: str, *options: str) -> Path:
    """The folder of a downloaded artifact."""
    store = store_root(REPOSITORY / "store")
    command = [sys.executable, "-m", "hfprune", "download", kind, *options, "--store", str(store)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    return Path(done.stdout.splitlines()[-1])


def requests(name: str, folder: Path, documents: int) -> list[Any]:
    """The requests of so many documents of a task, drawn as stage `evaluate` draws them."""
    task = stock_task(name, read_records(folder))
    chosen = sorted(random.Random(0).sample(range(len(task.eval_docs)), documents))
    task.build_all_requests(samples=chosen, rank=0, world_size=1)
    return task.instances


def difference(one: list[tuple[float, bool]], other: list[tuple[float, bool]]) -> float:
    """The largest difference of two lists of log-likelihoods, nats."""
    return max(abs(mine - theirs) for (mine, _), (theirs, _) in zip(one, other, strict=True))


def operations(lm: HFLM, asked: list[Any]) -> int:
    """Floating-point operations of the answers."""
    with FlopCounterMode(display=False) as counter:
        lm.loglikelihood(asked, disable_tqdm=True)
    return counter.get_total_flops()


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arc-easy", type=Path, help="its documents, JSON lines in the fields of lm-eval's definition")
    parser.add_argument("--documents", type=int, default=32, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    plan = Plan(load(CONFIG))
    labels = {job.label: job for kind in ("model", "task") for job in plan.jobs[kind].values()}
    (model_job,) = plan.jobs["model"].values()
    checkpoint = download("model", *model_job.options)
    folders = {name: download("task", *labels[f"task {name}"].options) for name in TASKS}
    if args.arc_easy:
        folders["arc_easy"] = download("task", "--name", "arc_easy", "--path", str(args.arc_easy.absolute()))

    model, tokenizer = load_model(checkpoint, "float32"), load_tokenizer(checkpoint)
    stock, shared = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16), Shared(model, tokenizer)
    figures: dict[str, Any] = {"model": checkpoint.name, "documents": args.documents, "rounds": args.rounds}
    figures |= {"threads": torch.get_num_threads(), "dtype": str(model.dtype)}
    ratios, differences = [], []
    for name, folder in folders.items():
        asked = requests(name, folder, args.documents)
        answers: dict[str, list[tuple[float, bool]]] = {}

        def run(what: str, lm: HFLM, asked: list[Any] = asked, answers: dict = answers) -> None:
            answers[what] = lm.loglikelihood(asked, disable_tqdm=True)

        def run_fast(what: str, lm: HFLM, run: Any = run) -> None:
            with fast_products(model.device):
                run(what, lm)

        seconds = alternate(
            {
                "stock": lambda run=run: run("stock", stock),
                "stock, our products": lambda run=run_fast: run("stock, our products", stock),
                "shared": lambda run=run_fast: run("shared", shared),
            },
            args.rounds,
        )
        print(name, {what: round(each, 2) for what, each in seconds.items()}, flush=True)
        differences.append(difference(answers["stock, our products"], answers["shared"]))
        ratios.append(seconds["stock"] / seconds["shared"])
        figures |= {f"{name}, seconds, {what}": each for what, each in seconds.items()}
        figures |= {
            f"{name}, speed_ratio": ratios[-1],
            f"{name}, product_ratio": seconds["stock, our products"] / seconds["shared"],
            f"{name}, operations_ratio": operations(stock, asked) / operations(shared, asked),
            f"{name}, max_difference": differences[-1],
            f"{name}, product_difference": difference(answers["stock"], answers["stock, our products"]),
            f"{name}, greedy answers differ": sum(
                one != other for (_, one), (_, other) in zip(answers["stock"], answers["shared"], strict=True)
            ),
        }
    record("evaluation", figures | {"speed_ratio": min(ratios), "max_difference": max(differences)})


if __name__ == "__main__":
    main()

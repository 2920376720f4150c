"""Stores full of artifacts that took no model: what results are read from, without what it takes to make them."""

import json
import shutil
from pathlib import Path

from hfprune.experiment.plan import Job, Plan
from hfprune.store.artifacts import Store


def fill(plan: Plan, checkpoint: Path) -> None:
    """Give a plan's store everything that its results rest on; `checkpoint` is the dense model's folder."""
    for job in plan.needed:
        plan.store.make(job.recipe, lambda folder, job=job: _produce(folder, job, checkpoint))
    for part in plan.parts.values():
        plan.store.make(part.recipe, lambda folder: _lines(folder / "samples.jsonl", acc=1.0))


def _lines(file: Path, **values: float) -> None:
    file.write_text("".join(json.dumps({"doc_id": i} | values) + "\n" for i in range(3)))


def _produce(folder: Path, job: Job, checkpoint: Path) -> dict:
    """Files and details of a job's artifact, such as readers of results look at; weights that nobody may read."""
    stage, estimate = job.recipe.stage, {"value": 0.5, "stderr": 0.1, "n": 3}
    if stage == "model":
        for file in (checkpoint / "config.json", checkpoint / "model.safetensors"):
            shutil.copyfile(file, folder / file.name)
    if stage in ("prune", "recover"):
        (folder / "model.safetensors").write_bytes(b"weights")
    if stage == "prune":
        kept = {"kept": {"mlp": [[0, 1], [2]]}, "units_dense": {"mlp": 6}}
        (folder / "pruning.json").write_text(json.dumps(kept))
        ways = {name: job.recipe.parameters[name] for name in ("allocation", "refit", "structure", "ratio")}
        achieved = dict.fromkeys(("ratio_achieved", "ratio_achieved_parent"), job.recipe.parameters["ratio"])
        return ways | achieved
    if stage == "recover":
        steps = [
            {"step": i, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1, "seconds": 1, "tokens": i} for i in (1, 2)
        ]
        (folder / "losses.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if stage == "measure":
        results = dict.fromkeys(("kl", "loss", "perplexity"), estimate)
        (folder / "results.json").write_text(json.dumps(results))
        _lines(folder / "samples.jsonl", kl=0.5, loss=2.0)
        columns = "by,bin,low,high,metric,n,value"
        bins = [f"{by},{i},{i},{i + 1},kl,3,0.5" for by in ("position", "entropy") for i in range(2)]
        (folder / "profile.csv").write_text("\n".join([columns, *bins]) + "\n")
        return {"parameters": 100, "flops_per_token": 10, "bytes": 400}
    if stage == "evaluate":
        tasks = [name for name in job.recipe.inputs if name != "model"]
        (folder / "results.json").write_text(json.dumps({name: {"acc": estimate} for name in tasks}))
    return {"name": stage, "documents": 3}


def take_out(store: Store, job: Job) -> None:
    """Remove an artifact by hand."""
    shutil.rmtree(store.folder(job.recipe))

# Requests to a cluster, from the estimate that `hfprune plan` prints. On a single machine jobs request only its GPU.
from functools import cache, partial
from math import ceil

TOKENS = 256 if GPU else 64  # tokens to decode for a timing; the paper has 256
ON_CLUSTER = DEVICE and workflow.is_main_process  # a running job already has its resources

if ON_CLUSTER:
    from hfprune.experiment.estimate import device_of, estimate  # imports torch, which planning does not need

    try:
        device_of(DEVICE)
    except UserError as error:
        raise WorkflowError(str(error))


@cache
def estimate_for(threads):
    """The estimate for jobs with this many threads. Refuses the whole workflow if a training does not fit."""
    try:
        estimated = estimate(plan, device_of(DEVICE, threads))[0]
        estimated.refuse_trainings()
    except UserError as error:
        raise WorkflowError(str(error))
    return estimated


# Refuse at the start if the model's shape is known without a network; otherwise at the first request.
(DENSE,) = plan.jobs["model"].values()
if ON_CLUSTER and (plan.has(DENSE) or (plan.experiment.model.path and plan.experiment.model.path.is_dir())):
    estimate_for(16)


@cache
def request(stage, key, threads):
    """The request of a job; without a key, that of a timing job."""
    estimated = estimate_for(threads)
    timings = {
        "efficiency": partial(estimated.efficiency, TOKENS),
        "scoring_cost": estimated.scoring_cost,
        "files": partial(estimated.files, threads),
    }
    try:
        return estimated.request(plan.jobs[stage].get(key) or plan.parts[key].after) if key else timings[stage]()
    except UserError as error:
        raise WorkflowError(str(error))


def cluster_request(stage, wildcards, input, threads):
    """The request of a job; None on a single machine.

    A model's shape is in its files. If a job's inputs are missing, the FileNotFoundError makes Snakemake call again later.
    """
    if not ON_CLUSTER:
        return None
    for path in input:
        os.stat(path)
    return request(stage, wildcards.get("key"), threads)


def memory(stage):
    """Resource function: memory of the node, more at every attempt."""

    def size(wildcards, input, threads, attempt):
        needs = cluster_request(stage, wildcards, input, threads)
        return f"{ceil(attempt * needs.memory_bytes / 10**6)} MB" if needs else None

    return size


def minutes(stage):
    """Resource function: time limit in minutes, more at every attempt."""

    def limit(wildcards, input, threads, attempt):
        needs = cluster_request(stage, wildcards, input, threads)
        return ceil(attempt * needs.seconds / 60) if needs else None

    return limit


def gpus(stage):
    """Resource function: number of GPUs, as many as the weights need."""

    def count(wildcards, input, threads):
        needs = cluster_request(stage, wildcards, input, threads)
        if needs:
            return needs.gpus
        if DEVICE:  # inside a job: the GPUs that it got
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            return len(visible.split(",")) if visible else 0
        return GPU

    return count

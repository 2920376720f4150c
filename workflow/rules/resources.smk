# What a job asks of a cluster, by the estimate that `hfprune plan` prints. On one machine jobs ask for nothing but its GPU.
from functools import cache, partial
from math import ceil

TOKENS = 256 if GPU else 64  # to decode for a timing; the paper has 256
ASKS = DEVICE and workflow.is_main_process  # a job that runs has been given what it has

if ASKS:
    from hfprune.experiment.estimate import device_of, estimate  # with torch, which planning does without

    try:
        device_of(DEVICE)
    except UserError as error:
        raise WorkflowError(str(error))


@cache
def estimate_for(threads):
    """The estimate of jobs that have so many threads; no job is sent where a later one would find no room."""
    try:
        made = estimate(plan, device_of(DEVICE, threads))[0]
        made.refuse_trainings()
    except UserError as error:
        raise WorkflowError(str(error))
    return made


# In time, where the model's shape is at hand without a network; else the first job that asks will know it.
(DENSE,) = plan.jobs["model"].values()
if ASKS and (plan.has(DENSE) or (plan.experiment.model.path and plan.experiment.model.path.is_dir())):
    estimate_for(16)


@cache
def request(stage, key, threads):
    """What a job asks for; without a key, one that times what the plan has."""
    counted = estimate_for(threads)
    timed = {"efficiency": partial(counted.efficiency, TOKENS), "scoring_cost": counted.scoring_cost}
    try:
        return counted.request(plan.jobs[stage].get(key) or plan.parts[key].after) if key else timed[stage]()
    except UserError as error:
        raise WorkflowError(str(error))


def asked(stage, wildcards, input, threads):
    """What a job asks for; nothing on one machine.

    Before a job's inputs are there, the FileNotFoundError has Snakemake ask again later: a model's shape is in its files.
    """
    if not ASKS:
        return None
    for path in input:
        os.stat(path)
    return request(stage, wildcards.get("key"), threads)


def memory(stage):
    """A node's memory, more at each attempt."""

    def size(wildcards, input, threads, attempt):
        found = asked(stage, wildcards, input, threads)
        return f"{ceil(attempt * found.memory_bytes / 10**6)} MB" if found else None

    return size


def minutes(stage):
    """Minutes after which the job may be ended, more at each attempt."""

    def until(wildcards, input, threads, attempt):
        found = asked(stage, wildcards, input, threads)
        return ceil(attempt * found.seconds / 60) if found else None

    return until


def gpus(stage):
    """GPUs: as many as the weights spread over."""

    def count(wildcards, input, threads):
        found = asked(stage, wildcards, input, threads)
        if found:
            return found.gpus
        if DEVICE:  # in a job, which sees those that it was given
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            return len(seen.split(",")) if seen else 0
        return GPU

    return count

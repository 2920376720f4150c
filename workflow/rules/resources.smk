# What a job asks of a cluster, by the estimate that `hfprune plan` prints. On one machine jobs ask for nothing but its GPU.
from functools import cache
from math import ceil

ASKS = DEVICE and workflow.is_main_process  # a job that runs has been given what it has

if ASKS:
    from hfprune.experiment.estimate import device_of, estimate  # with torch, which planning does without

    try:
        device_of(DEVICE)
    except UserError as error:
        raise WorkflowError(str(error))


@cache
def estimate_for(threads):
    """The estimate of jobs that have so many threads."""
    return estimate(plan, device_of(DEVICE, threads))[0]


@cache
def request(stage, key, threads):
    """What a job asks for."""
    try:
        return estimate_for(threads).request(plan.jobs[stage][key])
    except UserError as error:
        raise WorkflowError(str(error))


def requests(stage, wildcards, input, threads):
    """What a job asks for; of one for all models, what each job of that stage would. Nothing on one machine.

    Before a job's inputs are there, the FileNotFoundError has Snakemake ask again later: a model's shape is in its files.
    """
    for path in input if ASKS else []:
        os.stat(path)
    keys = [wildcards.key] if wildcards else plan.jobs[stage]
    return [request(stage, key, threads) for key in keys] if ASKS else []


def memory(stage):
    """A node's memory, more at each attempt."""

    def size(wildcards, input, threads, attempt):
        asked = requests(stage, wildcards, input, threads)
        return f"{ceil(attempt * max(each.memory_bytes for each in asked) / 10**6)} MB" if asked else None

    return size


def minutes(stage):
    """Minutes after which the job may be ended, more at each attempt."""

    def until(wildcards, input, threads, attempt):
        asked = requests(stage, wildcards, input, threads)
        return ceil(attempt * sum(each.seconds for each in asked) / 60) if asked else None

    return until


def gpus(stage):
    """GPUs: as many as the weights spread over."""

    def count(wildcards, input, threads):
        asked = requests(stage, wildcards, input, threads)
        if asked:
            return max(each.gpus for each in asked)
        if DEVICE:  # in a job, which sees those that it was given
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            return len(seen.split(",")) if seen else 0
        return GPU

    return count

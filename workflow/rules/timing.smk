# Timings depend on this machine and its current load. So they are not artifacts and not part of `all`.
rule efficiency:
    """Time prefill and decoding of the dense and the pruned models, side by side."""
    input:
        missing(plan.described(plan.timed)),
        VERDICT,
    output:
        RESULTS / "efficiency.csv",
    log:
        LOGS / "efficiency.log",
    conda:
        ENVIRONMENT
    threads: every_core
    resources:
        gpu=gpus("efficiency"),
        mem=memory("efficiency"),
        runtime=minutes("efficiency"),
    params:
        python=python,
        models=manifests(plan.timed),
        dtype=plan.experiment.model.dtype,
        # A function, so that a change of these values causes no new timing.
        place=lambda wildcards, resources: ["--tokens", TOKENS, "--store", STORE, *METHODS],
    message:
        "time models"
    shell:
        "{params.python:q} -m hfprune efficiency --models {params.models:q} --dtype {params.dtype:q} {params.place:q}"
        " --output {output:q} > {log:q} 2>&1"


CALIBRATION = {
    "model": next(iter(plan.jobs["model"].values())),
    "text": plan.calibration,
}


rule scoring_cost:
    """Measure seconds and memory of scoring by each criterion alone, on the calibration sequences."""
    input:
        missing([*CALIBRATION.values(), *plan.light_cuts]),
        VERDICT,
    output:
        RESULTS / "scoring_cost.csv",
    log:
        LOGS / "scoring_cost.log",
    conda:
        ENVIRONMENT
    threads: every_core
    resources:
        gpu=gpus("scoring_cost"),
        mem=memory("scoring_cost"),
        runtime=minutes("scoring_cost"),
    params:
        python=python,
        inputs=[
            *(word for name, job in CALIBRATION.items() for word in (f"--{name}", plan.manifest(job))),
            *(["--light-cut", *manifests(plan.light_cuts)] if plan.light_cuts else []),
        ],
        criteria=plan.experiment.criteria,
        sampling=plan.sampling,
    message:
        "time the scoring of each criterion"
    shell:
        "{params.python:q} -m hfprune scoring-cost {params.inputs:q} --criteria {params.criteria:q}"
        " {params.sampling:q} --output {output:q} > {log:q} 2>&1"

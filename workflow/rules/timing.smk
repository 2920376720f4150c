# Timings: of this machine, as it is at the moment. So they are no artifacts, and no part of `all`.
rule efficiency:
    """Prefill and decoding of the dense model and of the cut ones, side by side."""
    input:
        [ancient(plan.manifest(job)) for job in plan.timed],
    output:
        RESULTS / "efficiency.csv",
    log:
        "logs/efficiency.log",
    conda:
        ENVIRONMENT
    threads: every_core
    resources:
        gpu=GPU,
        mem=memory("measure"),
        runtime=minutes("measure"),
    params:
        python=python,
        dtype=plan.experiment.model.dtype,
        # Of where it runs, for which nothing is timed again. The paper decodes 256 tokens.
        place=lambda wildcards, resources: ["--tokens", 256 if GPU else 64, "--store", STORE],
    message:
        "time models"
    shell:
        "{params.python:q} -m hfprune efficiency --models {input:q} --dtype {params.dtype:q} {params.place:q}"
        " --output {output:q} 2>&1 | tee {log:q}"


rule scoring_cost:
    """Seconds and memory of scoring by each criterion alone, on the calibration's sequences."""
    input:
        model=[ancient(plan.manifest(job)) for job in plan.jobs["model"].values()],
        text=ancient(plan.manifest(plan.scores[0].inputs["text"])),
        light_cut=[ancient(plan.manifest(job)) for job in plan.light_cuts],
    output:
        RESULTS / "scoring_cost.csv",
    log:
        "logs/scoring_cost.log",
    conda:
        ENVIRONMENT
    threads: every_core
    resources:
        gpu=GPU,
        mem=memory("score"),
        runtime=minutes("score"),
    params:
        python=python,
        criteria=plan.experiment.criteria,
        sampling=plan.sampling,
        inputs=lambda wildcards, input: ["--light-cut", *input.light_cut] if input.light_cut else [],
    message:
        "time the scoring of each criterion"
    shell:
        "{params.python:q} -m hfprune scoring-cost --model {input.model:q} --text {input.text:q} --criteria {params.criteria:q}"
        " {params.inputs:q} {params.sampling:q} --output {output:q} 2>&1 | tee {log:q}"

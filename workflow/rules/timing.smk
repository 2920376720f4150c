# Timings: of this machine, as it is at the moment. So they are no artifacts, and no part of `all`.
rule efficiency:
    """Prefill and decoding of the dense model and of the cut ones, side by side."""
    input:
        missing(plan.timed),
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
        models=manifests(plan.timed),
        dtype=plan.experiment.model.dtype,
        # Of where it runs, for which nothing is timed again. The paper decodes 256 tokens.
        place=lambda wildcards, resources: ["--tokens", 256 if GPU else 64, "--store", STORE, *METHODS],
    message:
        "time models"
    shell:
        "{params.python:q} -m hfprune efficiency --models {params.models:q} --dtype {params.dtype:q} {params.place:q}"
        " --output {output:q} 2>&1 | tee {log:q}"


rule scoring_cost:
    """Seconds and memory of scoring by each criterion alone, on the calibration's sequences."""
    input:
        missing([*plan.scores[0].sources, *plan.light_cuts]),
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
        inputs=[
            *(
                word
                for name in ("model", "text")
                for word in (f"--{name}", plan.manifest(plan.scores[0].inputs[name]))
            ),
            *(["--light-cut", *manifests(plan.light_cuts)] if plan.light_cuts else []),
        ],
        criteria=plan.experiment.criteria,
        sampling=plan.sampling,
    message:
        "time the scoring of each criterion"
    shell:
        "{params.python:q} -m hfprune scoring-cost {params.inputs:q} --criteria {params.criteria:q}"
        " {params.sampling:q} --output {output:q} 2>&1 | tee {log:q}"

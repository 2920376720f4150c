rule download:
    """Download a model, a text or a task's documents. The only rule that uses the network; it runs first."""
    output:
        update(str(STORE / "{kind}" / "{key}" / "manifest.json")),
    log:
        LOGS / "{kind}" / "{key}.log",
    wildcard_constraints:
        kind="model|text|task",
    priority: 100
    conda:
        ENVIRONMENT
    params:
        command=lambda wildcards: command(wildcards.kind)(wildcards),
        label=lambda wildcards: label(wildcards.kind)(wildcards),
    message:
        "download {params.label}"
    shell:
        "python -m hfprune {params.command:q} > {log:q} 2>&1"


rule mix:
    """Make one text of several, to calibrate or train on."""
    input:
        made_from("mix"),
    output:
        artifact("mix"),
    log:
        LOGS / "mix" / "{key}.log",
    priority: 60
    conda:
        ENVIRONMENT
    params:
        command=command("mix"),
        label=label("mix"),
    message:
        "mix {params.label}"
    shell:
        "python -m hfprune {params.command:q} > {log:q} 2>&1"


checkpoint overlap:
    """Check for contamination of the test data. If the experiment is strict, all other jobs wait for it."""
    input:
        missing([job for jobs in plan.documents.values() for job in jobs.values()]),
    output:
        RESULTS / "tables" / "overlap.csv",
    log:
        LOGS / "overlap.log",
    priority: 75
    conda:
        ENVIRONMENT
    params:
        documents=[
            word
            for use, jobs in plan.documents.items()
            for word in ([f"--{use}", *(f"{name}={plan.manifest(job)}" for name, job in jobs.items())] if jobs else [])
        ],
        strict="--strict" if plan.experiment.strict else "",
        code=code_digest("hfprune.data.contamination"),
    message:
        "look for test documents in the calibration and training text"
    shell:
        "python -m hfprune overlap {params.documents:q} {params.strict} --output {output:q} > {log:q} 2>&1"


# If the experiment is strict, results wait for the verdict too: finished artifacts do not make them wait.
VERDICT = rules.overlap.output if plan.experiment.strict else []

rule reference:
    """Record the dense model's predictions on held-out text."""
    input:
        made_from("reference"),
    output:
        artifact("reference"),
    log:
        LOGS / "reference" / "{key}.log",
    priority: 50  # every measure waits for it
    conda:
        ENVIRONMENT
    threads: half_the_cores
    resources:
        gpu=gpus("reference"),
        mem=memory("reference"),
        runtime=minutes("reference"),
    params:
        python=python,
        command=command("reference"),
        label=label("reference"),
    message:
        "record {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"


rule measure:
    """Measure perplexity, and fidelity to the dense model."""
    input:
        made_from("measure"),
    output:
        artifact("measure"),
    log:
        LOGS / "measure" / "{key}.log",
    priority: 40  # fidelity is known first, then come trainings, then tasks
    conda:
        ENVIRONMENT
    threads: half_the_cores
    resources:
        gpu=gpus("measure"),
        mem=memory("measure"),
        runtime=minutes("measure"),
    params:
        python=python,
        command=command("measure"),
        label=label("measure"),
    message:
        "measure fidelity and perplexity: {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"


rule evaluate:
    """Measure zero-shot accuracy on all tasks."""
    input:
        made_from("evaluate"),
    output:
        artifact("evaluate"),
    log:
        LOGS / "evaluate" / "{key}.log",
    conda:
        ENVIRONMENT
    threads: half_the_cores
    resources:
        gpu=gpus("evaluate"),
        mem=memory("evaluate"),
        runtime=minutes("evaluate"),
    params:
        python=python,
        command=command("evaluate"),
        label=label("evaluate"),
    message:
        "evaluate tasks: {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"


rule evaluate_task:
    """Evaluate one task again, if its results were removed after the evaluation of all tasks."""
    input:
        lambda wildcards: missing(plan.parts[wildcards.key].sources),
    output:
        artifact("evaluate-task"),
    log:
        LOGS / "evaluate-task" / "{key}.log",
    conda:
        ENVIRONMENT
    threads: half_the_cores
    resources:
        gpu=gpus("evaluate"),
        mem=memory("evaluate"),
        runtime=minutes("evaluate"),
    params:
        python=python,
        command=lambda wildcards: plan.command(plan.parts[wildcards.key].after),
        label=lambda wildcards: plan.parts[wildcards.key].label,
    message:
        "evaluate tasks again: {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"

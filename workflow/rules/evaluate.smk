rule reference:
    """What the dense model predicts on held-out text."""
    input:
        unpack(made_from("reference")),
    output:
        artifact("reference"),
    log:
        "logs/reference/{key}.log",
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
        options=options("reference"),
        label=label("reference"),
    message:
        "record {params.label}"
    shell:
        "{params.python:q} -m hfprune reference --model {input.model:q} --text {input.text:q} {params.options:q} 2>&1"
        " | tee {log:q}"


rule measure:
    """Perplexity, and fidelity to the dense model."""
    input:
        unpack(made_from("measure")),
    output:
        artifact("measure"),
    log:
        "logs/measure/{key}.log",
    conda:
        ENVIRONMENT
    threads: half_the_cores
    resources:
        gpu=gpus("measure"),
        mem=memory("measure"),
        runtime=minutes("measure"),
    params:
        python=python,
        options=options("measure"),
        label=label("measure"),
    message:
        "measure fidelity and perplexity: {params.label}"
    shell:
        "{params.python:q} -m hfprune measure --model {input.model:q} --reference {input.reference:q} {params.options:q} 2>&1"
        " | tee {log:q}"


rule evaluate:
    """Zero-shot accuracy on every task."""
    input:
        unpack(made_from("evaluate")),
    output:
        artifact("evaluate"),
    log:
        "logs/evaluate/{key}.log",
    conda:
        ENVIRONMENT
    threads: half_the_cores
    resources:
        gpu=gpus("evaluate"),
        mem=memory("evaluate"),
        runtime=minutes("evaluate"),
    params:
        python=python,
        options=options("evaluate"),
        label=label("evaluate"),
    message:
        "evaluate tasks: {params.label}"
    shell:
        "{params.python:q} -m hfprune evaluate --model {input.model:q} --tasks {input.tasks:q} {params.options:q} 2>&1"
        " | tee {log:q}"

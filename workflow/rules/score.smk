rule score:
    """The importance of every neuron: one pass over the calibration text."""
    input:
        unpack(made_from("score")),
    output:
        artifact("score"),
    log:
        "logs/score/{key}.log",
    priority: 50  # much waits for it
    conda:
        ENVIRONMENT
    threads: 16
    resources:
        gpu=GPU,
    params:
        options=options("score"),
        label=label("score"),
    message:
        "score neurons: {params.label}"
    shell:
        "python -m hfprune score --model {input.model:q} --text {input.text:q} {params.options:q} 2>&1 | tee {log:q}"

rule score:
    """The importance of every neuron and key-value group: one pass over the calibration text, or the sum of its shards."""
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
        gpu=gpus("score"),
        mem=memory("score"),
        runtime=minutes("score"),
    params:
        python=python,
        options=options("score"),
        inputs=input_options("light_cut", "shards"),
        label=label("score"),
    message:
        "score: {params.label}"
    shell:
        "{params.python:q} -m hfprune score --model {input.model:q} --text {input.text:q} {params.inputs:q} {params.options:q} 2>&1"
        " | tee {log:q}"


rule shard:
    """One part of the pass over the calibration text, where `calibration.shards` cuts it into several jobs."""
    input:
        unpack(made_from("shard")),
    output:
        artifact("shard"),
    log:
        "logs/shard/{key}.log",
    priority: 50
    conda:
        ENVIRONMENT
    threads: 16
    resources:
        gpu=gpus("shard"),
        mem=memory("shard"),
        runtime=minutes("shard"),
    params:
        python=python,
        options=options("shard"),
        inputs=input_options("light_cut"),
        label=label("shard"),
    message:
        "add up for scores: {params.label}"
    shell:
        "{params.python:q} -m hfprune shard --model {input.model:q} --text {input.text:q} {params.inputs:q} {params.options:q} 2>&1"
        " | tee {log:q}"

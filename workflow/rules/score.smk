rule score:
    """Score every neuron and key-value group: in one pass over the calibration text, or as the sum of its shards."""
    input:
        made_from("score"),
    output:
        artifact("score"),
    log:
        LOGS / "score" / "{key}.log",
    wildcard_constraints:
        key=last("score"),
    priority: 60  # most jobs wait for it
    conda:
        ENVIRONMENT
    threads: 16
    resources:
        gpu=gpus("score"),
        mem=memory("score"),
        runtime=minutes("score"),
    params:
        python=python,
        command=command("score"),
        label=label("score"),
    message:
        "score: {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"


rule shard:
    """Score one shard of the calibration text, if `calibration.shards` splits the pass into several jobs."""
    input:
        made_from("shard"),
    output:
        artifact("shard"),
    log:
        LOGS / "shard" / "{key}.log",
    wildcard_constraints:
        key=last("shard"),
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
        command=command("shard"),
        label=label("shard"),
    message:
        "score a shard: {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"


ruleorder: score > first_score
ruleorder: shard > first_shard


# Scores and shards that other jobs of the same stage wait for.
use rule score as first_score with:
    wildcard_constraints:
        key="[0-9a-f]{16}",


use rule shard as first_shard with:
    wildcard_constraints:
        key="[0-9a-f]{16}",

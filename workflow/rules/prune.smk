rule prune:
    """Remove a checkpoint's least important neurons or key-value groups."""
    input:
        made_from("prune"),
    output:
        artifact("prune"),
    log:
        LOGS / "prune" / "{key}.log",
    priority: 50
    conda:
        ENVIRONMENT
    threads: half_the_cores
    resources:
        gpu=gpus("prune"),
        mem=memory("prune"),
        runtime=minutes("prune"),
    params:
        python=python,
        command=command("prune"),
        label=label("prune"),
    message:
        "prune {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"

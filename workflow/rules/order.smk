rule order:
    """Find the order in which whole sublayers or layers go. Cuts of all sizes read it."""
    input:
        made_from("order"),
    output:
        artifact("order"),
    log:
        LOGS / "order" / "{key}.log",
    priority: 50
    conda:
        ENVIRONMENT
    threads: half_the_cores
    resources:
        gpu=gpus("order"),
        mem=memory("order"),
        runtime=minutes("order"),
    params:
        python=python,
        command=command("order"),
        label=label("order"),
    message:
        "order {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"

rule search:
    """Find how wide each layer should be, by measuring refitted widths. One cut reads it."""
    input:
        made_from("search"),
    output:
        artifact("search"),
    log:
        LOGS / "search" / "{key}.log",
    priority: 50
    conda:
        ENVIRONMENT
    threads: half_the_cores
    resources:
        gpu=gpus("search"),
        mem=memory("search"),
        runtime=minutes("search"),
    params:
        python=python,
        command=command("search"),
        label=label("search"),
    message:
        "search {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"

rule recover:
    """Train a checkpoint after the cut. If the job gets several GPUs, they share the work."""
    input:
        made_from("recover"),
    output:
        artifact("recover"),
    log:
        LOGS / "recover" / "{key}.log",
    priority: 20  # what is cut is measured first
    conda:
        ENVIRONMENT
    threads: 16
    resources:
        gpu=GPU,
        mem=memory("recover"),
        runtime=minutes("recover"),
    params:
        python=processes,
        command=command("recover"),
        label=label("recover"),
    message:
        "recover {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"

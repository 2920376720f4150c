rule download:
    """A model, a text or a task's documents: the only rule that uses the network, and the first to run."""
    output:
        update(str(STORE / "{kind}" / "{key}" / "manifest.json")),
    log:
        "logs/{kind}/{key}.log",
    wildcard_constraints:
        kind="model|text|task",
    priority: 100
    conda:
        ENVIRONMENT
    params:
        options=lambda wildcards: options(wildcards.kind)(wildcards),
        label=lambda wildcards: label(wildcards.kind)(wildcards),
    message:
        "download {params.label}"
    shell:
        "python -m hfprune download {wildcards.kind} {params.options:q} 2>&1 | tee {log:q}"

# What is drawn from the artifacts is cheap, and not kept by hash: it follows its inputs and the code that makes it.
rule collect:
    """Every value of the experiment, one a row."""
    input:
        results_of(plan.models, "measure", "evaluate"),
    output:
        RESULTS / "metrics.csv",
    log:
        "logs/collect.log",
    conda:
        ENVIRONMENT
    params:
        store=STORE,
        texts=HELDOUT,
        code=code_digest("hfprune.tables"),
    shell:
        "python -m hfprune collect --store {params.store:q} {params.texts:q} --output {output:q} {input:q} 2>&1"
        " | tee {log:q}"


rule tables:
    """The summary, and what each model cost."""
    input:
        rules.collect.output,
    output:
        [RESULTS / "tables" / f"{name}.{suffix}" for name in ("summary", "cost") for suffix in ("csv", "md", "tex")],
    log:
        "logs/tables.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS / "tables",
        code=code_digest("hfprune.tables"),
    shell:
        "python -m hfprune tables --metrics {input:q} --output {params.folder:q} 2>&1 | tee {log:q}"


rule figures:
    """Accuracy and KL against ratio."""
    input:
        rules.collect.output,
    output:
        drawn("kl", *(["accuracy"] if plan.experiment.evaluation.tasks else [])),
    log:
        "logs/figures.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS / "figures",
        code=code_digest("hfprune.figures"),
    shell:
        "python -m hfprune figures --metrics {input:q} --output {params.folder:q} 2>&1 | tee {log:q}"


rule differences:
    """Intervals of every estimate; every pair of models on the same documents, with tests."""
    input:
        rules.collect.input,
    output:
        [RESULTS / "tables" / f"{name}.csv" for name in ("intervals", "differences")],
    log:
        "logs/differences.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS / "tables",
        store=STORE,
        texts=HELDOUT,
        code=[code_digest(f"hfprune.{module}") for module in ("documents", "comparison")],
    shell:
        "python -m hfprune differences --store {params.store:q} {params.texts:q} --output {params.folder:q} {input:q} 2>&1"
        " | tee {log:q}"


rule profile:
    """Fidelity by position and by the dense model's entropy."""
    input:
        results_of(plan.models, "measure"),
    output:
        RESULTS / "tables" / "profile.csv",
        drawn("fidelity_profile"),
    log:
        "logs/profile.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS,
        store=STORE,
        texts=HELDOUT,
        code=[code_digest(f"hfprune.{module}") for module in ("documents", "figures")],
    shell:
        "python -m hfprune profile --store {params.store:q} {params.texts:q} --output {params.folder:q} {input:q} 2>&1"
        " | tee {log:q}"


rule agreement:
    """Importance per layer; how far criteria and seeds agree on which neurons matter."""
    input:
        [plan.manifest(job) for job in plan.scores],
    output:
        RESULTS / "tables" / "agreement.csv",
        drawn(*drawn_of_scores(plan.experiment)),
    log:
        "logs/agreement.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS,
        code=code_digest("hfprune.figures"),
    shell:
        "python -m hfprune compare --output {params.folder:q} {input:q} 2>&1 | tee {log:q}"


rule widths:
    """What every layer keeps, at the first calibration seed."""
    input:
        [plan.manifest(model.job) for model in plan.cuts],
    output:
        RESULTS / "tables" / "widths.csv",
        drawn("widths"),
    log:
        "logs/widths.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS,
        store=STORE,
        code=code_digest("hfprune.figures"),
    shell:
        "python -m hfprune widths --store {params.store:q} --output {params.folder:q} {input:q} 2>&1 | tee {log:q}"


rule losses:
    """Loss and learning rate of every recovery."""
    input:
        [plan.manifest(job) for job in plan.recoveries],
    output:
        RESULTS / "tables" / "losses.csv",
        drawn("losses"),
    log:
        "logs/losses.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS,
        store=STORE,
        code=code_digest("hfprune.figures"),
    shell:
        "python -m hfprune losses --store {params.store:q} --output {params.folder:q} {input:q} 2>&1 | tee {log:q}"

# What is drawn from the artifacts is cheap, and not kept by hash: it follows them and the code that draws.
MEASURED = results_of(plan.models, "measure")
EVALUATED = results_of(plan.models, "measure", "evaluate")


rule collect:
    """Every value of the experiment, one a row."""
    input:
        missing(plan.described(EVALUATED)),
        VERDICT,
    output:
        RESULTS / "metrics.csv",
    log:
        LOGS / "collect.log",
    conda:
        ENVIRONMENT
    params:
        results=manifests(EVALUATED),
        store=STORE,
        names=[*METHODS, *HELDOUT],
        code=code_digest("hfprune.reporting.metrics"),
    shell:
        "python -m hfprune collect --store {params.store:q} {params.names:q} --output {output:q} {params.results:q} 2>&1"
        " | tee {log:q}"


rule tables:
    """The summary, and what each model cost."""
    input:
        rules.collect.output,
    output:
        [RESULTS / "tables" / f"{name}.{suffix}" for name in ("summary", "cost") for suffix in ("csv", "md", "tex")],
    log:
        LOGS / "tables.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS / "tables",
        code=code_digest("hfprune.reporting.summary"),
    shell:
        "python -m hfprune tables --metrics {input:q} --output {params.folder:q} 2>&1 | tee {log:q}"


rule figures:
    """Accuracy and KL against ratio."""
    input:
        rules.collect.output,
    output:
        drawn("kl", *(["accuracy"] if plan.experiment.evaluation.tasks else [])),
    log:
        LOGS / "figures.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS / "figures",
        code=code_digest("hfprune.reporting.figures"),
    shell:
        "python -m hfprune figures --metrics {input:q} --output {params.folder:q} 2>&1 | tee {log:q}"


rule differences:
    """Intervals of every estimate; every pair of models on the same documents, with tests."""
    input:
        missing([*plan.described(EVALUATED), *plan.lost_parts(EVALUATED)]),
        VERDICT,
    output:
        [RESULTS / "tables" / f"{name}.csv" for name in ("intervals", "differences")],
    log:
        LOGS / "differences.log",
    conda:
        ENVIRONMENT
    params:
        results=manifests(EVALUATED),
        folder=RESULTS / "tables",
        store=STORE,
        names=[*METHODS, *HELDOUT],
        code=[code_digest(f"hfprune.reporting.{module}") for module in ("samples", "comparison")],
    shell:
        "python -m hfprune differences --store {params.store:q} {params.names:q} --output {params.folder:q} {params.results:q} 2>&1"
        " | tee {log:q}"


rule profile:
    """Fidelity by position and by the dense model's entropy."""
    input:
        missing(plan.described(MEASURED)),
        VERDICT,
    output:
        RESULTS / "tables" / "profile.csv",
        drawn("fidelity_profile"),
    log:
        LOGS / "profile.log",
    conda:
        ENVIRONMENT
    params:
        results=manifests(MEASURED),
        folder=RESULTS,
        store=STORE,
        names=[*METHODS, *HELDOUT],
        code=[code_digest(f"hfprune.reporting.{module}") for module in ("samples", "figures")],
    shell:
        "python -m hfprune profile --store {params.store:q} {params.names:q} --output {params.folder:q} {params.results:q} 2>&1"
        " | tee {log:q}"


rule agreement:
    """Importance per layer; how far criteria and seeds agree on which neurons matter."""
    input:
        missing(plan.scores),
        VERDICT,
    output:
        RESULTS / "tables" / "agreement.csv",
        drawn(*drawn_of_scores(plan.experiment)),
    log:
        LOGS / "agreement.log",
    conda:
        ENVIRONMENT
    params:
        results=manifests(plan.scores),
        folder=RESULTS,
        code=code_digest("hfprune.reporting.figures"),
    shell:
        "python -m hfprune compare --output {params.folder:q} {params.results:q} 2>&1 | tee {log:q}"


rule widths:
    """What every layer keeps, at the first calibration seed."""
    input:
        missing(plan.described(model.job for model in plan.cuts)),
        VERDICT,
    output:
        RESULTS / "tables" / "widths.csv",
        drawn("widths"),
    log:
        LOGS / "widths.log",
    conda:
        ENVIRONMENT
    params:
        results=manifests([model.job for model in plan.cuts]),
        folder=RESULTS,
        store=STORE,
        names=METHODS,
        code=[code_digest(f"hfprune.reporting.{module}") for module in ("curves", "figures")],
    shell:
        "python -m hfprune widths --store {params.store:q} {params.names:q} --output {params.folder:q} {params.results:q} 2>&1 | tee {log:q}"


rule losses:
    """Loss and learning rate of every recovery."""
    input:
        missing(plan.described(plan.recoveries)),
        VERDICT,
    output:
        RESULTS / "tables" / "losses.csv",
        drawn("losses"),
    log:
        LOGS / "losses.log",
    conda:
        ENVIRONMENT
    params:
        results=manifests(plan.recoveries),
        folder=RESULTS,
        store=STORE,
        names=METHODS,
        code=[code_digest(f"hfprune.reporting.{module}") for module in ("curves", "figures")],
    shell:
        "python -m hfprune losses --store {params.store:q} {params.names:q} --output {params.folder:q} {params.results:q} 2>&1 | tee {log:q}"

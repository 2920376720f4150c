# Tables and figures are cheap, so the store does not keep them: they follow the artifacts and the drawing code.
MEASURED = results_of(plan.models, "measure")
EVALUATED = results_of(plan.models, "measure", "evaluate")
UNTRAINED = [model for model in plan.models if model.recovery == "none"]  # the dense model is one
FIRST = results_of(UNTRAINED, "measure")


rule headline:
    """Write and draw fidelity and perplexity of the models before any training: the first results of a run."""
    input:
        missing(plan.described(FIRST)),
        VERDICT,
    output:
        written("headline"),
        drawn("headline"),
    log:
        LOGS / "headline.log",
    priority: 45
    conda:
        ENVIRONMENT
    params:
        results=manifests(FIRST),
        folder=RESULTS,
        store=STORE,
        names=[*METHODS, *HELDOUT],
        code=[code_digest(f"hfprune.reporting.{module}") for module in ("metrics", "summary", "figures")],
    message:
        "write the first results: fidelity before any training"
    shell:
        "python -m hfprune headline --store {params.store:q} {params.names:q} --output {params.folder:q} {params.results:q} > {log:q} 2>&1"


rule collect:
    """Collect all values of the experiment, one per row."""
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
    message:
        "collect all measured values"
    shell:
        "python -m hfprune collect --store {params.store:q} {params.names:q} --output {output:q} {params.results:q} > {log:q} 2>&1"


rule tables:
    """Write the summary, and the cost of each model."""
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
    message:
        "write the tables of all models and their costs"
    shell:
        "python -m hfprune tables --metrics {input:q} --output {params.folder:q} > {log:q} 2>&1"


rule figures:
    """Draw accuracy and KL divergence against the ratio, and KL before and after training."""
    input:
        rules.collect.output,
    output:
        drawn(*drawn_of_models(plan.experiment)),
    log:
        LOGS / "figures.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS / "figures",
        code=code_digest("hfprune.reporting.figures"),
    message:
        "draw fidelity and accuracy"
    shell:
        "python -m hfprune figures --metrics {input:q} --output {params.folder:q} > {log:q} 2>&1"


rule differences:
    """Write confidence intervals, and compare every pair of models on the same documents, with tests."""
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
    message:
        "compare every pair of models"
    shell:
        "python -m hfprune differences --store {params.store:q} {params.names:q} --output {params.folder:q} {params.results:q} > {log:q} 2>&1"


rule profile:
    """Write and draw fidelity by position and by the dense model's entropy."""
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
    message:
        "draw where models differ from the dense one"
    shell:
        "python -m hfprune profile --store {params.store:q} {params.names:q} --output {params.folder:q} {params.results:q} > {log:q} 2>&1"


rule agreement:
    """Write and draw importance per layer, and the agreement of criteria and seeds."""
    input:
        missing(plan.scores),
        VERDICT,
    output:
        [RESULTS / "tables" / f"{name}.csv" for name in tables_of_scores(plan.experiment)],
        drawn(*drawn_of_scores(plan.experiment)),
    log:
        LOGS / "agreement.log",
    conda:
        ENVIRONMENT
    params:
        results=manifests(plan.scores),
        folder=RESULTS,
        code=code_digest("hfprune.reporting.figures"),
    message:
        "draw the scores by layer and how criteria agree"
    shell:
        "python -m hfprune compare --output {params.folder:q} {params.results:q} > {log:q} 2>&1"


rule widths:
    """Write and draw how many units every layer keeps, for the first calibration seed."""
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
    message:
        "draw what every layer keeps"
    shell:
        "python -m hfprune widths --store {params.store:q} {params.names:q} --output {params.folder:q} {params.results:q} > {log:q} 2>&1"


rule losses:
    """Write and draw loss and learning rate of every recovery."""
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
    message:
        "draw the loss curves of training"
    shell:
        "python -m hfprune losses --store {params.store:q} {params.names:q} --output {params.folder:q} {params.results:q} > {log:q} 2>&1"

# The paper's tables. They are not part of `all`; every table needs only the models that it compares.
SOURCES, REFUSED = table_sources()
for table, timed in {"table4": rules.efficiency.output, "table5": rules.scoring_cost.output}.items():
    SOURCES[table] = timed, timed
if not plan.scores:
    del SOURCES["table5"]
    REFUSED["table5"] = "table5 compares the cost of criteria: no method here scores units."


for table, (inputs, results) in SOURCES.items():

    rule:
        name:
            table
        input:
            inputs,
            VERDICT,
            published=published(table),
        output:
            written(table),
        log:
            LOGS / f"{table}.log",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            table=table,
            results=results,
            folder=RESULTS / "tables",
            published=PUBLISHED,
            store=STORE,
            names=[*METHODS, *HELDOUT],
            code=[code_digest(f"hfprune.reporting.{module}") for module in ("paper_sheets", "samples")],
        message:
            f"write {table} of the paper"
        shell:
            "python -m hfprune table {params.table} --store {params.store:q} {params.names:q} --output {params.folder:q}"
            " --published {params.published:q} {params.results:q} > {log:q} 2>&1"


for table, reason in REFUSED.items():

    rule:
        name:
            table
        output:
            written(table),
        log:
            LOGS / f"{table}.log",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            reason=reason,
        message:
            f"write {table} of the paper"
        shell:
            "echo hfprune table: {params.reason:q} > {log:q}; exit 2"


rule pareto:
    """Draw the quality of models against their speed and their cost."""
    input:
        metrics=rules.collect.output[0],
        timings=rules.efficiency.output[0],
    output:
        drawn("pareto"),
    log:
        LOGS / "pareto.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS / "figures",
        code=code_digest("hfprune.reporting.figures"),
    message:
        "draw quality against speed and cost"
    shell:
        "python -m hfprune pareto --metrics {input.metrics:q} --timings {input.timings:q} --output {params.folder:q} > {log:q} 2>&1"


# The report's results besides `all`: the tables that the experiment can fill, and timings that already exist.
PAPER = [file for table in (*paper_tables.TABLES, "table3") if table in SOURCES for file in written(table)]
TIMED = [*written("table4"), *written("table5"), *drawn("pareto")]
SHOWN_TOO = [*PAPER, *(file for file in TIMED if file.exists())]


rule paper:
    """Make every table and figure that the experiment has the models for, including timings."""
    input:
        rules.all.input,
        PAPER,
        TIMED,
        written("table3") if plan.experiment.further else [],
    localrule: True

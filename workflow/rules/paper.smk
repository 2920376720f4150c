# The paper's tables. None is part of `all`: each asks only for the models that it compares.
from hfprune import targets


def written(table):
    """The files of a table."""
    return [RESULTS / "tables" / f"{table}.{suffix}" for suffix in ("csv", "md", "tex")]


def sources():
    """By table, what it is made from; and why the experiment cannot fill the others."""
    found, refused = {"table4": rules.efficiency.output, "table5": rules.scoring_cost.output}, {}
    for table, target in targets.TABLES.items():
        try:
            models = targets.chosen(table, plan.models, bool(plan.experiment.evaluation.tasks))
            found[table] = results_of(models, "measure", *(["evaluate"] if target.tasks else []))
        except UserError as error:
            refused[table] = str(error)
    others = [RESULTS.parent / name / "metrics.csv" for name in plan.experiment.further]
    missing = [path for path in others if not path.exists()]
    if missing:
        refused["table3"] = f"further: there is no {missing[0]}. Run that experiment first, with its own config file."
    elif others:
        found["table3"] = [rules.collect.output[0], *others]
    else:
        refused["table3"] = "table3 compares models: name experiments that have been run in `further`."
    return found, refused


SOURCES, REFUSED = sources()


for table, files in SOURCES.items():

    rule:
        name:
            table
        input:
            files,
        output:
            written(table),
        log:
            f"logs/{table}.log",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            table=table,
            folder=RESULTS / "tables",
            published=Path(workflow.basedir) / "results" / "published",
            store=STORE,
            texts=HELDOUT,
            code=[code_digest(f"hfprune.{module}") for module in ("paper", "documents")],
        shell:
            "python -m hfprune table {params.table} --store {params.store:q} {params.texts:q} --output {params.folder:q}"
            " --published {params.published:q} {input:q} 2>&1 | tee {log:q}"


for table, reason in REFUSED.items():

    rule:
        name:
            table
        log:
            f"logs/{table}.log",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            reason=reason,
        shell:
            "echo {params.reason:q} | tee {log:q} >&2; exit 2"


rule pareto:
    """What models are worth against their speed and their cost."""
    input:
        metrics=rules.collect.output[0],
        timings=rules.efficiency.output[0],
    output:
        drawn("pareto"),
    log:
        "logs/pareto.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS / "figures",
        code=code_digest("hfprune.figures"),
    shell:
        "python -m hfprune pareto --metrics {input.metrics:q} --timings {input.timings:q} --output {params.folder:q} 2>&1"
        " | tee {log:q}"


# What the report shows beside `all`: the tables that the experiment can fill, and timings that have been taken.
PAPER = [file for table in targets.TABLES if table in SOURCES for file in written(table)]
TIMED = [*written("table4"), *written("table5"), *drawn("pareto")]
SHOWN_TOO = [*PAPER, *(file for file in TIMED if file.exists())]


rule paper:
    """Every table and figure that the experiment has the models for, timings among them."""
    input:
        rules.all.input,
        PAPER,
        TIMED,
        written("table3") if plan.experiment.further else [],
    localrule: True

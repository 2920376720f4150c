# The paper's tables. None is part of `all`: each asks only for the models that it compares.
from hfprune import targets


def compared(table):
    """The results of the models that a table compares; where the experiment lacks them, a message instead."""

    def manifests(wildcards):
        try:
            models = targets.chosen(table, plan.models, bool(plan.experiment.evaluation.tasks))
        except UserError as error:
            raise WorkflowError(str(error))
        return results_of(models, "measure", *(["evaluate"] if targets.TABLES[table].tasks else []))

    return manifests


def can_fill(table):
    """Whether the experiment has the models that a table compares."""
    try:
        return bool(targets.chosen(table, plan.models, bool(plan.experiment.evaluation.tasks)))
    except UserError:
        return False


def written(table):
    """The files of a table."""
    return [RESULTS / "tables" / f"{table}.{suffix}" for suffix in ("csv", "md", "tex")]


def further(wildcards):
    """The metrics of this experiment and of those that `further` names."""
    found = [RESULTS.parent / name / "metrics.csv" for name in plan.experiment.further]
    if missing := [path for path in found if not path.exists()]:
        raise WorkflowError(f"further: no {missing[0]}. Run that experiment first, with its own config file.")
    if not found:
        raise WorkflowError("table3 compares models: name experiments that have been run in `further`.")
    return [rules.collect.output[0], *found]


def sources(table):
    """What a table is made from."""
    files = {"table3": further, "table4": rules.efficiency.output, "table5": rules.scoring_cost.output}
    return files.get(table) or compared(table)


for table in (*targets.TABLES, *targets.OF_FILES):

    rule:
        name:
            table
        input:
            sources(table),
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
PAPER = [file for table in targets.TABLES if can_fill(table) for file in written(table)]
TIMED = [*written("table4"), *written("table5"), *drawn("pareto")]
SHOWN_TOO = [*PAPER, *(file for file in TIMED if file.exists())]


rule paper:
    input:
        rules.all.input,
        PAPER,
        TIMED,
        written("table3") if plan.experiment.further else [],
    """Every table and figure that the experiment has the models for, timings among them."""
    localrule: True

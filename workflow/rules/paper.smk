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
            [RESULTS / "tables" / f"{table}.{suffix}" for suffix in ("csv", "md", "tex")],
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

# The targets, and the files with the rules. Every rule runs a command of the package `hfprune`.
from snakemake.utils import min_version

min_version("9.0")

if not workflow.overwrite_configfiles:  # a file named by --configfile replaces config.yaml as a whole

    configfile: "config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/download.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/order.smk"
include: "workflow/rules/search.smk"
include: "workflow/rules/prune.smk"
include: "workflow/rules/recover.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/timing.smk"
include: "workflow/rules/overview.smk"


localrules:
    all,
    headline,
    collect,
    tables,
    figures,
    differences,
    profile,
    agreement,
    losses,
    widths,
    download,
    mix,
    overlap,
    page,
    artifacts,
    config,
    index,
    report,
    deploy,


rule all:
    default_target: True
    input:
        rules.overlap.output,
        rules.headline.output if len(UNTRAINED) > 1 else [],
        rules.collect.output,
        rules.tables.output,
        rules.figures.output,
        rules.differences.output,
        rules.profile.output,
        rules.agreement.output if plan.scores else [],
        rules.widths.output,
        rules.losses.output if plan.recoveries else [],
        rules.index.output,


include: "workflow/rules/paper.smk"
include: "workflow/rules/deploy.smk"
include: "workflow/rules/report.smk"

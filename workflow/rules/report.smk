# The report shows every table and figure of `rule all` and of the paper, with its text in
# workflow/report/captions.yaml: the first sentence is the title, the others are the caption.
SHOWN = shown([*rules.all.input, *SHOWN_TOO]) | {
    ("provenance", "config"): rules.config.output,
    ("provenance", "artifacts"): [RESULTS / "provenance" / "artifacts.csv"],
    ("provenance", "versions"): [RESULTS / "provenance" / "versions.csv"],
}


rule page:
    """Make a page with a table or a figure, its title and its caption."""
    input:
        lambda wildcards: SHOWN[wildcards.kind, wildcards.name],
    output:
        report(
            RESULTS / "report" / "{kind}" / "{name}.html",
            caption="../report/caption.rst",
            category=lambda wildcards: wildcards.kind.capitalize(),
            labels=lambda wildcards: {"Title": title(wildcards)},
        ),
    log:
        LOGS / "report" / "{kind}-{name}.log",
    conda:
        ENVIRONMENT
    params:
        title=title,
        caption=caption,
        code=code_digest("hfprune.reporting.pages"),
    message:
        "page of the report: {wildcards.name}"
    shell:
        "python -m hfprune page --title {params.title:q} --caption {params.caption:q} --output {output:q} {input:q} > {log:q} 2>&1"


rule artifacts:
    """List every artifact's inputs, code, library versions, host and time."""
    input:
        missing(plan.needed),
    output:
        [RESULTS / "provenance" / f"{name}.csv" for name in ("artifacts", "versions")],
    log:
        LOGS / "artifacts.log",
    conda:
        ENVIRONMENT
    params:
        artifacts=manifests(plan.needed),
        folder=RESULTS / "provenance",
        code=code_digest("hfprune.reporting.pages"),
    message:
        "list what every result was made from"
    shell:
        "python -m hfprune artifacts --output {params.folder:q} {params.artifacts:q} > {log:q} 2>&1"


rule report:
    """Put all pages into one HTML file, by `snakemake --report` on the same experiment."""
    input:
        start=rules.index.output[0],
        pages=[RESULTS / "report" / kind / f"{name}.html" for kind, name in SHOWN],
        config=rules.config.output[0],
        style=workflow.source_path("../report/style.css"),
    output:
        RESULTS / "report.html",
    log:
        LOGS / "report.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS,  # for a temporary folder: Snakemake writes in place, and a partial report would look finished
        snakefile=workflow.main_snakefile,
    message:
        "put all pages into one file"
    shell:
        "aside=$(mktemp -d {params.folder:q}/.report-XXXXXX); trap 'rm -rf $aside' EXIT; "
        "snakemake {input.start:q} {input.pages:q} --snakefile {params.snakefile:q} --configfile {input.config:q} --cores 1 --nolock"
        " --report $aside/report.html --report-stylesheet {input.style:q} > {log:q} 2>&1; "
        "mv $aside/report.html {output:q}"

# The report shows every table and figure that `rule all` and the paper have, each under the title and caption that
# workflow/report/captions.yaml has for it: the first sentence is the title.
import yaml

CATEGORIES = {"figures": "Figures", "tables": "Tables", "provenance": "Provenance"}
CAPTIONS = yaml.safe_load(Path(workflow.source_path("../report/captions.yaml")).read_text(encoding="utf-8"))


def shown(results):
    """The files of each result to show: a figure's svg; a table's csv, and its md where there is one."""
    found = {}
    for file in map(Path, results):
        if (file.parent.name, file.suffix) in {("figures", ".svg"), ("tables", ".csv"), ("tables", ".md")}:
            found.setdefault((file.parent.name, file.stem), []).append(file)
    for kind, name in found:
        if name not in CAPTIONS[kind]:
            raise WorkflowError(f"workflow/report/captions.yaml: no caption for {name!r} in {kind!r}: add a line.")
    return found


SHOWN = shown([*rules.all.input, *SHOWN_TOO]) | {
    ("provenance", "config"): [RESULTS / "provenance" / "config.yaml"],
    ("provenance", "artifacts"): [RESULTS / "provenance" / "artifacts.csv"],
    ("provenance", "versions"): [RESULTS / "provenance" / "versions.csv"],
}


def title(wildcards):
    return CAPTIONS[wildcards.kind][wildcards.name].partition(". ")[0]


def caption(wildcards):
    return CAPTIONS[wildcards.kind][wildcards.name].partition(". ")[2]


rule page:
    """A table or a figure with its title and caption."""
    input:
        lambda wildcards: SHOWN[wildcards.kind, wildcards.name],
    output:
        report(
            RESULTS / "report" / "{kind}" / "{name}.html",
            caption="../report/caption.rst",
            category=lambda wildcards: CATEGORIES[wildcards.kind],
            labels=lambda wildcards: {"Title": title(wildcards)},
        ),
    log:
        "logs/report/{kind}-{name}.log",
    conda:
        ENVIRONMENT
    params:
        title=title,
        caption=caption,
        code=code_digest("hfprune.report"),
    shell:
        "python -m hfprune page --title {params.title:q} --caption {params.caption:q} --output {output:q} {input:q} 2>&1"
        " | tee {log:q}"


rule provenance:
    """What every artifact was made from, by which code and versions, where and when."""
    input:
        [plan.manifest(job) for job in plan.needed],
    output:
        [RESULTS / "provenance" / f"{name}.csv" for name in ("artifacts", "versions")],
    log:
        "logs/provenance.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS / "provenance",
        code=code_digest("hfprune.report"),
    shell:
        "python -m hfprune provenance --output {params.folder:q} {input:q} 2>&1 | tee {log:q}"


rule config:
    """The experiment with every default filled in."""
    output:
        RESULTS / "provenance" / "config.yaml",
    log:
        "logs/config.log",
    conda:
        ENVIRONMENT
    params:
        experiment=lambda wildcards: plan.experiment.model_dump_json(exclude_none=True),  # its braces are no wildcards
    shell:
        "python -m hfprune config /dev/stdin <<< {params.experiment:q} 2> {log:q} > {output:q}"


rule report:
    """All of it in one HTML file, by `snakemake --report` on the same experiment."""
    input:
        pages=[RESULTS / "report" / kind / f"{name}.html" for kind, name in SHOWN],
        config=RESULTS / "provenance" / "config.yaml",
        style=workflow.source_path("../report/style.css"),
    output:
        RESULTS / "report.html",
    log:
        "logs/report.log",
    conda:
        ENVIRONMENT
    params:
        snakefile=workflow.main_snakefile,
    shell:
        "snakemake {input.pages:q} --snakefile {params.snakefile:q} --configfile {input.config:q} --cores 1 --nolock"
        " --report {output:q} --report-stylesheet {input.style:q} > {log:q} 2>&1 || {{ cat {log:q}; exit 1; }}"

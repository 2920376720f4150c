# The overview page, results/<experiment>/index.html; and the leaderboard, which is the same page with timings.
PAGE = Path(experiments.__file__).parents[1] / "reporting" / "overview.html"


rule config:
    """Write the config with every default filled in."""
    output:
        RESULTS / "provenance" / "config.yaml",
    log:
        LOGS / "config.log",
    conda:
        ENVIRONMENT
    params:
        experiment=whole_config,
    message:
        "write the config with its defaults"
    shell:
        "python -m hfprune config /dev/stdin --output {output:q} <<< {params.experiment:q} > {log:q} 2>&1"


rule index:
    """Make the overview page, which needs no other file."""
    input:
        rules.collect.output,
        rules.differences.output,
        rules.widths.output,
        rules.overlap.output,
        rules.losses.output if plan.recoveries else [],
        missing(plan.needed),
    output:
        report(
            RESULTS / "index.html",
            caption="../report/index.rst",
            category="At a glance",
            labels={"Title": "What came out"},
        ),
    log:
        LOGS / "index.log",
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS,
        experiment=whole_config,
        artifacts=manifests([*plan.needed, *plan.parts.values()]),
        code=[code_digest("hfprune.reporting.overview"), file_sha256(PAGE)],
    message:
        "write the overview page"
    shell:
        "python -m hfprune index /dev/stdin {params.artifacts:q} --results {params.folder:q} --output {output:q}"
        " <<< {params.experiment:q} > {log:q} 2>&1"


# Timings take the machine for themselves, so this is not part of `all`.
rule leaderboard:
    """Rank all models by fidelity, beside speed and cost: a table, a figure, and a page that needs no other file."""
    input:
        rules.index.input,
        timings=rules.efficiency.output[0],
    output:
        page=RESULTS / "leaderboard.html",
        files=[*written("leaderboard"), *drawn("leaderboard")],
    log:
        LOGS / "leaderboard.log",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        folder=RESULTS,
        experiment=whole_config,
        artifacts=rules.index.params.artifacts,
        code=[*rules.index.params.code, code_digest("hfprune.reporting.figures")],
    message:
        "write the leaderboard"
    shell:
        "python -m hfprune leaderboard /dev/stdin {params.artifacts:q} --results {params.folder:q}"
        " --timings {input.timings:q} --output {params.folder:q} <<< {params.experiment:q} > {log:q} 2>&1"

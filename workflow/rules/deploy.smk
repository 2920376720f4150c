# `snakemake deploy`: models as GGUF files, in llama.cpp. Not part of `all`, for the speeds depend on this machine.
rule gguf:
    """Write a checkpoint as a GGUF file, which llama.cpp reads as that checkpoint."""
    input:
        made_from("gguf"),
    output:
        artifact("gguf"),
    log:
        LOGS / "gguf" / "{key}.log",
    conda:
        ENVIRONMENT
    threads: half_the_cores
    resources:
        gpu=gpus("gguf"),
        mem=memory("gguf"),
        runtime=minutes("gguf"),
    params:
        python=python,
        command=command("gguf"),
        label=label("gguf"),
    message:
        "write {params.label}"
    shell:
        "{params.python:q} -m hfprune {params.command:q} > {log:q} 2>&1"


DEPLOYED = [*written("deploy"), *drawn("deploy")]
SHOWN_TOO += [file for file in DEPLOYED if file.exists()]

if plan.files:

    rule files:
        """Measure GGUF files: size, fidelity to the dense model, speed of prefill and decoding."""
        input:
            missing(plan.described([plan.compared_with, *plan.files])),
            VERDICT,
        output:
            RESULTS / "deploy.csv",
        log:
            LOGS / "files.log",
        conda:
            ENVIRONMENT
        threads: every_core
        resources:
            mem=memory("files"),
            runtime=minutes("files"),
        params:
            files=manifests(plan.files),
            reference=plan.manifest(plan.compared_with),
            types=plan.experiment.deploy.types,
            samples=plan.experiment.deploy.samples or plan.experiment.fidelity.samples,
            # A function, so that a change of these values causes no new timing.
            place=lambda wildcards, resources: ["--store", STORE, *METHODS, *HELDOUT],
        message:
            "measure GGUF files in llama.cpp"
        shell:
            "python -m hfprune files --gguf {params.files:q} --reference {params.reference:q} --types {params.types:q}"
            " --samples {params.samples} {params.place:q} --output {output:q} > {log:q} 2>&1"

    rule deploy:
        """Show fidelity against size and speed of pruned models, quantised ones, and both."""
        input:
            rules.files.output,
        output:
            DEPLOYED,
        log:
            LOGS / "deploy.log",
        conda:
            ENVIRONMENT
        params:
            folder=RESULTS,
            # Where the measuring of other files was stopped, its csv is gone, and the old table is not up to date.
            files=[*manifests(plan.files), *plan.experiment.deploy.types],
            code=[code_digest(f"hfprune.reporting.{module}") for module in ("deployment", "figures")],
        message:
            "draw fidelity against size and speed of GGUF files"
        shell:
            "python -m hfprune deploy --files {input:q} --output {params.folder:q} > {log:q} 2>&1"

else:

    rule deploy:
        """Say what the config lacks."""
        output:
            DEPLOYED,
        log:
            LOGS / "deploy.log",
        conda:
            ENVIRONMENT
        params:
            reason="the config names no types of files: add `deploy: {types: [f16, q8_0]}`; docs/deploy.md explains.",
        message:
            "compare GGUF files"
        shell:
            "echo hfprune deploy: {params.reason:q} > {log:q}; exit 2"

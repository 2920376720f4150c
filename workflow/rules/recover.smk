rule recover:
    """The checkpoint trained after the cut; several GPUs share the work where the job is given them."""
    input:
        unpack(made_from("recover")),
    output:
        artifact("recover"),
    log:
        "logs/recover/{key}.log",
    priority: 50
    conda:
        ENVIRONMENT
    threads: 16
    resources:
        gpu=GPU,
        mem=memory("recover"),
        runtime=minutes("recover"),
    params:
        python=processes,
        options=options("recover"),
        running=running("recover"),
        inputs=input_options("teacher"),
        label=label("recover"),
    message:
        "recover {params.label}"
    shell:
        "{params.python:q} -m hfprune recover --model {input.model:q} --text {input.text:q} {params.inputs:q} {params.options:q}"
        " {params.running:q}"
        " 2>&1 | tee {log:q}"

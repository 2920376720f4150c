# The experiment, its plan of artifacts, and how a rule asks the plan.
import json
import os
import sys
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.jobs import Job

sys.path.insert(0, workflow.basedir)

from hfprune.experiment import schema as experiments
from hfprune.experiment.claims import Claim
from hfprune.runtime import gpus
from hfprune.reporting import paper_tables
from hfprune.store.keys import code_digest
from hfprune.errors import UserError, is_refusal
from hfprune.experiment.plan import Plan

# What jobs compute on, where a profile says so: on a cluster it is not this machine.
DEVICE = config.pop("gpu") if "gpu" in workflow.config_settings.config else None

try:
    origin = workflow.overwrite_configfiles or ["config.yaml"]
    for file in origin:
        experiments.read(Path(file))  # Snakemake takes the last of two keys of one name
    plan = Plan(experiments.parse(experiments.Experiment, config, ", ".join(map(str, origin))))
    plan.refuse_misfits()
    claim = Claim(Path("results"), [Path(file) for file in origin], plan.experiment)
    claim.refuse()
except UserError as error:
    raise WorkflowError(str(error))

STORE = plan.store.root
RESULTS = Path("results") / plan.experiment.experiment
LOGS = Path("logs") / plan.experiment.experiment  # of its own: experiments that run at once may share artifacts
HELDOUT = [word for name, text in plan.documents["fidelity"].items() for word in ("--text", f"{name}={text.key}")]
METHODS = [word for key, name in plan.methods.items() for word in ("--method", f"{name}={key}")]

# Rules call `python -m hfprune`: the interpreter that runs this, the package beside this Snakefile.
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    PYTHONPATH=os.pathsep.join([workflow.basedir, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    # For the model's download, which refuses at once what it cannot give. An option would make Snakemake download again
    # whenever a ratio changes.
    HFPRUNE_BUDGETS=json.dumps(plan.budgets),
    HFPRUNE_LENGTHS=json.dumps(plan.lengths),
)

# Of every table and figure, for the report.
CAPTIONS = yaml.safe_load(Path(workflow.source_path("../report/captions.yaml")).read_text(encoding="utf-8"))

# A graph of the workflow shows also what is there already.
WHOLE = any(word.partition("=")[0] in ("--report", "--dag", "--rulegraph", "--filegraph") for word in sys.argv)

# What a job that computes on a model takes of the GPUs, where there are any; the default profile hands out one.
GPU = int(DEVICE != "cpu" if DEVICE else bool(gpus.visible()))
ENVIRONMENT = Path(workflow.basedir) / "envs" / ("cuda.yaml" if GPU else "cpu.yaml")


wildcard_constraints:
    key="[0-9a-f]{16}",


onstart:
    claim.record()


# Another attempt has more memory and time, which mends no user's mistake. Snakemake tells rules apart, not failures.
Job.restart_times = property(lambda job: 0 if is_refusal(*map(Path, job.log)) else job.rule.restart_times)


def artifact(stage):
    """A stage's output. Its manifest stays in place until the stage itself has judged it: see `update`."""
    return update(str(STORE / stage / "{key}" / "manifest.json"))


def missing(jobs):
    """Of those jobs' artifacts the ones that are still to be made: the inputs of whatever takes them all.

    A key says it all, so an artifact that is there is no part of a run: neither its time nor its job's parameters, nor
    that a killed run left the job unfinished, is a reason to make it again. As an `ancient` input it would be one, and
    then Snakemake looks at nothing behind it: the run ends as if all were done (DAG.update_needrun, 9.27).
    """
    return [plan.manifest(job) for job in jobs if WHOLE or not plan.has(job)]


def made_from(stage):
    """What an artifact waits for."""

    def inputs(wildcards):
        job = plan.jobs[stage][wildcards.key]
        if plan.experiment.strict:
            checkpoints.overlap.get()  # waits for the verdict; no input, which would be made again where it is another's
        return missing(job.waits_for)

    return inputs


def last(stage):
    """The keys of those jobs of a stage for which no other of the same stage waits.

    The others' rule has another name: `--until` releases nothing that waits for a job of a rule that it names.
    """
    return "".join(["".join(f"(?!{key})" for key in plan.waited_for(stage)), "[0-9a-f]{16}"])


def command(stage):
    """What makes an artifact."""
    return lambda wildcards: plan.command(plan.jobs[stage][wildcards.key])


def on_gpus(resources):
    """What goes before a command that is granted GPUs: it takes free ones of those that are here."""
    return ["python", "-m", "hfprune", "on-gpus", resources.gpu] if resources.gpu else []


def python(wildcards, resources):
    """Python, which sees the GPUs that the job is granted."""
    return [*on_gpus(resources), "python"]


def processes(wildcards, resources):
    """The same; as many processes as GPUs."""
    several = ["accelerate", "launch", "--multi_gpu", "--num_processes", resources.gpu, "--main_process_port", 0]
    return [*on_gpus(resources), *several] if resources.gpu > 1 else python(wildcards, resources)


def label(stage):
    """What an artifact is, for people."""
    return lambda wildcards: plan.jobs[stage][wildcards.key].label


CORES = 16 if DEVICE else workflow.resource_settings.cores or 1  # of a job; a graph is drawn without being told of any


def half_the_cores(wildcards):
    """Two jobs at once: the one computes while the other starts up, which takes one core."""
    return max(1, CORES // 2)


def every_core(wildcards):
    """Nothing runs beside what is timed."""
    return CORES


def results_of(models, *stages):
    """The jobs of those stages that find something of the models."""
    return [job for model in models for job in model.results if job.recipe.stage in stages]


def manifests(jobs):
    """The artifacts of all those jobs, as a parameter: where they are others, what is made of them is made again."""
    return [plan.manifest(job) for job in jobs]


def drawn_of_scores(experiment):
    """Which figures there are of an experiment's scores."""
    several = len(experiment.criteria) * len(experiment.calibration.seeds) > 1
    pair = {"entropy", "cross_entropy"} <= set(experiment.criteria)
    return ["importance", *(["agreement"] if several else []), *(["entropy_cross_entropy"] if pair else [])]


def written(table):
    """The files of a table."""
    return [RESULTS / "tables" / f"{table}.{suffix}" for suffix in ("csv", "md", "tex")]


PUBLISHED = Path(workflow.basedir) / "results" / "published"


def published(table):
    """The published values of a table, where there are any."""
    return [file for file in [PUBLISHED / f"{table}.csv"] if file.exists()]


def table_sources():
    """By table, what it waits for and the files that it is made from; and why the experiment cannot fill the others."""
    found, refused = {}, {}
    for table, declared in paper_tables.TABLES.items():
        try:
            tasks = bool(plan.experiment.evaluation.tasks)
            shown = paper_tables.compared(table, [model.setting for model in plan.models], tasks)
            models = [model for model, is_shown in zip(plan.models, shown) if is_shown]
            jobs = results_of(models, "measure", *(["evaluate"] if declared.has_accuracy else []))
            found[table] = missing([*plan.described(jobs), *plan.lost_parts(jobs)]), manifests(jobs)
        except UserError as error:
            refused[table] = str(error)
    others = [RESULTS.parent / name / "metrics.csv" for name in plan.experiment.further]
    absent = [path for path in others if not path.exists()]
    if absent:
        refused["table3"] = f"further: there is no {absent[0]}. Run that experiment first, with its own config file."
    elif others:
        files = [RESULTS / "metrics.csv", *others]
        found["table3"] = files, files
    else:
        refused["table3"] = "table3 compares models: name experiments that have been run in `further`."
    return found, refused


def drawn(*names):
    """The files of some figures."""
    return [RESULTS / "figures" / f"{name}.{suffix}" for name in names for suffix in ("png", "pdf", "svg")]


def shown(results):
    """By kind and name, the files of each result to show: a figure's svg; a table's csv, and its md if there is one."""
    found = {}
    for file in map(Path, results):
        if (file.parent.name, file.suffix) in {("figures", ".svg"), ("tables", ".csv"), ("tables", ".md")}:
            found.setdefault((file.parent.name, file.stem), []).append(file)
    for kind, name in found:
        if name not in CAPTIONS[kind]:
            raise WorkflowError(f"workflow/report/captions.yaml: no caption for {name!r} in {kind!r}: add a line.")
    return found


def title(wildcards):
    """The first sentence of a result's caption."""
    return CAPTIONS[wildcards.kind][wildcards.name].partition(". ")[0]


def caption(wildcards):
    """The others."""
    return CAPTIONS[wildcards.kind][wildcards.name].partition(". ")[2]

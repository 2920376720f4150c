"""The overview page of an experiment, for readers who were not there: one HTML file that needs no other.

Every number stands in a table that needs no scripts; scripts only sort tables and draw the charts.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
from jinja2 import Environment
from markupsafe import Markup

from hfprune.models.units import UNITS
from hfprune.pruning.methods import DENSE, shares_of
from hfprune.reporting import findings, interactive
from hfprune.reporting.findings import ACCURACY_CHANGE, KL, MEAN, listed, named_models, whole_name
from hfprune.reporting.labels import name_of
from hfprune.reporting.leaderboard import FIDELITY, PREFILL, SPEED_AND_COST, first_kl
from hfprune.reporting.metrics import TASK_TITLES, headline, on_headline_text
from hfprune.reporting.statistics import MODEL, note, varying, with_ends
from hfprune.reporting.summary import COST_NOTE, DIGITS, PARAMETERS, REMOVED, SCALES, cost, without_mean_of_one

TEMPLATE = Path(__file__).with_suffix(".html")
MEASURES = {"kl": KL, "perplexity": "Perplexity", "top1_agreement": "Top-1 agreement", "accuracy": "Mean accuracy (%)"}
SIZE = "Ratio (%)"
MEASURES_FIRST = (KL, "Perplexity", "Top-1 agreement")  # of the columns of the models' table
LOSSES = {"cross_entropy": "Cross-entropy (nats/token)", "distillation": "KL (nats/token)"}


@dataclass(frozen=True)
class Results:
    """What a page shows.

    Attributes:
        metrics: `metrics.csv`.
        config: the experiment with every default.
        config_text: the same as YAML.
        manifests: of all artifacts behind the results, each after its inputs.
        differences, widths, overlap: the tables of these names.
        losses: the table of that name; None if nothing was trained.
        board: see `leaderboard.board`; if it is there, the page shows it in the place of the models' table.
    """

    metrics: pd.DataFrame
    config: Mapping[str, Any]
    config_text: str
    manifests: Sequence[Mapping[str, Any]]
    differences: pd.DataFrame
    widths: pd.DataFrame
    overlap: pd.DataFrame
    losses: pd.DataFrame | None = None
    board: pd.DataFrame | None = None


def overview(results: Results) -> str:
    """The page."""
    models = named_models(results.metrics)
    models[[REMOVED, PARAMETERS]] *= [SCALES[REMOVED], SCALES[PARAMETERS]]
    charts = _charts(results, models)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        title=f"{results.config['experiment']}: what pruning costs {models['model'].iloc[0]}",
        introduction=list(_introduction(results, models)),
        findings=list(_findings(results, models)),
        models=_models_table(models) if results.board is None else _board_table(results.board, models),
        is_board=results.board is not None,
        note=note(models).removesuffix(" The csv has both ends."),
        differences=_differences_table(results, models),
        compared=len(_compared(results)),
        cost=_cost_table(results.metrics, models),
        cost_note=COST_NOTE,
        overlap=_overlap_table(results.overlap),
        charts=charts,
        specs=Markup(json.dumps({chart["id"]: chart["spec"] for chart in charts.values()}).replace("<", "\\u003c")),
        script=Markup(_library().replace("</script", "<\\/script")),
        chains=list(_chains(results, models)),
        artifacts=[_artifact(manifest) for manifest in results.manifests],
        config=results.config_text,
    )


@functools.cache  # it takes two seconds
def _library() -> str:
    """Vega, Vega-Lite and vega-embed as one script."""
    import vl_convert

    return vl_convert.javascript_bundle(vl_version=".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2]))


def _introduction(results: Results, models: pd.DataFrame) -> Iterator[str]:
    config = results.config
    cut = models[models["method"] != DENSE]
    methods, ratios = list(dict.fromkeys(cut["method"])), sorted(set(cut["ratio"]))
    sizes = f"{listed([f'{100 * ratio:.3g}' for ratio in ratios])} % {shares_of(methods)}"
    yield (
        f"{models['model'].iloc[0]} has {models[PARAMETERS].max():.1f} million parameters. This experiment removes "
        f"{sizes} by {listed(methods)}, and measures how far each smaller model is from the dense one."
    )
    calibration, fidelity = config["calibration"], config["fidelity"]
    most = "at most " if calibration.get("until") else ""
    words = (
        f"What may go was decided on {most}{calibration['samples']} sequences of {calibration['length']} tokens of the "
        f"text {calibration['text']}. Fidelity and perplexity are measured on {fidelity['samples']} sequences of "
        f"{fidelity['length']} tokens of the text {fidelity['texts'][0]}"
    )
    tasks = [TASK_TITLES.get(name, name) for name in config["evaluation"].get("tasks", {})]
    limit = config["evaluation"].get("limit")
    documents = f"{limit} documents{' each' if len(tasks) > 1 else ''}" if limit else "all documents"
    yield f"{words}; accuracy is zero-shot on {listed(tasks)}, {documents}." if tasks else f"{words}."
    trained = sorted(set(models["recovery"]) - {"none"})
    if trained:
        is_control = (models["method"] == DENSE) & (models["recovery"] != "none")
        control = " The dense model, trained alike, is the control." if is_control.any() else ""
        count = int((cut["recovery"] != "none").sum())
        yield (
            f"{count} of {len(cut)} smaller models {'was' if count == 1 else 'were'} trained after the cut: "
            f"{listed(trained)}.{control}"
        )


def _findings(results: Results, models: pd.DataFrame) -> Iterator[str]:
    """What the figures say, a sentence each."""
    yield _finding(results, models)
    if trained := findings.training(models):
        yield trained
    if MEAN in models:
        yield findings.accuracy_changes(_from_dense(results, models))


def _finding(results: Results, models: pd.DataFrame) -> str:
    """Who is nearest to the dense model: of a board at every size."""
    if (board := results.board) is not None:
        return findings.best_of_board(board, first_kl(board))
    return findings.fidelity(models)


def _from_dense(results: Results, models: pd.DataFrame) -> pd.DataFrame:
    """Paired differences of mean accuracy from the dense model, in points; the smallest cut first."""
    rows = results.differences
    rows = rows[(rows["metric"] == "accuracy") & (rows["task"] == "mean") & (rows["other_stage"] == "dense")].copy()
    rows["name"] = [whole_name({**row, "name": name_of(row, varying(models))}) for _, row in rows.iterrows()]
    for column, end in zip(with_ends(ACCURACY_CHANGE), ("difference", "low", "high"), strict=True):
        rows[column] = 100 * rows[end]
    return rows.sort_values(["ratio", "stage"], kind="stable")


def _charts(results: Results, models: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """By place on the page: a chart's id, title, caption and specification."""
    charts: dict[str, dict[str, Any]] = {}

    def add(place: str, title: str, caption: str, spec: Mapping[str, Any]) -> None:
        charts[place] = {"id": f"chart-{place}", "title": title, "caption": caption, "spec": spec}

    cut = models[models["method"] != DENSE]
    columns = ["name", REMOVED, *with_ends(KL)]
    if cut["ratio"].nunique() == 1:
        kl = interactive.rows(cut.sort_values(KL)[columns], KL)
    elif cut["name"].nunique() > interactive.MOST_NAMED:
        kl = interactive.sizes(cut[columns].assign(**{SIZE: 100 * cut["ratio"]}), KL, SIZE)
    else:
        kl = interactive.lines(cut[columns], REMOVED, KL)
    if (board := results.board) is not None and board[PREFILL].notna().any():
        timed = board[(board["method"] != DENSE) & board[PREFILL].notna()]
        distance = first_kl(board)
        columns = [*with_ends(distance), PREFILL]
        points = timed[["name", *columns]].assign(**{SIZE: 100 * timed["ratio"]})
        caption = "Lower, and further left, is better. Models of one shape share a time."
        add("speed", "Distance against latency", caption, interactive.points(points, PREFILL, distance, SIZE))
    finding = _finding(results, models)
    add("kl", "Distance from the dense model", f"{finding} Lower is better; bars are 95 % intervals.", kl)
    if MEAN in models and (changes := _from_dense(results, models))["distinguishable"].any():  # else it shows nothing
        finding = findings.accuracy_changes(changes)
        caption = f"{finding} The same documents were asked of both models; bars are 95 % intervals."
        spec = interactive.rows(changes[["name", *with_ends(ACCURACY_CHANGE)]], ACCURACY_CHANGE, 0)
        add("accuracy", "Accuracy against the dense model", caption, spec)
    for part, widths in results.widths.groupby("part", sort=False):
        points = widths.assign(
            name=[f"{model}, {ratio:.0%}" for model, ratio in zip(widths["model"], widths["ratio"], strict=True)],
            **{"Layer": widths["layer"], "Kept (%)": 100 * widths["kept"] / widths["dense"]},
        )[["name", "Layer", "Kept (%)"]]  # fmt: skip
        if points["name"].nunique() > interactive.MOST_NAMED:
            spec = interactive.heat(points, "Layer", "Kept (%)")
        else:
            spec = interactive.curves(points, "Layer", "Kept (%)", zero=False)
        caption = f"{findings.widths(widths)} The first calibration seed."
        add(f"widths-{part}", f"Kept {UNITS.get(part, part)} by layer", caption, spec)
    for loss, steps in results.losses.groupby("loss_name", sort=False) if results.losses is not None else ():
        title = LOSSES.get(loss, loss)
        points = steps.assign(name=steps["model"], **{"Tokens": steps["tokens"], title: steps["loss"]})
        spec = interactive.curves(points[["name", "Tokens", title]], "Tokens", title, zero=False)
        add(f"losses-{loss}", "Loss while training", findings.losses(steps), spec)
    return charts


@dataclass(frozen=True)
class Table:
    """A table of the page: titles, and rows of (text, number to sort by or None, link or None)."""

    titles: Sequence[str]
    rows: Sequence[Sequence[tuple[str, float | None, str | None]]]

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers."""
        return any(row[column][1] is not None for row in self.rows)


def _number(value: float, low: float, high: float, digits: int, link: str | None = None) -> tuple:
    if pd.isna(value):
        return "", None, None
    text = f"{value:,.{digits}f}"
    return (text if pd.isna(low) else f"{text} ±{(high - low) / 2:,.{digits}f}"), float(value), link


def _text(value: str, link: str | None = None) -> tuple:
    return value, None, link


def _models_table(models: pd.DataFrame) -> Table:
    models = without_mean_of_one(models)
    measured = [column for column in models if f"{column} low" in models]
    values = [*MEASURES_FIRST, *(column for column in measured if column not in MEASURES_FIRST)]
    rows = []
    for place, (_, model) in enumerate(models.iterrows()):
        cells = [_text(whole_name(model), f"#model-{place}")]
        cells += [_number(model[column], float("nan"), 0, 1) for column in (REMOVED, PARAMETERS)]
        for column in values:
            cells.append(_number(*model[with_ends(column)], DIGITS.get(column, 1), f"#model-{place}"))
        rows.append(cells)
    return Table(["Model", REMOVED, PARAMETERS, *values], rows)


def _board_table(board: pd.DataFrame, models: pd.DataFrame) -> Table:
    places = {tuple(model[MODEL]): place for place, (_, model) in enumerate(models.iterrows())}
    measured = [column for column in board if f"{column} low" in board]
    shown = {column: digits for column, digits in SPEED_AND_COST.items() if board[column].notna().any()}
    rows = []
    for _, model in board.iterrows():
        link = f"#model-{places[tuple(model[MODEL])]}"
        cells = [_text(model["name"], link), _number(100 * model["ratio"], float("nan"), 0, 0)]
        cells += [
            _number(*model[with_ends(column)], dict(FIDELITY.values()).get(column, 3), link) for column in measured
        ]
        cells += [_number(model[column], float("nan"), 0, digits) for column, digits in shown.items()]
        mark = "best" if model["best"] else "not distinguishable" if model["tied"] else ""
        rows.append([*cells, _text(mark)])
    return Table(["Model", SIZE, *measured, *shown, "Of its size"], rows)


def _cost_table(metrics: pd.DataFrame, models: pd.DataFrame) -> Table:
    costs = cost(metrics)
    columns = [name for name in costs if name not in (*MODEL, "seeds", REMOVED, PARAMETERS, *with_ends(KL))]
    rows = []
    for place, (_, model) in enumerate(costs.iterrows()):
        cells = [_text(whole_name(models.iloc[place]), f"#model-{place}"), _number(*model[with_ends(KL)], 3)]
        rows.append([*cells, *(_number(model[column], float("nan"), 0, 1) for column in columns)])
    return Table(["Model", KL, *columns], rows)


def _compared(results: Results) -> pd.DataFrame:
    """The comparisons that the page tells of: mean accuracy, and perplexity and fidelity on the headline text."""
    text = on_headline_text(results.metrics)["task"].iloc[0]
    rows = results.differences
    return rows[rows["metric"].isin(MEASURES) & rows["task"].isin([text, "mean"])]


def _differences_table(results: Results, models: pd.DataFrame) -> Table:
    """The comparisons that hold after Holm's correction, by measure."""
    differing, rows = varying(models), []
    compared = _compared(results)
    for metric, title in MEASURES.items():
        held = compared[(compared["metric"] == metric) & compared["distinguishable"]]
        for _, row in held.sort_values("difference").iterrows():
            other = {name: row[f"other_{name}"] for name in MODEL if f"other_{name}" in row}
            one, two = (whole_name({**side, "name": name_of(side, differing)}) for side in (row, other))
            scale, digits = (100, 1) if metric == "accuracy" else (1, DIGITS.get(title, 2))
            value, low, high = (scale * row[end] for end in ("difference", "low", "high"))
            interval = f"{value:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f})".replace("-", "\N{MINUS SIGN}")
            p = "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}"
            numbers = [(interval, float(value), None), (p, float(row["p_holm"]), None)]
            rows.append([_text(title), _text(one), _text(two), *numbers])
    return Table(["Measure", "Model", "Against", "Difference (95 % interval)", "p"], rows)


def _overlap_table(overlap: pd.DataFrame) -> Table:
    rows = []
    for _, pair in overlap.iterrows():
        example = "" if pd.isna(pair["example"]) else f"“{pair['example']}”"
        tested, seen = f"{pair['tested']} ({pair['tested_for']})", f"{pair['seen']} ({pair['seen_for']})"
        counts = [_number(pair[name], float("nan"), 0, 0) for name in ("overlapping", "documents")]
        rows.append([_text(tested), _text(seen), *counts, _text(example)])
    return Table(["Test", "Seen before", "Overlapping", "Documents", "Example"], rows)


def _chains(results: Results, models: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """How each model's numbers came to be: the artifacts behind them, from the downloads on, and the numbers."""
    by_key = {manifest["key"]: manifest for manifest in results.manifests}
    shown = pd.concat([headline(results.metrics), on_headline_text(results.metrics)])
    for place, (_, model) in enumerate(models.iterrows()):
        rows = shown[(shown[MODEL].fillna("") == model[MODEL].fillna("")).all(axis=1)]
        behind: dict[str, None] = {}
        for key in dict.fromkeys(rows["key"]):
            _add_sources(key, by_key, behind)
        numbers = [
            (f"{TASK_TITLES.get(row['task'], row['task'])}, {row['metric']}", f"{row['value']:.6g}", row["key"])
            for _, row in rows.iterrows()
        ]
        steps = [{"key": key, "stage": by_key[key]["stage"]} for key in behind]
        yield {"id": f"model-{place}", "name": whole_name(model), "steps": steps, "numbers": numbers}


def _add_sources(key: str, manifests: Mapping[str, Mapping[str, Any]], behind: dict[str, None]) -> None:
    """Add an artifact's sources to `behind`, and then itself, each once; those without a manifest are left out."""
    if key in behind or key not in manifests:
        return
    for sources in manifests[key]["inputs"].values():
        for source in sources if isinstance(sources, list) else [sources]:
            _add_sources(source, manifests, behind)
    behind[key] = None


def _artifact(manifest: Mapping[str, Any]) -> dict[str, Any]:
    inputs = [
        (role, source)
        for role, sources in manifest["inputs"].items()
        for source in (sources if isinstance(sources, list) else [sources])
    ]
    parameters = ", ".join(f"{name}: {_short(value)}" for name, value in manifest["parameters"].items())
    libraries = ", ".join(f"{name} {version}" for name, version in manifest["libraries"].items())
    made = f"{manifest['time']} on {manifest['host']} ({manifest['device']}), {manifest['seconds']:.0f} s"
    facts = {"Parameters": parameters, "Made": made, "Code": manifest["code"][:16], "Commit": manifest["git_commit"]}
    facts |= {"Libraries": libraries}
    return {"key": manifest["key"], "stage": manifest["stage"], "inputs": inputs, "facts": facts}


def _short(value: Any) -> str:
    """A parameter's value in few characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}…"

"""The leaderboard: what it says of every model, how it is ranked, and its page."""

import json
from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from hfprune.models.units import TWO_STAGES
from hfprune.reporting import interactive
from hfprune.reporting.figures import leaderboard
from hfprune.reporting.labels import spread
from hfprune.reporting.leaderboard import MAKING, PREFILL, board, first_kl, leaderboard_sheet
from hfprune.reporting.overview import Results, overview
from hfprune.reporting.statistics import MODEL
from tests import browser
from tests.test_tables import metrics

NAMES = ("entropy", "wanda", "flap", "random")
WAYS = [*((name, "uniform", "none") for name in NAMES), *((name, "global", "none") for name in NAMES[:2])]


def measured() -> pd.DataFrame:
    """A metrics.csv of six methods at two sizes, on two texts; the dense model has KL 0, the others 1, 2, ..."""
    table = metrics(*WAYS)
    table = table[table["group"] != "task"].assign(parameters=100 - 100 * table["ratio"])
    agreement = table[table["metric"] == "top1_agreement"]
    other = table[table["metric"] == "kl"].assign(task="other")
    table = pd.concat([table, other.assign(value=2 * other["value"]), agreement.assign(metric="acceptance")])
    of_models = table[(table["metric"] == "kl") & (table["task"] == "text") & (table["stage"] != "dense")]
    costs = [
        of_models.assign(group="cost", task=stage, metric=metric, value=value, stderr=None)
        for stage, metric, value in (("score", "seconds", 3), ("prune", "seconds", 4), ("score", "flops", 2e12))
    ]
    return pd.concat([table, *costs], ignore_index=True)


def timed(table: pd.DataFrame) -> pd.DataFrame:
    """Timings of the dense model, of the uniform widths by their first method, and of one with widths of its own."""
    models = table.drop_duplicates(MODEL)[MODEL]
    is_timed = (models["method"] == "dense") | models["method"].isin(["entropy", "entropy global"])
    rows = []
    for _, model in models[is_timed].iterrows():
        seconds = 0.1 * (1 - model["ratio"])
        values = [("prefill 256", "prefill_seconds", seconds), ("decode batch 1", "decode_tokens_per_second", 9)]
        rows += [{**model, "task": task, "metric": metric, "value": value} for task, metric, value in values]
    return pd.DataFrame(rows)


def compared(table: pd.DataFrame, p: float) -> pd.DataFrame:
    """Differences in KL of every pair of one size: `p` for the best two, and less for the others."""
    models = table.drop_duplicates(MODEL)[MODEL].reset_index(drop=True)
    pairs = [(one, other) for one in models.index for other in models.index if other < one]
    pairs = [(a, b) for a, b in pairs if models["ratio"][a] == models["ratio"][b]]
    rows = models.iloc[[one for one, _ in pairs]].reset_index(drop=True)
    others = (
        models.iloc[[other for _, other in pairs]].drop(columns="model").add_prefix("other_").reset_index(drop=True)
    )
    rows = pd.concat([rows, others], axis=1).assign(group="fidelity", task="text", metric="kl", p=1e-9)
    best = (rows["method"] == "wanda") & (rows["other_method"] == "entropy")
    return rows.assign(p=rows["p"].mask(best, p))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """A board of these."""
    values = measured()
    return board(values, timed(values), compared(values, 0.5))


def test_every_model_has_fidelity_speed_and_cost_the_nearest_of_a_size_first(table):
    assert table["name"].tolist()[:3] == ["dense", "entropy", "wanda"]
    assert table["ratio"].tolist() == [0.0, *[0.1] * 6, *[0.2] * 6]
    assert table["KL, text"].tolist() == [0, 1, 3, 5, 7, 9, 11, 2, 4, 6, 8, 10, 12]
    assert (table["KL, other"] == 2 * table["KL, text"]).all()
    assert (table["Acceptance"] == table["Top-1 agreement"]).all()
    assert table[MAKING].tolist() == [0, *[7] * 12] and table["TFLOP"].tolist() == [0, *[2] * 12]
    assert first_kl(table) == "KL, text"


def test_models_of_one_shape_share_a_time_and_others_have_none(table):
    by_name = table[table["ratio"] == 0.2].set_index("name")[PREFILL]
    assert by_name[["entropy", "wanda", "random", "entropy global"]].tolist() == pytest.approx([80] * 4)
    assert pd.isna(by_name["wanda global"])


@pytest.mark.parametrize(("p", "tied"), [(0.5, ["wanda"]), (1e-9, [])])
def test_the_best_of_a_size_is_marked_and_what_cannot_be_told_from_it(p, tied):
    values = measured()
    marked = board(values, timed(values), compared(values, p))
    here = marked[marked["ratio"] == 0.2]
    assert here[here["best"]]["name"].tolist() == ["entropy"]
    assert here[here["tied"]]["name"].tolist() == tied
    assert not marked[marked["ratio"] == 0][["best", "tied"]].any(axis=None)


def test_the_table_for_people_has_one_row_a_model(table, tmp_path):
    leaderboard_sheet(table).write(tmp_path, "leaderboard")
    lines = (tmp_path / "leaderboard.md").read_text().splitlines()
    (best,) = [line for line in lines if line.startswith("| 20 | entropy |")]
    assert "**2.000**" in best and "| 80 |" in best
    assert len(pd.read_csv(tmp_path / "leaderboard.csv")) == 13


def test_without_timings_there_are_no_speeds(tmp_path):
    values = measured()
    untimed = board(values, None, compared(values, 0.5))
    leaderboard_sheet(untimed).write(tmp_path, "leaderboard")
    assert list(untimed["KL, text"]) == [0, 1, 3, 5, 7, 9, 11, 2, 4, 6, 8, 10, 12]
    made = (tmp_path / "leaderboard.md").read_text(), page(untimed)
    assert not any(PREFILL in text or "chart-speed" in text for text in made) and all(MAKING in text for text in made)


def test_every_timed_model_is_a_point_with_its_name_and_the_others_are_named(table):
    figure = leaderboard(table, PREFILL, "KL, text")
    _, large = figure.axes
    names = [text.get_text() for text in large.texts]
    assert [name.split(" ")[0] for name in names] == ["entropy", "wanda", "flap", "random", "entropy"]
    assert names[:2] == ["entropy *", "wanda ≈"]
    points = sorted(map(tuple, (line.get_xydata().tolist()[0] for line in large.lines[:1])))
    assert points == [(pytest.approx(80), 2)]
    assert "not timed: wanda global" in large.get_title(loc="left").replace("\n", " ")
    heights = [text.get_position()[1] for text in large.texts]
    assert heights == sorted(heights) and min(b - a for a, b in pairwise(heights)) > 0.01
    plt.close(figure)


def test_colours_say_which_models_are_of_a_stock_class():
    of_shape = {"whole layers": ("layers", "uniform"), "sublayers": ("sublayers", "uniform"), "free": ("mlp", "global")}
    of_shape |= {"narrow": ("mlp", "uniform"), "both": ("mlp+attention", "uniform"), "2SSP": (TWO_STAGES, "uniform")}
    rows = [
        {"name": name, "ratio": 0.2, "structure": structure, "allocation": allocation, "best": False, "tied": False}
        for name, (structure, allocation) in of_shape.items()
    ]
    figure = leaderboard(pd.DataFrame(rows).assign(speed=range(6), distance=range(1, 7)), "speed", "distance")
    stock, other = [line.get_xdata().tolist() for line in figure.axes[0].lines]
    assert (stock, other) == ([0, 3, 4], [1, 2, 5])
    plt.close(figure)


def test_names_stand_apart_and_above_the_axis():
    values = [0.01, 0.02, 0.03, 0.5, 0.51]
    places = spread(values, 0.1, lowest=0)
    assert places[0] == pytest.approx(0) and places == sorted(places)
    assert min(b - a for a, b in pairwise(places)) > 0.1 - 1e-9
    assert spread(values, 0.1)[3:] == pytest.approx(places[3:]), "those that have room stay"
    assert spread([0.05, 0.9], 0.1, lowest=0) == [0.05, 0.9]


def page(table: pd.DataFrame) -> str:
    values = measured()
    config = {
        "experiment": "it", "calibration": {"samples": 1, "length": 2, "text": "c"}, "evaluation": {},
        "fidelity": {"samples": 1, "length": 2, "texts": ["text", "other"]},
    }  # fmt: skip
    widths = pd.DataFrame(
        [{"model": name, "ratio": 0.1, "part": "mlp", "layer": 0, "kept": 3, "dense": 4} for name in NAMES]
    )
    overlap = pd.DataFrame(columns=["tested", "tested_for", "seen", "seen_for", "documents", "overlapping", "example"])
    differences = compared(values, 0.5).assign(distinguishable=False, difference=0.0)
    return overview(Results(values, config, "a: 1", [], differences, widths, overlap, board=table))


def test_the_page_has_the_board_in_the_place_of_the_models(table):
    made = page(table)
    assert "chart-speed" in made and '<th class="number">Prefill (ms)</th>' in made
    assert "not distinguishable" in made and "snakemake leaderboard" in made


def test_a_reader_can_filter_and_sort_it(table, tmp_path):
    if (program := browser.find()) is None:
        pytest.skip(f"no browser here (looked for {', '.join(browser.NAMES)})")
    (tmp_path / "page.html").write_text(page(table))
    with browser.Browser(program, tmp_path / "profile") as opened:
        opened.open(tmp_path / "page.html")
        opened.wait("document.querySelector('#chart-speed svg') !== null")
        shown = "[...document.querySelectorAll('#models tbody tr')].filter(row => row.offsetHeight).length"
        assert opened.run(shown) == 13
        box = "document.querySelector('input[type=search]')"
        opened.run(f"{box}.value = 'Global entropy'; {box}.dispatchEvent(new Event('input'))")
        assert opened.run(shown) == 2
        assert opened.faults == []


def test_the_page_says_who_is_nearest_at_every_size(table):
    assert "at 10% entropy, 1.00 nats per token (1 cannot be told from it); and at 20% entropy, 2.00" in page(table)


@pytest.mark.parametrize("most", [6, 5])
def test_more_methods_than_lines_can_show_have_a_row_each(most, table, monkeypatch):
    monkeypatch.setattr(interactive, "MOST_NAMED", most)
    made = page(table)
    specs = json.loads(made[made.index("const specs = ") + len("const specs = ") :].split(";\nfor", 1)[0])
    kinds = [layer["mark"]["type"] for layer in specs["chart-kl"]["layer"]]
    assert kinds == (["line", "rule", "circle", "text"] if most == 6 else ["rule", "circle"])


def test_rows_of_several_sizes_are_in_the_order_of_their_ranks():
    models = pd.DataFrame({"name": [*"abca"], "size": [10, 10, 10, 50], "KL": [2.0, 1.0, 3.0, 90.0]})
    models = models.assign(**{"KL low": models["KL"], "KL high": models["KL"]})
    chart = interactive.sizes(models, "KL", "size")
    assert chart["layer"][1]["encoding"]["y"]["sort"] == [*"bac"]
    assert chart["layer"][1]["encoding"]["x"]["scale"]["type"] == "sqrt"


@pytest.mark.parametrize(("most", "mark"), [(4, "line"), (3, "rect")])
def test_layers_of_more_models_than_curves_can_show_are_a_map(most, mark, table, monkeypatch):
    monkeypatch.setattr(interactive, "MOST_NAMED", most)
    assert f'"mark": {{"type": "{mark}"' in page(table).split('"chart-widths-mlp"', 1)[1]


@pytest.mark.parametrize(("largest", "kind"), [(4.4, None), (4.6, "log")])
def test_a_row_for_each_model_has_a_logarithmic_axis_where_one_is_ten_times_farther_than_another(largest, kind):
    values = pd.DataFrame({"name": ["near", "far"], "KL": [0.5, largest]})
    models = values.assign(**{"KL low": values["KL"] - 0.05, "KL high": values["KL"] + 0.05})
    interval, point = interactive.rows(models, "KL")["layer"]
    assert interval["encoding"]["x"]["scale"].get("type") == point["encoding"]["x"]["scale"].get("type") == kind
    *_, point = interactive.rows(models, "KL", 0)["layer"]  # zero has no place on such an axis
    assert "type" not in point["encoding"]["x"]["scale"]

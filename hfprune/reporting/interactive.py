"""Charts of the overview page, as Vega-Lite specifications that Altair writes: the mouse tells a point's values."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from hfprune.reporting.labels import spread

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#56B4E9", "#000000"]  # Okabe and Ito, yellow darker
MOST_NAMED = 8  # lines that can be told apart, with their names beside them
NAME_SHARE = 0.45  # room for names right of the lines, as a share of the lines' extent
GAP = 0.055  # between the names of two lines, as a share of the axis
STEP, NARROW = 22, 14  # pixels of a row


def lines(models: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
    """Values against sizes, a line for each of at most `MOST_NAMED` names, with intervals.

    Args:
        models: columns `name`, `x`, `y`, `y low` and `y high`; a name without several sizes is a point.
        x, y: the columns, which are also the titles of the axes.
    """
    names = list(dict.fromkeys(models["name"]))
    ends = models.loc[models.groupby("name", sort=False)[x].idxmax()].reset_index(drop=True)
    top = models[[y, f"{y} high"]].max().max()
    ends["place"] = spread(list(ends[y]), GAP * top)
    first, last = models[x].min(), models[x].max()
    extent = max(last - first, 1)
    axis = alt.Scale(domain=[first - 0.05 * extent, last + NAME_SHARE * extent], nice=False)
    scale = alt.Scale(domain=names, range=_colors(names))
    color = alt.Color("name:N", sort=names, scale=scale, title=None, legend=None)
    base = alt.Chart(models).encode(alt.X(f"{_field(x)}:Q", scale=axis, title=x), color=color)
    marks = [
        base.mark_line().encode(alt.Y(f"{_field(y)}:Q", title=y, scale=alt.Scale(zero=True))),
        base.mark_rule(strokeWidth=1.5).encode(alt.Y(f"{_field(y + ' low')}:Q", title=y), alt.Y2(_field(f"{y} high"))),
        base.mark_circle(size=70, opacity=1).encode(alt.Y(f"{_field(y)}:Q", title=y), tooltip=_tooltip(["name", x], y)),
    ]
    text = alt.Chart(ends).mark_text(align="left", dx=8, limit=190, fontSize=12)
    marks.append(text.encode(alt.X(f"{_field(x)}:Q"), alt.Y("place:Q"), color=color, text="name:N"))
    return _finished(alt.layer(*marks).properties(width="container", height=300))


def sizes(models: pd.DataFrame, x: str, size: str) -> dict[str, Any]:
    """A row for each name: its value at every size, with intervals. For more names than lines can show.

    Names stand in the order of their mean rank over the sizes, the lowest values first.

    Args:
        models: columns `name`, `size`, `x`, `x low` and `x high`.
        x: the column of values, from 0 on, which is also the title of the axis.
        size: the column of sizes, which is also the title of the legend.
    """
    ranks = models.groupby(size)[x].rank(pct=True).groupby(models["name"], sort=False).mean()
    order = alt.Y(
        "name:N", sort=list(ranks.sort_values(kind="stable").index), title=None, axis=alt.Axis(labelLimit=190)
    )
    color = alt.Color(f"{_field(size)}:O", scale=alt.Scale(range=COLORS), legend=alt.Legend(orient="bottom"))
    base = alt.Chart(models).encode(order, color=color)
    root = alt.Scale(type="sqrt", zero=True)  # small and large cuts on one axis
    low, value = (
        alt.X(f"{_field(column)}:Q", title=f"{x}, square-root axis", scale=root) for column in (f"{x} low", x)
    )
    interval = base.mark_rule(strokeWidth=1.5).encode(low, alt.X2(_field(f"{x} high")))
    point = base.mark_circle(size=50, opacity=1).encode(value, tooltip=_tooltip(["name", size], x))
    return _finished(alt.layer(interval, point).properties(width="container", height=alt.Step(STEP)))


def rows(models: pd.DataFrame, x: str, reference: float | None = None) -> dict[str, Any]:
    """A row for each model, in the given order: its value and interval, and a line at `reference`.

    Where the largest value is more than ten times the smallest, the axis is logarithmic. Otherwise the best models
    would stand on one spot.

    Args:
        models: columns `name`, `x`, `x low` and `x high`.
        x: the column, which is also the title of the axis.
        reference: where nothing differs.
    """
    order = alt.Y("name:N", sort=list(models["name"]), title=None, axis=alt.Axis(labelLimit=190))
    base = alt.Chart(models).encode(order)
    axis = alt.Axis(titleAnchor="end")  # on a narrow screen the names leave a long title no room to the right
    smallest, title, scale = models[f"{x} low"].min(), x, alt.Scale(zero=True)
    if reference is None and 0 < 10 * smallest < models[x].max():
        title, scale = f"{x}, logarithmic axis", alt.Scale(type="log", nice=False, padding=10)
    low, value = (alt.X(f"{_field(column)}:Q", title=title, axis=axis, scale=scale) for column in (f"{x} low", x))
    interval = base.mark_rule(color=COLORS[0], strokeWidth=1.5).encode(low, alt.X2(_field(f"{x} high")))
    point = base.mark_circle(color=COLORS[0], size=70, opacity=1).encode(value, tooltip=_tooltip(["name"], x))
    marks = [interval, point]
    if reference is not None:
        zero = alt.Chart(pd.DataFrame({"at": [reference]})).mark_rule(color="#475569", strokeDash=[4, 3])
        marks.insert(0, zero.encode(alt.X("at:Q", title=x, axis=axis)))
    return _finished(alt.layer(*marks).properties(width="container", height=alt.Step(STEP)))


def points(models: pd.DataFrame, x: str, y: str, size: str) -> dict[str, Any]:
    """A point for each model, of a colour for each `size`, on a logarithmic axis; the mouse tells the name."""
    chart = alt.Chart(models).mark_circle(size=70, opacity=0.9).encode(
        alt.X(f"{_field(x)}:Q", title=x, scale=alt.Scale(zero=False)),
        alt.Y(f"{_field(y)}:Q", title=y, scale=alt.Scale(type="log")),
        color=alt.Color(f"{_field(size)}:N", scale=alt.Scale(range=COLORS), legend=alt.Legend(orient="bottom")),
        tooltip=[_value("name"), _value(size), _value(x), *_tooltip([], y)],
    )  # fmt: skip
    return _finished(chart.properties(width="container", height=400))


def curves(points: pd.DataFrame, x: str, y: str, zero: bool = True) -> dict[str, Any]:
    """Many points on a line for each `name`, told apart by a legend."""
    names = list(dict.fromkeys(points["name"]))
    longest = max(map(len, names))
    color = alt.Color(
        "name:N", sort=names, scale=alt.Scale(domain=names, range=_colors(names)), title=None,
        legend=alt.Legend(orient="bottom", columns=1 if longest > 20 else 2, labelLimit=300, labelFontSize=12),
    )  # fmt: skip
    chart = alt.Chart(points).mark_line(point={"size": 25}).encode(
        alt.X(f"{_field(x)}:Q", title=x), alt.Y(f"{_field(y)}:Q", title=y, scale=alt.Scale(zero=zero)), color=color,
        tooltip=[_value("name"), _value(x), _value(y)],
    )  # fmt: skip
    return _finished(chart.properties(width="container", height=260))


def heat(points: pd.DataFrame, x: str, value: str) -> dict[str, Any]:
    """A row for each `name`, darker cells for larger values. For more names than curves can show.

    Args:
        points: columns `name`, `x` and `value`; the names stand in their order.
        x: the column of numbers that the cells of a row stand for.
        value: the column that the legend explains.
    """
    names = list(dict.fromkeys(points["name"]))
    chart = alt.Chart(points).mark_rect().encode(
        alt.X(f"{_field(x)}:O", title=x),
        alt.Y("name:N", sort=names, title=None, axis=alt.Axis(labelLimit=190)),
        color=alt.Color(f"{_field(value)}:Q", scale=alt.Scale(scheme="blues"), legend=alt.Legend(orient="top")),
        tooltip=[_value("name"), _value(x), _value(value)],
    )  # fmt: skip
    return _finished(chart.properties(width="container", height=alt.Step(NARROW)))


def _finished(chart: alt.TopLevelMixin) -> dict[str, Any]:
    font = "system-ui, sans-serif"
    chart = chart.properties(autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    chart = chart.configure(font=font).configure_view(stroke=None).configure_axis(grid=True, gridColor="#e2e8f0")
    return chart.configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal").to_dict()


def _colors(names: Sequence[str]) -> list[str]:
    return [COLORS[number % len(COLORS)] for number in range(len(names))]


def _field(column: str) -> str:
    """A column's name as Vega-Lite reads it: these characters have a meaning in it."""
    return "".join(f"\\{letter}" if letter in ".[]:" else letter for letter in column)


def _value(column: str) -> alt.Tooltip:
    return (
        alt.Tooltip(_field(column), type="nominal")
        if column == "name"
        else alt.Tooltip(_field(column), type="quantitative", format=".4~g")
    )


def _tooltip(about: Sequence[str], value: str) -> list[alt.Tooltip]:
    return [_value(column) for column in (*about, value, f"{value} low", f"{value} high")]

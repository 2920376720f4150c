"""Charts of the overview page, as Vega-Lite specifications that Altair writes: the mouse tells a point's values."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from hfprune.reporting.labels import spread

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#56B4E9", "#000000"]  # Okabe and Ito, yellow darker
MOST_NAMED = 8  # lines that have their names beside them; more have a legend
NAME_SHARE = 0.45  # room for names right of the lines, as a share of the lines' extent
GAP = 0.055  # between the names of two lines, as a share of the axis
STEP = 22  # pixels of a row


def lines(models: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
    """Values against sizes, a line for each name, with intervals.

    Args:
        models: columns `name`, `x`, `y`, `y low` and `y high`; a name without several sizes is a point.
        x, y: the columns, which are also the titles of the axes.
    """
    names = list(dict.fromkeys(models["name"]))
    ends = models.loc[models.groupby("name", sort=False)[x].idxmax()].reset_index(drop=True)
    top = models[[y, f"{y} high"]].max().max()
    ends["place"] = spread(list(ends[y]), GAP * top)
    named = len(names) <= MOST_NAMED
    first, last = models[x].min(), models[x].max()
    extent = max(last - first, 1)
    axis = alt.Scale(domain=[first - 0.05 * extent, last + (NAME_SHARE if named else 0.05) * extent], nice=False)
    color = alt.Color(
        "name:N", sort=names, scale=alt.Scale(domain=names, range=_colors(names)), title=None,
        legend=None if named else alt.Legend(orient="bottom", columns=2, labelLimit=300, labelFontSize=12),
    )  # fmt: skip
    base = alt.Chart(models).encode(alt.X(f"{_field(x)}:Q", scale=axis, title=x), color=color)
    marks = [
        base.mark_line().encode(alt.Y(f"{_field(y)}:Q", title=y, scale=alt.Scale(zero=True))),
        base.mark_rule(strokeWidth=1.5).encode(alt.Y(f"{_field(y + ' low')}:Q", title=y), alt.Y2(_field(f"{y} high"))),
        base.mark_circle(size=70, opacity=1).encode(alt.Y(f"{_field(y)}:Q", title=y), tooltip=_tooltip(["name", x], y)),
    ]
    if named:
        text = alt.Chart(ends).mark_text(align="left", dx=8, limit=190, fontSize=12)
        marks.append(text.encode(alt.X(f"{_field(x)}:Q"), alt.Y("place:Q"), color=color, text="name:N"))
    return _finished(alt.layer(*marks).properties(width="container", height=300))


def rows(models: pd.DataFrame, x: str, reference: float | None = None) -> dict[str, Any]:
    """A row for each model, in the given order: its value and interval, and a line at `reference`.

    Args:
        models: columns `name`, `x`, `x low` and `x high`.
        x: the column, which is also the title of the axis.
        reference: where nothing differs.
    """
    order = alt.Y("name:N", sort=list(models["name"]), title=None, axis=alt.Axis(labelLimit=190))
    base = alt.Chart(models).encode(order)
    axis = alt.Axis(titleAnchor="end")  # on a narrow screen the names leave a long title no room to the right
    low, value = (alt.X(f"{_field(column)}:Q", title=x, axis=axis) for column in (f"{x} low", x))
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

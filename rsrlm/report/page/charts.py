"""Plots as SVG that stands in a page: colours are the page's own variables, so that they follow its light and dark.

Series differ by dash and by symbol as well as by colour; every mark has a label in words for readers of the screen.
The plots are written in Vega-Lite, which vl-convert draws.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLOURS = [f"var(--c{number})" for number in range(1, 7)]
OUTCOMES = ["var(--good)", "var(--even)", "var(--bad)"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [10, 4]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
WIDTH, HEIGHT = 380, 190
MOST_POINTS = 400  # of one series: more are thinned out, or the page would grow with the run
CHARACTER = 9  # of a bold text, wide enough for any font
FEW = 12  # places on an axis that are all named
WITH_SYMBOLS = 60  # points of a series: more are a line alone

Row = Mapping[str, Any]
_AXIS = {
    "labelColor": "var(--soft)", "titleColor": "var(--soft)", "gridColor": "var(--line)", "titleFontWeight": 400,
    "domainColor": "var(--line)", "tickColor": "var(--line)", "labelFontSize": 11, "titleFontSize": 11, "labelAngle": 0,
}  # fmt: skip
_LEGEND = {
    "labelColor": "var(--ink)", "orient": "top", "title": None, "labelFontSize": 11, "symbolSize": 60,
    "labelLimit": 220, "columnPadding": 28,
}  # fmt: skip
CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": _AXIS,
    "legend": _LEGEND,
    "header": {"labelColor": "var(--ink)", "labelFontSize": 11, "title": None},
}


def svg(spec: Row) -> str:
    """A Vega-Lite chart as an <svg> that takes the width it is given."""
    import vl_convert

    text: str = vl_convert.vegalite_to_svg({"config": CONFIG, **spec})
    return text.replace("<svg ", '<svg role="group" ', 1)


def thinned(rows: Sequence[Row]) -> list[Row]:
    """At most MOST_POINTS of each series, evenly spread, the last among them; only finite values of `y`."""
    of_series: dict[Any, list[Row]] = {}
    for row in rows:
        if isinstance(row.get("y"), int | float) and math.isfinite(row["y"]):
            of_series.setdefault(row["series"], []).append(row)
    kept = []
    for series in of_series.values():
        stride = max(1, math.ceil(len(series) / MOST_POINTS))
        kept += series[::-1][::stride][::-1]
    return kept


def lines(rows: Sequence[Row], x: str, y: str, ordinal: bool = False) -> str:
    """`x`, `y` and `series` of each row, as lines; `x` and `y` say what they are. Rows with `low` and `high`
    have intervals. Empty where there is nothing to show."""
    rows = thinned(rows)
    if not rows:
        return ""
    names = list(dict.fromkeys(str(row["series"]) for row in rows))
    whole = not ordinal and all(float(row["x"]).is_integer() for row in rows)
    across: dict[str, Any] = {
        "field": "x",
        "title": x,
        "type": "ordinal" if ordinal else "quantitative",
        "axis": {"labelOverlap": True, **(_ticks(rows) if whole else {})},
    }
    across |= {"sort": list(dict.fromkeys(row["x"] for row in rows))} if ordinal else {"scale": {"zero": False}}
    up = {
        "field": "y",
        "type": "quantitative",
        "title": y,
        "scale": {"zero": False},
        "axis": {"tickCount": 5, "title": None},
    }

    def by_series(values: Sequence[Any]) -> dict[str, Any]:
        scale = {"domain": names, "range": [values[number % len(values)] for number in range(len(names))]}
        return {"field": "series", "type": "nominal", "scale": scale, **({} if len(names) > 1 else {"legend": None})}

    layers = [
        {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": {"y": up, "strokeDash": by_series(DASHES)}},
    ]
    if len(rows) <= WITH_SYMBOLS * len(names):
        mark = {"type": "point", "filled": True, "size": 36, "opacity": 1}
        layers.append({"mark": mark, "encoding": {"y": up, "shape": by_series(SHAPES)}})
    if any(row.get("low") is not None for row in rows):
        interval = {"y": {**up, "field": "low"}, "y2": {"field": "high"}}
        layers.append({"mark": {"type": "rule", "strokeWidth": 1.4}, "encoding": interval})
    return svg(
        {
            "data": {"values": rows},
            "encoding": {"x": across, "color": by_series(COLOURS)},
            "layer": layers,
            "width": WIDTH,
            "height": HEIGHT,
        }
    )


def _ticks(rows: Sequence[Row]) -> dict[str, Any]:
    """At whole numbers alone."""
    places = sorted({float(row["x"]) for row in rows})
    return {"format": "d", **({"values": places} if len(places) <= FEW else {"tickMinStep": 1})}


def histogram(groups: Mapping[str, Any], x: str, bins: int = 20) -> str:
    """Shares of the values of each group in bins that they have in common, one row of bars above the other."""
    rows, low, high = _binned(groups, bins)
    if not rows:
        return ""
    names = list(dict.fromkeys(row["series"] for row in rows))
    return svg(
        {
            "data": {"values": rows},
            "facet": {
                "row": {
                    "field": "series",
                    "type": "nominal",
                    "sort": names,
                    "header": {"labelAngle": 0, "labelOrient": "top", "labelAnchor": "start", "labelPadding": 2},
                }
            },
            "spacing": 8,
            "spec": {
                "width": WIDTH,
                "height": max(46, min(HEIGHT, 260 // len(names))),
                "mark": {"type": "bar", "color": COLOURS[0], "stroke": "var(--card)", "strokeWidth": 0.5},
                "encoding": {
                    "x": {
                        "field": "from",
                        "bin": "binned",
                        "type": "quantitative",
                        "title": x,
                        "scale": {"domain": [low, high], "nice": False},
                        "axis": {"tickCount": 8, "labelOverlap": True},
                    },
                    "x2": {"field": "to"},
                    "y": {
                        "field": "share",
                        "type": "quantitative",
                        "title": "share",
                        "axis": {"tickCount": 3, "format": "%"},
                    },
                },
            },
        }
    )


def _binned(groups: Mapping[str, Any], bins: int) -> tuple[list[dict[str, Any]], float, float]:
    """Rows of bars, and where the bins begin and end."""
    values = {name: np.asarray(found, float) for name, found in groups.items()}
    values = {name: found[np.isfinite(found)] for name, found in values.items()}
    values = {name: found for name, found in values.items() if len(found)}
    if not values:
        return [], 0.0, 1.0
    low, high = (float(end([end(found) for found in values.values()])) for end in (np.min, np.max))
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    rows = []
    for name, found in values.items():
        counts, edges = np.histogram(found, bins, (low, high))
        rows += [
            {"series": f"{name} (n = {len(found):,})", "from": a, "to": b, "share": count / len(found)}
            for count, a, b in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        ]
    return rows, low, high


def stacked(rows: Sequence[Row], x: str, order: Sequence[str], colours: Sequence[str] = (), share: bool = False) -> str:
    """Bars of `label`, each of parts `series` that are `x` long, in this order; a part with room says what it is."""
    kept, whole = _laid(rows, order, share)
    if not kept:
        return ""
    names = [name for name in order if any(row["series"] == name for row in kept)]
    chosen = dict(zip(order, colours, strict=True)) if colours else dict(zip(names, COLOURS * len(names), strict=False))
    axis = {"format": "%", "tickCount": 4} if share else {"tickCount": 5}
    along = {"field": "start", "type": "quantitative", "title": x, "axis": axis}
    bar = {"type": "bar", "stroke": "var(--card)", "strokeWidth": 1.5}
    text = {"type": "text", "color": "var(--card)", "fontSize": 11, "fontWeight": 600}
    return svg(
        {
            "data": {"values": kept},
            "width": WIDTH,
            "height": {"step": 30},
            "encoding": {
                "y": {
                    "field": "label",
                    "type": "nominal",
                    "sort": list(dict.fromkeys(row["label"] for row in rows)),
                    "title": None,
                    "axis": {"labelLimit": 150, "minExtent": 96},
                }
            },
            "layer": [
                {
                    "mark": bar,
                    "encoding": {
                        "x": {**along, "scale": {"domain": [0, whole], "nice": False}},
                        "x2": {"field": "end"},
                        "color": {
                            "field": "series",
                            "type": "nominal",
                            "sort": names,
                            "scale": {"domain": names, "range": [chosen[name] for name in names]},
                        },
                    },
                },
                {"mark": text, "encoding": {"x": {**along, "field": "middle"}, "text": {"field": "text"}}},
            ],
        }
    )


def _laid(rows: Sequence[Row], order: Sequence[str], share: bool) -> tuple[list[dict[str, Any]], float]:
    """Where each part of a bar begins and ends and what it says, and how long the longest bar is."""
    kept: list[dict[str, Any]] = []
    at: dict[str, float] = {}
    for name in order:
        for row in rows:
            if row["series"] == name and (row.get("x") or 0) > 0:
                start = at.get(row["label"], 0.0)
                at[row["label"]] = start + row["x"]
                kept.append({**row, "start": start, "end": start + row["x"], "middle": start + row["x"] / 2})
    whole = max(at.values(), default=0.0)
    for one in kept:
        number, room = f"{one['x']:.0%}" if share else f"{one['x']:,.0f}", one["x"] / whole
        texts = (f"{one['series']} {number}", number, "")
        one["text"] = next(text for text in texts if len(text) * CHARACTER < room * WIDTH or not text)
    return kept, whole


def timeline(rows: Sequence[Row], x: str) -> str:
    """Marks at `x` in rows named `series`, each with a `label` in words and a `short` one that is shown."""
    if not rows:
        return ""
    names = list(dict.fromkeys(str(row["series"]) for row in rows))

    def by_series(values: Sequence[Any]) -> dict[str, Any]:
        scale = {"domain": names, "range": [values[number % len(values)] for number in range(len(names))]}
        return {"field": "series", "type": "nominal", "scale": scale, "legend": None}

    mark = {"type": "point", "filled": True, "size": 60, "opacity": 1}
    text = {"type": "text", "dy": -10, "fontSize": 10, "color": "var(--soft)"}
    marks = {"color": by_series(COLOURS), "shape": by_series(SHAPES), "description": {"field": "label"}}
    return svg(
        {
            "data": {"values": [*rows]},
            "width": 2 * WIDTH + 60,
            "height": {"step": 34},
            "encoding": {
                "x": {"field": "x", "type": "quantitative", "title": x, "axis": {"tickCount": 6}},
                "y": {
                    "field": "series",
                    "type": "nominal",
                    "sort": names,
                    "title": None,
                    "axis": {"grid": True, "minExtent": 130},
                },
            },
            "layer": [
                {"mark": mark, "encoding": marks},
                {"mark": text, "encoding": {"text": {"field": "short"}}},
            ],
        }
    )

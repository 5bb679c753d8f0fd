"""The report's charts as SVG, rendered by Vega-Lite: no script, no request.

Colours are CSS variables of stages/reporting/page.css, so that one drawing serves light, dark and
print. Each chart comes with a description (`alt`) and its numbers (a table).
"""

import vl_convert

from stages.reporting.page import Chart, Table

VEGA_LITE = "6.4"
WIDTH, HEIGHT = 330, 190
COLOURS = [f"var(--{name})" for name in ("a", "b", "c", "d", "e", "f", "ink", "soft")]
DOT = {"filled": True, "opacity": 1}
BAND = {
    "type": "nominal",
    "sort": None,
    "title": None,
    "axis": {"domain": False, "ticks": False, "labelPadding": 8, "grid": False},
}
STYLE = {
    "background": None,
    # Browser fonts are wider than the one Vega measures labels with.
    "padding": {"left": 14, "right": 8, "top": 4, "bottom": 4},
    "config": {
        "font": "sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": "var(--soft)",
            "titleColor": "var(--soft)",
            "gridColor": "var(--grid)",
            "domainColor": "var(--line)",
            "tickColor": "var(--line)",
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "labelFlush": False,
            "labelOverlap": True,
            "tickCount": 5,
        },
        "legend": {
            "labelColor": "var(--ink)",
            "labelFontSize": 12,
            "title": None,
            "orient": "top",
            "columns": 3,
            "columnPadding": 20,
            "symbolOpacity": 1,
        },
        "text": {"fill": "var(--ink)", "fontSize": 12},
    },
}


def svg(spec: dict, values: list[dict], height: int = HEIGHT) -> str:
    """`spec` over `values` as an SVG that scales to the available width."""
    size = {"width": WIDTH, "height": height, "data": {"values": values}}
    return vl_convert.vegalite_to_svg(STYLE | size | spec, vl_version=VEGA_LITE)


def _quantitative(name: str, title: str, **scale) -> dict:
    return {
        "field": name,
        "type": "quantitative",
        "title": title,
        "scale": {"zero": False, **scale},
    }


def _coloured(name: str, domain: list[str], colours: list[str]) -> dict:
    scale = {"domain": domain, "range": colours[: len(domain)]}
    return {"field": name, "type": "nominal", "scale": scale}


def loss(curve: list[dict]) -> Chart:
    """Training, held-out and validation loss by step. `curve`: the rows of metrics/curve.csv as
    text; validation losses are optional."""
    names = {"loss": "training", "eval_loss": "evaluation"}
    if "validation_loss" in curve[0]:
        names |= {"validation_loss": "validation", "kept": "kept"}
    values = [
        {"step": int(line["step"]), "loss": float(line[column]), "set": name}
        for column, name in names.items()
        for line in curve
        if line[column]
    ]
    train, held_out, *chosen = (
        [v["loss"] for v in values if v["set"] == name] for name in names.values()
    )
    alt = f"Line chart. Training loss goes from {train[0]:.3g} to {train[-1]:.3g}"
    alt += f" in {values[len(train) - 1]['step']} steps"
    if held_out:
        alt += f"; loss on held-out rows goes from {held_out[0]:.3g} to {held_out[-1]:.3g}"
    if chosen:
        validation, (kept,) = chosen
        alt += f"; on validation rows from {validation[0]:.3g} to {validation[-1]:.3g}, and the "
        alt += f"state of {kept:.3g} was kept"
    spec = {
        "encoding": {
            "x": _quantitative("step", "step", nice=False),
            "y": _quantitative("loss", "mean NLL per learned token"),
            "color": _coloured("set", [*names.values()], COLOURS),
        },
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 2}},
            {
                "mark": {"type": "point", **DOT, "size": 40},
                "transform": [{"filter": "datum.set != 'training'"}],
            },
        ],
    }
    rows = [[line["step"], *(line[column] for column in names)] for line in curve]
    table = Table(["step", *names.values()], rows)
    return Chart("Loss", alt + ".", svg(spec, values), table)


def learning_rate(curve: list[dict]) -> Chart:
    """Learning rate by step."""
    values = [
        {"step": int(line["step"]), "rate": float(line["learning_rate"])}
        for line in curve
        if line["learning_rate"]
    ]
    rates = [v["rate"] for v in values]
    alt = (
        f"Line chart. The learning rate begins at {rates[0]:.3g}, is at most {max(rates):.3g} "
        f"and ends at {rates[-1]:.3g}."
    )
    spec = {
        "mark": {"type": "line", "strokeWidth": 2, "stroke": "var(--c)"},
        "encoding": {
            "x": _quantitative("step", "step", nice=False),
            "y": _quantitative("rate", "learning rate", zero=True) | {"axis": {"format": "~g"}},
        },
    }
    rows = [[str(v["step"]), f"{v['rate']:.4g}"] for v in values]
    return Chart("Learning rate", alt, svg(spec, values), Table(["step", "learning rate"], rows))


def perplexity(metrics: dict, sets: dict[str, str]) -> Chart:
    """Base and tuned perplexity with their 95 % intervals. `sets`: metric prefix -> name."""
    values = [
        {"set": name, "model": who, "perplexity": metrics[key]}
        | {side: metrics[f"{key}_{side}"] for side in ("low", "high")}
        for prefix, name in sets.items()
        for who in ("base", "tuned")
        for key in [f"{prefix}{who}_perplexity"]
    ]
    x = _quantitative("perplexity", "perplexity (logarithmic)", type="log", nice=False, padding=12)
    number = {"field": "perplexity", "type": "quantitative", "format": ".4~r"}
    spec = {
        "encoding": {
            "y": {"field": "set", **BAND},
            "color": _coloured("model", ["base", "tuned"], ["var(--f)", "var(--a)"]),
        },
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.5},
                "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}},
            },
            {"mark": {"type": "point", **DOT, "size": 90}, "encoding": {"x": x}},
            {
                "mark": {"type": "text", "dy": -14},
                "encoding": {"x": x, "text": number, "color": {"value": "var(--ink)"}},
            },
        ],
    }
    rows = [
        [v["set"], v["model"], *(f"{v[key]:.4g}" for key in ("perplexity", "low", "high"))]
        for v in values
    ]
    words = "; ".join(f"{v['set']}, {v['model']} model: {v['perplexity']:.4g}" for v in values)
    alt = f"Dots with 95 % intervals. {words}."
    table = Table(["Set", "Model", "Perplexity", "Low", "High"], rows)
    return Chart("Perplexity with 95 % intervals", alt, svg(spec, values, 58 * len(sets)), table)


def memory(parts: list[dict]) -> Chart:
    """VRAM in its parts, in drawing order; `parts` are the rows of metrics/memory.csv."""
    names = list(dict.fromkeys(part["part"] for part in parts))
    bars = list(dict.fromkeys(part["bar"] for part in parts))
    values = [part | {"order": names.index(part["part"])} for part in parts]
    spec = {
        "mark": {"type": "bar", "height": 26},
        "encoding": {
            "x": {"field": "gb", "type": "quantitative", "title": "GB (10^9 bytes)"},
            "y": {"field": "bar", **BAND},
            "color": _coloured("part", names, COLOURS),
            "order": {"field": "order", "type": "quantitative"},
        },
    }
    words = "; ".join(
        f"{bar}: " + ", ".join(f"{p['part']} {p['gb']:.3g} GB" for p in parts if p["bar"] == bar)
        for bar in bars
    )
    rows = [[p["bar"], p["part"], f"{p['gb']:.4g}"] for p in parts]
    table = Table(["Bar", "Part", "GB"], rows)
    return Chart(
        "VRAM by part", f"Stacked bars. {words}.", svg(spec, values, 48 * len(bars)), table
    )


def lengths(histogram: list[dict]) -> Chart:
    """Training rows by length; `histogram` is metrics/lengths.csv with ranges such as 001-008."""
    values = []
    for line in histogram:
        low, high = map(int, line["tokens"].split("-"))
        values.append({"low": low, "high": high, "end": high + 1, "rows": int(line["rows"])})
    most = max(values, key=lambda v: v["rows"])
    alt = (
        f"Histogram of {sum(v['rows'] for v in values):,} rows of up to {values[-1]['high']} "
        f"tokens; most have {most['low']} to {most['high']} tokens ({most['rows']:,} rows)."
    )
    spec = {
        "mark": {"type": "bar", "binSpacing": 1, "fill": "var(--a)"},
        "encoding": {
            "x": {
                "field": "low",
                "type": "quantitative",
                "bin": "binned",
                "title": "tokens in the row",
                "scale": {"zero": False, "nice": False},
            },
            "x2": {"field": "end"},
            "y": {"field": "rows", "type": "quantitative", "title": "rows"},
        },
    }
    rows = [[f"{v['low']} to {v['high']}", str(v["rows"])] for v in values]
    return Chart("Rows by length", alt, svg(spec, values), Table(["Tokens", "Rows"], rows))

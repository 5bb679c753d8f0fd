"""The report's charts as SVG, drawn by Vega-Lite through its package: no script, no request.

Colours are CSS variables of stages/shared/page.css, so that one drawing serves light, dark and
print. Each chart brings its words (`alt`) and its numbers (a table) along.
"""

from itertools import pairwise

import vl_convert

from stages.shared.page import Chart, Table

VEGA_LITE = "6.4"
WIDTH, HEIGHT = 400, 210
TABLE_ROWS = 200
MEMORY_PARTS = {
    "weights_gb": "weights",
    "adapter_gb": "adapter",
    "optimizer_gb": "optimizer",
    "activations_gb": "activations",
    "logits_gb": "logits",
    "overhead_gb": "overhead",
}
COLOURS = ["var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)", "var(--f)"]
STYLE = {
    "background": None,
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
        },
        "legend": {
            "labelColor": "var(--ink)",
            "labelFontSize": 12,
            "title": None,
            "orient": "top",
            "columns": 3,
        },
        "range": {"category": COLOURS},
        "text": {"fill": "var(--ink)", "fontSize": 12},
    },
}


def svg(spec: dict, values: list[dict], height: int = HEIGHT) -> str:
    """`spec` over `values` as an SVG that scales to the width it is given."""
    size = {"width": WIDTH, "height": height, "data": {"values": values}}
    return vl_convert.vegalite_to_svg(STYLE | size | spec, vl_version=VEGA_LITE)


def _quantitative(name: str, title: str, **scale) -> dict:
    return {
        "field": name,
        "type": "quantitative",
        "title": title,
        "scale": {"zero": False, **scale},
        "axis": {"tickCount": 6},
    }


def _thinned(rows: list[list[str]], what: str) -> Table:
    every = -(-len(rows) // TABLE_ROWS)
    return Table([name.replace("_", " ") for name in what.split()], rows[::every] if rows else [])


def loss(curve: list[dict]) -> Chart:
    """Training and evaluation loss by step. `curve`: the lines of metrics/curve.csv as text."""
    names = {"loss": "training", "eval_loss": "evaluation"}
    values = [
        {"step": int(line["step"]), "loss": float(line[column]), "set": name}
        for column, name in names.items()
        for line in curve
        if line[column]
    ]
    train, held_out = ([v["loss"] for v in values if v["set"] == name] for name in names.values())
    alt = f"Line chart. Training loss goes from {train[0]:.3g} to {train[-1]:.3g}"
    alt += f" in {values[len(train) - 1]['step']} steps"
    if held_out:
        alt += f"; loss on held-out rows goes from {held_out[0]:.3g} to {held_out[-1]:.3g}"
    spec = {
        "encoding": {
            "x": _quantitative("step", "step", nice=False),
            "y": _quantitative("loss", "mean NLL per learned token"),
            "color": {
                "field": "set",
                "type": "nominal",
                "scale": {"domain": list(names.values())[: 1 + bool(held_out)]},
            },
        },
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 2}},
            {
                "mark": {"type": "point", "filled": True, "size": 40, "opacity": 1},
                "transform": [{"filter": "datum.set == 'evaluation'"}],
            },
        ],
    }
    rows = [[line["step"], line["loss"], line["eval_loss"]] for line in curve]
    return Chart("Loss", alt + ".", svg(spec, values), _thinned(rows, "step training evaluation"))


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
            "y": _quantitative("rate", "learning rate", zero=True)
            | {"axis": {"tickCount": 5, "format": "~g"}},
        },
    }
    rows = [[str(v["step"]), f"{v['rate']:.4g}"] for v in values]
    return Chart("Learning rate", alt, svg(spec, values), _thinned(rows, "step learning_rate"))


def perplexity(metrics: dict, prefixes: list[str]) -> Chart:
    """Base and tuned perplexity with their 95 % intervals, one line a set and model."""
    names = {"": "held-out rows", "group_": "held-out groups"}
    values, rows, words = [], [], []
    for prefix in prefixes:
        for who in ("base", "tuned"):
            key = f"{prefix}{who}_perplexity"
            point = [metrics[key], metrics[f"{key}_low"], metrics[f"{key}_high"]]
            values.append(
                {"set": f"{names[prefix]}, {who}", "who": who}
                | dict(zip(("value", "low", "high"), point, strict=True))
            )
            rows.append([f"{names[prefix]}, {who}", *(f"{v:.4g}" for v in point)])
            words.append(f"{names[prefix]}, {who} model: {point[0]:.4g}")
    y = {
        "field": "set",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelLimit": 200, "domain": False, "ticks": False, "labelPadding": 8},
    }
    x = _quantitative("value", "perplexity (logarithmic, lower is better)", type="log", nice=False)
    colour = {
        "field": "who",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": ["base", "tuned"], "range": ["var(--f)", "var(--a)"]},
    }
    spec = {
        "encoding": {"y": y, "color": colour},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.55},
                "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {"x": x},
            },
            {
                "mark": {"type": "text", "dy": -13},
                "encoding": {
                    "x": x,
                    "text": {"field": "value", "type": "quantitative", "format": ".3~g"},
                    "color": {"value": "var(--ink)"},
                },
            },
        ],
    }
    table = Table(["Set and model", "Perplexity", "Low", "High"], rows)
    alt = "Dots with 95 % intervals. Perplexity on " + "; on ".join(words) + "."
    return Chart("Perplexity with 95 % intervals", alt, svg(spec, values, 46 * len(rows)), table)


def memory(plan: dict, cost: dict) -> Chart:
    """Predicted VRAM in its parts, above the measured peaks where a GPU was used."""
    values = [
        {"bar": "predicted", "part": name, "gb": plan[key], "order": i}
        for i, (key, name) in enumerate(MEMORY_PARTS.items())
    ]
    parts = list(MEMORY_PARTS.values())
    measured = {"peak_vram_gb": "measured", "peak_vram_reserved_gb": "reserved"}
    for key, bar in measured.items():
        if key in cost:
            values.append({"bar": bar, "part": "measured", "gb": cost[key], "order": len(parts)})
    bars = list(dict.fromkeys(v["bar"] for v in values))
    domain = parts + ["measured"] * (len(bars) > 1)
    spec = {
        "mark": {"type": "bar", "height": 26},
        "encoding": {
            "x": {
                "field": "gb",
                "type": "quantitative",
                "title": "GB (10^9 bytes)",
                "axis": {"tickCount": 6},
            },
            "y": {
                "field": "bar",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"domain": False, "ticks": False, "labelPadding": 8},
            },
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": domain, "range": [*COLOURS, "var(--ink)"][: len(domain)]},
            },
            "order": {"field": "order", "type": "quantitative"},
        },
    }
    words = ", ".join(f"{v['part']} {v['gb']:.3g} GB" for v in values if v["bar"] == "predicted")
    alt = f"Stacked bar of the predicted VRAM: {words}."
    alt += "".join(
        f" {bar.capitalize()} peak: {cost[k]:.3g} GB." for k, bar in measured.items() if k in cost
    )
    rows = [[v["bar"], v["part"], f"{v['gb']:.4g}"] for v in values]
    return Chart(
        "VRAM by part", alt, svg(spec, values, 50 * len(bars)), Table(["Bar", "Part", "GB"], rows)
    )


def lengths(histogram: list[dict]) -> Chart:
    """Training rows by length in tokens. `histogram`: the lines of metrics/lengths.csv as text."""
    values = [{"tokens": int(line["tokens"]), "rows": int(line["rows"])} for line in histogram]
    most = max(values, key=lambda v: v["rows"])
    alt = (
        f"Histogram of {sum(v['rows'] for v in values):,} rows from {values[0]['tokens']} to "
        f"{values[-1]['tokens']} tokens; the most frequent length is {most['tokens']} tokens "
        f"({most['rows']:,} rows)."
    )
    step = min((b["tokens"] - a["tokens"] for a, b in pairwise(values)), default=1)
    for value in values:
        value["end"] = value["tokens"] + step
    spec = {
        "mark": {"type": "bar", "binSpacing": 1, "fill": "var(--a)"},
        "encoding": {
            "x": {
                "field": "tokens",
                "type": "quantitative",
                "bin": "binned",
                "title": "tokens in the row",
                "scale": {"zero": False, "nice": False},
            },
            "x2": {"field": "end"},
            "y": {"field": "rows", "type": "quantitative", "title": "rows"},
        },
    }
    rows = [[line["tokens"], line["rows"]] for line in histogram]
    return Chart("Rows by length", alt, svg(spec, values), Table(["Tokens", "Rows"], rows))

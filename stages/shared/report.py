"""What the report says: pure functions from the pipeline's results to blocks of a page.

The same sections become metrics/report.html, metrics/report.md and the model card.
"""

from dataclasses import dataclass

import yaml

from stages.shared import charts
from stages.shared.page import (
    Answers,
    Figures,
    Marked,
    Mono,
    Paragraph,
    Section,
    Table,
)

SET_NAMES = {"": "held-out rows", "group_": "held-out groups"}
GPU_SIZES_GB = (8, 12, 16, 24, 40, 48, 80)
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Results:
    """Everything export read. Metrics are flat mappings as in metrics/*.json."""

    params: dict
    data: dict
    plan: dict
    train: dict
    train_cost: dict
    eval: dict
    eval_cost: dict
    verify: dict
    prepared: dict
    data_source: dict
    model_source: dict
    curve: list[dict]
    lengths: list[dict]
    samples: list[dict]
    versions: dict
    release_gb: float


def number(value) -> str:
    """A value as a person reads it: whole numbers with commas, others with 4 digits."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return {None: "none", True: "yes", False: "no"}.get(value, value)
    if isinstance(value, int):
        return f"{value:,}"
    digits = f"{value:.4g}"
    return f"{value:,.0f}" if "e+" in digits else digits


def held_out_sets(results: Results) -> dict[str, str]:
    """Metric prefix and name of each set that was scored."""
    scored = SET_NAMES.items()
    return {prefix: name for prefix, name in scored if f"{prefix}tuned_perplexity" in results.eval}


def fitting_gpus(needed_gb: float) -> list[int]:
    """Which common cards (in GB as sold) hold `needed_gb` (10^9 bytes)."""
    return [size for size in GPU_SIZES_GB if size >= needed_gb]


def summary(results: Results) -> dict:
    """metrics/summary.json: the figures a reader wants first, under keys of their own.

    A key that another metrics file has too would put a path before both in `dvc exp show`.
    """
    figures = {}
    for prefix in held_out_sets(results):
        figures[f"{prefix}perplexity_before"] = results.eval[f"{prefix}base_perplexity"]
        figures[f"{prefix}perplexity_after"] = results.eval[f"{prefix}tuned_perplexity"]
    figures["merge_change_percent"] = results.verify["perplexity_change_percent"]
    figures["train_minutes"] = results.train_cost["train_seconds"] / 60
    cost = results.train_cost
    predicted = results.plan["predicted_peak_vram_gb"]
    if "peak_vram_gb" in cost:
        figures["vram_gb"] = cost["peak_vram_gb"]
        error = 100 * (predicted - cost["peak_vram_gb"]) / cost["peak_vram_gb"]
        figures["vram_prediction_error_percent"] = error
    else:
        figures["ram_gb"] = cost["peak_ram_gb"]
    figures["predicted_vram_gb"] = predicted
    fitting = fitting_gpus(results.plan["predicted_device_gb"])
    figures["fits_gpus"] = ", ".join(f"{size} GB" for size in fitting) or "none"
    return figures


def sections(results: Results) -> list[Section]:
    """The whole report, in the order of what a reader asks."""
    return [
        _result(results),
        _what(results),
        _quality(results),
        _samples(results),
        _training(results),
        _memory(results),
        _data(results),
        _merge(results),
        _cost(results),
        _parameters(results),
        _versions(results),
    ]


def _result(results: Results) -> Section:
    items = []
    for prefix, name in held_out_sets(results).items():
        before = results.eval[f"{prefix}base_perplexity"]
        after = results.eval[f"{prefix}tuned_perplexity"]
        items.append(
            (
                f"Perplexity on {name}",
                f"{number(before)} → {number(after)}",
                f"{results.eval[f'{prefix}eval_tokens']:,} tokens; lower is better",
            )
        )
    change = results.verify["perplexity_change_percent"]
    limit = results.params["verify"]["max_perplexity_change_percent"]
    items.append(("Merged model", f"{change:+.2g} %", f"change by merging; the limit is {limit} %"))
    minutes = results.train_cost["train_seconds"] / 60
    items.append(
        ("Training", f"{number(round(minutes, 1))} min", f"on {results.train_cost['device']}")
    )
    return Section("Result", [Figures(items)])


def _source_rows(kind: str, source: dict) -> list[list[str]]:
    rows = [
        [f"{kind}", Mono(source["id"])],
        [
            f"{kind}: from",
            {"hub": "Hugging Face Hub", "pypi": "PyPI", "local": "local"}[source["source"]],
        ],
    ]
    if source["revision"]:
        rows.append([f"{kind}: revision", Mono(source["revision"])])
    if source["commit"]:
        rows.append([f"{kind}: commit", Mono(source["commit"])])
    rows.append([f"{kind}: licence", source["license"] or "not stated"])
    return rows


def _what(results: Results) -> Section:
    lora, train = results.params["lora"], results.params["train"]
    prepared = results.prepared
    rows = _source_rows("Base model", results.model_source)
    rows += _source_rows("Data", results.data_source)
    rows += [
        ["Training rows", number(prepared["splits"]["train"]["rows"])],
        ["Method", _method(results)],
        ["Trainable parameters", number(results.train["trainable_params"])],
        ["Update scale (alpha / r)", number(lora["alpha"] / lora["r"])],
        ["Effective batch", number(train["batch_size"] * train["gradient_accumulation"])],
    ]
    for prefix, name in held_out_sets(results).items():
        key = f"{prefix}eval_set_sha256"
        rows.append([f"SHA-256 of the {name}", Mono(results.eval[key])])
    files = [
        [Mono(f"{kind}/{name}"), Mono(digest)]
        for kind, source in (("model", results.model_source), ("data", results.data_source))
        for name, digest in sorted(source["files"].items())
    ]
    return Section(
        "What was trained on what",
        [
            Table([], rows),
            Paragraph("Files as they were fetched:"),
            Table(["File", "SHA-256"], files),
        ],
    )


def _method(results: Results) -> str:
    quantize = results.params["quantize"]
    if quantize["type"] == "none":
        return "LoRA on the 16-bit base"
    double = " with double quantization" if quantize["double_quant"] else ""
    return f"QLoRA: LoRA on the base in {quantize['type'].upper()}{double}"


def _quality(results: Results) -> Section:
    rows = []
    for prefix, name in held_out_sets(results).items():
        for who in ("base", "tuned"):
            key = f"{prefix}{who}_perplexity"
            low, high = results.eval[f"{key}_low"], results.eval[f"{key}_high"]
            rows.append(
                [
                    f"{name}, {who}",
                    number(results.eval[key]),
                    f"{number(low)} to {number(high)}",
                    number(results.eval[f"{prefix}{who}_bits_per_byte"]),
                    number(results.eval[f"{prefix}eval_tokens"]),
                ]
            )
    table = Table(["Set and model", "Perplexity", "95 % interval", "Bits per byte", "Tokens"], rows)
    text = (
        "Perplexity is exp(mean negative log likelihood) of the learned tokens; the base and the "
        "tuned model score the same tokens. The interval is a bootstrap over rows. Held-out groups "
        "are whole groups that training never saw."
    )
    chart = charts.perplexity(results.eval, held_out_sets(results))
    return Section("Perplexity before and after", [Paragraph(text), chart, table])


def _samples(results: Results) -> Section:
    blocks = [
        Answers(
            f"{sample['set']}, {sample['row']}",
            [
                ("Prompt", _short(sample["prompt"])),
                ("Reference", _short(sample["reference"])),
                ("Base model", _short(sample["base"])),
                ("Tuned model", _short(sample["tuned"])),
            ],
        )
        for sample in results.samples
    ]
    if not blocks:
        blocks = [Paragraph("None were asked for (evaluate.samples is 0).")]
    return Section("Answers to held-out prompts", blocks)


def _short(text: str) -> str:
    cut = len(text) - SHOWN_CHARACTERS
    return text if cut <= 0 else f"{text[:SHOWN_CHARACTERS]} … ({cut:,} more characters)"


def _training(results: Results) -> Section:
    rows = [
        ["Steps", number(results.train["steps"])],
        ["Tokens", number(results.train["tokens"])],
        ["Training loss at the end", number(results.train["train_loss"])],
    ]
    return Section(
        "Training",
        [charts.loss(results.curve), charts.learning_rate(results.curve), Table([], rows)],
    )


def _memory(results: Results) -> Section:
    plan, cost = results.plan, results.train_cost
    rows = [[name, number(plan[key])] for key, name in charts.MEMORY_PARTS.items()]
    rows.append(["predicted peak", number(plan["predicted_peak_vram_gb"])])
    rows.append(["predicted need of the card", number(plan["predicted_device_gb"])])
    if "peak_vram_gb" in cost:
        rows.append(["measured peak", number(cost["peak_vram_gb"])])
        rows.append(["measured peak, reserved", number(cost["peak_vram_reserved_gb"])])
        text = "Training ran on a GPU: predicted parts beside what was measured."
    else:
        rows.append(["measured peak of RAM (not VRAM)", number(cost["peak_ram_gb"])])
        text = "Training ran on the CPU: VRAM is a prediction, and only RAM was measured."
    fitting = fitting_gpus(plan["predicted_device_gb"])
    fits = [[f"{s} GB", "fits" if s in fitting else "does not fit"] for s in GPU_SIZES_GB]
    return Section(
        "Memory",
        [
            Paragraph(text),
            charts.memory(plan, cost),
            Table(["Part", "GB (10^9 bytes)"], rows),
            Paragraph("Cards that hold the predicted need:"),
            Table(["Card", "Fits"], fits),
        ],
    )


def _data(results: Results) -> Section:
    rows = [[key.replace("_", " "), number(value)] for key, value in results.data.items()]
    sample = results.prepared["sample"]
    return Section(
        "Data",
        [
            Table([], rows),
            charts.lengths(results.lengths),
            Paragraph(f"One training row ({sample['row']}) ; what is learned is marked:"),
            Marked([tuple(piece) for piece in sample["pieces"]]),
        ],
    )


def _merge(results: Results) -> Section:
    rows = [[key.replace("_", " "), number(value)] for key, value in results.verify.items()]
    merge = results.params["merge"]
    text = (
        f"The adapter was added to the {merge['base']} base and stored as {merge['dtype']}. "
        "The merged model was then held against the base with its adapter on the same tokens."
    )
    return Section("Verification of the merged model", [Paragraph(text), Table([], rows)])


def _cost(results: Results) -> Section:
    keys = dict.fromkeys([*results.train_cost, *results.eval_cost])
    rows = [
        [
            key.replace("_", " "),
            number(results.train_cost.get(key, "")),
            number(results.eval_cost.get(key, "")),
        ]
        for key in keys
    ]
    release = Paragraph(f"The released model takes {number(results.release_gb)} GB on disk.")
    return Section("Cost", [Table(["", "Training", "Evaluation"], rows), release])


def _parameters(results: Results) -> Section:
    rows = []
    for section, values in results.params.items():
        items = values.items() if isinstance(values, dict) else [(None, values)]
        for key, value in items:
            shown = yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]
            rows.append([Mono(f"{section}.{key}" if key else section), shown])
    return Section("Every parameter", [Table(["Parameter", "Value"], rows)])


def _versions(results: Results) -> Section:
    rows = [[name, Mono(version)] for name, version in results.versions.items()]
    return Section("Versions", [Table([], rows)])

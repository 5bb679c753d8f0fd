"""What the report says: pure functions from the pipeline's results to blocks of a page.

The same sections become metrics/report.html, metrics/report.md and the model card.
"""

from dataclasses import dataclass

import yaml

from stages.reporting import charts
from stages.reporting.page import (
    Answers,
    Figures,
    Marked,
    Mono,
    Paragraph,
    Section,
    Table,
)
from stages.shared.outputs import GB
from stages.shared.vram import CARDS_GB, fitting_cards

SET_NAMES = {"": "held-out rows", "group_": "held-out groups"}
MEMORY_PARTS = ("weights", "adapter", "optimizer", "activations", "logits", "overhead")
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Results:
    """Everything export read. Metrics are flat mappings as in metrics/*.json.

    `train`, `train_cost` and `curve` are empty where the adapter was trained elsewhere.
    """

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


def title(results: Results) -> str:
    if results.train:
        return f"{results.model_source['id']} tuned on {results.data_source['id']}"
    return f"{results.model_source['id']} with an adapter from elsewhere"


def summary(results: Results) -> dict:
    """metrics/summary.json: the figures a reader wants first, under keys of their own.

    A key that another metrics file has too would put a path before both in `dvc exp show`.
    """
    figures = {}
    for prefix in held_out_sets(results):
        figures[f"{prefix}perplexity_before"] = results.eval[f"{prefix}base_perplexity"]
        figures[f"{prefix}perplexity_after"] = results.eval[f"{prefix}tuned_perplexity"]
    figures["merge_change_percent"] = results.verify["perplexity_change_percent"]
    if not results.train:
        return figures
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
    fitting = fitting_cards(results.plan["predicted_device_gb"] * GB)
    figures["fits_gpus"] = ", ".join(f"{size} GB" for size in fitting) or "none"
    return figures


def memory_parts(plan: dict, cost: dict) -> list[dict]:
    """metrics/memory.csv: what the card must hold, part by part, and what a GPU run measured."""
    parts = [{"bar": "predicted", "part": part, "gb": plan[f"{part}_gb"]} for part in MEMORY_PARTS]
    if "peak_vram_gb" in cost:
        allocated, reserved = cost["peak_vram_gb"], cost["peak_vram_reserved_gb"]
        parts.append({"bar": "measured", "part": "allocated", "gb": allocated})
        rest = max(0.0, reserved - allocated)
        parts.append({"bar": "measured", "part": "reserved beyond it", "gb": rest})
    return parts


def sections(results: Results) -> list[Section]:
    """The whole report, in the order of what a reader asks."""
    return [
        _result(results),
        _what(results),
        _quality(results),
        *([_training(results), _memory(results)] if results.train else []),
        _data(results),
        _samples(results),
        _merge(results),
        _cost(results),
        _parameters(results),
        _hashes(results),
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
    if results.train:
        minutes = f"{number(round(results.train_cost['train_seconds'] / 60, 1))} min"
        items.append(("Training", minutes, f"on {results.train_cost['device']}"))
    return Section("Result", [Figures(items)])


def _sources(model: dict, data: dict) -> Table:
    places = {"hub": "Hugging Face Hub", "pypi": "PyPI", "local": "a local folder or file"}
    rows = [
        ["Id", *(Mono(source["id"]) for source in (model, data))],
        ["From", *(places[source["source"]] for source in (model, data))],
        ["Revision", *(Mono(source["revision"] or "none") for source in (model, data))],
        ["Commit", *(Mono(source["commit"] or "none") for source in (model, data))],
        ["Licence", *(source["license"] or "not stated" for source in (model, data))],
    ]
    return Table(["", "Base model", "Data"], rows)


def _what(results: Results) -> Section:
    sources = _sources(results.model_source, results.data_source)
    if not results.train:
        text = (
            "The adapter was not trained by this pipeline but put into models/adapter: on what, "
            "and whether on the rows below, is not known here. plan, lora and train among the "
            "parameters do not describe it."
        )
        return Section("What was evaluated on what", [Paragraph(text), sources])
    lora, train = results.params["lora"], results.params["train"]
    settings = [
        ["Method", _method(results)],
        ["Training rows", number(results.prepared["splits"]["train"]["rows"])],
        ["Trainable parameters", number(results.train["trainable_params"])],
        ["Update scale (alpha / r)", number(lora["alpha"] / lora["r"])],
        ["Effective batch", number(train["batch_size"] * train["gradient_accumulation"])],
    ]
    return Section("What was trained on what", [sources, Table([], settings)])


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
        "tuned model score the same tokens. The interval is a bootstrap over rows."
    )
    if "group_" in held_out_sets(results) and results.train:
        text += " Held-out groups are whole groups of rows that training never saw."
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
    """At most SHOWN_CHARACTERS of an answer: a base model may go on for ever, or write nothing."""
    text = text.rstrip()
    cut = len(text) - SHOWN_CHARACTERS
    if cut > 0:
        return f"{text[:SHOWN_CHARACTERS]} … ({cut:,} more characters)"
    return text or "(only white space)"


def _training(results: Results) -> Section:
    rows = [
        ["Steps", number(results.train["steps"])],
        ["Tokens", number(results.train["tokens"])],
        ["Mean training loss", number(results.train["train_loss"])],
    ]
    return Section(
        "Training",
        [charts.loss(results.curve), charts.learning_rate(results.curve), Table([], rows)],
    )


def _memory(results: Results) -> Section:
    plan, cost = results.plan, results.train_cost
    head = ["GB (10^9 bytes)", "Predicted"]
    rows = [[part, number(plan[f"{part}_gb"])] for part in MEMORY_PARTS]
    rows.append(["peak of training", number(plan["predicted_peak_vram_gb"])])
    rows.append(["needed on the card", number(plan["predicted_device_gb"])])
    if "peak_vram_gb" in cost:
        head.append("Measured")
        measured = {
            "weights": results.eval_cost["weights_vram_gb"],
            "peak of training": cost["peak_vram_gb"],
            "needed on the card": cost["peak_vram_reserved_gb"],
        }
        rows = [[*row, number(measured.get(row[0], ""))] for row in rows]
        text = (
            f"Training ran on a GPU ({cost['device']}). Measured are the peak that torch allocated "
            "and, in the last line, reserved; the CUDA context comes on top of the latter."
        )
    else:
        text = (
            "Training ran on the CPU, so VRAM is a prediction for a GPU and only RAM was measured: "
            f"{number(cost['peak_ram_gb'])} GB at its peak."
        )
    fitting = fitting_cards(plan["predicted_device_gb"] * GB)
    fits = ["This run", *("fits" if size in fitting else "does not fit" for size in CARDS_GB)]
    methods = {"Full fine-tuning": "full_finetune_gb", "LoRA": "lora_gb", "QLoRA": "qlora_gb"}
    return Section(
        "Memory",
        [
            Paragraph(text),
            charts.memory(memory_parts(plan, cost)),
            Table(head, rows),
            Table(["Card", *(f"{size} GB" for size in CARDS_GB)], [fits]),
            Table(
                ["The same rows by", "Predicted GB"],
                [[name, number(plan[key])] for name, key in methods.items()],
            ),
        ],
    )


def _data(results: Results) -> Section:
    prepared = results.prepared
    counts = [
        [{"train": "training", "eval": "held-out rows", "group": "held-out groups"}[name]]
        + [number(values[key]) for key in ("rows", "tokens", "learned_tokens")]
        for name, values in prepared["splits"].items()
    ]
    contract = [[key.replace("_", " "), number(value)] for key, value in results.data.items()]
    sample = prepared["sample"]
    text = f"One training row ({sample['row']}) as the model sees it; what is learned is marked:"
    return Section(
        "Data",
        [
            Paragraph(
                f"Rows were read as {prepared['format']} and rendered with the template "
                f"{prepared['template']}; loss is on: {prepared['loss_on']}."
            ),
            Table(["Set", "Rows", "Tokens", "Learned tokens"], counts),
            charts.lengths(results.lengths),
            Paragraph("The data contract:"),
            Table([], contract),
            Paragraph(text),
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


def _hashes(results: Results) -> Section:
    sources = {"Base model": results.model_source, "Data": results.data_source}
    rows = [
        [f"{kind}: {name}", Mono(digest)]
        for kind, source in sources.items()
        for name, digest in sorted(source["files"].items())
    ]
    rows += [
        [f"Scored tokens: {name}", Mono(results.eval[f"{prefix}eval_set_sha256"])]
        for prefix, name in held_out_sets(results).items()
    ]
    return Section("Hashes", [Table(["File as fetched, or set as scored", "SHA-256"], rows)])


def _versions(results: Results) -> Section:
    rows = [[name, Mono(version)] for name, version in results.versions.items()]
    return Section("Versions", [Table([], rows)])

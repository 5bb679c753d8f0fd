"""Sections of the report on provenance: sources, settings, hashes and versions."""

import yaml

from stages.reporting.page import Mono, Paragraph, Section, Table, facts
from stages.reporting.results import Results, data_sources, scored_sets, source_name
from stages.shared.provenance import made_with


def what(results: Results) -> Section:
    named = _named(results)
    if results.retention_source:
        named["Text of another domain"] = results.retention_source
    sources = _sources(named)
    if not results.train:
        text = (
            "The adapter was not trained by this pipeline but put into models/adapter. What it was "
            "trained on, possibly the rows below, is unknown; the parameters of plan, lora and "
            "train do not describe it."
        )
        return Section("What was evaluated on what", [Paragraph(text), sources])
    lora, train = results.params["lora"], results.params["train"]
    root = lora["scaling"] == "rslora"
    scale = "alpha / sqrt(r)" if root else "alpha / r"
    settings = {
        "Method": _method(results.params["quantize"]),
        "Training rows": results.prepared["splits"]["train"]["rows"],
        "Trainable parameters": results.train["trainable_params"],
        f"Update scale ({scale})": lora["alpha"] / lora["r"] ** (0.5 if root else 1),
        "Effective batch": train["batch_size"] * train["gradient_accumulation"],
    }
    return Section("What was trained on what", [sources, facts(settings)])


def _named(results: Results) -> dict[str, dict]:
    """Display name -> source, for the model and its data."""
    data = {source_name(prefix): source for prefix, source in data_sources(results).items()}
    return {"Base model": results.model_source} | data


def _sources(named: dict[str, dict]) -> Table:
    places = {"hub": "Hugging Face Hub", "pypi": "PyPI", "local": "a local folder or file"}
    sources = named.values()
    rows = [
        ["Id", *(Mono(source["id"]) for source in sources)],
        ["From", *(places[source["source"]] for source in sources)],
        ["Revision", *(Mono(source["revision"] or "none") for source in sources)],
        ["Commit", *(Mono(source["commit"] or "none") for source in sources)],
        ["Licence", *(source["license"] or "not stated" for source in sources)],
    ]
    return Table(["", *named], rows)


def _method(quantize: dict) -> str:
    if quantize["type"] == "none":
        return "LoRA on the 16-bit base"
    double = " with double quantization" if quantize["double_quant"] else ""
    return f"QLoRA: LoRA on the base in {quantize['type'].upper()}{double}"


def parameters(params: dict) -> Section:
    rows = []
    for section, values in params.items():
        items = values.items() if isinstance(values, dict) else [(None, values)]
        for key, value in items:
            shown = yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]
            rows.append([Mono(f"{section}.{key}" if key else section), shown])
    return Section("Every parameter", [Table(["Parameter", "Value"], rows)])


def hashes(results: Results) -> Section:
    rows = [
        [f"{kind}: {name}", Mono(digest)]
        for kind, source in _named(results).items()
        for name, digest in sorted(source["files"].items())
    ]
    rows += [
        [f"Scored tokens: {name}", Mono(results.eval[f"{prefix}eval_set_sha256"])]
        for prefix, name in scored_sets(results).items()
    ]
    if (digest := results.eval.get("retention_eval_set_sha256")) is not None:
        rows.append(["Scored tokens: text of another domain", Mono(digest)])
    return Section("Hashes", [Table(["File as fetched, or set as scored", "SHA-256"], rows)])


def environment(costs: dict[str, dict]) -> Section:
    """The machine and versions that each stage recorded."""
    found = {stage: made_with(cost) for stage, cost in costs.items() if cost}
    keys = dict.fromkeys(key for facts in found.values() for key in facts)
    rows = [
        [key.removesuffix("_version").replace("_", " ")]
        + [Mono(str(facts.get(key, ""))) for facts in found.values()]
        for key in keys
    ]
    return Section("Made with", [Table(["", *found], rows)])

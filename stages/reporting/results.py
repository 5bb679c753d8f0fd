"""The report's inputs, and figures computed from them."""

from dataclasses import dataclass

from stages.shared.sets import held_out, set_name, stem_of

MEMORY_PARTS = ("weights", "adapter", "optimizer", "activations", "logits", "overhead")


@dataclass(frozen=True)
class Results:
    """Everything export read. Metrics are flat mappings as in metrics/*.json.

    `train`, `train_cost` and `curve` are empty if the adapter was trained elsewhere, `answers` if
    evaluate.samples is 0, `retention_source` if params.yaml has none. `made_with` maps the stages
    that compute to their metrics/*_cost.json.
    """

    params: dict
    data: dict
    plan: dict
    train: dict
    train_cost: dict
    answers: dict
    eval: dict
    eval_cost: dict
    verify: dict
    prepared: dict
    data_source: dict
    model_source: dict
    retention_source: dict
    curve: list[dict]
    lengths: list[dict]
    samples: list[dict]
    made_with: dict[str, dict]
    release_gb: float
    model_type: str = ""  # of the merged model's config.json


def scored_sets(results: Results) -> dict[str, str]:
    """Metric prefix -> name of each scored set."""
    keys = [key.removesuffix("tuned_perplexity") for key in results.eval]
    scored = held_out([stem_of(key) for key in keys])
    return {prefix: set_name(stem_of(prefix)) for prefix in scored}


def main_measure(results: Results) -> str:
    """The measure that decides whether an answer is right: the user's first, or exact_match."""
    return next(iter(results.params["evaluate"]["measures"]), "exact_match")


def data_sources(results: Results) -> dict[str, dict]:
    """Metric prefix -> source, for the data set and those in dataset.mix."""
    mixed = results.data_source.get("mix", [])
    return {"": results.data_source} | {f"source_{i}_": each for i, each in enumerate(mixed, 1)}


def source_name(prefix: str) -> str:
    return f"Data, {prefix.replace('_', ' ').strip()}" if prefix else "Data"


def title(results: Results) -> str:
    if results.train:
        ids = dict.fromkeys(source["id"] for source in data_sources(results).values())
        return f"{results.model_source['id']} tuned on {' and '.join(ids)}"
    return f"{results.model_source['id']} with an adapter from elsewhere"


def summary(results: Results) -> dict:
    """metrics/summary.json: headline figures, under keys that no other metrics file has.

    For keys that two files share, `dvc exp show` prefixes both with their paths.
    """
    figures = {}
    measure, forgetting = main_measure(results), "retention_perplexity_change_percent"
    for prefix in scored_sets(results):
        for who, when in (("base", "before"), ("tuned", "after")):
            if (key := f"{prefix}{who}_{measure}") in results.answers:
                figures[f"{prefix}{measure}_{when}"] = results.answers[key]
    if forgetting in results.eval:
        figures["retention_change_percent"] = results.eval[forgetting]
    for prefix in scored_sets(results):
        figures[f"{prefix}perplexity_before"] = results.eval[f"{prefix}base_perplexity"]
        figures[f"{prefix}perplexity_after"] = results.eval[f"{prefix}tuned_perplexity"]
    figures["merge_change_percent"] = results.verify["perplexity_change_percent"]
    if not results.train:
        return figures
    cost = results.train_cost
    # On a GPU for the actual placement, else the least that a card needs.
    predicted = (cost if "peak_vram_gb" in cost else results.plan)["predicted_peak_vram_gb"]
    figures["train_minutes"] = cost["train_seconds"] / 60
    if measured := cost.get("peak_vram_gb"):
        figures["vram_gb"] = measured
        figures["vram_prediction_error_percent"] = 100 * (predicted - measured) / measured
    else:
        figures["ram_gb"] = cost["peak_ram_gb"]
    figures["predicted_vram_gb"] = predicted
    fitting = [card["card_gb"] for card in results.plan["cards"] if card["placed"]]
    figures["fits_gpus"] = ", ".join(f"{size} GB" for size in fitting) or "none"
    return figures


def memory_parts(plan: dict, cost: dict) -> list[dict]:
    """metrics/memory.csv: predicted GPU memory by part, and the measured peak of a GPU run."""
    parts = [{"bar": "predicted", "part": part, "gb": plan[f"{part}_gb"]} for part in MEMORY_PARTS]
    if "peak_vram_gb" in cost:
        allocated, reserved = cost["peak_vram_gb"], cost["peak_vram_reserved_gb"]
        parts.append({"bar": "measured", "part": "allocated", "gb": allocated})
        rest = max(0.0, reserved - allocated)
        parts.append({"bar": "measured", "part": "reserved beyond it", "gb": rest})
    return parts

"""The summary that prepare prints: where all rows went."""

from stages.shared.mix import sources_of
from stages.shared.params import Dataset, Prepare
from stages.shared.sets import SET_NAMES

# Why a row is in no set: the metrics' name and a description.
UNUSED = {
    "beyond_train_rows": "beyond train_rows",
    "beyond_eval_rows": "beyond eval_rows",
    "margin": "in the margin between held-out and training",
}
# Metrics that the summary shows of each source, if there are several.
PER_SOURCE = (
    "train_examples",
    "train_share_percent",
    "train_tokens",
    "eval_examples",
    "asked_before_examples",
)


def summary(metrics: dict, params: Prepare, dataset: Dataset) -> str:
    counts = {called: metrics.get(f"{name}_examples") for name, called in SET_NAMES.items()}
    kept = [f"{called} {count:,}" for called, count in counts.items() if count]
    unused = {said: metrics[f"unused_{name}_examples"] for name, said in UNUSED.items()}
    reasons = ", ".join(f"{count:,} {said}" for said, count in unused.items() if count)
    reasons = f" ({reasons})" if reasons else ""
    said = (
        f"prepare: {metrics['rows_in']:,} rows: {', '.join(kept)}; dropped "
        f"{metrics['dropped_examples']:,}, duplicates {metrics['duplicate_examples']:,}, "
        f"unused {metrics['unused_examples']:,}{reasons}; {metrics['train_tokens']:,} tokens to "
        f"train on, {metrics['learned_token_share_percent']:.0f} % of them learned"
    )
    if metrics["eval_examples"] < params.eval_rows and not params.eval_file:
        said += (
            f"\nprepare: too few rows to hold out {params.eval_rows} (prepare.eval_rows); half of "
            "them stay in training, and some are in no set, so that adding rows moves no others"
        )
    if metrics.get("validation_examples", 0) < params.validation_rows:
        said += (
            f"\nprepare: too few rows to validate on {params.validation_rows} "
            "(prepare.validation_rows); half of those not held out stay in training"
        )
    for number, source in enumerate(sources_of(dataset).values() if dataset.mix else []):
        of = {key: metrics[f"source_{number}_{key}"] for key in PER_SOURCE}
        said += (
            f"\nprepare: source {number}, {source.id}: training {of['train_examples']:,} rows "
            f"({of['train_share_percent']:.3g} %) of {of['train_tokens']:,} tokens, held out "
            f"{of['eval_examples']:,}, prompts of an earlier source "
            f"{of['asked_before_examples']:,}"
        )
    return said

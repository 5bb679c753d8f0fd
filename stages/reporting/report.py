"""The report's content: pure functions from the pipeline's results to blocks of a page.

The same sections become metrics/report.html, metrics/report.md and, where public, the model card.
"""

from stages.reporting import charts, provenance
from stages.reporting.page import (
    Answers,
    Block,
    Figures,
    Filtered,
    Marked,
    Paragraph,
    Section,
    Table,
    facts,
    number,
)
from stages.reporting.results import (
    MEMORY_PARTS,
    Results,
    main_measure,
    memory_parts,
    scored_sets,
)
from stages.shared.provenance import made_with
from stages.shared.sets import set_name

SHOWN_CHARACTERS = 2000
MEASURES = {
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF2 (of 100)",
    "json_valid": "valid JSON",
    "answer_tokens": "tokens of the answer",
    "ended": "with an end token",
}
# An answer counts as right if its first measure exceeds this.
RIGHT = 0.5
# (base right, tuned right) -> name of the group; regressions first.
OUTCOMES = {
    (True, False): "base right, tuned wrong",
    (False, True): "base wrong, tuned right",
    (False, False): "both wrong",
    (True, True): "both right",
}
WARNING = Paragraph(
    "This page contains rows of the data, model answers and paths of this machine. Share it only "
    "with people who may see them; the model card in models/release is meant for everybody."
)


def report(results: Results) -> list[Section]:
    """The whole report, with the notice that it is not public."""
    first, *others = sections(results)
    return [Section(first.title, [WARNING, *first.blocks]), *others]


def sections(results: Results, rows: bool = True) -> list[Section]:
    """All sections in reading order; with `rows` False, without rows of the data."""
    return [
        _result(results),
        provenance.what(results),
        *([_task(results)] if results.answers else []),
        *([_forgotten(results)] if "retention_tuned_perplexity" in results.eval else []),
        _quality(results),
        *([_training(results), _memory(results)] if results.train else []),
        _data(results, rows),
        *([_samples(results)] if rows else []),
        _merge(results),
        _cost(results),
        provenance.parameters(results.params),
        provenance.hashes(results),
        provenance.environment(results.made_with),
    ]


def _result(results: Results) -> Section:
    items = []
    measure = main_measure(results)
    for prefix, name in scored_sets(results).items():
        if (key := f"{prefix}tuned_{measure}") not in results.answers:
            continue
        before, after = results.answers[f"{prefix}base_{measure}"], results.answers[key]
        p = _p(results.answers[f"{prefix}{measure}_p_value"])
        note = f"{results.answers[f'{prefix}answered_rows']} answers, {p}; higher is better"
        title = f"{_measure(measure).capitalize()} on {name}"
        items.append((title, f"{number(before)} → {number(after)}", note))
    if (forgotten := results.eval.get("retention_perplexity_change_percent")) is not None:
        note = "perplexity change on text of another domain; lower is better"
        items.append(("Forgotten", f"{forgotten:+.3g} %", note))
    for prefix, name in scored_sets(results).items():
        before, after = (results.eval[f"{prefix}{who}_perplexity"] for who in ("base", "tuned"))
        note = f"{results.eval[f'{prefix}eval_tokens']:,} tokens; lower is better"
        items.append((f"Perplexity on {name}", f"{number(before)} → {number(after)}", note))
    change = results.verify["perplexity_change_percent"]
    limit = results.params["verify"]["max_perplexity_change_percent"]
    note = f"perplexity change by merging; the limit is {limit} %"
    items.append(("Merged model", f"{change:+.2g} %", note))
    if results.train:
        minutes = f"{number(round(results.train_cost['train_seconds'] / 60, 1))} min"
        items.append(("Training", minutes, f"on {results.train_cost['device']}"))
    return Section("Result", [Figures(items)])


def _measure(name: str) -> str:
    return MEASURES.get(name, name.replace("_", " "))


def _p(value: float) -> str:
    return "p < 0.01" if value < 0.01 else f"p = {value:.2g}"


def _task(results: Results) -> Section:
    """Each measure of the answers, base and tuned side by side."""
    found, rows = results.answers, []
    for prefix, name in scored_sets(results).items():
        names = [
            key.removeprefix(f"{prefix}tuned_")
            for key in found
            if key.startswith(f"{prefix}tuned_") and not key.endswith(("_low", "_high"))
        ]
        for measure in names:
            values = []
            for who in ("base", "tuned"):
                key = f"{prefix}{who}_{measure}"
                low, high = number(found[f"{key}_low"]), number(found[f"{key}_high"])
                values.append(f"{number(found[key])} ({low} to {high})")
            p = _p(found[f"{prefix}{measure}_p_value"])
            count = found.get(f"{prefix}{measure}_rows", found[f"{prefix}answered_rows"])
            rows.append([name, _measure(measure), *values, p, number(count)])
    text = (
        "Greedy answers of the base and the tuned model to the same held-out prompts, of at most "
        f"{results.params['evaluate']['max_answer_tokens']} tokens. Means over rows, with 95 % "
        "bootstrap intervals; p is from a paired bootstrap of base against tuned."
    )
    table = Table(["Set", "Measure", "Base", "Tuned", "p", "Rows"], rows)
    return Section("Answers scored", [Paragraph(text), table])


def _forgotten(results: Results) -> Section:
    found, prefix = results.eval, "retention_"
    rows = [
        [
            who,
            number(found[key]),
            f"{number(found[f'{key}_low'])} to {number(found[f'{key}_high'])}",
        ]
        for who in ("base", "tuned")
        for key in [f"{prefix}{who}_perplexity"]
    ]
    change = found[f"{prefix}perplexity_change_percent"]
    text = (
        f"The perplexity on {results.retention_source['id']}, text unrelated to the task, "
        f"changed by {change:+.3g} % ({_p(found[f'{prefix}perplexity_p_value'])}, "
        f"{found[f'{prefix}eval_tokens']:,} tokens). A rise means that the model forgot."
    )
    table = Table(["Model", "Perplexity", "95 % interval"], rows)
    return Section("What was forgotten", [Paragraph(text), table])


def _quality(results: Results) -> Section:
    sets, found, rows = scored_sets(results), results.eval, []
    for prefix, name in sets.items():
        for who in ("base", "tuned"):
            key = f"{prefix}{who}_perplexity"
            interval = f"{number(found[f'{key}_low'])} to {number(found[f'{key}_high'])}"
            rest = (found[f"{prefix}{who}_bits_per_byte"], found[f"{prefix}eval_tokens"])
            rows.append([f"{name}, {who}", number(found[key]), interval, *map(number, rest)])
    table = Table(["Set and model", "Perplexity", "95 % interval", "Bits per byte", "Tokens"], rows)
    text = (
        "Perplexity is exp(mean negative log-likelihood) of the learned tokens; base and tuned "
        "model score the same tokens. Intervals are bootstrapped over rows."
    )
    if "group_" in sets and results.train:
        text += " Held-out groups are whole groups of rows that were not trained on."
    chart = charts.perplexity(found, sets)
    return Section("Perplexity before and after", [Paragraph(text), chart, table])


def _training(results: Results) -> Section:
    curves = [charts.loss(results.curve), charts.learning_rate(results.curve)]
    names = {
        "steps": "Steps",
        "tokens": "Tokens",
        "train_loss": "Mean training loss",
        "kept_step": "Step of the kept state",
        "kept_because": "Reason",
        "best_validation_loss": "Lowest validation loss",
        "last_validation_loss": "Validation loss of the last state",
    }
    found = {name: results.train[key] for key, name in names.items() if key in results.train}
    numbers = facts(found)
    return Section("Training", [*curves, numbers])


def _memory(results: Results) -> Section:
    plan, cost = results.plan, results.train_cost
    if "peak_vram_gb" in cost:
        text = (
            f"Training ran on a GPU ({cost['device']}), with the weights of "
            f"{cost['streamed_layers']} layers streamed from host memory, those of "
            f"{cost['dense_layers']} kept in 16 bit, and the activations of "
            f"{cost['kept_mlp_layers']} MLP and {cost['kept_attention_layers']} attention blocks "
            "kept. The predicted peak is for this placement; the parts are those of the smallest "
            "placement with all weights on the card. Measured are the peak that torch allocated "
            "and, in the last line, reserved; the CUDA context comes on top of the latter."
        )
    else:
        text = (
            "Training ran on the CPU, so VRAM is a prediction for a GPU. The measured peak of RAM "
            f"is {number(cost['peak_ram_gb'])} GB."
        )
    cards = {f"{card['card_gb']} GB": _fits(card["placed"]) for card in plan["cards"]}
    methods = {"Full fine-tuning": "full_finetune_gb", "LoRA": "lora_gb", "QLoRA": "qlora_gb"}
    by_method = [[name, number(plan[key])] for name, key in methods.items()]
    return Section(
        "Memory",
        [
            Paragraph(text),
            charts.memory(memory_parts(plan, cost)),
            _memory_table(plan, cost, results.eval_cost),
            Table(["Card", *cards], [["This run", *cards.values()]]),
            Table(["The same rows by", "Predicted GB"], by_method),
        ],
    )


def _fits(placed: dict | None) -> str:
    """The plan for one size of card, in words."""
    if placed is None:
        return "does not fit"
    return "fits, streamed" if placed["streamed_layers"] else "fits"


def _memory_table(plan: dict, cost: dict, eval_cost: dict) -> Table:
    head = ["GB (10^9 bytes)", "Predicted"]
    rows = [[part, number(plan[f"{part}_gb"])] for part in MEMORY_PARTS]
    # For the actual placement, if known.
    predicted = cost if "peak_vram_gb" in cost else plan
    rows.append(["peak of training", number(predicted["predicted_peak_vram_gb"])])
    rows.append(["needed on the card", number(predicted["predicted_device_gb"])])
    if "peak_vram_gb" in cost:
        head.append("Measured")
        measured = {
            "weights": eval_cost["weights_vram_gb"],
            "peak of training": cost["peak_vram_gb"],
            "needed on the card": cost["peak_vram_reserved_gb"],
        }
        rows = [[*row, number(measured.get(row[0], ""))] for row in rows]
    return Table(head, rows)


def _data(results: Results, rows: bool) -> Section:
    prepared, sample = results.prepared, results.prepared["sample"]
    counts = [
        [set_name(name), *(number(values[key]) for key in ("rows", "tokens", "learned_tokens"))]
        for name, values in prepared["splits"].items()
    ]
    text = (
        f"Rows were read as {prepared['format']} and rendered with the template "
        f"{prepared['template']}; the loss is on: {prepared['loss_on']}."
    )
    blocks: list[Block] = [
        Paragraph(text),
        Table(["Set", "Rows", "Tokens", "Learned tokens"], counts),
        charts.lengths(results.lengths),
        Paragraph("The data contract:"),
        facts(results.data),
    ]
    if rows:
        shown = f"One training row ({sample['row']}) as the model sees it; what is learned is "
        pieces = Marked([tuple(piece) for piece in sample["pieces"]])
        blocks += [Paragraph(f"{shown}marked:"), pieces]
    return Section("Data", blocks)


def _samples(results: Results) -> Section:
    who = {"prompt": "Prompt", "reference": "Reference"}
    who |= {"base": "Base model", "tuned": "Tuned model"}
    measure = main_measure(results)
    groups: dict[str, list[Answers]] = {name: [] for name in OUTCOMES.values()}
    for sample in results.samples:
        texts = [(name, _short(sample[key])) for key, name in who.items()]
        right = [sample[f"{model}_scores"][measure] > RIGHT for model in ("base", "tuned")]
        title = f"{sample['set']}, {sample['row']}"
        groups[OUTCOMES[right[0], right[1]]].append(Answers(title, texts))
    if not results.samples:
        blocks: list[Block] = [Paragraph("None: evaluate.samples is 0.")]
    else:
        text = f"An answer counts as right if its {_measure(measure)} exceeds {RIGHT}."
        blocks = [Paragraph(text), Filtered(list(groups.items()))]
    return Section("Answers to held-out prompts", blocks)


def _short(text: str) -> str:
    """At most SHOWN_CHARACTERS of an answer, which may be very long or empty."""
    text = text.rstrip()
    cut = len(text) - SHOWN_CHARACTERS
    if cut > 0:
        return f"{text[:SHOWN_CHARACTERS]} … ({cut:,} more characters)"
    return text or "(only white space)"


def _merge(results: Results) -> Section:
    merge = results.params["merge"]
    text = (
        f"The adapter was merged into the {merge['base']} base and stored as {merge['dtype']}. "
        "The merged model was then compared with the base plus adapter on the same tokens."
    )
    return Section("Verification of the merged model", [Paragraph(text), facts(results.verify)])


def _cost(results: Results) -> Section:
    costs = {stage: cost for stage, cost in results.made_with.items() if cost}
    keys = dict.fromkeys(k for cost in costs.values() for k in cost if k not in made_with(cost))
    rows = [
        [key.replace("_", " "), *(number(cost.get(key, "")) for cost in costs.values())]
        for key in keys
    ]
    release = Paragraph(f"The released model takes {number(results.release_gb)} GB on disk.")
    return Section("Cost", [Table(["", *costs], rows), release])

"""Insert the figures of metrics/ and benchmarks/results/ into README.md and docs/.

    python -m benchmarks.figures            (make figures)
    python -m benchmarks.figures --check    (tests/test_docs.py: fails if a page differs)

A page calls a function of this file in a comment, `<!--[[[cog default_result() ]]]-->`; its output
goes below, up to `<!--[[[end]]]-->` (https://cog.readthedocs.io).
"""

import json
import sys
from pathlib import Path

from cogapp import Cog

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SIDES = {
    "ours-packed": ("this pipeline", "8 x 2,048 packed"),
    "unsloth-packed": ("Unsloth 2026.10.9", "8 x 2,048 packed"),
    "ours-4": ("this pipeline", "4 rows"),
    "unsloth-packed-2": ("Unsloth 2026.10.9", "2 x 2,048 packed"),
    "unsloth-4": ("Unsloth 2026.10.9", "4 rows"),
    "reference-4": ("TRL and PEFT, the usual script", "4 rows, dropout 0.1"),
    "ours-24": ("this pipeline", "2 x 2,048 packed, 24 GB"),
    "unsloth-24-auto": ("Unsloth 2026.10.9", "2 x 2,048 packed, 24 GB, auto"),
    "unsloth-24": ("Unsloth 2026.10.9", "2 x 2,048 packed, 24 GB, no checkpointing"),
    "unsloth-24-1": ("Unsloth 2026.10.9", "1 x 2,048 packed, 24 GB, no checkpointing"),
    "ours-48": ("this pipeline", "4 x 2,048 packed, 48 GB"),
    "unsloth-48": ("Unsloth 2026.10.9", "4 x 2,048 packed, 48 GB, no checkpointing"),
    "unsloth-48-auto": ("Unsloth 2026.10.9", "8 x 2,048 packed, 48 GB, auto"),
    "ours-80": ("this pipeline", "8 x 2,048 packed, 80 GB"),
    "unsloth-80": ("Unsloth 2026.10.9", "8 x 2,048 packed, 80 GB, no checkpointing"),
    "unsloth-80-auto": ("Unsloth 2026.10.9", "8 x 2,048 packed, 80 GB, auto"),
}
DEFAULT = {
    "perplexity, {eval_examples} held-out rows": "{}_perplexity",
    "perplexity, {group_examples} rows of services not in training": "group_{}_perplexity",
    "perplexity, English prose (forgetting)": "retention_{}_perplexity",
    "chrF of {answered_rows} answers, 0 to 100": "{}_chrf",
    "command and flags of {answered_rows} answers, 0 to 1": "{}_command_and_flags",
}
KILLED = {
    "dvc writes": "`dvc repro` while DVC writes its own files",
    "dvc queue": "the queue of experiments",
    "dvc repro: a worker of prepare": "a worker of `prepare`",
}


def metrics(name: str) -> dict:
    return json.loads((ROOT / f"metrics/{name}.json").read_text(encoding="utf-8"))


def results(name: str):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table; columns whose head ends with ":" are right-aligned."""
    aligned = ["--:" if cell.endswith(":") else "---" for cell in head]
    for row in ([cell.removesuffix(":") for cell in head], aligned, *rows):
        print(f"| {' | '.join(row)} |")


def default_result() -> None:
    """Perplexity, answers and forgetting of the default run, and the effect of merging."""
    scores = metrics("eval") | metrics("answers") | metrics("data")
    lines = [
        [
            what.format(**scores),
            *(_interval(scores, key.format(side)) for side in ("base", "tuned")),
        ]
        for what, key in DEFAULT.items()
    ]
    table(["95 % interval in brackets", "base:", "tuned:"], lines)
    found = metrics("verify")
    print(
        f"\nMerging changed the perplexity by {found['perplexity_change_percent']:+.2f} % (mean KL "
        f"{found['mean_kl']:.1e} a token, top-1 agreement {100 * found['token_agreement']:.1f} %)."
    )


def _interval(scores: dict, key: str) -> str:
    value, low, high = (scores[f"{key}{part}"] for part in ("", "_low", "_high"))
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


def comparison() -> None:
    """Speed and memory against Unsloth and the usual script."""
    sides = results("speed")["sides"]
    shown = {
        "ours-packed": "this pipeline",
        "unsloth-packed": "Unsloth",
        "reference-4": "TRL + PEFT, 4 rows a step",
    }
    lines = [
        [
            "tokens/s over an epoch",
            *(f"{sides[side]['tokens_per_second']:,.0f}" for side in shown),
        ],
        ["peak GPU memory", *(f"{sides[side]['peak_vram_gb']:.1f} GB" for side in shown)],
    ]
    table(["7B shape, r = 64, one H200", *(f"{name}:" for name in shown.values())], lines)


def speed() -> None:
    sides = results("speed")["sides"]
    lines = []
    for side, (who, step) in SIDES.items():
        if side not in sides:
            continue
        found = sides[side]
        low, high = found["tokens_per_second_range"]
        lines.append(
            [
                who + kernels_of(side),
                step,
                str(found["runs"]),
                f"{found['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})",
                f"{found['steady_tokens_per_second']:,.0f}",
                f"{found['peak_vram_gb']:.2f} GB",
            ]
        )
    table(
        ["", "a step", "runs:", "tokens/s, whole epoch:", "tokens/s, steady:", "peak VRAM:"], lines
    )


def kernels_of(side: str) -> str:
    """What a side of benchmarks/speed.py had in all of its runs."""
    runs = [run for run in results("speed")["runs"] if run["side"] == side]
    return ", FlashAttention 4" * all("flash-attn-4" in run for run in runs)


def speed_ratios() -> None:
    lines = [
        [
            f"{SIDES[ours][0]}, {SIDES[ours][1]}{kernels_of(ours)}",
            f"{SIDES[other][0]}, {SIDES[other][1]}",
            " and ".join(map(str, found["runs"])),
            f"{found['ratio']:.2f}",
            f"{found['steady_ratio']:.2f}" if "steady_ratio" in found else "",
        ]
        for found in results("speed")["ratios"]
        for ours, other in [found["sides"]]
    ]
    head = ["on one GPU", "against", "runs:", "whole epochs:", "steady:"]
    table(head, sorted(lines))


def share_of_floor() -> None:
    percent = 100 * results("speed")["share_of_floor"]
    print(
        f"The steady rate is {percent:.0f} % of what the matrix products alone would allow with "
        "full recomputation."
    )


def longest_row() -> None:
    """The longest rows that trained in 24 GB, ours and Unsloth's."""
    found = results("speed").get("longest", {})
    names = {"ours": "This pipeline", "unsloth": "Unsloth"}
    for side, name in names.items():
        tried = found.get(side, {}).get("attempts", [])
        for row in [one for one in tried if one["result"] == "trained"][-1:]:
            longer = found[side]["out_of_memory"]
            more = f"{longer:,} run out of memory" if longer else "none longer was tried"
            with_4 = " with FlashAttention 4" if "flash-attn-4" in row else ""
            print(
                f"{name}: one row of {row['tokens']:,} tokens trains in {found[side]['cap_gb']} "
                f"GB ({found[side]['shape']}'s shape, r = {found[side]['rank']}) with a peak of "
                f"{row['peak_vram_gb']:.1f} GB, at {row['steady_tokens_per_second']:,.0f} "
                f"tokens/s{with_4}; {more} ({row['date']})."
            )


def vram_errors() -> None:
    found = results("plan")
    held_out = [point for point in found["points"] if point["held_out"]]
    peaks, cards = (
        [point[key] for point in held_out] for key in ("error_percent", "device_error_percent")
    )
    print(
        f"In {len(held_out)} runs not used to fit the model, from 1.5B to 70B with LoRA, QLoRA and "
        f"full fine-tuning, the predicted peak is {min(peaks):+.1f} to {max(peaks):+.1f} % off, "
        f"and the predicted GPU memory needed {min(cards):+.1f} to {max(cards):+.1f} % "
        f"({found['device']}, {found['date']})."
    )


def cards() -> None:
    lines = []
    for part in results("cards")["parts"]:
        train = {stage["stage"]: stage for stage in part.get("stages", [])}
        if part["part"] == "70b":
            gb = [part["predicted_device_gb"], part["measured_device_gb"]]
            cells = [*(f"{value:.1f}" for value in gb), "", "", ""]
            name = "Llama's 70B shape, r = 16, 5 steps of 2,048 tokens"
        elif "evaluate" in train:
            cells, name = [f"{part['predicted_device_gb']:.1f}"], part["part"]
            for stage in ("train", "evaluate", "merge", "verify"):
                run = train.get(stage, {"exit": None})
                said = {0: f"{run.get('device_gb', 0):.1f}", None: "not run"}
                cells.append(said.get(run["exit"], "failed"))
            if part["shape"].endswith("8-layers"):
                name += ", 8 layers"
        else:
            continue
        lines.append([name, str(part["card_gb"]), *cells])
    head = ["recipe", "card:", "plan said:", "train:", "evaluate:", "merge:", "verify:"]
    table(head, sorted(lines))


def streamed_scores() -> None:
    """Seconds of evaluate at 70B's width, streamed and resident."""
    parts = [p for p in results("cards")["parts"] if p["part"] == "llama-3-70b-24gb"]
    streamed, resident = sorted(parts, key=lambda part: part["card_gb"])
    small, large = streamed["eval_seconds"], resident["eval_seconds"]
    whole = [
        next(stage["seconds"] for stage in part["stages"] if stage["stage"] == "verify")
        for part in (streamed, resident)
    ]
    print(
        f"evaluate scores 100 rows of 2,048 tokens, twice, in {small:.1f} s with all layers "
        f"streamed in {streamed['card_gb']} GB, and in {large:.1f} s with the model on the card: "
        f"{small / large:.2f} times. verify takes {whole[0]:.0f} and {whole[1]:.0f} s in all."
    )


def kernels(point: dict) -> str:
    return ", FlashAttention 4" * point.get("fast_path", "").endswith("flash attention 4")


def placements() -> None:
    """Every point of benchmarks/placement.py with its prediction."""
    lines = []
    for point in results("placement")["points"]:
        placed = point["placement"]
        kept = f"{placed['kept_mlp']}/{placed['kept_attention']}"
        gb = [
            f"{point[f'measured_{key}']:.2f} "
            f"({100 * (point[f'predicted_{key}'] / point[f'measured_{key}'] - 1):+.1f} %)"
            for key in ("gb", "device_gb", "ram_gb")
        ]
        more = (", experts too" if point.get("experts") else "") + kernels(point)
        cap = f"{point['cap_gb']} GB" if point["cap_gb"] else "whole card"
        lines.append(
            [
                f"{point['shape']}, r = {point['rank']}{more}",
                f"{point['tokens_per_step']:,}",
                cap,
                f"{placed['streamed']}/{placed.get('dense', 0)}",
                kept,
                f"{point['steady_tokens_per_second']:,.0f}",
                f"{100 * point['share_of_operations']:.0f} %",
                *gb,
            ]
        )
    head = ["shape", "tokens a step:", "limit:", "layers streamed/dense:", "kept MLP/attention:"]
    head += ["tokens/s:", "of operations:"]
    table([*head, "peak GB (predicted):", "card GB:", "host GB:"], lines)


def step_profile() -> None:
    """Where the time of a step goes, in percent of it."""
    lines = []
    for point in results("profile")["points"]:
        placed, step = point["placement"], point["step_seconds"]
        shares = [*point["seconds"].values(), point["idle_seconds"]]
        name = f"{point['name']}, {placed['streamed']} layers streamed{kernels(point)}"
        shares = [f"{100 * seconds / step:.1f}" for seconds in shares]
        lines.append([name, f"{1000 * step:.0f}", *shares])
    groups = [f"{group}:" for group in results("profile")["points"][0]["seconds"]]
    table(["point", "step in ms:", *groups, "GPU idle:"], lines)


def flash_4() -> None:
    """Attention with FlashAttention 4 and without it, and the memory beside plan's."""
    points = results("profile")["points"]
    plain = {one["name"]: one for one in points if not kernels(one)}
    for one in points:
        if kernels(one) and (other := plain.get(one["name"])):
            ours, theirs = (1000 * point["seconds"]["attention"] for point in (one, other))
            gpus = "one" if one["device_uuid"] == other["device_uuid"] else "each on its own"
            print(
                f"- {one['name']}: attention takes {ours:.0f} instead of {theirs:.0f} ms of a step "
                f"({gpus} {one['device']}, torch {one['versions']['torch']}, {one['date']})."
            )
    measured = [point for point in results("placement")["points"] if kernels(point)]
    for key, what in (("gb", "peak"), ("ram_gb", "host memory")):
        most = max(abs(p[f"predicted_{key}"] / p[f"measured_{key}"] - 1) for p in measured)
        print(f"- The {what} predicted for {len(measured)} points is up to {100 * most:.2g} % off.")


def streaming() -> None:
    """Rates with streamed weights, as shares of the resident ones."""
    ratios, points = (results("placement")[key] for key in ("ratios", "points"))
    shares = {point["name"]: 100 * point["share_of_operations"] for point in points}
    small, whole = shares["7b 6 GB 4096"], shares["7b resident 4096"]
    print(
        f"With 4,096 tokens a step, a 70B shape limited to 12 GB trains at "
        f"{100 * ratios['70b_4096_12gb']:.1f} % of its resident steady rate, "
        f"a 7B shape limited to 6 GB at {100 * ratios['7b_4096_6gb']:.0f} %, where operations "
        f"take {small:.0f} and {whole:.0f} % of a step."
    )


def dense() -> None:
    """Rates with weights that are dequantized once, and those of whole cards."""
    found = results("placement")
    rates = {point["name"]: point["steady_tokens_per_second"] for point in found["points"]}
    for tokens in (4096, 16384):
        name = f"7b whole {tokens}"
        print(
            f"- {tokens:,} tokens a step: {rates[name]:,.0f} tokens/s with dense layers, "
            f"{rates[f'{name} in 4 bit']:,.0f} without "
            f"({100 * (found['ratios'][f'dense_{tokens}'] - 1):+.1f} %)."
        )
    stage = results("speed")["sides"]["ours-80"]["steady_tokens_per_second"]
    print(
        f"- The faster is {100 * found['ratios']['share_of_26000']:.0f} % of the 26,000 tokens/s "
        f"that the products with the base allow at 760 TFLOP/s. The stage itself, which does not "
        f"wait for the GPU after each step, reaches {stage:,.0f} ({100 * stage / 26_000:.0f} %) "
        f"with 8 packs of 2,048 tokens in 80 GB."
    )


def determinism() -> None:
    found = results("determinism")
    equal = sum(pair["equal"] for pair in found["pairs"])
    print(
        f"{equal} of {len(found['pairs'])} pairs of runs are byte-identical, and "
        f"{found['kills_equal']} of {found['kills']} runs that were killed and resumed equal an "
        f"undisturbed one. This costs {found['cost_percent']:.1f} % of the speed. The perplexity "
        f"of the same rows with other batch sizes differs by at most "
        f"{found['perplexity_spread_percent']:.3f} % ({found['device']}, {found['date']})."
    )


def two_gpus() -> None:
    found = results("determinism")
    pair = found["two_gpus"]
    print(
        f"On two {found['device']}s, {len(pair['equal'])} of {len(pair['outputs'])} outputs are "
        f"equal to the byte: {', '.join(f'`{name}`' for name in pair['equal'])}."
    )


def ranks() -> None:
    """One GPU and several: rates, memory, and what became of the loss and the bytes."""
    found = results("scale")
    lines = []
    for name, run in found["7b"].items():
        lines.append(
            [
                name.replace("1 GPUs", "1 GPU"),
                f"{run['tokens_per_second']:,.0f}",
                f"{run['steady_tokens_per_second']:,.0f}",
                f"{run['peak_vram_gb']:.1f} GB ({run['predicted_peak_vram_gb']:.1f} GB)",
                f"{run['peak_ram_gb']:.1f} GB",
            ]
        )
    head = ["Mistral-7B's shape", "tokens/s, epoch:", "tokens/s, steady:"]
    table([*head, "peak VRAM a GPU (predicted):", "host memory:"], lines)
    run = found["7b_run"]
    equal = "equal to the byte" if found["7b_two_runs_equal"] else "**not** equal"
    print(
        f"\nThat is {found['7b_steady_ratio']:.2f} times the steady rate and "
        f"{found['7b_epoch_ratio']:.2f} times that of the epoch of {found['rows']:,} rows. The "
        f"losses of a step differ by at most {found['7b_largest_difference_of_losses']:.4f} nats; "
        f"two runs on {run['gpus']} GPUs are {equal} ({run['device']}, {run['date']})."
    )


def streamed_ranks() -> None:
    """Several GPUs whose weights come from one copy in host memory."""
    found = results("scale")
    runs, run = found["70b"], found["70b_run"]
    many = f"{run['gpus']} GPUs"
    one, all_of_them = (runs[name]["host_gb"] for name in ("1 GPUs", many))
    print(
        f"With the weights of all layers streamed ({found['70b_shape']}, {found['70b_cap_gb']:g} "
        f"GB a GPU, one row of 4,096 tokens on each), {many} train "
        f"{found['70b_steady_ratio']:.2f} times as fast as one, and use {all_of_them:.1f} GB of "
        f"host memory instead of {one:.1f}: one copy of the weights, and what each process needs "
        f"({run['device']}, {run['date']})."
    )


def one_rank() -> None:
    """What a rank costs on one GPU, and that two processes share a host copy; each if measured."""
    found = results("scale")
    if run := found.get("one_run"):
        equal = "the same bytes" if found["one_same_bytes"] else "**other** bytes"
        ways: dict[str, list[float]] = {}
        for one in found["one"]:
            ways.setdefault(one["way"], []).append(one["steady_tokens_per_second"])
        spread = max(max(rates) / min(rates) - 1 for rates in ways.values())
        # So short a run has no steady rate of its own.
        short = found["one_steady_ratio"] == found["one_epoch_ratio"]
        rate = "rate of a short run" if short else "steady rate"
        print(
            f"A rank in a world of one trains at {100 * found['one_steady_ratio']:.1f} % of the "
            f"{rate} in the stage's own process, where two runs of one kind differ by up to "
            f"{100 * spread:.1f} %, and writes {equal} ({found['one_shape']}, {run['device']}, "
            f"{run['date']})."
        )
    if run := found.get("copies_run"):
        one, two = (memory["host_gb"] for memory in found["copies"])
        equal = "the same logits" if found["copies_same_logits"] else "**other** logits"
        print(
            f"Two processes on one GPU that stream from one copy of {found['copies_bytes_gb']:.1f} "
            f"GB ({found['copies_shape']}) use {two:.1f} GB of host memory, one uses {one:.1f}; "
            f"they compute {equal} ({run['device']}, {run['date']})."
        )


def scored_ranks() -> None:
    """Evaluate and verify on one GPU and on several."""
    found = results("scale")
    run, runs = found["score_run"], found["score"]
    many = f"{run['gpus']} GPUs"
    equal = "equal" if found["score_figures_equal"] else "**not** equal"
    seconds = [
        [runs[name][f"{stage}_wall_seconds"] for name in ("1 GPUs", many)]
        for stage in ("evaluate", "verify")
    ]
    print(
        f"On {many} ({found['score_shape']}) evaluate scores "
        f"{runs[many]['evaluate_tokens_per_second']:,.0f} tokens/s; its figures and verify's are "
        f"{equal} to those of one. With starting and loading, evaluate takes {seconds[0][1]:.0f} "
        f"instead of {seconds[0][0]:.0f} s, verify {seconds[1][1]:.0f} instead of "
        f"{seconds[1][0]:.0f} ({run['device']}, {run['date']})."
    )


def killed_ranks() -> None:
    """A rank that is killed, and one that hangs, on several GPUs."""
    found = results("scale")
    kill, hang, run = found["kill"], found["hang"], found["kill_run"]
    bytes_after = "the same bytes" if found["kill_same_bytes"] else "**other** bytes"
    print(
        f"On {run['gpus']} GPUs ({found['kill_shape']}), all had ended "
        f"{kill['seconds_until_all_ended']:.1f} s after rank 1 was killed, and "
        f"{hang['seconds_until_all_ended']:.1f} s after it was stopped, with a timeout of "
        f"{hang['timeout_seconds']} s; the run that went on wrote {bytes_after} ({run['device']}, "
        f"{run['date']})."
    )


def answers_speed() -> None:
    """Answers in batches and row by row."""
    found = results("generation")["speed"]
    ours, plain = found["stage"], found["row by row"]
    print(
        f"On a 7B shape in NF4 with its adapter, {ours['prompts']} prompts are answered in batches "
        f"at {ours['tokens_per_second']:.0f} tokens/s, row by row at "
        f"{plain['tokens_per_second']:.0f}: {found['times']:.0f} times; "
        f"{found['different']['differ']} of {found['different']['answers']} answers differ "
        f"({found['device']}, {found['date']})."
    )


def chaos() -> None:
    found = results("chaos")
    lines = [
        [KILLED.get(name, f"`{name}`"), str(count)]
        for name, count in found["kills_by_stage"].items()
    ]
    lines.append(["all", str(found["kills"])])
    table(["killed", "times:"], lines)
    print(
        f"\n{found['identical']} of {found['kills']} ended with the bytes of an undisturbed run, "
        f"{found['lost']} were lost. Of {found['bad_params'] + found['bad_inputs']} malformed "
        f"parameter files and inputs {found['clear_errors']} got one clear line; of "
        f"{found['hostile_inputs']:,} hostile ones {found['hangs']} caused a hang and "
        f"{found['escapes']} an injection into a terminal or a page ({found['date']})."
    )


def mutants() -> None:
    """How many changes of six modules tests notice (tests/mutants.py)."""
    modules = results("mutants")["modules"]
    lines = [
        [f"`{module}`", *(str(found[key]) for key in ("changes", "tried", "noticed", "left"))]
        for module, found in modules.items()
    ]
    table(["module", "changes:", "tried:", "noticed:", "not noticed:"], lines)
    tried, noticed = (sum(found[key] for found in modules.values()) for key in ("tried", "noticed"))
    print(f"\n{noticed} of {tried} changes are noticed, {100 * noticed / tried:.1f} %.")


def kills() -> None:
    found = results("chaos")
    print(
        f"After {found['kills']} kills at chosen and random moments, `dvc repro` ended with the "
        f"bytes of an undisturbed run in {found['identical']} cases."
    )


def noise() -> None:
    found = results("noise")
    eval_metrics = found["metrics"]["metrics/eval.json"]
    percent = eval_metrics["tuned_perplexity"]["noise_percent"]
    print(
        f"In 95 of 100 cases, two runs of the default that differ only by the seed differ by up to "
        f"{percent:.1f} % in perplexity ({len(found['seeds'])} seeds)."
    )


def preparing() -> None:
    found = results("prepare")
    print(
        f"`prepare` processes {found['prepare_rows_per_second']:,.0f} rows a second on "
        f"{found['cores']} cores, {found['prepare_to_map_percent']:.0f} % of the rate of "
        f"`datasets.map` with only the tokenizer, and needs {found['prepare_peak_ram_gb']:.2f} GB "
        f"for {found['rows']:,} rows."
    )


def merging() -> None:
    lines = [
        [
            f"{found['shape']} ({found['layers']} layers)",
            found["device"],
            f"{found['written_gb']:.1f}",
            f"{found['peak_ram_gb']:.2f}",
            f"{found['seconds']:.0f}",
            f"{found['copy_seconds']:.0f}",
            {True: "yes", None: "not compared"}[found["bit_equal"]],
        ]
        for found in results("merge")
    ]
    head = ["shape", "device", "written GB:", "peak RAM GB:", "seconds:", "plain write, seconds:"]
    table([*head, "equal to PEFT's"], lines)


def scoring() -> None:
    found = results("fast_path")["evaluation"]
    ours, plain = found["stage"], found["plain loop"]
    print(
        f"Held-out rows are scored at {ours['tokens_per_second']:,.0f} tokens/s in "
        f"{ours['peak_gb']:.2f} GB; a plain loop reaches {plain['tokens_per_second']:,.0f} "
        f"tokens/s in {plain['peak_gb']:.2f} GB."
    )


def replay() -> None:
    lines = []
    for run in results("replay")["runs"]:
        p = run.get("retention_p")
        lines.append(
            [
                f"{run['learning_rate']:g}, {run['seed']}",
                f"{100 * run['share']:g} % ({run['general_rows']})",
                f"{run['task_tuned_perplexity']:.2f}",
                f"{run['retention_tuned_perplexity']:.2f}",
                f"{run['retention_change_percent']:+.1f} %",
                "" if p is None else "< 0.01" if p < 0.01 else f"{p:.2g}",
            ]
        )
    head = ["learning rate, seed", "replay (rows)", "task:", "retention:"]
    table([*head, "change from the base:", "p:"], lines)


def curve() -> None:
    found = results("fast_path")["curve"]
    print(
        f"Over {found['steps']} steps of the default, the fast path's loss differs on average by "
        f"{found['from_plain']['mean_nats']:.3f} nats from that of PEFT's own layers on padded "
        "rows with SDPA."
    )


def default_on_gpu() -> None:
    found = results("default")
    before = found["runs"][0]["base_perplexity"]
    after = found["runs"][0]["tuned_perplexity"]
    print(
        f"The default on an H200, {len(found['runs'])} runs: perplexity {before:.1f} before and "
        f"{after:.2f} after training, with a spread of {found['spread_percent']:g} %, and "
        f"{found['from_committed_percent']:.1f} % from the CPU's."
    )


def methods() -> None:
    print((ROOT / "benchmarks/results/methods.md").read_text(encoding="utf-8").rstrip())


def main() -> None:
    check = ["--check", "--diff"] if "--check" in sys.argv[1:] else ["-r"]
    prologue = "from benchmarks.figures import *"
    pages = [str(page) for page in PAGES if "[[[cog" in page.read_text(encoding="utf-8")]
    sys.exit(Cog().main(["cog", *check, "-P", "-I", str(ROOT), "-p", prologue, *pages]))


if __name__ == "__main__":
    main()

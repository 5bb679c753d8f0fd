"""export: the page shows what the files contain, and no data can break it."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape

import pytest
import yaml
from export_inputs import EVAL, GPU_COST, HOSTILE, METRICS, PLAN, write_export_inputs, write_json
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from report_page import Page, axis, figures, line_points, marks
from tiny import PARAMS, ROOT

from stages import export
from stages.reporting import page
from stages.reporting.charts import WIDTH
from stages.reporting.model_card import model_card
from stages.reporting.report import report, sections
from stages.reporting.results import MEMORY_PARTS, Results, summary
from stages.shared.outputs import write_sums

SHOWN_HOSTILE = HOSTILE.replace("\u202e", "\ufffd").replace("\ud800", "\ufffd")
SHOWN_HOSTILE = SHOWN_HOSTILE.replace("\x1b", "\ufffd")


def make_inputs(folder, text="az vm list --resource-group g"):
    (folder / "metrics").mkdir(parents=True)
    shutil.copy(PARAMS, folder / "params.yaml")
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "stages").symlink_to(ROOT / "stages")
    write_export_inputs(folder, text)
    for made in ("data/prepared", "data/retention", "models/merged", "models/tokenizer"):
        write_sums(folder / made)
    return folder


def run_export(folder):
    command = [sys.executable, "-m", "stages.export"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The stage run once over texts that try to break the page."""
    folder = make_inputs(tmp_path_factory.mktemp("export") / "ws", HOSTILE)
    done = run_export(folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder


@pytest.fixture(scope="module")
def html(exported):
    return (exported / "metrics/report.html").read_text(encoding="utf-8")


def results(folder, monkeypatch, **changes):
    """What export reads in `folder`, with whole metrics files replaced."""
    monkeypatch.chdir(folder)
    params = yaml.safe_load(PARAMS.read_text())
    read = export.read_results(params, export.MERGED)
    return Results(**(vars(read) | changes))


def test_summary_has_keys_of_its_own(exported):
    found = json.loads((exported / "metrics/summary.json").read_text())
    assert found == {
        "command_and_flags_before": 0.1,
        "command_and_flags_after": 0.62,
        "group_command_and_flags_before": 0.1,
        "group_command_and_flags_after": 0.62,
        "retention_change_percent": 14.42,
        "perplexity_before": 72.9813,
        "perplexity_after": 12.7104,
        "group_perplexity_before": 85.24,
        "group_perplexity_after": 14.62,
        "merge_change_percent": 0.0134,
        "train_minutes": 3.05333,
        "ram_gb": 2.31,
        "predicted_vram_gb": 1.799,
        "fits_gpus": "6 GB, 8 GB",
    }
    for values in METRICS.values():
        assert not found.keys() & values.keys()


def test_summary_on_a_gpu_compares_prediction_and_measurement(exported, monkeypatch):
    found = summary(results(exported, monkeypatch, train_cost=GPU_COST))
    assert "ram_gb" not in found
    assert found["vram_gb"] == 1.84
    # From the placement on that card, not from plan's minimum.
    assert found["predicted_vram_gb"] == 1.87 != PLAN["predicted_peak_vram_gb"]
    assert found["vram_prediction_error_percent"] == pytest.approx(100 * (1.87 - 1.84) / 1.84)


def test_summary_says_when_no_card_is_large_enough(exported, monkeypatch):
    plan = PLAN | {"cards": [card | {"placed": None} for card in PLAN["cards"]]}
    assert summary(results(exported, monkeypatch, plan=plan))["fits_gpus"] == "none"


def test_the_report_says_of_each_card_what_plan_says(exported, monkeypatch):
    html = page.to_html("t", sections(results(exported, monkeypatch)))
    [row] = re.findall(r"<tr><t[hd][^>]*>This run.*?</tr>", html, re.DOTALL)
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
    assert cells == ["This run", "does not fit", "fits, streamed", "fits"]


def test_one_held_out_set_is_enough(exported, monkeypatch):
    rows_only = {k: v for k, v in EVAL.items() if not k.startswith("group_")}
    found = results(exported, monkeypatch, eval=rows_only)
    assert not [key for key in summary(found) if key.startswith("group_")]
    html = page.to_html("t", sections(found))
    assert "Perplexity on held-out rows" in html
    assert "Perplexity on held-out groups" not in html


def test_release_links_the_merged_files(exported):
    merged, release = exported / "models/merged", exported / "models/release"
    for name in ("config.json", "model.safetensors"):
        assert (release / name).stat().st_ino == (merged / name).stat().st_ino
    names = {path.name for path in release.iterdir()}
    assert names == {"config.json", "merge.json", "model.safetensors", "README.md", "SHA256SUMS"}
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    for folder in (merged, release):
        subprocess.run(check, cwd=folder, check=True)
    assert "README.md" not in (merged / "SHA256SUMS").read_text()


def test_release_copies_where_the_cache_is_on_another_file_system(tmp_path):
    other = tmp_path.parent / f"{tmp_path.name}-other"
    other = type(other)("/dev/shm") / other.name
    other.mkdir()
    try:
        (other / "model.safetensors").write_bytes(b"weights")
        assert other.stat().st_dev != tmp_path.stat().st_dev
        source, target = tmp_path / "merged", tmp_path / "release"
        source.mkdir(), target.mkdir()
        (source / "model.safetensors").symlink_to(other / "model.safetensors")
        assert export.link_files(source, target) == 1
        copy = target / "model.safetensors"
        assert copy.read_bytes() == b"weights"
        assert not copy.is_symlink()
    finally:
        shutil.rmtree(other)


def test_a_damaged_merged_model_is_not_released(tmp_path):
    folder = make_inputs(tmp_path / "ws")
    (folder / "models/merged/model.safetensors").write_bytes(b"damaged")
    done = run_export(folder)
    assert done.returncode == 1
    assert done.stderr == (
        "export: models/merged/model.safetensors is damaged (its SHA-256 differs); "
        "repair it with: python -m tools.repair merge\n"
    )
    assert not (folder / "models/release").exists()
    assert not (folder / "metrics/report.html").exists()


def test_two_exports_are_equal(exported):
    files = ["metrics/report.html", "metrics/report.md", "models/release/README.md"]
    before = [(exported / name).read_bytes() for name in files]
    assert run_export(exported).returncode == 0
    assert [(exported / name).read_bytes() for name in files] == before


def test_page_needs_nothing_else_and_runs_nothing(html):
    tags = Page(html).tags
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "embed", "img", "base"}
    for tag, attributes in tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("src", "href", "xlink:href", "action"):
                assert value.startswith(("#", "data:")), f"{tag} {name}={value}"
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a for t, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_ids_are_unique_and_links_lead_somewhere(html):
    tags = Page(html).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for t, a in tags if t == "a"]
    assert len(links) == 14
    assert set(links) <= set(ids)


def test_what_models_wrote_is_shown_as_it_is(html):
    texts = Page(html).texts
    assert texts.count(SHOWN_HOSTILE) == 4
    assert f"user: list VMs\n{SHOWN_HOSTILE}" in texts
    assert "\u202e" not in html


def page_of(text):
    """The HTML of a page that holds `text` wherever a page holds text."""
    table = page.Table([text], [[text], [page.Mono(text)]])
    blocks = [
        page.Paragraph(text),
        table,
        page.Chart(text, text, "<svg></svg>", table),
        page.Figures([(text, text, text)]),
        page.Marked([(text, True), (text, False)]),
        page.Answers(text, [(text, text)]),
    ]
    return page.to_html(text, [page.Section(text, blocks)])


def test_no_text_of_any_block_is_markup():
    tags = Page(page_of(HOSTILE)).tags
    assert [tag for tag, _ in tags] == [tag for tag, _ in Page(page_of("x")).tags]
    words = next(attributes["aria-label"] for _, attributes in tags if "role" in attributes)
    assert words == SHOWN_HOSTILE
    places = page_of("@@").count("@@")
    assert unescape(page_of(HOSTILE)).count(SHOWN_HOSTILE) == places


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("az vm list\n\n\n", "az vm list"),
        ("\n" * 128, "(only white space)"),
        ("a" * 2000, "a" * 2000),
        ("a" * 3001, "a" * 2000 + " … (1,001 more characters)"),
    ],
)
def test_answers_are_shown_at_a_bearable_length(exported, monkeypatch, answer, shown):
    sample = dict.fromkeys(("row", "set", "prompt", "reference", "base"), "x") | {"tuned": answer}
    sample |= {key: {"command_and_flags": 1.0} for key in ("base_scores", "tuned_scores")}
    html = page.to_html("t", sections(results(exported, monkeypatch, samples=[sample])))
    assert Page(html).texts[-1] == shown


def test_the_learned_part_is_marked(html):
    marked = re.search(r"<pre dir=\"auto\">user: list VMs\n<mark>(.*?)</mark></pre>", html)
    assert marked[1].startswith("&lt;script&gt;")


@pytest.mark.parametrize("name", ["metrics/report.md", "models/release/README.md"])
def test_markdown_holds_no_markup_of_others(exported, name):
    text = (exported / name).read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n")[-1])
    inline = [child for token in tokens for child in token.children or []]
    assert not [t for t in [*tokens, *inline] if t.type.startswith(("html", "link", "image"))]
    fences = [token.content for token in tokens if token.type == "fence"]
    assert fences.count(SHOWN_HOSTILE + "\n") == 5


@pytest.mark.parametrize(
    "text",
    ["a | b", "<b>", "*x* _y_ `z`", "[l](u)", "![i](u)", "# h", "1 < 2 & 3", "a\\|b", "$x$ ~~y~~"],
)
def test_markdown_cells_show_their_text(text):
    table = page.Table(["head"], [[text], [page.Mono(text)]])
    tokens = (
        MarkdownIt("commonmark")
        .enable(["table", "strikethrough"])
        .parse(page.to_markdown("t", [page.Section("s", [table])]))
    )
    cells = [t for t in tokens if t.type == "inline" and t.level == 4][1:]
    shown = ["".join(child.content for child in cell.children) for cell in cells]
    assert shown == [text, text]


@pytest.mark.parametrize("name", ["Loss", "Learning rate"])
def test_lines_run_through_the_values(exported, html, name):
    with (exported / "metrics/curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    columns = {"Loss": ["loss", "eval_loss"], "Learning rate": ["learning_rate"]}[name]
    svg, _ = figures(html)[name]
    lines = marks(svg, "line")
    assert len(lines) == len(columns)
    for column, line in zip(columns, lines, strict=True):
        expected = [(int(row["step"]), float(row[column])) for row in curve if row[column]]
        drawn = line_points(svg, line)
        assert len(drawn) == len(expected)
        low, high = axis(svg, "Y")
        for (x, y), (step, value) in zip(drawn, expected, strict=True):
            assert x == pytest.approx(step, abs=0.01)
            assert y == pytest.approx(value, abs=(high - low) / 1000)


def test_dots_stand_at_the_perplexities(html):
    svg, rows = figures(html)["Perplexity with 95 % intervals"]
    low, high = map(math.log, axis(svg, "X"))
    drawn = []
    for dot in marks(svg, "symbol"):
        x = float(re.match(r"translate\(([-\d.]+)", dot.get("transform"))[1])
        drawn.append(math.exp(low + x / WIDTH * (high - low)))
    assert drawn == pytest.approx([72.9813, 12.7104, 85.24, 14.62], rel=1e-3)
    assert rows[1] == ["held-out rows", "tuned", "12.71", "11.02", "14.9"]


def test_bars_are_as_long_as_the_memory_parts(exported, monkeypatch):
    found = results(
        exported,
        monkeypatch,
        train_cost=GPU_COST,
        eval_cost=METRICS["eval_cost"] | {"weights_vram_gb": 0.118},
    )
    html = page.to_html("t", sections(found))
    svg, rows = figures(html)["VRAM by part"]
    low, high = axis(svg, "X")
    widths = [float(re.search(r"h([\d.]+)v", bar.get("d"))[1]) for bar in marks(svg, "rect")]
    drawn = [width / WIDTH * (high - low) for width in widths]
    parts = [PLAN[f"{part}_gb"] for part in MEMORY_PARTS]
    assert drawn == pytest.approx([*parts, 1.84, 0.19], abs=high / 1000)
    assert [row[0] for row in rows] == ["predicted"] * 6 + ["measured"] * 2
    assert "<td class=number>0.118</td>" in html


def test_bars_are_as_high_as_the_length_counts(exported, html):
    with (exported / "metrics/lengths.csv").open() as file:
        counts = [int(line["rows"]) for line in csv.DictReader(file)]
    svg, rows = figures(html)["Rows by length"]
    low, high = axis(svg, "Y")
    heights = [float(re.search(r"v([\d.]+)h", bar.get("d"))[1]) for bar in marks(svg, "rect")]
    drawn = [height / 190 * (high - low) for height in heights]
    assert drawn == pytest.approx(counts, abs=0.05)
    assert [int(row[1]) for row in rows] == counts


def test_every_chart_has_words_and_numbers(html):
    charts = re.findall(r'<figure>.*?role="img" aria-label="([^"]*)".*?</figure>', html, re.DOTALL)
    assert len(charts) == 5
    assert all(len(words) > 40 for words in charts)
    assert all(rows for _, rows in figures(html).values())


def test_long_curves_keep_every_point_also_in_the_table(exported, monkeypatch):
    """train writes a few lines beyond 200, so that none of the held-out losses is lost."""
    line = {"eval_loss": "", "learning_rate": "0.001"}
    curve = [line | {"step": str(i), "loss": f"{3 - i / 500:.5f}"} for i in range(1, 206)]
    html = page.to_html("t", sections(results(exported, monkeypatch, curve=curve)))
    svg, rows = figures(html)["Loss"]
    assert len(line_points(svg, marks(svg, "line")[0])) == 205
    assert [row[0] for row in rows] == [point["step"] for point in curve]
    assert len(figures(html)["Learning rate"][1]) == 205


def test_the_state_that_was_kept_is_shown(exported, monkeypatch):
    line = {"eval_loss": "", "learning_rate": "0.001", "validation_loss": "", "kept": ""}
    curve = [line | {"step": str(i), "loss": f"{3 - i / 500:.5f}"} for i in range(1, 21)]
    for i, loss in ((9, "2.5"), (14, "2.25"), (19, "2.75")):
        curve[i]["validation_loss"] = loss
    curve[14]["kept"] = "2.25"
    kept = {"kept_step": 15, "kept_because": "lowest of 3 validation losses"}
    kept |= {"best_validation_loss": 2.25, "last_validation_loss": 2.75}
    train = METRICS["train"] | kept
    html = page.to_html("t", sections(results(exported, monkeypatch, curve=curve, train=train)))
    svg, rows = figures(html)["Loss"]
    lines = [[value for _, value in line_points(svg, mark)] for mark in marks(svg, "line")]
    assert lines[1] == pytest.approx([2.5, 2.25, 2.75], abs=0.01)
    assert rows[14] == ["15", "2.97000", "", "2.25", "2.25"]
    assert "; on validation rows from 2.5 to 2.75, and the state of 2.25 was kept" in html
    assert re.search(r"Reason</th>\s*<td[^>]*>lowest of 3 validation losses</td>", html)


def test_the_scale_of_the_update_is_that_of_its_kind(exported, monkeypatch):
    params = yaml.safe_load((exported / "params.yaml").read_text())
    for scaling, said in {
        "standard": r"Update scale \(alpha / r\)</th>\s*<td[^>]*>2</td>",
        "rslora": r"Update scale \(alpha / sqrt\(r\)\)</th>\s*<td[^>]*>8</td>",
    }.items():
        params["lora"] |= {"r": 16, "alpha": 32, "scaling": scaling}
        html = page.to_html("t", sections(results(exported, monkeypatch, params=params)))
        assert re.search(said, html)


def test_every_parameter_is_listed_but_the_tracker(exported, html):
    params = yaml.safe_load((exported / "params.yaml").read_text())
    # Switching it would give another report.
    assert params.pop("tracking")
    assert "report_to" not in html
    for section, values in params.items():
        for key in values if isinstance(values, dict) else [None]:
            assert f"<code>{section}.{key}</code>" in html or f"<code>{section}</code>" in html


def test_card_metadata(exported):
    card = ModelCard.load(exported / "models/release/README.md").data
    assert card.license == "apache-2.0"
    assert card.tags == ["qlora", "lora", "dvc"]
    # A PyPI name is no id of the Hub.
    assert card.base_model is None
    values = {(r.metric_type, r.dataset_split): r.metric_value for r in card.eval_results}
    assert values == {
        ("exact_match", "held-out rows"): 0.25,
        ("exact_match", "held-out groups"): 0.25,
        ("rouge_l", "held-out rows"): 0.4,
        ("rouge_l", "held-out groups"): 0.4,
        ("chrf", "held-out rows"): 44.1,
        ("chrf", "held-out groups"): 44.1,
        ("perplexity", "held-out rows"): 12.7104,
        ("perplexity", "held-out groups"): 14.62,
    }


def test_the_task_and_what_was_forgotten_come_before_perplexity(exported, monkeypatch):
    found = results(exported, monkeypatch)
    first, _, task, forgotten, perplexity, *_ = sections(found)
    [shown] = first.blocks
    assert [name for name, _, _ in shown.items][:4] == [
        "Command and flags on held-out rows",
        "Command and flags on held-out groups",
        "Forgotten",
        "Perplexity on held-out rows",
    ]
    assert shown.items[0][1:] == ("0.1 → 0.62", "12 answers, p = 0.02; higher is better")
    assert shown.items[2][1] == "+14.4 %"
    titles = [task.title, forgotten.title, perplexity.title]
    assert titles == ["Answers scored", "What was forgotten", "Perplexity before and after"]
    assert task.blocks[1].rows[3][1:] == [
        "chrF2 (of 100)",
        "12.5 (10 to 15)",
        "44.1 (35.28 to 52.92)",
        "p = 0.02",
        "12",
    ]
    assert "adventure, text unrelated to the task, changed by +14.4 %" in (forgotten.blocks[0].text)


def test_without_answers_and_texts_nothing_is_said_of_them(exported, monkeypatch):
    scored = {k: v for k, v in EVAL.items() if not k.startswith("retention_")}
    found = results(exported, monkeypatch, answers={}, eval=scored, retention_source={}, samples=[])
    text = page.to_markdown("t", sections(found)) + model_card(found)
    assert "Answers scored" not in text
    assert "orgotten" not in text
    assert "another domain" not in text
    assert not [key for key in summary(found) if "command" in key or "retention" in key]


def test_answers_are_chosen_by_outcome_without_a_script(html, exported):
    found = Page(html)
    inputs = [a for tag, a in found.tags if tag == "input"]
    assert {a["type"] for a in inputs} == {"radio"}
    assert [a["id"] for a in inputs] == [f"group-{i}" for i in range(page.GROUPS + 1)]
    assert ["checked" in a for a in inputs] == [True, *[False] * page.GROUPS]
    labels = re.findall(r"<label for=\"(group-\d)\">([^<]+)</label>", html)
    assert labels == [
        ("group-0", "all (2)"),
        ("group-1", "base right, tuned wrong (1)"),
        ("group-2", "base wrong, tuned right (0)"),
        ("group-3", "both wrong (1)"),
        ("group-4", "both right (0)"),
    ]
    css = (ROOT / "stages/reporting/page.css").read_text()
    for i in range(1, page.GROUPS + 1):
        assert f"#group-{i}:checked ~ div:not(.group-{i})" in css
        assert f'<div class="group-{i}">' in html
    lost = html.partition('<div class="group-1">')[2].partition('<div class="group-2">')[0]
    assert "examples.jsonl:0" in lost
    assert "examples.jsonl:1" not in lost
    markdown = (exported / "metrics/report.md").read_text()
    places = [markdown.index(text) for text in ("base right, tuned wrong (1)", "both wrong (1)")]
    assert places == sorted(places)


ROW = "The account of Ada L. is overdrawn."
PLACES = {
    "model": "/home/quinn/llm/tiny",
    "dataset": "data/source/quinn/accounts.jsonl",
    "retention": "data/source/quinn/prose.txt",
}


def local_results(exported, monkeypatch, wish, mixed=False):
    """Of a model, a data set and text of this machine; `mixed`: with a data set of PyPI."""
    read = results(exported, monkeypatch)
    params = dict(read.params) | {"export": {"rows_in_card": wish}}
    for kind, id in PLACES.items():
        params[kind] = {"source": "local", "id": id, "revision": None}
    params["prepare"] = params["prepare"] | {"eval_file": "quinn/held-out.jsonl"}
    source = {"source": "local", "revision": None, "commit": None, "license": None}
    about = {kind: source | {"id": id} for kind, id in PLACES.items()}
    sample = dict.fromkeys(("set", "prompt", "reference", "base", "tuned"), ROW)
    sample |= {key: {"command_and_flags": 1.0} for key in ("base_scores", "tuned_scores")}
    if mixed:
        # The data set itself is public then, and what is mixed with it is not.
        mix = {"source": "local", "id": PLACES["dataset"], "revision": None, "share": 0.1}
        public = source | {"source": "pypi", "id": "rows"}
        params["dataset"] = public | {"mix": [mix]}
        params["prepare"] = params["prepare"] | {"eval_file": None}
        about["dataset"] = public | {"mix": [about["dataset"] | {"files": {}}], "files": {}}
    return replace(
        read,
        params=params,
        prepared=read.prepared | {"sample": {"row": "quinn/7", "pieces": [[ROW, True]]}},
        model_source=about["model"] | {"files": {"config.json": "c" * 64}},
        data_source={"files": {"quinn/accounts.jsonl": "d" * 64}} | about["dataset"],
        retention_source=about["retention"] | {"files": {"quinn/prose.txt": "e" * 64}},
        samples=[sample | {"row": "quinn/9"}],
    )


def test_card_of_several_towers_loads_them_all(exported, monkeypatch):
    read = results(exported, monkeypatch)
    for kind, loads in (("llama", "CausalLM"), ("gemma3", "ImageTextToText")):
        card = model_card(replace(read, model_type=kind))
        assert set(re.findall(r"AutoModelFor(\w+)", card)) == {loads}
        assert ("pipeline_tag: image-text-to-text" in card) == (kind == "gemma3")


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("wish", ["public", "never", "always"])
def test_card_shows_no_rows_and_no_places_of_a_local_data_set(exported, monkeypatch, wish, mixed):
    found = local_results(exported, monkeypatch, wish, mixed)
    card = model_card(found)
    for text in (*PLACES.values(), "data/source", "accounts.jsonl", "held-out.jsonl", "/home"):
        assert text not in card
    assert f"# tiny tuned on {'rows and ' * mixed}local data\n" in card
    assert (ROW in card) == (wish == "always")
    if wish != "always":
        assert "quinn" not in card
    # The report is whole and says so first.
    whole = page.to_markdown("t", report(found))
    assert whole.count(ROW) == 6
    assert all(f"`{place}`" in whole for place in PLACES.values())
    assert whole.split("\n\n")[2].startswith("This page contains rows of the data")
    assert "This page contains" not in card


@pytest.mark.parametrize(
    ("source", "wish", "shown"),
    [
        ({"source": "pypi"}, "public", True),
        ({"source": "pypi"}, "never", False),
        ({"source": "hub"}, "public", True),
        ({"source": "hub", "private": True}, "public", False),
        ({"source": "hub", "private": True}, "always", True),
        ({"source": "local"}, "public", False),
    ],
)
def test_rows_of_public_data_are_in_the_card(exported, monkeypatch, source, wish, shown):
    read = results(exported, monkeypatch)
    found = replace(
        read,
        params=read.params | {"export": {"rows_in_card": wish}},
        data_source=read.data_source | source,
    )
    card = model_card(found)
    assert (SHOWN_HOSTILE in card, "Answers to held-out prompts" in card) == (shown, shown)


def test_card_names_a_base_and_data_of_the_hub(tmp_path):
    folder = make_inputs(tmp_path / "ws")
    source = {"source": "hub", "revision": "main", "commit": "f" * 40, "license": None}
    model = source | {"id": "mistralai/Mistral-7B-v0.1", "files": {}}
    data = source | {"id": "mlabonne/guanaco-llama2-1k", "files": {}}
    replayed = source | {"id": "owner/general", "files": {"a.jsonl": "7" * 64}}
    data["mix"] = [replayed, replayed | {"source": "pypi", "id": "talk"}]
    for made, about in (("models/tokenizer", model), ("data/prepared", data)):
        write_json(folder / made / "source.json", about)
        write_sums(folder / made)
    assert run_export(folder).returncode == 0
    text = (folder / "models/release/README.md").read_text()
    card = ModelCard(text).data
    assert card.base_model == "mistralai/Mistral-7B-v0.1"
    assert card.datasets == ["mlabonne/guanaco-llama2-1k", "owner/general"]
    assert "Data, source 1: a.jsonl" in text
    assert card.license is None
    assert "f" * 40 in text
    assert os.path.getsize(folder / "metrics/report.html") < 500_000

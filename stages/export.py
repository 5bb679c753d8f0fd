"""Write the report, the model card and the release.

    python -m stages.export

Reads   models/merged (approved by models/verify.ok), metrics/*, and for provenance
        data/prepared, data/retention and models/tokenizer
Writes  models/release: the merged files, linked, with a model card and fresh SHA256SUMS,
        metrics/report.html, metrics/report.md, metrics/summary.json, metrics/memory.csv
"""

import csv
import io
import json
from pathlib import Path

from stages.shared.outputs import (
    SUMS,
    check_sums,
    link_or_copy,
    read_json,
    whole_folder,
    write_metrics,
    write_text,
)
from stages.shared.params import load_params
from stages.shared.process import begin

if __name__ == "__main__":
    begin("export")

from stages.reporting.model_card import model_card
from stages.reporting.page import to_html, to_markdown
from stages.reporting.report import report
from stages.reporting.results import Results, memory_parts, summary, title
from stages.shared.adapter_record import split_record, trained_here
from stages.shared.paths import MERGED, PREPARED, RETENTION, TOKENIZER

RELEASE = Path("models/release")
METRICS = Path("metrics")
INPUTS = {
    MERGED: "merge",
    PREPARED: "prepare",
    RETENTION: "fetch_retention",
    TOKENIZER: "fetch_model",
}
# Stage -> its file of costs and versions.
COSTS = {"quantize": "quantize", "train": "train", "evaluate": "eval", "merge": "merge"}


def read_results(params: dict, merged: Path) -> Results:
    """All inputs of the report; `params` as in params.yaml."""
    metrics = {
        name: read_json(METRICS / f"{name}.json")
        for name in (
            "data",
            "plan",
            "train",
            "train_cost",
            "answers",
            "eval",
            "eval_cost",
            "verify",
        )
    }
    curve = _csv(METRICS / "curve.csv")
    costs = {stage: read_json(METRICS / f"{name}_cost.json") for stage, name in COSTS.items()}
    if trained_here(read_json(merged / "merge.json"), metrics["train_cost"]):
        _, metrics["train_cost"] = split_record(metrics["train_cost"])
    else:
        metrics["train"], metrics["train_cost"], curve, costs["train"] = {}, {}, [], {}
    samples = (METRICS / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return Results(
        **metrics,
        params=params,
        prepared=read_json(PREPARED / "prepared.json"),
        data_source=read_json(PREPARED / "source.json"),
        model_source=read_json(TOKENIZER / "source.json"),
        retention_source=read_json(RETENTION / "source.json"),
        curve=curve,
        lengths=_csv(METRICS / "lengths.csv"),
        samples=[json.loads(line) for line in samples],
        made_with=costs,
        model_type=read_json(merged / "config.json")["model_type"],
        release_gb=sum(f.stat().st_size for f in merged.rglob("*") if f.is_file()) / 1e9,
    )


def link_files(source: Path, target: Path) -> int:
    """Link every file of `source` but its checksums into `target`; returns their number."""
    files = sorted(f for f in source.rglob("*") if f.is_file() and f != source / SUMS)
    for file in files:
        link_or_copy(file, target / file.relative_to(source))
    return len(files)


def csv_text(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_release(results: Results) -> int:
    """Write models/release; returns the number of linked files."""
    with whole_folder(RELEASE) as out:
        files = link_files(MERGED, out)
        (out / "README.md").write_text(model_card(results), encoding="utf-8")
    return files


def main() -> None:
    # A tracker changes no result.
    params = load_params().model_dump(exclude={"tracking"})
    for folder, stage in INPUTS.items():
        check_sums(folder, stage)
    results = read_results(params, MERGED)
    print(f"export: linking {results.release_gb:.2f} GB from {MERGED} into {RELEASE}")
    files = write_release(results)
    parts = memory_parts(results.plan, results.train_cost)
    write_text(METRICS / "memory.csv", csv_text(parts))
    heading, content = title(results), report(results)
    write_text(METRICS / "report.md", to_markdown(heading, content))
    write_text(METRICS / "report.html", to_html(heading, content))
    write_metrics(METRICS / "summary.json", summary(results))
    print(f"export: {files} files and README.md in {RELEASE}; report: {METRICS}/report.html")


if __name__ == "__main__":
    main()

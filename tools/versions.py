"""List results that were made with versions other than the installed ones.

    python -m tools.versions

Compares metrics/*_cost.json of each stage with this environment. A new library version does not
make a stage stale, so that an update does not force a training run; rerun what you want renewed.
Exit status: 0 all equal, 1 some differ, 2 nothing is recorded.
"""

import sys

from stages.shared.process import StageError
from stages.shared.provenance import versions
from stages.shared.screen import tell
from tools.revision import Revision
from tools.schemas import METRICS
from tools.screen import fail

# Stage -> the file of metrics/ that records its versions, in the order in which they run.
RECORDS = {
    "quantize": "metrics/quantize_cost.json",
    "train": "metrics/train_cost.json",
    "evaluate": "metrics/eval_cost.json",
    "merge": "metrics/merge_cost.json",
}


def differences(recorded: dict, installed: dict[str, str]) -> list[str]:
    """Differences, such as `torch 2.11.0, installed 2.13.0`."""
    return [
        f"{key.removesuffix('_version')} {recorded[key]}, installed {version}"
        for key, version in installed.items()
        if key in recorded and recorded[key] != version
    ]


def main() -> None:
    workspace, installed = Revision(None), versions()
    try:
        records = {stage: workspace.json(path, METRICS) for stage, path in RECORDS.items()}
    except StageError as error:
        fail("versions", error)
    if not any(records.values()):
        fail("versions", "no stage has recorded its versions here; run: dvc repro")
    found = {stage: differences(record or {}, installed) for stage, record in records.items()}
    found = {stage: lines for stage, lines in found.items() if lines}
    for stage, lines in found.items():
        tell(f"versions: {stage} was made with {'; '.join(lines)}")
    if not found:
        print("versions: every recorded result was made with the installed versions")
        return
    first = next(iter(found))
    print(f"versions: renew them with: dvc repro --force --single-item {first} && dvc repro")
    sys.exit(1)


if __name__ == "__main__":
    main()

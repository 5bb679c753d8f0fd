"""Change six modules that decide results, one small change at a time, and see a test fail.

    make mutants                               (an hour on one core)
    make mutants NAMES="gate splitting"        (some of them)
    make mutants NAMES="scoring --ending 147"  (those whose numbers end so: three in ten)

mutmut (https://mutmut.readthedocs.io) makes the changes, in copies of the project in .mutmut/, and
runs for each the tests that call the changed function. Counts go into
benchmarks/results/mutants.json, what no test noticed into .mutmut/NAME.diff, whose kinds
docs/benchmarks.md lists.
"""

import argparse
import datetime
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/mutants.json"
# Module -> its tests, all of which run in one process.
MODULES = {
    "tools/gate.py": ["test_gate_rules.py"],
    "stages/preparing/splitting.py": ["test_splitting.py"],
    "stages/verifying/agreement.py": ["test_agreement.py"],
    "stages/shared/scoring.py": ["test_scoring.py"],
    "stages/shared/merging.py": ["test_merging.py"],
    "stages/training/fused_lora.py": ["test_fused_lora.py"],
}
CONFIG = """
[tool.mutmut]
source_paths = ["stages", "tools"]
only_mutate = ["{module}"]
also_copy = {also}
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-m", "not gpu"]
# The tests of a change take seconds; one that never ends is given half a minute.
timeout_multiplier = 4.0
timeout_constant = 5.0
use_git_change_detection = false
"""


def copy_project(folder: Path, module: str, tests: list[str]) -> None:
    """The project as it is in the working tree, and mutmut's settings for one module."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in names.split("\0") if name and (ROOT / name).is_file()]
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    top = {name.split("/")[0] for name in names} - {"stages", "tools"}
    settings = CONFIG.format(
        module=module, also=json.dumps(sorted(top)), tests=json.dumps([f"tests/{t}" for t in tests])
    )
    with (folder / "pyproject.toml").open("a") as file:
        file.write(settings)


def mutate(module: str, tests: list[str], ending: str | None) -> dict:
    """Run the changes of one module; counts by what became of them."""
    name = Path(module).stem
    folder = ROOT / ".mutmut" / name
    shutil.rmtree(folder, ignore_errors=True)
    copy_project(folder, module, tests)
    mutmut = [str(Path(sys.executable).parent / "mutmut")]
    wanted = [f"*__mutmut_*{digit}" for digit in ending or ""]
    subprocess.run([*mutmut, "run", "--max-children", "1", *wanted], cwd=folder, check=True)
    meta = json.loads((folder / f"mutants/{module}.meta").read_text(encoding="utf-8"))
    found = {key: status_by_exit_code[code] for key, code in meta["exit_code_by_key"].items()}
    tried = {key: status for key, status in found.items() if status != "not checked"}
    left = [key for key, status in tried.items() if status not in ("killed", "timeout")]
    with (ROOT / f".mutmut/{name}.diff").open("w") as file:
        for key in left:
            show = subprocess.run(
                [*mutmut, "show", key], cwd=folder, capture_output=True, text=True
            )
            file.write(re.sub(r"(?m)^(---|\+\+\+) .*\n", "", show.stdout) + "\n")
    counts = Counter(tried.values())
    return {
        "changes": len(found),
        "tried": len(tried),
        "noticed": counts["killed"] + counts["timeout"],
        "of them by never ending": counts["timeout"],
        "left": len(left),
        "tests": tests,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    names = {Path(module).stem: module for module in MODULES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--ending", metavar="DIGITS", help="only numbers that end with one of them")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(names)}")
    for name in arguments.names or names:
        counts = mutate(names[name], MODULES[names[name]], arguments.ending)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        modules = results.get("modules", {}) | {names[name]: counts}
        content = {
            "modules": {module: modules[module] for module in MODULES if module in modules},
            "versions": {"mutmut": importlib.metadata.version("mutmut")},
        }
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{names[name]}: {counts['noticed']} of {counts['tried']} noticed")


if __name__ == "__main__":
    main()

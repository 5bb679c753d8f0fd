"""The room of a module says which stages use it: one stage's own, or shared/."""

import pytest
from source_code import code
from tiny import ROOT

STAGES = sorted(file.stem for file in (ROOT / "stages").glob("*.py") if file.stem != "__init__")
# Room -> the stages that may import from it. A stage with only its script has none.
ROOMS = {
    "fetching": {"fetch_data", "fetch_model", "fetch_retention"},
    "preparing": {"prepare"},
    "planning": {"plan"},
    "quantizing": {"quantize"},
    "training": {"train"},
    "evaluating": {"evaluate"},
    "merging": {"merge"},
    "verifying": {"verify"},
    "reporting": {"export"},
}
MODULES = sorted(
    file.relative_to(ROOT).as_posix()
    for file in (ROOT / "stages").glob("*/*.py")
    if file.stem != "__init__"
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_lies_with_those_who_use_it(module):
    users = {stage for stage in STAGES if module in code(stage)}
    room = module.split("/")[1]
    if room == "shared":
        assert len(users) >= 2, f"of {users or 'no stage'} alone: move it to that stage's room"
    else:
        strangers = users - ROOMS[room]
        assert not strangers, f"also of {strangers}: move it, or what they need of it, to shared/"
        assert users, "of no stage: delete it"


def test_rooms_hold_modules_alone():
    """Code in subfolders or in a room's __init__.py would run without being checked here."""
    folders = {file.parent.relative_to(ROOT / "stages") for file in (ROOT / "stages").rglob("*.py")}
    assert {folder.as_posix() for folder in folders} <= {".", "shared", *ROOMS}
    markers = [folder / "__init__.py" for folder in map((ROOT / "stages").joinpath, folders)]
    assert all(marker.read_bytes() == b"" for marker in markers)

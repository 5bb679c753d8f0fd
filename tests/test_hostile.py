"""A part of `make chaos`: files written to do harm (tests/hostile.py)."""

import json
import os
import random
import signal
import time
from collections import defaultdict

import hostile
import pytest

from stages.shared import bounded
from stages.shared.process import StageError
from stages.shared.screen import brief, on_screen

pytestmark = pytest.mark.slow

# Of each kind; those that refuse only a tokenizer or a template take seconds and have fewer.
TRIED = 12
SLOW_KINDS = {"mixture": 4, "template": 4, "tokenizer.json": 5, "Parquet": 6, "screen": 4}


def chosen() -> list[hostile.Hostile]:
    """Every kind by a draw that is the same each time."""
    kinds = defaultdict(list)
    for case in hostile.cases():
        kinds[case.kind].append(case)
    draw = random.Random(0)
    return [
        case
        for kind, cases in kinds.items()
        for case in draw.sample(cases, min(len(cases), SLOW_KINDS.get(kind, TRIED)))
    ]


def test_what_others_wrote_is_taken_or_refused_in_one_line(tmp_path):
    found = hostile.try_all(chosen(), tmp_path / "case")
    assert len(found) > 100
    faults = [f"{c.kind}: {c.name}: {o.fault} {o.said}" for c, o in found if o.fault]
    assert faults == []
    # Not everything may be refused.
    assert any(not outcome.said for _, outcome in found)


def raise_key_error(_):
    raise KeyError("x")


@pytest.mark.parametrize(
    ("run", "refused", "fault"),
    [
        (raise_key_error, None, "KeyError"),
        (lambda _: print("\x1b[2J"), None, "steers the screen"),
        (lambda _: print("a\nprepare: all is well"), None, "steers the screen"),
        (lambda _: time.sleep(30), None, "StageError: HANG: took more than"),
        (lambda _: None, True, "taken"),
    ],
)
def test_the_trial_sees_a_fault(run, refused, fault, tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, "MOST_SECONDS", 1.0)
    outcome = hostile.attempt(hostile.Hostile("x", "x", run, refused), tmp_path)
    assert outcome.fault.startswith(fault)


def test_a_screen_shows_one_line_that_steers_nothing():
    shown = on_screen(f"a{hostile.STEERING}\udcff\N{ZERO WIDTH SPACE}é漢")
    assert shown.isprintable()
    assert shown.startswith(
        "a\\x1b[2J\\x1b]0;own\\x07\\nprepare: all is well\\u2028\\u202e\\x9b31m"
    )
    assert shown.endswith("\\udcff\\u200bé漢")
    assert on_screen("x" * 5000) == "x" * 2000 + "…"


def test_brief_shows_what_has_no_end():
    bomb: list = ["x"]
    for _ in range(60):
        bomb = [bomb] * 9
    assert len(brief(bomb)) <= 60
    assert brief(16**5000) == "a number of thousands of digits"


def grow():
    content = b""
    while True:
        content += bytes(500_000_000)


def refuse():
    raise StageError("no")


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: time.sleep(60), "x: took more than 3 s; y"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "x: ended its process (SIGKILL); y"),
        (lambda: os._exit(3), "x: failed; y"),
        (refuse, "no"),
    ],
)
def test_work_that_takes_too_much_ends_in_one_line(work, message):
    with pytest.raises(StageError) as error:
        bounded.bounded(work, "x", "y", 1.0)
    assert str(error.value) == message


def test_computing_is_limited_though_there_is_patience(monkeypatch):
    monkeypatch.setattr(bounded, "PATIENCE", 100)
    with pytest.raises(StageError, match=r"^x: took more than 0.5 s; y$"):
        bounded.bounded(lambda: 9**9**9, "x", "y", 0.5)


def test_memory_is_limited(monkeypatch):
    monkeypatch.setattr(bounded, "BYTES", 1_000_000_000)
    with pytest.raises(StageError, match=r"^x: took more than 1 GB of memory; y$"):
        bounded.bounded(grow, "x", "y")


def test_work_gives_its_result_and_its_exceptions():
    assert bounded.bounded(lambda: {"a": [1]}, "x", "y") == {"a": [1]}
    with pytest.raises(json.JSONDecodeError) as error:
        bounded.bounded(lambda: json.loads("{"), "x", "y")
    assert "json.loads" in error.value.__notes__[0]

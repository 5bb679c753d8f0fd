"""A few of the kills of `make chaos`, one or more in every stage, at chosen and random instants."""

import random

import pytest
from kills import Target, stages
from tiny import ROOT

pytestmark = pytest.mark.slow

NAMES = list(stages(ROOT))


@pytest.mark.parametrize("name", NAMES)
def test_killed_stage_ends_like_an_undisturbed_one(finished, tmp_path, name):
    target = Target(finished, name, tmp_path / "ws")
    draw = random.Random(name)
    kill = target.kill_at(draw.choice(target.chosen(8)[:-1]))
    assert kill.counted
    assert kill.identical, kill


@pytest.mark.parametrize("name", ["prepare", "train"])
def test_stage_killed_at_a_moment_ends_like_an_undisturbed_one(finished, tmp_path, name):
    target = Target(finished, name, tmp_path / "ws")
    kill = target.kill_after(random.Random(name).uniform(0.1, target.seconds / 2))
    assert kill.counted
    assert kill.identical, kill

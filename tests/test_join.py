"""What a machine that joins, and the first one, make of what the other says."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from hostile import RAW, STEERING, VALUES

from stages.shared import ranks
from stages.shared.process import StageError
from stages.shared.ranks import put
from stages.training import machines
from stages.training.machines import Devices, Facts, Part, how_many, said, where
from tools import join

PART = {"first": 1, "count": 1, "size": 2, "key": "0123456789abcdef"}


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


@pytest.mark.parametrize("content", RAW.values(), ids=RAW)
@pytest.mark.parametrize("schema", [Facts, Part, Devices], ids=["facts", "part", "devices"])
def test_what_is_no_json_of_its_kind_is_refused(store, schema, content):
    store.set("x", content)
    if content == b"null" or (content == RAW["100,000 keys"] and schema is Facts):
        return
    with pytest.raises(StageError, match=r"^the other machine's x: ") as error:
        said(store, "x", schema)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("key", PART)
def test_a_part_of_wrong_values_is_refused(store, key, value):
    put(store, "x", PART | {key: value})
    if value == 0 and value is not False and key in ("first", "count"):
        return
    with pytest.raises(StageError, match=f"^the other machine's x: {key}: "):
        said(store, "x", Part)


def test_a_part_names_no_folder_but_its_own(store):
    for key in ("../../etc", "/etc", "0123456789abcdef\n", "0123456789ABCDEF", "."):
        put(store, "x", PART | {"key": key})
        with pytest.raises(StageError, match=r"^the other machine's x: key: "):
            said(store, "x", Part)
    put(store, "x", PART)
    assert said(store, "x", Part).model_dump() == PART


def test_nothing_yet_is_none(store):
    assert said(store, "x", Facts) is None


@pytest.fixture
def inputs(monkeypatch, tmp_path) -> dict[str, str]:
    """The facts of this machine, in a folder with a dvc.lock."""
    found = {"commit": "a", "data/prepared": "b", "models/quantized": "c"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(join, "load_params", lambda: None)
    monkeypatch.setattr(join, "describe", lambda _: found)
    (tmp_path / "dvc.lock").write_text("stages: {}\n")
    return found


@pytest.mark.parametrize("lock", ["<html>", STEERING, "stages: 5\n", "a: \ud800"])
def test_no_other_dvc_lock_than_a_good_one_is_taken(store, inputs, lock):
    put(store, "lock", lock)
    with pytest.raises(StageError, match=r"^the other machine's dvc.lock"):
        join.pull(store, inputs | {"data/prepared": "z"})
    assert Path("dvc.lock").read_text() == "stages: {}\n"


def test_what_cannot_be_pulled_leaves_dvc_lock_as_it_was(store, inputs):
    put(store, "lock", "stages: {prepare: {cmd: x}}\n")
    with pytest.raises(StageError, match="cannot be pulled"):
        join.pull(store, inputs | {"data/prepared": "z"})
    assert Path("dvc.lock").read_text() == "stages: {}\n"


@pytest.mark.parametrize(
    "first", [{}, {STEERING: "x"}, {"commit": "other"}, {"data/prepared": "b"}], ids=str
)
def test_nothing_is_pulled_for_a_machine_that_differs_in_more(store, inputs, first, monkeypatch):
    monkeypatch.setattr(join.subprocess, "run", None)
    join.pull(store, first)
    monkeypatch.setattr(machines, "describe", lambda _: inputs)
    monkeypatch.setattr(machines, "load_params", lambda: None)
    with pytest.raises(StageError, match=r"^the first machine differs in "):
        machines.check_same(first)


@pytest.mark.parametrize(
    ("variable", "function", "most"),
    [("RANK", how_many, 10**5), ("MACHINES", how_many, 10**5), ("WORLD_SIZE", how_many, 10**5),
     ("MASTER_PORT", where, 65535)],
)  # fmt: skip
@pytest.mark.parametrize("text", ["two", "-2", "1.0", "²", " 1", "9" * 18, "9" * 5000, "\x1b[2J"])
def test_a_schedulers_variable_that_is_no_number_is_refused(
    monkeypatch, variable, function, most, text
):
    for name in ("RANK", "MACHINES", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, text)
    with pytest.raises(StageError, match=rf"^{variable} is .* but must be a whole number") as error:
        function()
    assert f"to {most:,}" in str(error.value)
    monkeypatch.setenv(variable, "")
    function()


@pytest.mark.parametrize("text", ["host", ":1", "host:", "host:0", "host:65536", "host:-1", "h:²"])
def test_an_address_that_is_none_is_refused(text):
    with pytest.raises(StageError, match="is not HOST:PORT"):
        join.parse(text)


def test_the_reason_for_waiting_is_told(capfd, monkeypatch):
    """Once each: nobody listens, no such host, something else answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert join.why_not("127.0.0.1", port) == "what answers there is no training run"
    assert join.why_not("127.0.0.1", port) == os.strerror(111)
    assert join.why_not("a" * 300, port)
    answers = iter([ConnectionError(), ConnectionError(), "store"])

    def connect(*_, **__):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(join, "connect", connect)
    monkeypatch.setattr(join.time, "sleep", lambda _: None)
    assert join.find("127.0.0.1", port) == "store"
    assert capfd.readouterr().out.splitlines() == [
        f"join: waiting for a training run at 127.0.0.1:{port}",
        f"join: still waiting: {os.strerror(111)}",
    ]


def test_who_accepts_and_says_nothing_is_not_waited_for(monkeypatch, capfd):
    """torch alone would wait for ever."""
    monkeypatch.setattr(ranks, "ANSWER_SECONDS", 0.2)
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ranks.Silent) as error:
            ranks.connect("127.0.0.1", port, seconds=0.2)
    for thread in set(threading.enumerate()) - before:
        thread.join(30)

    def connect(*_, **__):
        raise error.value

    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(join, "connect", connect)
    monkeypatch.setattr(join, "load_params", lambda: None)
    monkeypatch.setattr(join.os, "_exit", end)
    monkeypatch.setattr("sys.argv", ["join", f"127.0.0.1:{port}"])
    capfd.readouterr()
    with pytest.raises(Ended, match="1"):
        join.main()
    assert capfd.readouterr().err.splitlines() == [
        f"join: what listens at 127.0.0.1:{port} does not answer and is no training run; check the "
        "address that the first machine prints"
    ]


def test_what_the_other_says_steers_no_screen(monkeypatch):
    def differ(_):
        raise StageError(f"the first machine differs in {STEERING}")

    monkeypatch.setattr(join, "take_part", differ)
    monkeypatch.setattr("sys.argv", ["join"])
    with pytest.raises(SystemExit) as ended:
        join.main()
    assert str(ended.value.code).isprintable()


def test_only_numbers_of_devices_count(store, monkeypatch):
    monkeypatch.setattr(machines, "host", lambda *_, **__: store)
    monkeypatch.setattr(machines, "recorded", lambda: "")
    store.set("machine 1", json.dumps(10**400))
    with pytest.raises(StageError, match=r"^the other machine's machine 1: "):
        machines.wait_for(2, {})


def test_ctrl_c_while_libraries_load_is_one_line():
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.join", "localhost:1"],
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "join: interrupted\n"
    assert process.returncode == 1

"""The Hub through the real huggingface_hub, in other processes, with a server of our own."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_server import Hub, Repo
from tiny import ROOT

from stages.shared.dataset_card import license_in, read_card
from stages.shared.foreign import check_name
from stages.shared.hub import Repository
from stages.shared.process import StageError
from stages.shared.sources import Folder, copy_license, package, write_source

pytestmark = pytest.mark.slow

A, B = "a" * 40, "b" * 40
BIG = bytes(range(256)) * 100_000
TOKEN = "hf_thisTokenMustNeverBeShown"
NO_SOCKETS = """
import sys
def forbid(event, args):
    if event == "socket.__new__":
        raise RuntimeError("a socket was opened")
sys.addaudithook(forbid)
"""
# Looks every repository up and downloads it; prints one line for each.
FETCH = """
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from stages.shared.sources import open_source
from stages.shared.outputs import whole_folder
from stages.shared.process import StageError
# A shell that puts a job into the background has it ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number, (kind, id, revision) in enumerate(map(str.split, sys.argv[2:])):
    try:
        source = open_source(kind, SimpleNamespace(source="hub", id=id, revision=revision))
        with whole_folder(Path(sys.argv[1], str(number)), resume_key=source.commit) as out:
            source.get(list(source.files), out)
        print("ok", source.commit, source.license)
    except StageError as error:
        print(error)
"""


def environment(endpoint: str, **others: str) -> dict:
    return os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
        **others,
    }


def start(endpoint, out, *repositories, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, str(out), *repositories],
        env=environment(endpoint, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def no_sockets(folder) -> str:
    """A PYTHONPATH under which opening a socket is an error."""
    (folder / "sitecustomize.py").write_text(NO_SOCKETS)
    return f"{folder}:{ROOT}"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the driver prints for every case of `ANSWERS`, from one process without a token and
    one with a token."""
    with Hub() as hub:
        hub.models["owner/open"] = Repo({"config.json": b"{}", "x.safetensors": b"\1\2"}, A)
        hub.models["owner/gated"] = Repo({"config.json": b"{}"}, A, gated=True)
        hub.models["owner/escape"] = Repo({"../../evil.json": b"{}"}, A)
        hub.datasets["rows"] = Repo({"data/[a]*.jsonl": b'{"text": "a"}\n'}, B, license=None)
        printed = {}
        for token in ("", TOKEN):
            out = tmp_path_factory.mktemp("answers")
            process = start(hub.url, out, *[case[0] for case in ANSWERS], HF_TOKEN=token)
            text, _ = process.communicate(timeout=60)
            requests, hub.requests = hub.requests, []
            printed[token] = SimpleNamespace(text=text, out=out, requests=requests)
        return printed


ANSWERS = [
    (f"model owner/open {A}", f"ok {A} apache-2.0"),
    ("model owner/open main", f"ok {A} apache-2.0"),
    (f"dataset rows {B}", f"ok {B} None"),
    (
        f"model owner/gated {A}",
        "owner/gated is gated: accept its licence at https://huggingface.co/owner/gated and set "
        "HF_TOKEN to your token",
    ),
    (
        f"model owner/missing {A}",
        "owner/missing is not a model on the Hub, or is private; correct model.id, or set HF_TOKEN "
        "to a token that may read https://huggingface.co/owner/missing",
    ),
    (
        f"dataset owner/missing {A}",
        "owner/missing is not a dataset on the Hub, or is private; correct dataset.id, or set "
        "HF_TOKEN to a token that may read https://huggingface.co/datasets/owner/missing",
    ),
    (
        f"model owner/open {B}",
        f"owner/open has no revision {B}; see https://huggingface.co/owner/open/commits/main",
    ),
    ("model a/b/c main", "model.id: 'a/b/c' is not a Hugging Face id like owner/name"),
    (
        f"model owner/escape {A}",
        "owner/escape: the file name '../../evil.json' leads out of its folder",
    ),
]


@pytest.mark.parametrize("token", ["", TOKEN], ids=["anonymous", "token"])
def test_every_answer_of_the_hub_is_one_line(answers, token):
    lines = answers[token].text.splitlines()
    warning = f"warning: owner/open: main may move; pin it in params.yaml as model.revision: {A}"
    assert lines.count(warning) == 1
    assert [line for line in lines if line != warning] == [case[1] for case in ANSWERS]
    assert TOKEN not in answers[token].text


def test_only_the_files_are_left(answers):
    out = answers[TOKEN].out
    assert sorted(p.name for p in (out / "0").rglob("*")) == [
        "SHA256SUMS",
        "config.json",
        "x.safetensors",
    ]
    assert (out / "2/data/[a]*.jsonl").read_bytes() == b'{"text": "a"}\n'
    assert not any(TOKEN in p.read_text("latin-1") for p in out.rglob("*") if p.is_file())


def test_the_token_goes_to_the_hub_and_nowhere_else(answers):
    shown = {
        (request.token, request.path.startswith("/elsewhere/"))
        for request in answers[TOKEN].requests
    }
    assert shown == {(f"Bearer {TOKEN}", False), (None, True)}


def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path):
    part = tmp_path / f".0.partial-{A}/x.safetensors.part"
    with Hub() as hub:
        hub.models["owner/big"] = Repo({"config.json": b"{}", "x.safetensors": BIG}, A)
        # Cut, and then out of service: the stage ends.
        hub.faults = ["12000000", "503"]
        text, _ = start(hub.url, tmp_path, f"model owner/big {A}").communicate(timeout=60)
        line = text.splitlines()[-1]
        assert line == "owner/big: the Hub answered 503; the downloaded part is kept, run again"
        first = part.stat().st_size
        assert first >= 10_000_000
        # Taken up, and killed while the connection hangs.
        hub.faults = ["12000000 stall"]
        process = start(hub.url, tmp_path, f"model owner/big {A}")
        deadline = time.monotonic() + 60
        while part.stat().st_size == first and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        second = part.stat().st_size
        assert second > first
        text, _ = start(hub.url, tmp_path, f"model owner/big {A}").communicate(timeout=60)
        assert text.splitlines()[-1] == f"ok {A} apache-2.0"
        assert [request.start for request in hub.of("x.safetensors")] == [0, first, first, second]
        assert len(hub.of("config.json")) == 1
    assert (tmp_path / "0/x.safetensors").read_bytes() == BIG
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0"]


def test_ctrl_c_does_not_wait_for_the_download(tmp_path):
    with Hub() as hub:
        hub.models["owner/big"] = Repo({"x.safetensors": b"\1\2"}, A)
        hub.faults = ["1 stall"]
        process = start(hub.url, tmp_path, f"model owner/big {A}")
        deadline = time.monotonic() + 60
        while not hub.requests and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        # The server keeps the connection for 60 seconds.
        text, _ = process.communicate(timeout=30)
    assert text.splitlines()[-1] == "KeyboardInterrupt"


def test_a_download_that_would_not_fit_is_not_begun(tmp_path):
    with Hub() as hub:
        huge = Repo({"x.safetensors": b"\1\2"}, A, sizes={"x.safetensors": 10**14})
        hub.models["owner/huge"] = huge
        text, _ = start(hub.url, tmp_path, f"model owner/huge {A}").communicate(timeout=60)
        assert text.startswith("owner/huge: 100000.0 GB to download, ")
        assert len(text.splitlines()) == 1
        assert hub.requests == []


def test_a_damaged_file_is_not_kept(tmp_path):
    with Hub() as hub:
        hub.models["owner/x"] = Repo({"a.json": b"[1, 2]", "x.safetensors": b"\1\2"}, A)
        hub.faults = ["flip"]
        text, _ = start(hub.url, tmp_path, f"model owner/x {A}").communicate(timeout=60)
        assert (
            text.strip() == "owner/x: x.safetensors arrived damaged (its hash differs); run again"
        )
        hub.faulty, hub.faults = ".json", ["flip"]
        (tmp_path / f".0.partial-{A}/a.json").unlink(missing_ok=True)
        text, _ = start(hub.url, tmp_path, f"model owner/x {A}").communicate(timeout=60)
        assert text.strip() == "owner/x: a.json arrived damaged (its hash differs); run again"
        hub.faults = ["long"]
        text, _ = start(hub.url, tmp_path, f"model owner/x {A}").communicate(timeout=60)
        assert text.strip() == "owner/x: the Hub's answer has the wrong length; run again"
        text, _ = start(hub.url, tmp_path, f"model owner/x {A}").communicate(timeout=60)
        assert text.strip() == f"ok {A} apache-2.0"
        assert (tmp_path / "0/a.json").read_bytes() == b"[1, 2]"


@pytest.mark.parametrize("damaged", [b"", b"\1", b"\1\0", b"\0\0\0"])
def test_a_file_that_a_switched_off_machine_lost_is_fetched_again(tmp_path, damaged):
    """Its name reached the disk and its bytes did not."""
    files = {"a.json": b"[1, 2]", "x.safetensors": b"\1\2"}
    partial = tmp_path / f".0.partial-{A}"
    partial.mkdir()
    for name in files:
        (partial / name).write_bytes(damaged)
    with Hub() as hub:
        hub.models["owner/x"] = Repo(files, A)
        text, _ = start(hub.url, tmp_path, f"model owner/x {A}").communicate(timeout=60)
    assert text.strip() == f"ok {A} apache-2.0"
    assert {name: (tmp_path / "0" / name).read_bytes() for name in files} == files


def test_no_connection_is_one_line(tmp_path):
    with Hub() as hub:
        closed = hub.url
    text, _ = start(closed, tmp_path, f"model owner/x {A}").communicate(timeout=60)
    assert text.strip() == (
        "owner/x: the connection to the Hub failed; the downloaded part is kept, run again"
    )


def test_offline_takes_the_cache_and_opens_no_socket(tmp_path):
    cache = tmp_path / "home/hub/models--owner--cached"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / A).mkdir(parents=True)
    (cache / "blobs/1").write_bytes(b"{}")
    (cache / "snapshots" / A / "config.json").symlink_to("../../blobs/1")
    process = start(
        "http://127.0.0.1:9",
        tmp_path / "out",
        f"model owner/cached {A}",
        f"model owner/cached {B}",
        HF_HOME=str(tmp_path / "home"),
        HF_HUB_OFFLINE="1",
        PYTHONPATH=no_sockets(tmp_path),
    )
    text, _ = process.communicate(timeout=60)
    assert text.splitlines() == [
        f"ok {A} None",
        f"owner/cached: HF_HUB_OFFLINE is set and {B} is not in the Hugging Face cache; with "
        f"a network, run: hf download owner/cached --repo-type model --revision {B}",
    ]
    copied = tmp_path / "out/0/config.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == b"{}"


def test_the_guard_against_sockets_works(tmp_path):
    text, _ = start(
        "http://127.0.0.1:9", tmp_path, f"model owner/x {A}", PYTHONPATH=no_sockets(tmp_path)
    ).communicate(timeout=60)
    assert "a socket was opened" in text


@pytest.mark.parametrize(
    ("private", "gated", "expected"),
    [(False, False, None), (True, False, True), (False, "auto", True)],
)
def test_the_record_says_when_not_everybody_may_read(
    private, gated, expected, tmp_path, monkeypatch
):
    info = SimpleNamespace(sha="c" * 40, siblings=[], card_data=None)
    info.private, info.gated = private, gated
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: info)
    repository = Repository("dataset", "org/rows", "main")
    records = []
    for revision in ("main", "c" * 40):
        section = SimpleNamespace(source="hub", id="org/rows", revision=revision)
        write_source(tmp_path, section, repository.commit, None, {}, repository.private)
        records.append((tmp_path / "source.json").read_bytes())
        (tmp_path / "source.json").unlink()
    assert json.loads(records[0]).get("private") is expected
    # What follows does not run again when the branch is pinned.
    assert records[0] == records[1]


def test_links(tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text("{}")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}")
    (folder / "again.jsonl").symlink_to("rows.jsonl")
    stored = tmp_path / "cache/files/md5/12" / ("3" * 30)
    stored.parent.mkdir(parents=True)
    stored.write_text("{}")
    (folder / "tracked.jsonl").symlink_to(stored)
    assert list(Folder(folder).files) == ["again.jsonl", "rows.jsonl", "tracked.jsonl"]
    (folder / "out.jsonl").symlink_to(secret)
    with pytest.raises(StageError, match=r"out\.jsonl is a link to .*secret\.jsonl, outside"):
        Folder(folder)
    with pytest.raises(StageError, match="is a link to"):
        Folder(folder / "out.jsonl")
    (folder / "out.jsonl").unlink()
    (folder / "up").symlink_to(tmp_path)
    with pytest.raises(StageError, match="up is a link to"):
        Folder(folder)


def test_a_copy_shares_nothing_with_the_original(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jsonl").write_text("{}")
    Folder(tmp_path / "a").get(["x.jsonl"], tmp_path / "b")
    assert (tmp_path / "a/x.jsonl").stat().st_nlink == 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\\..\\x", ""])
def test_names_that_lead_out_are_refused(name):
    with pytest.raises(StageError, match="leads out of its folder"):
        check_name(name, "x")


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "a\u2028b", "a\x1b[2Jb", "a\udcffb"])
def test_names_that_a_list_of_checksums_cannot_hold_are_refused(name):
    with pytest.raises(StageError, match="contains a line end, a control character or bytes"):
        check_name(name, "x")


def make_package(folder, name: str, files: dict[str, bytes], metadata: str = "License: MIT\n"):
    """An installed package that importlib.metadata finds when `folder` is on sys.path."""
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}"
    files = files | {f"{info}/METADATA": head.encode(), f"{info}/LICENSE.txt": b"MIT"}
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    (folder / info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_packages(tmp_path, monkeypatch):
    make_package(tmp_path, "a-package", {"a_package/__init__.py": b"raise SystemExit('imported')"})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert copy_license(package("a-package", "1.0"), tmp_path) == "MIT"
    assert (tmp_path / "LICENSE").read_bytes() == b"MIT"
    (tmp_path / "requirements-default.lock").write_text("a-package==2.0 \\\n  --hash=sha256:0\n")
    with pytest.raises(StageError) as error:
        package("a-package", "2.0")
    assert str(error.value) == (
        "the package a-package is 1.0, but params.yaml says 2.0; run: "
        "pip install --no-deps --require-hashes -r requirements-default.lock"
    )
    with pytest.raises(StageError) as error:
        package("none-such", "2.0")
    assert str(error.value) == (
        "the package none-such is not installed; run: pip install --no-deps none-such==2.0"
    )


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: mit\n---\n# X", "mit"),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("# X", None),
        ("---\n- a\n---\n", None),
        ("---\n{ not yaml\n---\n", None),
        ("---\nlicense: mit", None),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: 2023-02-30\n---\n", None),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", None),
        (b"---\nlicense: mit\n---\n\xff", None),
    ],
)
def test_the_licence_in_a_card(tmp_path, text, license):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "README.md").write_bytes(data)
    assert license_in(read_card(tmp_path)) == license

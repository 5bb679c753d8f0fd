"""fetch_data: what it accepts from each source, what it refuses, and that its bytes are stable."""

import hashlib
import json
import subprocess
import sys

import pytest
from hub_server import Hub, Repo
from test_hub import NO_SOCKETS, environment
from tiny import ROOT, make_workspace

from stages import fetch_data
from stages.fetching import data_files
from stages.fetching.azure_cli import azure_examples
from stages.fetching.chatterbot_corpus import dialogs
from stages.shared.dataset_card import known_of
from stages.shared.outputs import check_sums
from stages.shared.params import Source
from stages.shared.process import StageError
from stages.shared.sources import Folder

COMMIT = "d" * 40
ROW = b'{"text": "a"}\n'


def make(folder, *names: str, content: bytes = ROW):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def section_of():
    """A function that makes the params section `dataset`."""

    def of(source: str = "local", id: str = "data/source", **others) -> Source:
        keys = {"source": source, "id": id, "revision": None, "config": None, "split": None}
        return Source(**(keys | others))

    return of


@pytest.mark.parametrize("id", ["data/source/rows.jsonl", "data/source"])
def test_a_local_source_is_copied(tmp_path, monkeypatch, id):
    workspace = make_workspace(tmp_path / "work", dataset={"id": id})
    monkeypatch.chdir(workspace)
    make(workspace / "data/source", "b/more.csv.gz", "b/.hidden.json", "notes.png")
    fetch_data.main()
    raw = workspace / "data/raw"
    names = {"rows.jsonl"} if id.endswith("jsonl") else {"rows.jsonl", "b/more.csv.gz", "README.md"}
    found = {p.relative_to(raw).as_posix() for p in raw.rglob("*") if p.is_file()}
    assert found == names | {"source.json", "SHA256SUMS"}
    for name in names:
        assert (raw / name).read_bytes() == (workspace / "data/source" / name).read_bytes()
    check_sums(raw, "fetch_data")
    record = json.loads((raw / "source.json").read_text())
    sums = {n: hashlib.sha256((raw / n).read_bytes()).hexdigest() for n in sorted(names)}
    assert record == {
        "source": "local",
        "id": id,
        "revision": None,
        "commit": None,
        "license": None,
        "files": sums,
    }
    assert not (workspace / "data/source/rows.jsonl").stat().st_nlink > 1


def test_files_that_are_left_out_are_named(tmp_path, monkeypatch, capsys):
    workspace = make_workspace(tmp_path / "work", dataset={"id": "data/source"})
    monkeypatch.chdir(workspace)
    make(workspace / "data/source", "b/state.json", "notes.txt", *(f"z{i}.png" for i in range(9)))
    fetch_data.main()
    said = capsys.readouterr().out
    assert "fetch_data: left out: b/state.json, notes.txt, texts.txt, z0.png, z1.png, …\n" in said


REFUSED = [
    (["a.zip"], "data/source: a.zip is an archive; unpack it into data/source and set"),
    (["rows.jsonl", "x/a.tar.gz"], "data/source: x/a.tar.gz is an archive"),
    (["a.TGZ"], "data/source: a.TGZ is an archive"),
    (["a.pkl"], "data/source has no data files (jsonl, ndjson, json, csv, tsv or parquet"),
    ([".hidden.jsonl"], "data/source has no data files"),
    (["dataset_infos.json", "b/source.json"], "data/source has no data files"),
    (["rows.py"], "data/source is built by a script, and no code from a data set is run"),
]


@pytest.mark.parametrize(("names", "message"), REFUSED)
def test_a_local_source_is_refused_in_one_line(tmp_path, section_of, names, message):
    with pytest.raises(StageError) as error:
        data_files.data_files(Folder(make(tmp_path, *names)).files, section_of())
    assert str(error.value).startswith(message)


def test_an_archive_on_the_hub_is_left_there(tmp_path, section_of):
    files = Folder(make(tmp_path, "rows.jsonl", "images.zip")).files
    hub = section_of("hub", "owner/data", revision="main")
    assert data_files.data_files(files, hub) == ["rows.jsonl"]


def test_a_source_that_does_not_exist(tmp_path, monkeypatch):
    workspace = make_workspace(tmp_path / "work", dataset={"id": "data/source/none.jsonl"})
    monkeypatch.chdir(workspace)
    with pytest.raises(StageError, match=r"^dataset\.id: data/source/none\.jsonl does not exist$"):
        fetch_data.main()


def test_a_link_out_of_the_source(tmp_path, monkeypatch):
    workspace = make_workspace(tmp_path / "work", dataset={"id": "data/source"})
    monkeypatch.chdir(workspace)
    (workspace / "data/source/x.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(StageError, match=r"x\.jsonl is a link to /etc/passwd, outside"):
        fetch_data.main()
    assert not (workspace / "data/raw").exists()


NAMES = ["train.jsonl", "en/train-0.parquet", "en/test-0.parquet", "de/deep/train.csv", "a[1].json"]
EN = {"config_name": "en", "data_files": [{"split": "train", "path": "en/train-*"}]}
DE = {"config_name": "de", "data_dir": "de"}
CONFIGURATIONS = [
    (None, None, NAMES),
    ([EN], None, NAMES[1:2]),
    ([EN, DE | {"default": True}], None, NAMES[3:4]),
    ([EN, DE], "en", NAMES[1:2]),
    ([{"config_name": "default", "data_files": "*.jsonl"}, DE], None, NAMES[:1]),
    ([{"config_name": "x", "data_files": ["./train.jsonl", "de/**/*.csv"]}], "x", NAMES[:4:3]),
    ([{"config_name": "x", "data_files": "**/train*"}], "x", [*NAMES[:2], NAMES[3]]),
    (
        [
            {
                "config_name": "x",
                "data_files": [
                    {"split": "train", "path": ["train.jsonl", "en/train-0.parquet"]},
                    {"split": "test", "path": "en/test-*"},
                ],
            }
        ],
        "x",
        NAMES[:3],
    ),
    (["not a mapping"], None, NAMES),
    ("not a list", None, NAMES),
    ([{"config_name": "x", "data_files": None, "data_dir": None}], None, NAMES),
    ([{"config_name": "x", "data_files": [{"split": "train"}]}], None, "data: no file matches"),
    ([{"config_name": 2024, "data_files": [{"split": 1, "path": "a*"}]}], "2024", NAMES[4:]),
    ([EN, DE], "fr", "dataset.config: data has no configuration fr; its README.md lists: en, de"),
    ([EN, DE], None, "dataset.config: data has no configuration default; its README.md lists: en,"),
    (None, "en", "dataset.config: data has no configuration en; its README.md lists: none"),
    (
        [{"config_name": "x", "data_files": "nothing/*"}],
        "x",
        "data: no file matches nothing/*, as its README.md lists; name another configuration",
    ),
]


@pytest.mark.parametrize(("configs", "config", "expected"), CONFIGURATIONS)
def test_the_configuration_chooses_the_files(section_of, configs, config, expected):
    card, _ = known_of({"configs": configs} if configs else {})
    hub = section_of("hub", "data", revision="main", config=config)
    if isinstance(expected, list):
        assert data_files.of_configuration(NAMES, card, hub) == expected
    else:
        with pytest.raises(StageError) as error:
            data_files.of_configuration(NAMES, card, hub)
        assert str(error.value).startswith(expected)


@pytest.mark.slow
def test_the_stage_downloads_a_configuration_from_the_hub(tmp_path):
    readme = (
        b"---\nlicense: mit\nconfigs:\n- config_name: en\n  data_files: data/en-*\n---\n# Rows\n"
    )
    files = {
        "README.md": readme,
        "LICENSE": b"MIT",
        "data/en-0.jsonl": ROW,
        "data/de-0.jsonl": ROW,
        "load.py": b"raise SystemExit('ran')",
        ".dvcignore": b"*",
    }
    dataset = {"source": "hub", "id": "owner/rows", "revision": COMMIT, "config": "en"}
    workspace = make_workspace(tmp_path / "work", dataset=dataset)
    with Hub(datasets={"owner/rows": Repo(files, COMMIT, license="mit")}) as hub:
        run = subprocess.run(
            [sys.executable, "-m", "stages.fetch_data"],
            cwd=workspace,
            env=environment(hub.url, PYTHONPATH=""),
            capture_output=True,
            text=True,
        )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "fetch_data: fetching 1 files of owner/rows, 0.00 MB",
        "fetch_data: left out: data/de-0.jsonl, load.py, .dvcignore",
        "fetch_data: 0.00 MB in data/raw",
    ]
    raw = workspace / "data/raw"
    names = ["LICENSE", "README.md", "data/en-0.jsonl"]
    found = {p.relative_to(raw).as_posix() for p in raw.rglob("*") if p.is_file()}
    assert found == {*names, "source.json", "SHA256SUMS"}
    assert all((raw / name).read_bytes() == files[name] for name in names)
    record = json.loads((raw / "source.json").read_text())
    assert (record["commit"], record["license"]) == (COMMIT, "mit")


@pytest.mark.slow
def test_each_source_of_a_mix_has_a_folder_and_what_came_is_not_fetched_again(tmp_path):
    rows = [b'{"text": "%s"}\n' % (b"a" * size) for size in (40, 400_000)]
    entry = {"source": "hub", "config": None, "split": None, "share": 0.1}
    entry |= {"format": "auto", "columns": None}
    mix = [
        entry | {"id": "owner/small", "revision": COMMIT},
        entry | {"id": "owner/large", "revision": "main"},
    ]
    workspace = make_workspace(tmp_path / "work", dataset={"mix": mix})
    repos = {
        f"owner/{name}": Repo({"train.jsonl": content}, commit * 40)
        for name, content, commit in zip(("small", "large"), rows, "de", strict=True)
    }
    with Hub(datasets=repos, faults=["", "503"], faulty=".jsonl") as hub:
        runs = [
            subprocess.run(
                [sys.executable, "-m", "stages.fetch_data"],
                cwd=workspace,
                env=environment(hub.url, PYTHONPATH=""),
                capture_output=True,
                text=True,
            )
            for _ in range(2)
        ]
        asked = [
            (each.path.split("/")[3], each.start) for each in hub.requests if "resolve" in each.path
        ]
    assert [run.returncode for run in runs] == [1, 0], runs
    assert f"dataset.mix.revision: {'e' * 40}" in runs[1].stdout + runs[1].stderr
    assert asked == [("small", 0), ("large", 0), ("large", 0)]
    raw = workspace / "data/raw"
    found = {p.relative_to(raw).as_posix() for p in raw.rglob("*") if p.is_file()}
    files = {f"source_{i}/source.json" for i in range(3)}
    files |= {"source_0/rows.jsonl", "source_1/train.jsonl", "source_2/train.jsonl"}
    assert found == files | {"SHA256SUMS"}
    for number, content in enumerate(rows, 1):
        assert (raw / f"source_{number}/train.jsonl").read_bytes() == content
        record = json.loads((raw / f"source_{number}/source.json").read_text())
        assert record["commit"] == "de"[number - 1] * 40
        assert record["files"] == {"train.jsonl": hashlib.sha256(content).hexdigest()}
    check_sums(raw, "fetch_data")


DIALOGS = """
categories:
- small talk
- chat
conversations:
- - 'Hello '
  - Hi
  - How are you?
- - Hello
  - Good day
- - Is it 1963?
  - 1963
- - What is this?
  - |
    Two
      lines
- - Alone
"""


def test_the_dialogs_of_chatterbot_corpus(tmp_path):
    make(tmp_path, "b.yml", content=DIALOGS.encode())
    make(tmp_path, "a.yml", content=b"categories: [x]\nconversations: [[Hello, first]]")
    assert dialogs(tmp_path) == [
        {"prompt": "Hello", "completion": "first", "group": "x"},
        {"prompt": "What is this?", "completion": "Two\n  lines", "group": "small talk"},
    ]


HELP = '''
raise SystemExit("imported")
helps["vm"] = """
type: group
"""
helps["vm create"] = """
examples:
  - name: Create a VM. (autogenerated)
    text: |
        az vm create -n a \\\\
            --image b
  - name: Create it again.
    text: az vm create -n a
        --image c
  - name: CreateVm
    text: az vm create -n one-word
  - name: Not a command
    text: my_name=a
  - name: Broken off
    text: az vm create -n a \\\\
  - name: Two commands
    text: |
        az vm create -n a
        az vm show -n a
  - name: Another command
    text: az vm delete -n a
  - name: Add a tag.
    text: az vm create --tags a
  - name: Add a tag.
    text: az vm create --tags b
"""
helps["made by code"] = "examples: [{name: Never read, text: az made}]".format(1)
'''
SHOW = '''
@register_command("net nic ip-config show")
class Show(AAZCommand):
    """Show a NIC.

    :example: Show an IP configuration.
        az net nic ip-config show -n a
        --query "x"

    :example: Add a tag.
        az net nic ip-config show
    """

    def method(self):
        not python, and never parsed
'''


def test_the_examples_of_azure_cli(tmp_path):
    make(tmp_path, "vm/_help.py", content=HELP.encode())
    make(tmp_path, "net/aaz/latest/net/nic/ip_config/_show.py", content=SHOW.encode())
    make(tmp_path, "net/aaz/hybrid/net/nic/_list.py", content=b"not python")
    assert azure_examples(tmp_path) == [
        {
            "prompt": "Show an IP configuration.",
            "completion": 'az net nic ip-config show -n a --query "x"',
            "group": "net",
        },
        {
            "prompt": "Add a tag. (net nic ip-config)",
            "completion": "az net nic ip-config show",
            "group": "net",
        },
        {
            "prompt": "Create a VM.",
            "completion": "az vm create -n a --image b",
            "group": "vm",
        },
        {
            "prompt": "Create it again.",
            "completion": "az vm create -n a --image c",
            "group": "vm",
        },
        {"prompt": "Add a tag. (vm)", "completion": "az vm create --tags a", "group": "vm"},
    ]


@pytest.mark.slow
def test_the_default_is_stable_and_opens_no_socket(tmp_path):
    """The real package: the same bytes in every process, and nothing of it is imported."""
    workspace = make_workspace(
        tmp_path / "work", dataset={"source": "pypi", "id": "azure-cli", "revision": "2.91.0"}
    )
    guard = NO_SOCKETS + (
        "def no_import(event, args):\n"
        "    if event == 'import' and args[0].partition('.')[0] == 'azure':\n"
        "        raise RuntimeError('azure was imported')\n"
        "sys.addaudithook(no_import)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(guard)
    (workspace / "requirements-default.lock").write_bytes(
        (ROOT / "requirements-default.lock").read_bytes()
    )
    run = subprocess.run(
        [sys.executable, "-m", "stages.fetch_data"],
        cwd=workspace,
        env=environment("http://127.0.0.1:9", PYTHONPATH=str(tmp_path), PYTHONHASHSEED="7"),
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "fetch_data: 6937 examples of 93 services",
        "fetch_data: 1.70 MB in data/raw",
    ]
    content = (workspace / "data/raw/examples.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == (
        "6178a3e2595d117118d307983ccbbd49e8bb4315e5ead2f3323d34ecfac78736"
    )
    rows = [json.loads(line) for line in content.splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(row["completion"].startswith(f"az {row['group']}") for row in rows)
    assert not any("\n" in row["prompt"] + row["completion"] for row in rows)
    record = json.loads((workspace / "data/raw/source.json").read_text())
    assert (record["license"], record["revision"]) == ("MIT", "2.91.0")
    assert sorted(record["files"]) == ["LICENSE", "examples.jsonl"]


def test_another_package_is_refused(section_of, tmp_path):
    with pytest.raises(
        StageError, match="the supported packages are azure-cli and chatterbot-corpus, not"
    ):
        fetch_data.extract(section_of("pypi", "pip", revision="1"), tmp_path)

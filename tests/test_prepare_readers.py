"""Every kind of file gives its rows with their line numbers, or is refused."""

import bz2
import csv
import errno
import gzip
import io
import json
import lzma
import os
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_folder import make_folder

from stages import prepare
from stages.preparing.messages import Unusable
from stages.preparing.recognizing import recognize
from stages.shared import opening, parquet_rows
from stages.shared.params import Source
from stages.shared.process import StageError
from stages.shared.readers import files_to_read, read_file

PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
COLUMNS = ["prompt", "completion"]
# Anything but what is refused for itself: NUL, lone surrogates. \r alone ends a line of CSV.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=30)
TABLES = st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, TEXT)), min_size=1, max_size=8)


def as_csv(rows: list[dict], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def lines(rows: list[dict], separator: str = "", **options) -> bytes:
    return (separator + "\n").join(json.dumps(row, **options) for row in rows).encode()


WRITERS = {
    "a.jsonl": lines,
    "b.jsonl": lambda rows: lines(rows, ensure_ascii=False),
    "a.ndjson": lambda rows: b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n\r\n"),
    "a.json": lambda rows: json.dumps(rows).encode(),
    "b.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "c.json": lines,
    "d.json": lambda rows: b"\xef\xbb\xbf[" + lines(rows, ",") + b"\n]\n",
    "a.csv": lambda rows: as_csv(rows, ","),
    "b.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows, ","),
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "a.parquet": as_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=40, deadline=None)
@given(rows=TABLES)
def test_rows_come_out_as_they_went_in(name, rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(WRITERS[name](rows))
    assert [row for _, row in read_file(path)] == rows


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_compression_changes_nothing(name, packer, tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "ü\n" * i} for i in range(500)]
    path = tmp_path / (name + packer)
    path.write_bytes(PACKERS[packer](WRITERS[name](rows)))
    assert [row for _, row in read_file(path)] == rows


@settings(max_examples=150, deadline=None)
@given(rows=TABLES, chunk=st.integers(1, 60))
def test_json_is_read_alike_in_chunks_of_any_size(rows, chunk, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "chunks.json"
    path.write_bytes(json.dumps(rows, indent=1, ensure_ascii=False).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "CHUNK_BYTES", chunk)
        found = list(read_file(path))
    assert [row for _, row in found] == rows
    # One line for the bracket, then each row's brace, columns and closing brace.
    assert [line for line, _ in found] == [2 + 4 * i for i in range(len(rows))]


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(WRITERS)), data=st.binary(max_size=80), cut=st.integers(0, 200))
def test_any_bytes_are_read_or_refused_in_one_line(name, data, cut, tmp_path_factory):
    whole = WRITERS[name]([{"prompt": "a", "completion": 'b"é\n'}] * 3)
    path = tmp_path_factory.getbasetemp() / name
    for content in (data, whole[:cut] + data, whole[:cut] + data + whole[cut:]):
        path.write_bytes(content)
        message = refusal(path)
        assert message.startswith(str(path))
        assert "\n" not in message


def refusal(path: Path) -> str:
    """What is said of the first row of `path` that is refused or dropped, or its name."""
    try:
        for line, row in read_file(path):
            form = recognize("prompt_completion", None, row, f"{path}:{line}")
            form.example(row, f"{path}:{line}")
    except Unusable as unusable:
        return f"{path}: {unusable.message}"
    except StageError as error:
        return str(error)
    return str(path)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": 2}\n', [1, 3]),
        ("a.json", b'[\n{"a": 1},\n{"a":\n 2}, {"a": 3}]', [2, 3, 4]),
        ("a.csv", b'a,b\n"x\ny",1\n\nz,2\n', [2, 5]),
    ],
)
def test_lines_are_those_of_an_editor(name, data, expected, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    assert [line for line, _ in read_file(path)] == expected


@pytest.mark.parametrize("packer", [p for p in PACKERS if p])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_compression_is_told_by_the_content(name, packer, tmp_path):
    """Browsers and `curl --output` keep the name in the URL."""
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(3)]
    path = tmp_path / name
    path.write_bytes(PACKERS[packer](WRITERS[name](rows)))
    assert [row for _, row in read_file(path)] == rows


@pytest.mark.parametrize("packer", ["", ".gz"])
def test_parquet_is_not_held_in_memory(packer, tmp_path, monkeypatch):
    """Not even if the file is a single row group."""
    monkeypatch.setattr(parquet_rows, "_BATCH", 10)
    text = "".join(map(chr, range(33, 127))) * 100
    rows = [{"prompt": f"{i}", "completion": text} for i in range(4000)]
    sink, path = io.BytesIO(), tmp_path / f"a.parquet{packer}"
    pq.write_table(pa.Table.from_pylist(rows), sink, use_dictionary=False, compression="none")
    size = sink.tell()
    path.write_bytes(gzip.compress(sink.getvalue(), 1) if packer else sink.getvalue())
    before, held, count = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for _ in read_file(path):
        count += 1
        if count % 10 == 1:
            held = max(held, pa.total_allocated_bytes() - before)
    held += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(rows)
    assert held < size / 2


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.csv", b'prompt,completion\rp,"c\rd"\rq,e\r', [(2, "p", "c\rd"), (4, "q", "e")]),
        ("a.csv", b"prompt,completion\rp,c", [(2, "p", "c")]),
        (
            "a.jsonl",
            b'\xef\xbb\xbf{"prompt": "p", "completion": "c"}\r\r'
            b'{"prompt": "q", "completion": "e"}\r',
            [(1, "p", "c"), (3, "q", "e")],
        ),
        # A blank behind every separator of the header is one behind those of the rows.
        ("a.csv", b'prompt, completion\np, c\nq," e"\n', [(2, "p", "c"), (3, "q", " e")]),
        ("a.csv", b'"prompt", "completion"\n"p,\nr", "c, d"\nq, e\n',
         [(2, "p,\nr", "c, d"), (4, "q", "e")]),
        ("a.csv", b"prompt ,completion \np, c\n", [(2, "p", " c")]),
    ],
)  # fmt: skip
def test_rows_of_odd_line_ends_and_separators(name, data, expected, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_bytes(data)
    for chunk in (1, 7, 1 << 20):
        monkeypatch.setattr(opening, "CHUNK_BYTES", chunk)
        found = [(line, row["prompt"], row["completion"]) for line, row in read_file(path)]
        assert found == expected


def test_a_row_without_an_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "MAX_ROW_BYTES", 100)
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\rp," + b"c" * 5000)
    with pytest.raises(StageError, match=r"a.csv:2: a row of more than"):
        list(read_file(path))


def test_many_columns_are_checked_once_each(tmp_path):
    """Comparing each name with all others would take minutes."""
    names = [f"c{i}" for i in range(100_000)]
    path = tmp_path / "a.csv"
    path.write_text(",".join(names) + "\n" + ",".join("x" * len(names)) + "\n")
    started = time.monotonic()
    ((_, row),) = read_file(path)
    assert list(row) == names
    path = tmp_path / "a.jsonl"
    path.write_text("{" + ",".join(f'"{name}": 1' for name in [*names, names[-1]]) + "}\n")
    with pytest.raises(StageError, match=r"the key 'c99999' appears twice"):
        list(read_file(path))
    path = tmp_path / "a.parquet"
    names = names[:4000]
    pq.write_table(pa.table([pa.array(["x"])] * len(names), names=names), path)
    ((_, row),) = read_file(path)
    assert list(row) == names
    assert time.monotonic() - started < 10


def test_maps_of_parquet_are_objects(tmp_path):
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    turns = [[("role", "user"), ("content", "q")], [("role", "assistant"), ("content", "a")]]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": pa.array([turns], kind)}), path)
    ((line, row),) = read_file(path)
    example = recognize("auto", None, row, "a:1").example(row, "a:1")
    assert (line, example) == (
        1,
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    )
    pq.write_table(pa.table({"messages": pa.array([turns, [turns[0] * 2]], kind)}), path)
    with pytest.raises(StageError, match=r"rows 1 to 2: a map has the key 'role' twice; keep one"):
        list(read_file(path))


def test_fault_of_the_disk_is_not_laid_to_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(as_parquet([{"prompt": "a"}])))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parquet_rows.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        list(read_file(path))


HUB = {"source": "hub", "id": "a/b", "revision": "main", "config": None, "split": None}
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/one-*}
  - {split: test, path: [data/two.parquet]}
- config_name: other
  data_files:
  - {split: train, path: other.parquet}
---
"""
DEEP = """---
configs:
- not a mapping
- config_name: x
  data_dir: null
  data_files: [{split: train, path: "data/**/a*"}, {split: test}]
---
"""
UNSPLIT = "---\nconfigs:\n- {config_name: x, data_files: '**.csv'}\n---\n"
CHAT = [
    "data/test_sft-00000-of-00001.parquet",
    "data/train_gen-00000-of-00001.parquet",
    "data/train_sft-00000-of-00002.parquet",
    "data/train_sft-00001-of-00002.parquet",
]
TESTS = ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]
SHARDS = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000.parquet"]


@pytest.mark.parametrize(
    ("files", "card", "dataset", "eval_file", "expected"),
    [
        (
            ["a.jsonl", "sub/b.csv.gz", "LICENSE", "README.md"],
            "",
            {},
            None,
            ["a.jsonl", "sub/b.csv.gz"],
        ),
        (["a.jsonl", "b.jsonl"], "", {}, "a.jsonl", ["b.jsonl", "a.jsonl"]),
        (["train.jsonl", "test.jsonl"], "", {}, "test.jsonl", ["train.jsonl", "test.jsonl"]),
        (SHARDS, "", HUB, None, SHARDS[:2]),
        (SHARDS, "", HUB, SHARDS[2], SHARDS),
        (SHARDS, "", HUB | {"split": "test"}, None, SHARDS[2:]),
        (["validation.csv"], "", HUB | {"split": "validation"}, None, ["validation.csv"]),
        (["a.parquet", "test.parquet"], "", HUB, None, ["a.parquet"]),
        (["data/one-1.parquet", "data/two.parquet"], CARD, HUB, None, ["data/one-1.parquet"]),
        (
            ["data/one-1.parquet", "data/two.parquet"],
            CARD,
            HUB | {"split": "test"},
            None,
            ["data/two.parquet"],
        ),
        (["other.parquet"], CARD, HUB | {"config": "other"}, None, ["other.parquet"]),
        # Each split that the library writes is one of its own, also without a card.
        (CHAT, "", HUB | {"split": "train_sft"}, None, CHAT[2:4]),
        (CHAT[2:], "", HUB, None, CHAT[2:4]),
        ([*CHAT, *SHARDS], "", HUB, None, SHARDS[:2]),
        (["x_train-00000-of-00001.csv"], "", HUB, None, ["x_train-00000-of-00001.csv"]),
        # A test set in shards.
        ([*SHARDS[:2], *TESTS], "", {}, "test-*", [*SHARDS[:2], *TESTS]),
        ([*SHARDS[:2], *TESTS], "", HUB, "test-*.parquet", [*SHARDS[:2], *TESTS]),
        (["a[1].csv", "b.csv"], "", {}, "a[1].csv", ["b.csv", "a[1].csv"]),
        # prepare finds the files that fetch_data chose by the card.
        (["data/a.csv", "data/b.csv"], DEEP, HUB, None, ["data/a.csv"]),
        (["data/a.csv", "b.csv"], UNSPLIT, HUB, None, ["b.csv", "data/a.csv"]),
    ],
)
def test_files_of_a_split(files, card, dataset, eval_file, expected, tmp_path):
    write(tmp_path, files, card)
    local = {"source": "local", "id": "data/source/x", "revision": None, "config": None}
    section = Source(**{**local, "split": None, **dataset})
    chosen, given = files_to_read(tmp_path, section, eval_file)
    assert chosen + given == expected
    assert bool(given) == (eval_file is not None)


@pytest.mark.parametrize(
    ("files", "card", "dataset", "message"),
    [
        (
            SHARDS,
            "",
            HUB | {"split": "validation"},
            "no file of split validation; there is test, tr",
        ),
        (SHARDS, CARD, HUB | {"split": "dev"}, "no file of split dev; there is train, test"),
        (["LICENSE"], "", HUB, "no file of split train"),
        (
            ["train.csv", "test.csv"],
            "",
            {"source": "local"},
            "test.csv is beside train.csv; name it in prepare.eval_file, or remove it from the",
        ),
        (
            [*SHARDS[:2], *TESTS],
            "",
            {"source": "local"},
            r"beside train-00000-of-00002.parquet; name test-\*.parquet in prepare.eval_file, or",
        ),
        (CHAT, "", HUB, "no file of split train; there is test_sft, train_gen, train_sft$"),
        (
            CHAT[1:],
            "",
            {"source": "local"},
            "data/train_gen-00000-of-00001.parquet and data/train_sft-00001-of-00002.p",
        ),
        (CHAT[::3], "", {"source": "local"}, "data/test_sft-00000-of-00001.parquet is beside"),
    ],
)
def test_no_file_of_a_split(files, card, dataset, message, tmp_path):
    write(tmp_path, files, card)
    local = {"id": "data/source/x", "revision": None, "config": None, "split": None}
    with pytest.raises(StageError, match=message):
        files_to_read(tmp_path, Source(**{**local, **dataset}), None)


def write(folder: Path, files: list[str], card: str) -> None:
    for name in [*files, "source.json"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    if card:
        (folder / "README.md").write_text(card)


FORMATS = {
    "text": [{"text": f"t{i}"} for i in range(9)],
    "rendered": [{"text": f"<s>[INST] q{i} [/INST] a{i} </s>"} for i in range(9)],
    "prompt_completion": [{"prompt": f"p{i}", "completion": "c", "id": i} for i in range(9)],
    "alpaca": [
        {"instruction": f"i{i}", "input": "" if i % 2 else "x", "output": "o"} for i in range(9)
    ],
    "messages": [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(9)
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]}
        for i in range(9)
    ],
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_recognized_and_said(name, tmp_path, monkeypatch, capsys):
    make_folder(tmp_path, {"a.jsonl": lines(FORMATS[name])})
    monkeypatch.chdir(tmp_path)
    prepare.main()
    about = json.loads(Path("data/prepared/prepared.json").read_text())
    assert about["format"] == name
    assert f"format {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"instruction": "i", "input": "x", "output": "o"},
            None,
            [("user", "i\n\nx"), ("assistant", "o")],
        ),
        (
            {"instruction": "i", "input": None, "output": "o"},
            None,
            [("user", "i"), ("assistant", "o")],
        ),
        (
            {"q": "p", "a": "c", "s": "be brief"},
            {"prompt": "q", "completion": "a", "system": "s"},
            [("system", "be brief"), ("user", "p"), ("assistant", "c")],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "p"}],
                "completion": [{"role": "assistant", "content": "c"}],
            },
            None,
            [("user", "p"), ("assistant", "c")],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "p"}],
                "completion": [{"role": "assistant", "content": "c"}],
                "system": "s",
            },
            None,
            [("system", "s"), ("user", "p"), ("assistant", "c")],
        ),
        (
            {
                "conversations": [
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "c"},
                ]
            },
            {"messages": "conversations"},
            [("user", "p"), ("assistant", "c")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "p"},
                    {"from": "gpt", "value": "c"},
                ]
            },
            None,
            [("system", "s"), ("user", "p"), ("assistant", "c")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "p"}]},
                    {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
                    {"role": "tool", "content": "t", "name": None},
                    {"role": "assistant", "content": "c"},
                ]
            },
            None,
            [("user", "p"), ("assistant", ""), ("tool", "t"), ("assistant", "c")],
        ),
    ],
)
def test_row_becomes_messages(row, columns, expected):
    example = recognize("auto", columns, row, "a:1").example(row, "a:1")
    assert [(message["role"], message["content"]) for message in example] == expected


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize(
    "store",
    [json.dumps, lambda turns: {key: [turn[key] for turn in turns] for key in turns[0]}],
    ids=["JSON text", "a list for each key"],
)
def test_turns_may_be_stored_otherwise(column, store):
    role, content = ("role", "content") if column == "messages" else ("from", "value")
    turns = [{role: "user", content: "[p]"}, {role: "assistant", content: "c"}]
    row = {column: store(turns)}
    example = recognize("auto", None, row, "a:1").example(row, "a:1")
    expected = [{"role": "user", "content": "[p]"}, {"role": "assistant", "content": "c"}]
    assert example == expected
    half = {"prompt": store(turns[:1]), "completion": store(turns[1:])}
    form = recognize("auto", None, half, "a:1")
    if isinstance(half["prompt"], dict) and column == "messages":
        assert form.example(half, "a:1") == expected


@pytest.mark.parametrize("name", ["auto", "alpaca"])
@pytest.mark.parametrize("extra", ["input", "context"])
@pytest.mark.parametrize("system", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("first", [{}, {"input": ""}, {"context": "", "system": None}])
def test_optional_column_may_come_in_a_later_row_alone(name, extra, system, first):
    form = recognize(name, None, {"instruction": "i", "output": "o"} | first, "a:1")
    later = {"instruction": "i", "output": "o"} | first | {extra: "x", system: "s"}
    example = form.example(later, "a:2")
    assert [message["content"] for message in example] == ["s", "i\n\nx", "o"]
    assert form.not_used(later) == []


@pytest.mark.parametrize("given", ["x", ""])
def test_of_two_columns_with_one_meaning_the_other_is_not_used(given):
    row = {"instruction": "i", "output": "o", "context": "c", "input": given, "id": 7, "note": ""}
    form = recognize("auto", None, row, "a:1")
    assert form.example(row, "a:1")[0]["content"] == ("i\n\nx" if given else "i")
    assert form.not_used(row) == ["context", "id"]
    # Nor where later rows alone leave the usual one blank.
    assert form.example(row | {"input": ""}, "a:2")[0]["content"] == "i"
    assert form.not_used(row | {"input": ""}) == ["context", "id"]


@pytest.mark.parametrize("name", FORMATS)
def test_column_of_later_rows_that_is_not_used_is_said(name, tmp_path, monkeypatch, capsys):
    rows = [row | {"first": 1} for row in FORMATS[name]]
    rows[1:] = [row | {"note": i, "none": None} for i, row in enumerate(rows[1:])]
    make_folder(tmp_path, {"a.jsonl": lines(rows)})
    monkeypatch.chdir(tmp_path)
    prepare.main()
    said = capsys.readouterr().out
    assert "first\n" in said
    assert "prepare: not used: column note (8)\n" in said


def test_functions_may_come_in_a_later_row_alone():
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    form = recognize("auto", None, row, "a:1")
    example = form.example(row | {"functions": [{"name": "f"}]}, "a:2")
    assert example["given"] == {"tools": [{"type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize("column", ["input", "context", "history"])
def test_later_column_that_changes_the_meaning_is_not_lost(column, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(12)]
    rows[1][column] = ""
    rows[5][column] = [["q0", "a0"]] if column == "history" else "CTX"
    make_folder(tmp_path, {"a.jsonl": lines(rows)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        StageError, match=rf"a.jsonl:6: format .* would not use '{column}'; set"
    ) as e:
        prepare.main()
    advice = str(e.value).partition("columns: {")[2].partition("}")[0]
    columns = dict(pair.split(": ") for pair in advice.split(", "))
    assert set(columns.values()) == {"prompt", "completion", column}
    make_folder(tmp_path, {"a.jsonl": lines(rows)}, columns=columns)
    prepare.main()
    capsys.readouterr()
    alone = {"prompt": "prompt", "completion": "completion"}
    make_folder(tmp_path, {"a.jsonl": lines(rows)}, columns=alone)
    prepare.main()
    assert f"not used: column {column} (1)\n" in capsys.readouterr().out


def test_named_column_that_no_row_has_is_refused(tmp_path, monkeypatch):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(12)]
    columns = {"prompt": "prompt", "completion": "completion", "system": "sistem"}
    make_folder(tmp_path, {"a.jsonl": lines(rows)}, columns=columns)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        StageError, match=r"prepare.columns names 'sistem', which no row of a.jsonl"
    ):
        prepare.main()


def test_of_many_columns_that_are_not_used_some_are_named(tmp_path, monkeypatch, capsys):
    rows = [{"text": f"t{i}"} for i in range(9)]
    rows[1] |= {f"c{i:03}": 1 for i in range(60)}
    make_folder(tmp_path, {"a.jsonl": lines(rows)})
    monkeypatch.chdir(tmp_path)
    prepare.main()
    assert ", column c049 (1) and 10 more\n" in capsys.readouterr().out


def test_zero_in_an_optional_column_is_no_empty_one():
    row = {"instruction": "a", "input": 0, "output": "b"}
    with pytest.raises(StageError, match=r"^a:1: 'input' holds a number \(0\) where text belongs"):
        recognize("auto", None, row, "a:1").example(row, "a:1")


RAGGED = {"from": ["human"], "value": ["q", "a"]}


@pytest.mark.parametrize(
    "turns", [{"from": "human"}, {}, RAGGED, [1], [None], 5, True, [["x"]], "["]
)
def test_conversations_that_are_no_list_of_turns_are_refused(turns):
    row = {"conversations": turns}
    with pytest.raises(
        StageError, match=r"^a:1: 'conversations' holds .* where a list of messages"
    ):
        recognize("auto", None, row, "a:1").example(row, "a:1")


def test_conversations_of_messages_are_named_in_the_remedy():
    row = {"conversations": [{"role": "user", "content": "p"}]}
    with pytest.raises(StageError, match=r"set prepare.columns: {messages: conversations}$"):
        recognize("auto", None, row, "a:1")


@pytest.mark.parametrize("name", ["auto", "prompt_completion"])
def test_columns_that_were_named_are_taken_whatever_else_is_there(name):
    row = {"messages": [{"role": "user", "content": "m"}], "q": "p", "a": "c"}
    form = recognize(name, {"prompt": "q", "completion": "a"}, row, "a:1")
    assert [message["content"] for message in form.example(row, "a:1")] == ["p", "c"]


def test_named_column_that_the_format_has_not_is_refused():
    with pytest.raises(StageError, match=r"format messages has no 'prompt', only messages, "):
        recognize("messages", {"prompt": "q"}, {"messages": [], "q": "p"}, "a:1")


def test_empty_answer_without_a_tool_call_is_dropped_whatever_keys_it_has():
    question = {"role": "user", "content": "p", "tool_calls": [], "name": ""}
    answer = {"role": "assistant", "content": "", "tool_calls": [], "reasoning_content": ""}
    row = {"messages": [question, answer]}
    form = recognize("auto", None, row, "a:1")
    with pytest.raises(Unusable, match=r"'message 2 \(assistant\)' is empty"):
        form.example(row, "a:1")
    kept = form.example({"messages": [question, answer | {"content": "c"}]}, "a:1")
    assert kept == [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]

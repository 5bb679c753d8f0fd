"""Text unrelated to the task: where it comes from, and how it is scored."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import quick
import yaml
from hub_server import Hub, Repo
from test_fetch_data import COMMIT
from test_hub import environment
from tiny import TEXTS, make_model, make_tokenizer, make_workspace

from stages import fetch_retention
from stages.evaluating import retention
from stages.evaluating.retention import MOST_TOKENS_A_ROW, forgetting, retention_rows
from stages.fetching.adventure import adventure_texts
from stages.shared.outputs import check_sums
from stages.shared.process import StageError
from stages.shared.rows import IGNORED


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A function that runs the stage over files of data/source and gives the folder's rows."""

    def run(files: dict[str, str], **retention):
        folder = make_workspace(tmp_path / "work", retention={"id": "data/source"} | retention)
        (folder / "data/source/texts.txt").unlink()
        (folder / "data/source/rows.jsonl").unlink()
        for name, text in files.items():
            (folder / "data/source" / name).write_text(text, encoding="utf-8")
        monkeypatch.chdir(folder)
        fetch_retention.main()
        return read(folder)

    return run


def read(folder):
    check_sums(folder / "data/retention", "fetch_retention")
    lines = (folder / "data/retention/texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["row"], row["text"]) for row in map(json.loads, lines)]


def test_paragraphs_and_columns_become_texts(fetched):
    files = {"a.txt": TEXTS, "b.jsonl": '{"id": 1, "text": "In b."}\n{"id": 2, "text": " "}\n'}
    text = TEXTS.rstrip("\n")
    assert fetched(files) == [("a.txt:1", text), ("b.jsonl:1", "In b.")]


def test_short_texts_stand_behind_each_other():
    texts = [{"row": f"a:{i}", "text": "x" * 400} for i in range(7)] + [{"row": "b:1", "text": "y"}]
    rows = fetch_retention.passages(texts, 10**6)
    assert [row["row"] for row in rows] == ["a:0", "a:3", "a:6", "b:1"]
    assert rows[1]["text"] == "\n\n".join(["x" * 400] * 3)
    assert len(rows[0]["text"]) >= fetch_retention.PASSAGE


def test_of_a_large_source_no_more_is_kept_than_can_be_scored(fetched):
    [(_, text)] = fetched({"a.txt": "\n\n".join(["x" * 100] * 50)}, tokens=20)
    assert text.count("x") == 400


@pytest.mark.parametrize(
    "files", [{"a.txt": "x\n" * 9}, {"a.jsonl": '{"text": "xxxxxxxxx"}'}], ids=list
)
def test_a_text_has_a_largest_size(fetched, monkeypatch, files):
    monkeypatch.setattr(fetch_retention, "MAX_ROW_BYTES", 8)
    with pytest.raises(StageError, match=r"a\.(txt:9|jsonl:1): a row of more than"):
        fetched(files)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.csv": "body\nx\n"}, "a.csv:2: retention needs text in a column `text`"),
        ({"a.jsonl": '{"text": 5}\n'}, "a.jsonl:1: `text` is 5 and must be text"),
        ({"a.txt": " \n\n "}, "retention.id: data/source contains no text"),
        ({"a.zip": ""}, "a.zip is an archive; unpack it into data/source and set retention.source"),
        ({"a.txt": "a\0b"}, "a.txt:1: a NUL byte; remove it"),
        ({"a.txt": "<!doctype html>"}, "a.txt: a web page, not data; download the file itself"),
        ({"a.jsonl": '{"text": "\\ud800"}'}, "a.jsonl:1: `text` contains half a surrogate pair"),
        ({}, "data/source has no data files"),
    ],
)
def test_what_is_no_text_is_refused(fetched, files, said):
    with pytest.raises(StageError, match=re.escape(said)):
        fetched(files)


def test_null_writes_always_the_same(tmp_path, monkeypatch):
    contents = []
    for name in ("a", "b"):
        folder = make_workspace(tmp_path / name, retention=None)
        monkeypatch.chdir(folder)
        fetch_retention.main()
        assert read(folder) == []
        files = sorted((folder / "data/retention").iterdir())
        contents.append([(file.name, file.read_bytes()) for file in files])
    assert contents[0] == contents[1]


def test_a_data_set_of_the_hub_is_taken_at_its_commit(tmp_path):
    rows = b'{"text": "From the hub."}\n'
    repo = Repo({"train.jsonl": rows, "test.jsonl": rows * 2}, COMMIT, license="cc0-1.0")
    source = {"source": "hub", "id": "owner/texts", "revision": "main"}
    folder = make_workspace(tmp_path / "work", retention=source)
    with Hub(datasets={"owner/texts": repo}) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "stages.fetch_retention"],
            cwd=folder,
            env=environment(hub.url),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert f"pin it in params.yaml as retention.revision: {COMMIT}" in done.stdout
    assert read(folder) == [("train.jsonl:1", "From the hub.")]
    record = json.loads((folder / "data/retention/source.json").read_text())
    assert (record["license"], record["commit"]) == ("cc0-1.0", COMMIT)


ADVENT = """\
1
1\tYOU ARE AT A ROAD.  "AROUND" YOU
1\tAND I IS A FOREST.
2\tIT IS DARK!
-1\tEND
2
1\tNOT A TEXT.
-1
6
1\tWHAT?  "WHO" SAID THAT?
-1
0
"""


def test_the_game_is_read_as_sentences(tmp_path):
    (tmp_path / "advent.dat").write_text(ADVENT)
    assert adventure_texts(tmp_path / "advent.dat") == [
        {"row": "advent.dat:1.1", "text": 'You are at a road. "Around" you and I is a forest.'},
        {"row": "advent.dat:1.2", "text": "It is dark!"},
        {"row": "advent.dat:6.1", "text": 'What? "Who" said that?'},
    ]


def rows_of(folder, tokens, *texts, positions=None):
    lines = [json.dumps({"row": f"t:{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "texts.jsonl").write_text("".join(lines))
    return retention_rows(folder, make_tokenizer(folder / "tokenizer"), tokens, positions)


def loop(*_, **__):
    while True:
        pass


def test_a_tokenizer_that_loops_ends_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "texts.jsonl").write_text('{"row": "t:1", "text": "abc"}\n')
    monkeypatch.setattr(retention, "SECONDS", 0.2)
    with pytest.raises(StageError, match=r"its texts: took more than .* retention: null"):
        retention_rows(tmp_path, loop, 8)


@pytest.mark.parametrize(
    ("positions", "lengths"), [(None, [512, 88]), (1024, [512, 88]), (250, [250, 250, 100])]
)
def test_rows_are_no_longer_than_the_models_positions(tmp_path, positions, lengths):
    rows = rows_of(tmp_path, 1000, "x" * 600, positions=positions)
    assert [len(row["input_ids"]) for row in rows] == lengths


def test_a_model_with_few_learned_positions_is_scored(tmp_path):
    texts = {"source": "local", "id": "data/source/texts.txt", "revision": None, "tokens": 300}
    project = make_workspace(
        tmp_path / "ws",
        retention=texts,
        prepare={"train_rows": 24, "eval_rows": 8, "max_length": 128},
        evaluate={"samples": 0},
    )
    shutil.rmtree(project / "tiny")
    make_tokenizer(project / "tiny")
    sizes = {"max_position_embeddings": 128, "ffn_dim": 128, "word_embed_proj_dim": 64}
    make_model(project / "tiny", "opt", **sizes)
    (project / "data/source/texts.txt").write_text("The valley is deep. " * 30)
    for name in yaml.safe_load((project / "dvc.yaml").read_text())["stages"]:
        quick.run(name, project)
        if name == "evaluate":
            break
    found = json.loads((project / "metrics/eval.json").read_text())
    assert math.isfinite(found["retention_tuned_perplexity"])


def scored(row):
    return [label for label in row["labels"] if label != IGNORED]


def test_all_but_the_first_token_is_scored_until_there_are_enough(tmp_path):
    """The tokenizer's tokens are bytes."""
    rows = rows_of(tmp_path, 8, "abcd", "x", "größe", "never")
    assert [len(scored(row)) for row in rows] == [3, 5]
    assert [row["row"] for row in rows] == ["t:0", "t:2"]
    assert rows[0]["input_ids"][1:] == scored(rows[0])
    assert rows[0]["scored_bytes"] == 3


def test_long_texts_are_cut(tmp_path):
    rows = rows_of(tmp_path, 10**6, "a" * (MOST_TOKENS_A_ROW + 10))
    assert [len(row["input_ids"]) for row in rows] == [MOST_TOKENS_A_ROW, 10]


def test_bytes_are_those_of_the_scored_tokens(tmp_path):
    [row] = rows_of(tmp_path, 100, "aä€")
    assert row["scored_bytes"] == len("ä€".encode())


def test_forgetting_is_the_change_of_perplexity():
    metrics = {"retention_base_perplexity": 20.0, "retention_tuned_perplexity": 25.0}
    assert forgetting(metrics) == {"retention_perplexity_change_percent": pytest.approx(25)}
    assert forgetting({"tuned_perplexity": 3.0}) == {}

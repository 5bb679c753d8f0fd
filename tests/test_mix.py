"""Several sources mixed: shares of the training rows, one source per prompt, and counts."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_folder import jsonl, make_folder, pairs

from stages import prepare
from stages.preparing import mixing
from stages.preparing.mixing import interleave, rows_of_each
from stages.preparing.writing import Written
from stages.shared.process import StageError
from stages.shared.rows import SCHEMA, read_rows
from stages.shared.sets import held_out_sets, set_name

pytestmark = pytest.mark.slow

ENTRY = {"source": "local", "id": "data/source/y", "revision": None, "config": None, "split": None}
ENTRY |= {"format": "auto", "columns": None}
GENERAL = [{"prompt": f"Why {i}?", "completion": f"because {i}"} for i in range(40)]


def run(folder: Path, monkeypatch, *sources: bytes, shares=(0.25,), keys=None, **prepared) -> dict:
    """Prepare rows.jsonl of each of `sources`, further ones with `shares` and other `keys` of
    their entries: set -> rows. One source alone is mixed with nothing."""
    entries = [ENTRY | {"share": share} | (keys or {}) for share in shares]
    mixed = len(sources) > 1
    files = {}
    for number, rows in enumerate(sources):
        below = f"source_{number}/" if mixed else ""
        files |= {f"{below}rows.jsonl": rows, f"{below}source.json": b'{"id": "%d"}' % number}
    make_folder(folder, files, dataset={"mix": entries if mixed else None}, **prepared)
    monkeypatch.chdir(folder)
    prepare.main()
    return {file.stem: read_rows(file) for file in Path("data/prepared").glob("*.arrow")}


def metrics_in(folder: Path) -> dict:
    return json.loads((folder / "metrics/data.json").read_text())


def of_source(rows: list[dict], number: int) -> list[int]:
    """Places of the rows of one source."""
    return [
        i for i, row in enumerate(rows) if row["row"].startswith(f"source_{number}/rows.jsonl:")
    ]


def ids(rows: list[dict]) -> list[list[int]]:
    return [row["input_ids"] for row in rows]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """(folder, sets, the sets of the first source alone) of 20 training rows, a quarter general."""
    with pytest.MonkeyPatch.context() as patch:
        folder, alone = (tmp_path_factory.mktemp(name) for name in ("mixed", "alone"))
        options = {"train_rows": 20, "group_by": "group"}
        sets = run(folder, patch, jsonl(pairs(60)), jsonl(GENERAL), **options)
        return folder, sets, run(alone, patch, jsonl(pairs(60)), **options)


def test_a_share_is_of_the_training_rows(mixed):
    _, sets, alone = mixed
    assert len(sets["train"]) == 20
    places = of_source(sets["train"], 1)
    # Five, one in each fifth of the set.
    assert [place // 4 for place in places] == [0, 1, 2, 3, 4]
    task = [sets["train"][place] for place in of_source(sets["train"], 0)]
    assert ids(task) == ids(alone["train"][:15])


def test_the_first_source_is_held_out_as_it_is_alone(mixed):
    folder, sets, alone = mixed
    for name in ("eval", "group"):
        assert ids(sets[name]) == ids(alone[name])
    assert len(of_source(sets["source_1"], 1)) == len(sets["source_1"]) == 2
    assert list(held_out_sets(folder / "data/prepared")) == ["", "group_", "source_1_"]
    assert set_name("source_1") == "held-out rows of source 1"


def test_no_row_is_in_two_sets(mixed):
    _, sets, _ = mixed
    named = [row["row"] for rows in sets.values() for row in rows]
    assert len(named) == len(set(named))


def test_every_source_is_counted(mixed):
    folder, sets, _ = mixed
    metrics = metrics_in(folder)
    every = {"source_0": 60, "source_1": 40}
    removed = ("duplicate", "asked_before", "near_duplicate", "dropped", "unused")
    for number, (name, rows_in) in enumerate(every.items()):
        own = {k.removeprefix(f"{name}_"): v for k, v in metrics.items() if k.startswith(name)}
        places = of_source(sets["train"], number)
        tokens = sum(len(sets["train"][place]["input_ids"]) for place in places)
        assert (own["train_examples"], own["train_tokens"]) == (len(places), tokens)
        assert own["train_share_percent"] == 100 * len(places) / 20
        used = [row for rows in sets.values() for row in rows if row["row"].startswith(name)]
        assert own["rows_in"] == rows_in
        assert len(used) + sum(own[f"{why}_examples"] for why in removed) == rows_in
    for key in ("rows_in", "unused_examples", "dropped_examples", "asked_before_examples"):
        assert metrics[key] == sum(metrics[f"{name}_{key}"] for name in every)
    about = json.loads((folder / "data/prepared/source.json").read_text())
    assert about == {"id": "0", "mix": [{"id": "1"}]}


def test_the_same_bytes_each_time(mixed, tmp_path, monkeypatch):
    folder, _, _ = mixed
    options = {"train_rows": 20, "group_by": "group"}
    run(tmp_path, monkeypatch, jsonl(pairs(60)), jsonl(GENERAL), **options)
    for name in ("data/prepared/SHA256SUMS", "metrics/data.json", "metrics/lengths.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_question_belongs_to_the_first_source_that_asks_it(tmp_path, monkeypatch):
    """Whatever the answer, and in whichever set the first source has the prompt."""
    asked = [{"prompt": f"question  {i}?", "completion": f"other {i}"} for i in range(30)]
    copies = pairs(5)
    for row in copies:
        del row["group"]
    sets = run(
        tmp_path,
        monkeypatch,
        jsonl(pairs(30)),
        jsonl(GENERAL),
        jsonl(
            [
                *asked,
                *copies,
                *GENERAL[5:9],
                *({"prompt": f"How {i}?", "completion": "so"} for i in range(30)),
            ]
        ),
        shares=(0.2, 0.2),
    )
    metrics = metrics_in(tmp_path)
    assert metrics["source_2_asked_before_examples"] == 30
    assert metrics["source_2_duplicate_examples"] == 5 + 4
    assert metrics["leaked_examples"] == 0
    of_third = [rows[i] for rows in sets.values() for i in of_source(rows, 2)]
    # What its rows say first is "How": the lines before are those of the other two.
    assert min(int(row["row"].split(":")[1]) for row in of_third) > len(asked) + len(copies) + 4


def test_nearly_equal_rows_stay_in_the_first_source(tmp_path, monkeypatch):
    words = [f"{'abcdefghij'[i % 10]}{i}" for i in range(600)]
    texts = [" ".join(words[i * 20 : i * 20 + 20]) for i in range(30)]
    first = jsonl([{"text": text} for text in texts])
    # The last word differs, so no row has a prompt of the first source.
    second = jsonl([{"text": f"{text} too"} for text in texts[:5]])
    more = jsonl([{"text": f"{i} is a number"} for i in range(20)])
    run(tmp_path, monkeypatch, first, second + more, near_duplicates=True)
    metrics = metrics_in(tmp_path)
    assert metrics["source_0_near_duplicate_examples"] == 0
    assert metrics["source_1_near_duplicate_examples"] == 5
    assert metrics["source_1_asked_before_examples"] == 0


def test_without_a_limit_the_first_source_decides_how_many(tmp_path, monkeypatch):
    sets = run(tmp_path, monkeypatch, jsonl(pairs(30)), jsonl(GENERAL), shares=(0.1,))
    counts = [len(of_source(sets["train"], number)) for number in (0, 1)]
    # As many as it has alone: 30 less two held out and one between.
    assert counts == [27, 3]


def test_rows_of_the_evaluation_file_are_asked_by_no_source(tmp_path, monkeypatch):
    held = jsonl(pairs(4))
    files = {"source_0/rows.jsonl": jsonl(pairs(30, 4)), "source_0/held.jsonl": held}
    files |= {"source_1/rows.jsonl": held + jsonl(GENERAL)}
    files |= {f"source_{number}/source.json": b"{}" for number in (0, 1)}
    dataset = {"mix": [ENTRY | {"share": 0.5}]}
    make_folder(tmp_path, files, dataset=dataset, eval_file="held.jsonl", train_rows=40)
    monkeypatch.chdir(tmp_path)
    prepare.main()
    metrics = metrics_in(tmp_path)
    assert metrics["source_1_asked_before_examples"] == 4
    assert metrics["leaked_examples"] == 0
    rows = read_rows(Path("data/prepared/eval.arrow"))
    assert {row["row"].rpartition(":")[0] for row in rows} == {"source_0/held.jsonl"}


def test_plain_text_is_mixed_with_conversations(tmp_path, monkeypatch):
    prose = jsonl([{"text": f"It was the night number {i}."} for i in range(20)])
    for name, sources in {
        "after": [jsonl(pairs(30)), prose],
        "first": [prose, jsonl(pairs(30))],
    }.items():
        sets = run(tmp_path / name, monkeypatch, *sources)
        text = sources.index(prose)
        places = of_source(sets["train"], text)
        assert places
        for place, row in enumerate(sets["train"]):
            # A text asks nothing.
            assert (row["prompt_tokens"] == 0) == (place in places)


COLUMNS = {"columns": {"prompt": "q", "completion": "a"}}
OWN = [{"q": f"Who {i}?", "a": f"she {i}"} for i in range(20)]


def test_a_source_has_its_own_columns(tmp_path, monkeypatch):
    sets = run(tmp_path, monkeypatch, jsonl(pairs(30)), jsonl(OWN), keys=COLUMNS)
    assert of_source(sets["train"], 1)


RENDERED = [{"text": f"<s>[INST] Ask {i} [/INST] Told {i} </s>"} for i in range(20)]
REFUSED = [
    (
        jsonl(GENERAL),
        {"train_rows": 200, "shares": (0.9,)},
        r"^dataset\.mix\.0 \(data/source/y\): a share of 0\.9 of 200 training rows is 180, but it "
        r"has 37 to train on; lower the share, or prepare\.train_rows, or bring more rows$",
    ),
    (
        jsonl(GENERAL),
        {"train_rows": 20, "shares": (0.02,)},
        r"^dataset\.mix\.0 \(data/source/y\): a share of 0\.02 of 20 training rows is less than "
        r"one row; raise it, or prepare\.train_rows$",
    ),
    (
        jsonl(GENERAL),
        {"train_rows": 1, "shares": (0.5,)},
        r"^prepare\.train_rows: 1 leaves no row for dataset \(data/source/x\) beside the shares",
    ),
    (
        jsonl(pairs(30)),
        {"train_rows": 20},
        r"^dataset\.mix\.0 \(data/source/y\): no row is left to hold out, of 0 that no other "
        r"source has; add rows, or remove the source from dataset\.mix$",
    ),
    (
        jsonl(RENDERED),
        {},
        r"^dataset\.mix\.0 \(data/source/y\): its rows are already rendered, in the .* "
        r"shape, those of dataset \(data/source/x\) are not rendered yet, but "
        r"prompts at inference have one template; bring both as messages$",
    ),
    (
        jsonl(OWN),
        {},
        r"^data/raw/source_1/rows\.jsonl:1: no known format has the columns q, a; name yours "
        r"in dataset\.mix\.columns, such as",
    ),
    (
        jsonl(GENERAL) + b"{",
        {},
        r"^data/raw/source_1/rows\.jsonl:41: ",
    ),
    (
        jsonl([row | {"split": "test"} for row in GENERAL]),
        {},
        r"^data/raw/source_1/rows\.jsonl:1: its column 'split' says 'test', but it would be "
        r"trained on: move such rows to a file of their own and leave it out$",
    ),
    (
        jsonl([*GENERAL[:2], *[{"prompt": "", "completion": "a"}] * 9]),
        {},
        r"^9 of 11 rows dropped, more than 50%; 9 are empty \(rows\.jsonl:3, .*data/raw/source_1/",
    ),
]


@pytest.mark.parametrize(("general", "options", "message"), REFUSED)
def test_a_source_is_refused_in_one_line(tmp_path, monkeypatch, general, options, message):
    many = 200 if options.get("train_rows") == 200 else 30
    with pytest.raises(StageError, match=message):
        run(tmp_path, monkeypatch, jsonl(pairs(many)), general, **options)
    assert not Path("data/prepared").exists()


def test_two_sources_of_one_shape_are_mixed(tmp_path, monkeypatch):
    other = [{"text": row["text"].replace("Ask", "Say")} for row in RENDERED]
    sets = run(tmp_path, monkeypatch, jsonl(RENDERED), jsonl(other), loss_on="all")
    assert of_source(sets["train"], 1)


@settings(deadline=None)
@given(
    total=st.integers(1, 10**6),
    shares=st.lists(st.decimals(0, 1, places=3, allow_nan=False), max_size=4),
)
def test_rows_of_each_are_the_nearest_whole_numbers(total, shares):
    for share, count in zip(shares, rows_of_each(total, [float(s) for s in shares]), strict=True):
        assert 2 * abs(share * total - count) <= 1
    assert rows_of_each(30, [0.05]) == [2]


def write_rows(path: Path, names: list[str]) -> Written:
    rows = [
        {
            "row": n,
            "input_ids": [1] * (i + 1),
            "labels": [1] * (i + 1),
            "prompt_tokens": i,
            "scored_bytes": 1,
        }
        for i, n in enumerate(names)
    ]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
        stream.write_table(pa.Table.from_pylist(rows, SCHEMA), max_chunksize=3)
    numbers = np.arange(len(names))
    flat = np.stack([numbers, numbers + 1, numbers, numbers * 0 + 1, numbers * 0], axis=1)
    return Written(flat, len(names), len(names), 1, {len(names)})


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), chunk=st.integers(1, 40))
def test_sources_are_spread_evenly(tmp_path_factory, sizes, chunk):
    folder = tmp_path_factory.mktemp("mix")
    every = [[f"{source}:{i}" for i in range(size)] for source, size in enumerate(sizes)]
    files = [folder / f"{source}.arrow" for source in range(len(sizes))]
    written = [write_rows(*each) for each in zip(files, every, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "CHUNK", chunk)
        made = interleave(files, written, folder / "out.arrow")
    rows = read_rows(folder / "out.arrow")
    names = [row["row"] for row in rows]
    for source, own in enumerate(every):
        assert [name for name in names if name.startswith(f"{source}:")] == own
        for size in range(1, len(names) + 1):
            # In any beginning of the set each source has its share, to within a row.
            there = sum(name.startswith(f"{source}:") for name in names[:size])
            assert abs(there - size * len(own) / len(names)) <= len(sizes)
    assert made.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert [len(row["labels"]) for row in rows] == made.lengths.tolist()
    assert (made.learned, made.left) == (len(names), len(sizes))

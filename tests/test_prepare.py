"""The whole stage: the set of each row, the counts, and reproducible bytes."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_folder import jsonl, make_folder, pairs
from tiny import ROOT, make_workspace
from transformers import AutoTokenizer

from stages import prepare
from stages.preparing import contract, writing
from stages.preparing.contract import packed_bins, show
from stages.preparing.recognizing import recognize
from stages.preparing.splitting import (
    Store,
    distinct,
    hash64,
    normal,
    prompt_and_rest,
    text_of,
)
from stages.preparing.summary import UNUSED
from stages.shared.end_tokens import end_tokens
from stages.shared.outputs import SUMS
from stages.shared.process import StageError, sha256
from stages.shared.rows import IGNORED, read_rows
from templates import make_shape

pytestmark = pytest.mark.slow

SETS = ("train", "eval", "group")


def run(folder: Path, monkeypatch, files: dict[str, bytes], **options) -> dict[str, list[dict]]:
    """Run the stage in `folder`: set -> rows."""
    make_folder(folder, files, **options)
    monkeypatch.chdir(folder)
    prepare.main()
    found = {name: folder / f"data/prepared/{name}.arrow" for name in SETS}
    return {name: read_rows(path) for name, path in found.items() if path.exists()}


def metrics_in(folder: Path) -> dict:
    return json.loads((folder / "metrics/data.json").read_text())


def prompts(rows: list[dict], tokenizer) -> set[str]:
    """The prompts of the rows, decoded from their tokens."""
    texts = [tokenizer.decode(row["input_ids"][: row["prompt_tokens"]]) for row in rows]
    return {text.split("user\n")[1].split("<|im_end|>")[0] for text in texts}


def tokenizer_of(folder: Path):
    return AutoTokenizer.from_pretrained(folder / "data/prepared/tokenizer")


def test_rows_hold_what_later_stages_read(tmp_path, monkeypatch):
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(pairs(40))}, group_by="group")
    tokenizer = tokenizer_of(tmp_path)
    source = pairs(40)
    for row in [*sets["train"], *sets["eval"], *sets["group"]]:
        asked = source[int(row["row"].removeprefix("a.jsonl:")) - 1]
        ids, start = row["input_ids"], row["prompt_tokens"]
        prompt = [{"role": "user", "content": asked["prompt"]}]
        assert (
            ids[:start]
            == tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        )
        assert tokenizer.decode(ids[start:]) == asked["completion"] + "<|im_end|>"
        assert row["labels"] == [IGNORED] * start + ids[start:]
        assert row["scored_bytes"] == len(asked["completion"])
    assert sorted(p.name for p in (tmp_path / "data/prepared").iterdir()) == sorted(
        [
            SUMS,
            "eval.arrow",
            "group.arrow",
            "prepared.json",
            "source.json",
            "tokenizer",
            "train.arrow",
        ]
    )


def test_whole_groups_are_held_out(tmp_path, monkeypatch):
    rows = pairs(100)
    # The same prompt in every group: it is in no set, since it would leak.
    rows += [{"prompt": "Shared?", "completion": f"c{i}", "group": f"g{i}"} for i in range(10)]
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(rows)}, group_by="group", eval_rows=12)
    lines = {n: [int(r["row"].split(":")[1]) - 1 for r in found] for n, found in sets.items()}
    groups = {name: {rows[i]["group"] for i in found} for name, found in lines.items()}
    assert not groups["group"] & (groups["train"] | groups["eval"])
    assert len(sets["group"]) == len(sets["eval"]) == 12
    # A large group does not fill the set: two groups hold the 12 rows and share them.
    assert len(groups["group"]) == 2
    assert "Shared?" not in {rows[i]["prompt"] for i in lines["group"]}


@pytest.mark.parametrize("group_by", [None, "group"])
def test_added_rows_move_no_row_into_or_out_of_training(group_by, tmp_path, monkeypatch):
    asked, options = {}, {"group_by": group_by, "eval_rows": 20}
    for name, count in (("before", 200), ("after", 230)):
        sets = run(tmp_path / name, monkeypatch, {"a.jsonl": jsonl(pairs(count))}, **options)
        tokenizer = tokenizer_of(tmp_path / name)
        asked[name] = {n: prompts(rows, tokenizer) for n, rows in sets.items()}
    for held in asked["before"].keys() - {"train"}:
        assert not asked["before"][held] & asked["after"]["train"]
        assert not asked["after"][held] & asked["before"]["train"]
    assert asked["before"]["train"] < asked["after"]["train"]


def test_own_column_names_of_a_csv(tmp_path, monkeypatch, capsys):
    lines = [f'"Question {i}, really?",answer {i},x\n' for i in range(9)]
    data = ("frage,antwort,id\n" + "".join(lines)).encode()
    columns = {"prompt": "frage", "completion": "antwort"}
    sets = run(tmp_path, monkeypatch, {"a.csv": data}, columns=columns)
    tokenizer = tokenizer_of(tmp_path)
    row = sets["train"][0]
    number = int(row["row"].split(":")[1]) - 2
    assert f"user\nQuestion {number}, really?<|im_end|>" in tokenizer.decode(row["input_ids"])
    said = capsys.readouterr().out
    assert "columns frage as prompt, antwort as completion; not used: id" in said


@pytest.mark.parametrize("delay", [0, 2])
def test_killed_stage_takes_its_workers_along(tmp_path, delay):
    """A worker that lives on would hold the memory of the stage, and the lock of its terminal.

    delay  seconds that a worker needs to begin: the stage is killed before that, or may be
    """
    make_folder(tmp_path, {"a.jsonl": jsonl(pairs(20_000))})
    code = (
        "import os, time; from stages import prepare; from stages.preparing import writing\n"
        "os.sched_getaffinity = lambda _: {0, 1}\n"
        "work = writing._work\n"
        f"writing._work = lambda *args: (time.sleep({delay}), work(*args))\n"
        "prepare.main()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    stage = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    )
    children = Path(f"/proc/{stage.pid}/task/{stage.pid}/children")
    while len(workers := children.read_text().split()) < 2:
        assert stage.poll() is None
        time.sleep(0.01)
    stage.kill()
    stage.wait()
    deadline = time.monotonic() + 30
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (tmp_path / "data/prepared").exists()


def ends_by(number):
    # Without the traceback of pytest's own handler.
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def sends_half(pipe):
    """Die in the middle of a result: the length says more than there is."""
    os.write(pipe.fileno(), b"\0\0\1\0half")
    os.kill(os.getpid(), signal.SIGKILL)


DEATHS = {
    "SIGKILL": lambda pipe: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda pipe: os.kill(os.getpid(), signal.SIGTERM),
    # A row could cause this too, but none does it again.
    "SIGSEGV": lambda pipe: ends_by(signal.SIGSEGV),
    "status 3": lambda pipe: os._exit(3),
    "SIGKILL in a result": sends_half,
}


@pytest.mark.parametrize("death", DEATHS)
def test_worker_that_dies_ends_the_stage_in_a_line(tmp_path, monkeypatch, death):
    """Killed by the system when memory runs out, or by a crash in the tokenizer's code."""
    begin, encode, pipes = writing._work, writing._encode, []
    monkeypatch.setattr(writing, "_WORTH_WORKERS", 10)
    monkeypatch.setattr(writing, "CHUNK", 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def work(chunks, numbers, to, stage):
        pipes.append(to)
        begin(chunks, numbers, to, stage)

    def dying(chunk):
        # One of the workers, in the middle; the other has work left.
        if pipes and len(chunk) == 8 and 40 in chunk:
            DEATHS[death](pipes[0])
        return encode(chunk)

    monkeypatch.setattr(writing, "_work", work)
    monkeypatch.setattr(writing, "_encode", dying)
    started = time.monotonic()
    with pytest.raises(StageError, match="a worker process died") as refused:
        run(tmp_path, monkeypatch, {"a.jsonl": jsonl(pairs(200))}, eval_rows=8)
    assert f"({death.split()[0] if 'result' in death else death})" in str(refused.value)
    assert time.monotonic() - started < 20
    assert not multiprocessing.active_children()
    assert not (tmp_path / "data/prepared").exists()


def compute(seconds=60.0):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def uses_memory():
    raise MemoryError


@pytest.mark.parametrize("rows", [9, 200])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (compute, "takes too long"),
        (lambda: ends_by(signal.SIGABRT), r"ended the process \(SIGABRT\)"),
        (uses_memory, "takes too much memory"),
    ],
)
def test_row_that_harms_a_worker_is_named(tmp_path, monkeypatch, harm, said, rows):
    """With as many workers as cores, or the one that few rows have."""
    encode = writing._encode
    monkeypatch.setattr(writing, "_WORTH_WORKERS", 10)
    monkeypatch.setattr(writing, "CHUNK", 8)
    monkeypatch.setattr(writing, "seconds_for", lambda chunk: 2.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def harmed(chunk):
        if 3 in chunk:
            harm()
        return encode(chunk)

    monkeypatch.setattr(writing, "_encode", harmed)
    with pytest.raises(StageError, match=rf"a\.jsonl:4: rendering and tokenizing it {said}; set "):
        run(tmp_path, monkeypatch, {"a.jsonl": jsonl(pairs(rows))}, eval_rows=2)
    assert not multiprocessing.active_children()


def test_rows_that_are_slow_together_are_refused_without_trying_all(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "seconds_for", lambda chunk: 1.0)
    monkeypatch.setattr(writing, "_encode", lambda chunk: compute(0.4 * len(chunk)))
    with pytest.raises(StageError, match=r"a\.jsonl:\d+ to .*a\.jsonl:\d+: rendering and token"):
        run(tmp_path, monkeypatch, {"a.jsonl": jsonl(pairs(60))}, eval_rows=8)
    assert not multiprocessing.active_children()


def test_slow_conversations_have_time_with_the_square_of_their_length(tmp_path, monkeypatch):
    short, long = ([{"role": "user", "content": "q"}] * n for n in (2, 100))
    assert writing.seconds_for_turns([short, "text"]) < 0.001
    assert writing.seconds_for_turns([short, long]) == pytest.approx(1, rel=0.01)
    assert writing.seconds_for_turns([long * 1000]) == 600
    assert writing.seconds_for_turns([long * 1000] * 9) == 9 * 600
    # Where each answer is rendered, they may be the cause.
    monkeypatch.setattr(writing, "seconds_for_turns", lambda examples: -3.5)
    monkeypatch.setattr(writing, "_encode", lambda chunk: compute(9))
    rows = {"a.jsonl": jsonl(pairs(20))}
    with pytest.raises(StageError, match="takes too long; divide long conversations, "):
        run(tmp_path, monkeypatch, rows, eval_rows=2, loss_on="assistant")


def test_fault_in_a_worker_is_told_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_WORTH_WORKERS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(writing, "_encode", lambda chunk: {}["no such key"])
    with pytest.raises(KeyError, match="no such key") as raised:
        run(tmp_path, monkeypatch, {"a.jsonl": jsonl(pairs(40))}, eval_rows=8)
    assert "test_prepare.py" in raised.value.__notes__[0]


def test_odd_rendered_rows_are_taken_as_they_are(tmp_path, monkeypatch):
    rows = [{"text": f"<s>[INST] q{i} [/INST] a{i} </s>"} for i in range(8)]
    rows.insert(0, {"text": "<s>[INST]odd[/INST]odd</s>"})
    rows.append({"text": "<s>[INST] never answered [/INST]"})
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(rows)}, loss_on="assistant")
    tokenizer = tokenizer_of(tmp_path)
    texts = {tokenizer.decode(row["input_ids"]) for row in [*sets["train"], *sets["eval"]]}
    # The tokenizer has no token </s>, so its own EOS ends the rows.
    assert texts <= {row["text"] + "<|im_end|>" for row in rows}
    assert metrics_in(tmp_path)["dropped_roles_examples"] == 1
    prompt = [{"role": "user", "content": "q1"}]
    assert tokenizer.apply_chat_template(prompt, tokenize=False) == "<s>[INST] q1 [/INST]"


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def rendered(*turns: tuple[str, str]) -> dict:
    mark = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    return {"text": "<|begin_of_text|>" + "".join(mark.format(*turn) for turn in turns)}


@pytest.mark.parametrize("loss_on", ["completion", "assistant", "all"])
def test_what_answers_end_with_is_kept_for_generation(loss_on, tmp_path, monkeypatch, capsys):
    rows = []
    for i in range(20):
        turns = [("user", f"q{i}<|eot_id|>"), ("assistant", f"call {i}<|eom_id|>")]
        turns += [("ipython", f"r{i}<|eot_id|>"), ("assistant", f"a{i}<|eot_id|>")]
        # The first row and one more end with a call, but most do not.
        rows.append(rendered(*turns[: 2 if i in (0, 9) else 4]))
    options = {"tokenizer": make_shape("llama-3"), "loss_on": loss_on}
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(rows)}, **options)
    folder = tmp_path / "data/prepared/tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|eot_id|>"
    calls = {row["row"] for row in sets["train"]} & {"a.jsonl:1", "a.jsonl:10"}
    assert calls
    assert end_tokens(folder) == tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|eom_id|>"])
    said = "other tokens that end answers, saved in generation_config.json: <|eom_id|>"
    assert said in capsys.readouterr().out


def test_end_of_a_part_is_no_end_of_an_answer(tmp_path, monkeypatch):
    rows = [rendered(("user", "q" * i + "<|eot_id|>"), ("assistant", "a<|eot_id|>"))
            for i in range(1, 30)]  # fmt: skip
    options = {"tokenizer": make_shape("llama-3"), "loss_on": "all", "too_long": "split"}
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(rows)}, max_length=32, **options)
    folder = tmp_path / "data/prepared/tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marks = {tokenizer.convert_tokens_to_ids(f"<|{name}_header_id|>") for name in ("start", "end")}
    assert marks & {row["input_ids"][-1] for row in sets["train"]}
    assert end_tokens(folder) == [tokenizer.eos_token_id]


def test_order_of_the_file_does_not_matter(tmp_path, monkeypatch):
    rows = pairs(60)
    files = {"a": rows, "b": random.Random(1).sample(rows, 60)}
    made = {
        name: run(tmp_path / name, monkeypatch, {"a.jsonl": jsonl(found)}, eval_rows=5)
        for name, found in files.items()
    }
    for name in ("train", "eval"):
        first, second = ([row["input_ids"] for row in made[n][name]] for n in files)
        assert first == second
    # Nor are the rows in the order of the file.
    assert [row["row"] for row in made["a"]["train"]] != sorted(
        (row["row"] for row in made["a"]["train"]), key=lambda name: int(name.split(":")[1])
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bytes_depend_on_no_number_of_workers(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_WORTH_WORKERS", 10)
    monkeypatch.setattr(writing, "CHUNK", 16)
    rows = pairs(150) + [{"prompt": f"Long {i}", "completion": "x" * 300} for i in range(20)]
    for name, cores in (("one", {0}), ("several", set(range(workers)))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        run(tmp_path / name, monkeypatch, {"a.jsonl": jsonl(rows)}, eval_rows=20)
    one, several = (
        (tmp_path / name / "data/prepared" / SUMS).read_text() for name in ("one", "several")
    )
    assert one == several
    assert metrics_in(tmp_path / "one") == metrics_in(tmp_path / "several")


def test_second_run_gives_the_same_bytes(tmp_path, monkeypatch):
    sums = []
    for home in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", home)
        run(tmp_path, monkeypatch, {"a.jsonl": jsonl(pairs(40))}, group_by="group")
        files = [p for p in tmp_path.rglob("*") if p.is_file() and "raw" not in p.parts]
        sums.append({str(path): sha256(path) for path in files})
    assert sums[0] == sums[1]


def test_train_rows_takes_the_first_of_the_same_order(tmp_path, monkeypatch, capsys):
    some = run(tmp_path / "a", monkeypatch, {"a.jsonl": jsonl(pairs(60))}, train_rows=10)
    every = run(tmp_path / "b", monkeypatch, {"a.jsonl": jsonl(pairs(60))})
    assert some["train"] == every["train"][:10]
    for name, sets in (("a", some), ("b", every)):
        metrics = metrics_in(tmp_path / name)
        assert metrics["unused_examples"] == 60 - len(sets["train"]) - 2
        assert metrics["unused_beyond_train_rows_examples"] == len(every["train"]) - len(
            sets["train"]
        )
        # Half as many as are held out.
        assert metrics["unused_margin_examples"] == 1
    assert (
        "(47 beyond train_rows, 1 in the margin between held-out and training)"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("given", [True, False])
def test_rows_that_no_set_needs_are_counted_by_their_reason(given, tmp_path, monkeypatch):
    files = {"a.jsonl": jsonl(pairs(100)), "b.jsonl": jsonl(pairs(10, start=200))}
    files = files if given else {"a.jsonl": files["a.jsonl"]}
    options = {"eval_rows": 4, "eval_file": "b.jsonl"} if given else {"eval_rows": 12}
    run(tmp_path, monkeypatch, files, group_by=None if given else "group", **options)
    metrics = metrics_in(tmp_path)
    reasons = {name: metrics[f"unused_{name}_examples"] for name in UNUSED}
    assert sum(reasons.values()) == metrics["unused_examples"]
    # Ten rows in the file; or two groups of ten to score, and one more aside with the margin.
    margin = 0 if given else 10 + 6
    assert reasons == {
        "beyond_train_rows": 0, "beyond_eval_rows": 6 if given else 8, "margin": margin
    }  # fmt: skip


def test_duplicates_are_equal_to_the_letter(tmp_path, monkeypatch):
    rows = pairs(30)
    # A prompt that differs in case or spaces is another one, and stays in its set.
    rows += [{**row, "prompt": row["prompt"].upper().replace(" ", "  ")} for row in rows[:7]]
    rows += [{**row, "completion": "another"} for row in rows[:30]]
    # Columns that are not used do not make rows different.
    rows += [{**row, "group": "x"} for row in rows[:5]]
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(rows)}, eval_rows=8)
    assert metrics_in(tmp_path)["duplicate_examples"] == 5
    tokenizer = tokenizer_of(tmp_path)
    asked = [{normal(text) for text in prompts(sets[name], tokenizer)} for name in SETS[:2]]
    assert not asked[0] & asked[1]


CASES = ["hello", "HELLO", "Hello", "hELLO", "word", "WORD", "Word", "wORD"]


def test_task_about_case_keeps_every_row(tmp_path, monkeypatch):
    rows = [{"prompt": f"Swap: {each}", "completion": each.swapcase()} for each in CASES]
    rows += [{"prompt": f"z{i}", "completion": "q"} for i in range(6)]
    run(tmp_path, monkeypatch, {"a.jsonl": jsonl(rows)})
    assert metrics_in(tmp_path)["duplicate_examples"] == 0


def test_what_a_row_is_split_by_knows_no_case():
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        for text in ("É à\n  b", "é À b\n", "É à b c")
    ]
    keys = [prompt_and_rest(chat) for chat in chats]
    assert keys[0] == keys[1] != keys[2]


def tool(description: str) -> dict:
    return {"type": "function", "function": {"name": "f", "description": description}}


def test_rows_that_differ_in_tools_alone_are_no_duplicates(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    store = Store(tmp_path)
    for i, description in enumerate(["one", "two", "one"]):
        row = {"messages": chat, "tools": [tool(description)]}
        example = recognize("auto", None, row, "a:1").example(row, "a:1")
        store.add("a", i, example, "")
    store.finish()
    assert distinct(store, np.arange(3)).tolist() == [0, 1]
    assert len(set(store.prompts)) == 1
    assert "two" in text_of(store.example(1))


def test_rows_that_all_ask_the_same_are_said_to(tmp_path, monkeypatch):
    rows = [{"prompt": "Sum it up", "completion": f"c{i}", "system": f"s{i}"} for i in range(20)]
    message = "these 20 have only 1 different prompts, and rows with the same prompt stay in one"
    with pytest.raises(StageError, match=message):
        run(tmp_path, monkeypatch, {"a.jsonl": jsonl(rows)})


def test_first_question_may_have_a_name():
    named = {"role": "user", "content": "q", "name": "n"}
    answer = {"role": "assistant", "content": "a"}
    assert prompt_and_rest([named, answer])[0] == "q"


# Of 40 runs of three words, all but three are equal.
NEAR = " ".join(f"word{i}" for i in range(40)) + " "


def test_near_duplicates_are_removed_on_request(tmp_path, monkeypatch):
    rows = pairs(20) + [{"prompt": NEAR + str(i), "completion": "az vm list"} for i in range(5)]
    counts = {}
    for near in (True, False):
        run(tmp_path / str(near), monkeypatch, {"a.jsonl": jsonl(rows)}, near_duplicates=near)
        counts[near] = metrics_in(tmp_path / str(near))["near_duplicate_examples"]
    assert counts == {True: 4, False: 0}


def test_near_duplicate_of_the_evaluation_file_leaves_training(tmp_path, monkeypatch):
    row = {"prompt": NEAR + "1", "completion": "az vm list"}
    files = {"a.jsonl": jsonl([*pairs(9), row]), "b.jsonl": jsonl([row | {"prompt": NEAR + "2"}])}
    options = {"eval_file": "b.jsonl", "near_duplicates": True, "max_length": 512}
    sets = run(tmp_path, monkeypatch, files, **options)
    assert len(sets["train"]) == 9
    assert [row["row"] for row in sets["eval"]] == ["b.jsonl:1"]


def test_evaluation_file_is_the_held_out_set(tmp_path, monkeypatch):
    files = {"train.jsonl": jsonl(pairs(20)), "test.jsonl": jsonl(pairs(5, start=90))}
    sets = run(tmp_path, monkeypatch, files, eval_file="test.jsonl", eval_rows=100)
    assert {row["row"].split(":")[0] for row in sets["eval"]} == {"test.jsonl"}
    assert (len(sets["train"]), len(sets["eval"])) == (20, 5)


def test_shards_of_a_test_set_are_held_out_together(tmp_path, monkeypatch):
    files = {"train-00000-of-00001.jsonl": jsonl(pairs(20))}
    tests = {f"test-0000{i}-of-00002.jsonl": jsonl(pairs(3, start=90 + 3 * i)) for i in range(2)}
    sets = run(tmp_path, monkeypatch, files | tests, eval_file="test-*.jsonl", eval_rows=100)
    assert {row["row"].split(":")[0] for row in sets["eval"]} == set(tests)
    assert (len(sets["train"]), len(sets["eval"])) == (20, 6)


def test_row_that_leaks_into_the_evaluation_file_is_refused(tmp_path, monkeypatch):
    leaked = [{**row, "completion": "another"} for row in pairs(3, start=4)]
    files = {"a.jsonl": jsonl(pairs(20)), "b.jsonl": jsonl(leaked)}
    with pytest.raises(StageError) as caught:
        run(tmp_path, monkeypatch, files, eval_file="b.jsonl")
    assert str(caught.value) == (
        "data/raw/a.jsonl:5: has the same prompt as a row of b.jsonl, as do 2 others; delete them "
        "from one of the two"
    )
    assert not (tmp_path / "data/prepared").exists()


def test_prompt_in_another_unicode_spelling_leaks_as_well(tmp_path, monkeypatch):
    rows = [{"prompt": f"Où est le café {i} ?", "completion": f"c{i}"} for i in range(40)]
    spelt = [row | {"prompt": unicodedata.normalize("NFD", row["prompt"])} for row in rows]
    files = {"a.jsonl": jsonl(spelt), "b.jsonl": jsonl(rows[:3])}
    with pytest.raises(StageError, match=r"a.jsonl:1: has the same prompt as a row of b"):
        run(tmp_path / "given", monkeypatch, files, eval_file="b.jsonl")
    options = {"eval_rows": 8, "max_length": 512}
    sets = run(tmp_path / "split", monkeypatch, {"a.jsonl": jsonl(rows + spelt)}, **options)
    numbers = [{int(row["row"].partition(":")[2]) % 40 for row in sets[name]} for name in SETS[:2]]
    assert numbers[0]
    assert not numbers[0] & numbers[1]


MIXED = [
    *pairs(30),
    {"prompt": "Null?", "completion": None},
    {"prompt": "Empty?", "completion": ""},
    {"prompt": "Mark?", "completion": "<|im_start|>"},
    *({"prompt": f"Long {i}?", "completion": "x" * 300} for i in range(4)),
    pairs(1)[0],
]


@pytest.mark.parametrize(
    ("too_long", "expected"),
    [
        ("drop", {"dropped_too_long_examples": 4, "truncated_examples": 0, "split_examples": 0}),
        (
            "truncate",
            {"dropped_too_long_examples": 0, "truncated_examples": 4, "split_examples": 0},
        ),
        ("split", {"dropped_too_long_examples": 0, "truncated_examples": 4, "split_examples": 4}),
    ],
)
def test_every_row_is_accounted_for(too_long, expected, tmp_path, monkeypatch, capsys):
    # Held-out rows are chosen first, and must be the same for all three.
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(MIXED)}, too_long=too_long)
    metrics = metrics_in(tmp_path)
    rows = sum(metrics[f"{name}_examples"] for name in SETS)
    assert metrics["rows_in"] == len(MIXED)
    assert rows - metrics["split_examples"] + metrics["dropped_examples"] + metrics[
        "duplicate_examples"
    ] + metrics["near_duplicate_examples"] + metrics["unused_examples"] == len(MIXED)
    reasons = [k for k in metrics if k.startswith("dropped_") and k != "dropped_examples"]
    assert metrics["dropped_examples"] == sum(metrics[k] for k in reasons)
    assert metrics["dropped_empty_examples"] == 2
    assert metrics["dropped_special_token_examples"] == 1
    assert metrics["duplicate_examples"] == 1
    assert {key: metrics[key] for key in expected} == expected
    assert metrics["train_tokens"] == sum(len(row["input_ids"]) for row in sets["train"])
    learned = sum(label != IGNORED for row in sets["train"] for label in row["labels"])
    assert metrics["train_learned_tokens"] == learned
    assert metrics["leaked_examples"] == 0
    said = capsys.readouterr().out
    assert "dropped data/raw/a.jsonl:31: 'completion' is null: fill it in or delete the row" in said
    parts = [row["row"] for row in sets["train"] if "#" in row["row"]]
    assert len(parts) == expected["split_examples"]


def test_part_of_a_split_row_has_its_number_though_one_before_it_is_not_learned(
    tmp_path, monkeypatch
):
    rows = [{"prompt": f"{i}?" + "q" * 80, "completion": "a" * 50} for i in range(9)]
    options = {"max_length": 64, "too_long": "split"}
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(rows)}, **options)
    found = sets["train"] + sets["eval"]
    assert {row["row"].rpartition("#")[2] for row in found} == {"2", "3"}
    assert not any(row["prompt_tokens"] for row in found)


def rows_of(sets: dict[str, list[dict]], name: str) -> list[str]:
    return [row["row"] for row in sets[name]]


@pytest.mark.parametrize("group_by", [None, "group"])
def test_validation_rows_are_a_third_set_and_move_no_held_out_row(group_by, tmp_path, monkeypatch):
    rows, options = pairs(100), {"group_by": group_by, "eval_rows": 8}
    # Rows with the same prompt stay in one set.
    rows += [row | {"completion": "another"} for row in rows]
    before = run(tmp_path / "0", monkeypatch, {"a.jsonl": jsonl(rows)}, **options)
    plain = metrics_in(tmp_path / "0")
    assert not any("validation" in key for key in plain)
    options["validation_rows"] = 12
    sets = run(tmp_path / "12", monkeypatch, {"a.jsonl": jsonl(rows)}, **options)
    for name in before.keys() - {"train"}:
        assert rows_of(sets, name) == rows_of(before, name)
    chosen = read_rows(tmp_path / "12/data/prepared/validation.arrow")
    tokenizer = tokenizer_of(tmp_path / "12")
    asked = {name: prompts(found, tokenizer) for name, found in sets.items()}
    judged = prompts(chosen, tokenizer)
    assert all(not judged & questions for questions in asked.values())
    train = set(rows_of(before, "train"))
    assert set(rows_of(sets, "train")) < train
    # Half as many again stand between them and training, or one more where rows ask the same.
    assert len(train) - len(sets["train"]) in (18, 19)
    metrics, about = metrics_in(tmp_path / "12"), tmp_path / "12/data/prepared/prepared.json"
    assert metrics["validation_examples"] == len(chosen) == 12
    assert metrics["validation_tokens"] == sum(len(row["input_ids"]) for row in chosen)
    assert metrics["unused_margin_examples"] - plain["unused_margin_examples"] in (6, 7)
    assert metrics["leaked_examples"] == 0
    assert json.loads(about.read_text())["splits"]["validation"]["rows"] == 12


def test_added_rows_bring_no_validation_row_into_another_set(tmp_path, monkeypatch):
    found = []
    for count in (200, 230):
        folder, options = tmp_path / str(count), {"eval_rows": 20, "validation_rows": 20}
        sets = run(folder, monkeypatch, {"a.jsonl": jsonl(pairs(count))}, **options)
        sets["validation"] = read_rows(folder / "data/prepared/validation.arrow")
        found.append({name: set(rows_of(sets, name)) for name in sets})
    before, after = found
    assert before["validation"] != after["validation"]
    for name, others in {"validation": "eval train", "eval": "validation train"}.items():
        assert not any(before[name] & after[other] for other in others.split())
    assert not before["train"] & after["validation"]


def test_few_rows_are_shared_between_three_sets(tmp_path, monkeypatch, capsys):
    options = {"eval_rows": 100, "validation_rows": 100}
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(pairs(60))}, **options)
    chosen = read_rows(tmp_path / "data/prepared/validation.arrow")
    assert (len(sets["eval"]), len(chosen), len(sets["train"])) == (20, 10, 15)
    assert "too few rows to validate on 100" in capsys.readouterr().out


def test_validation_rows_beside_an_evaluation_file(tmp_path, monkeypatch):
    files = {"train.jsonl": jsonl(pairs(40)), "test.jsonl": jsonl(pairs(5, start=90))}
    options = {"eval_file": "test.jsonl", "eval_rows": 100, "validation_rows": 4}
    sets = run(tmp_path, monkeypatch, files, **options)
    chosen = read_rows(tmp_path / "data/prepared/validation.arrow")
    assert (len(sets["eval"]), len(chosen), len(sets["train"])) == (5, 4, 34)
    assert {row["row"].split(":")[0] for row in chosen} == {"train.jsonl"}


def test_keys_of_the_metrics_are_always_the_same(tmp_path, monkeypatch):
    keys = []
    for name, group_by in (("a", None), ("b", "group")):
        run(tmp_path / name, monkeypatch, {"a.jsonl": jsonl(pairs(40))}, group_by=group_by)
        keys.append(list(metrics_in(tmp_path / name)))
    assert keys[0] == keys[1]
    needed = (
        "train_examples eval_examples train_tokens eval_tokens truncated_examples "
        "dropped_examples duplicate_examples leaked_examples"
    )
    assert set(needed.split()) <= set(keys[0])


def test_stage_says_which_rows_it_drops_once_too_many(tmp_path, monkeypatch):
    rows = [*pairs(4), *({"prompt": f"p{i}", "completion": ""} for i in range(6))]
    with pytest.raises(StageError) as caught:
        run(tmp_path, monkeypatch, {"a.jsonl": jsonl(rows)})
    assert str(caught.value) == (
        "6 of 10 rows dropped, more than 50%; 6 are empty (a.jsonl:5, a.jsonl:6, a.jsonl:7, "
        "a.jsonl:8, a.jsonl:9, …), the first: data/raw/a.jsonl:5: 'completion' is empty: fill it "
        "in or delete the row"
    )


def test_stage_says_when_rows_are_too_few_to_hold_out_what_was_asked(tmp_path, monkeypatch, capsys):
    files = {"a.jsonl": jsonl(pairs(60))}
    sets = run(tmp_path / "few", monkeypatch, files, eval_rows=100)
    assert [len(sets[name]) for name in ("train", "eval")] == [30, 20]
    note = "too few rows to hold out 100 (prepare.eval_rows); half of them stay in training"
    assert note in capsys.readouterr().out
    run(tmp_path / "enough", monkeypatch, files, eval_rows=20)
    assert "too few rows" not in capsys.readouterr().out


def test_histogram_counts_every_row_to_train_on(tmp_path, monkeypatch):
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(pairs(30))})
    header, *lines = (tmp_path / "metrics/lengths.csv").read_text().splitlines()
    assert header == "tokens,rows"
    counted = dict.fromkeys(range(1, 257), 0)
    for line in lines:
        steps, count = line.split(",")
        first, last = map(int, steps.split("-"))
        inside = [row for row in sets["train"] if first <= len(row["input_ids"]) <= last]
        assert int(count) == len(inside)
        counted = {k: v for k, v in counted.items() if not first <= k <= last}
    assert not counted


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_is_best_fit_decreasing(lengths):
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in room if space >= length]
        if fitting:
            room.remove(min(fitting))
            room.append(min(fitting) - length)
        else:
            room.append(20 - length)
    assert packed_bins(np.array(lengths), 20) == len(room)


def test_sample_marks_what_is_learned(tmp_path, monkeypatch, capsys):
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(pairs(30))})
    about = json.loads((tmp_path / "data/prepared/prepared.json").read_text())
    row = sets["train"][0]
    number = int(row["row"].split(":")[1]) - 1
    (prompt, no), (answer, yes) = about["sample"]["pieces"]
    assert (about["sample"]["row"], no, yes) == (row["row"], False, True)
    assert f"user\nQuestion {number}?<|im_end|>" in prompt
    assert answer == f"answer {number}<|im_end|>"
    shown = f"  {prompt}[[{answer}]]".replace("\n", "\n  ")
    assert f"marked:\n{shown}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("terminal", "no_color", "expected"),
    [
        (True, "", "  a\\x1b\n  \x1b[32mb\x1b[0m"),
        (True, "1", "  a\\x1b\n  [[b]]"),
        (False, "", "  a\\x1b\n  [[b]]"),
    ],
)
def test_sample_is_coloured_in_a_terminal_only(terminal, no_color, expected, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(contract.sys.stdout, "isatty", lambda: terminal, raising=False)
    show({"row": "a:1", "pieces": [["a\x1b\n", False], ["b", True]]})
    assert capsys.readouterr().out.endswith(expected + "\n")


def test_prepared_json_describes_the_sets(tmp_path, monkeypatch):
    sets = run(tmp_path, monkeypatch, {"a.jsonl": jsonl(pairs(40))}, group_by="group")
    about = json.loads((tmp_path / "data/prepared/prepared.json").read_text())
    assert {k: about[k] for k in ("format", "template", "loss_on", "max_length")} == {
        "format": "prompt_completion",
        "template": "chat",
        "loss_on": "completion",
        "max_length": 256,
    }
    for name, rows in sets.items():
        assert about["splits"][name]["rows"] == len(rows)
        assert about["splits"][name]["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert len({about["eval_set_sha256"], about["group_eval_set_sha256"]}) == 2


@pytest.mark.slow
def test_stage_in_a_process_of_its_own_fails_in_one_line(tmp_path):
    folder = make_workspace(tmp_path / "w", prepare={"group_by": None})
    make_folder(folder, {"a.jsonl": b'{"prompt": "a", "completion": 4}\n'})
    done = subprocess.run(
        [sys.executable, "-m", "stages.prepare"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        "prepare: data/raw/a.jsonl:1: 'completion' holds a number (4) where text belongs; "
        "quote it\n"
    )
    assert not (folder / "data/prepared").exists()


@pytest.mark.parametrize("seed", ["1", "2"])
def test_rows_are_split_by_a_hash_that_every_process_gives(seed):
    """Python's own hash has another seed in each process."""
    code = "from stages.preparing.splitting import hash64; print(hash64('List all machines'))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) == hash64("List all machines")

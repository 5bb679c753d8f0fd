"""Which row is in which set: the rules of splitting.py on numbers that can be checked by hand."""

import hashlib
import json
import math
import tempfile
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest

from stages.preparing.scanning import group_of
from stages.preparing.splitting import (
    Store,
    after_held_out,
    asked_before,
    asked_by,
    distinct,
    hash64,
    hash_order,
    held_out_groups,
    in_turn,
    make_pools,
    may_be_held_out,
    near_duplicates,
    normal,
    prompt_and_rest,
    text_of,
)
from stages.shared.process import StageError


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CHAT = [turn("system", "Be  brief."), turn("user", "Who?"), turn("assistant", "I.")]


def columns(**named):
    """A store of columns alone, for what reads nothing else of it."""
    kinds = dict.fromkeys(("prompts", "wholes", "exacts", "groups"), np.uint64)
    return SimpleNamespace(**{name: np.array(v, kinds[name]) for name, v in named.items()})


def all_of(store):
    return np.arange(len(next(iter(vars(store).values()))))


def stored(folder, examples, path="a", groups=""):
    store = Store(folder)
    for line, example in enumerate(examples):
        store.add(path, line, example, groups[line] if groups else "")
    store.finish()
    return store


def test_a_row_is_split_by_the_first_thing_asked():
    assert prompt_and_rest(CHAT) == ("who?", json.dumps(["be brief.", "i."]))
    later = [turn("assistant", "Hello"), *CHAT[1:], turn("user", "And you?")]
    assert prompt_and_rest(later) == ("who?", json.dumps(["hello", "i.", "and you?"]))
    # Nothing is asked: what stands first.
    assert prompt_and_rest([turn("assistant", "A"), turn("assistant", "B")]) == ("a", '["b"]')


def test_what_a_message_has_beside_its_content_is_of_the_rest():
    named = turn("assistant", "A  b", name="N")
    asked, rest = prompt_and_rest([turn("user", "Q", name="U"), named])
    assert (asked, json.loads(rest)) == ("q", [named | {"content": "a b"}])


def test_a_text_is_split_before_its_first_answer():
    text = "Ask: Who? Answer: I. Ask: You? Answer: Me."
    assert prompt_and_rest(text) == (normal(text), "")
    marked = {"text": text, "answers": [[18, 20], [39, 42]]}
    assert prompt_and_rest(marked) == ("ask: who? answer:", "i. ask: you? answer: me.")


def test_the_words_by_which_rows_are_alike():
    assert text_of("One text") == "One text"
    assert text_of({"text": "Marked", "answers": [[0, 1]]}) == "Marked"
    assert text_of(CHAT) == "Be  brief.\nWho?\nI."
    given = {"messages": CHAT, "given": {"tools": ["t"]}, "silent": [1]}
    assert text_of(given) == 'Be  brief.\nWho?\nI.\n{"tools": ["t"]}'
    called = [turn("user", "Q"), turn("assistant", "A", calls=["c"])]
    assert text_of(called) == 'Q\nA\n{"role": "assistant", "calls": ["c"]}'


def test_spellings_of_the_same_characters_are_one_prompt():
    texts = ["Où est le café ?", "Ångström", "한국어", "Việt Nam"]
    for text in texts:
        composed, parts = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert composed != parts
        assert prompt_and_rest([turn("user", parts)]) == prompt_and_rest([turn("user", composed)])
    assert normal("\u212bngstr\u00f6m") == normal("\u00c5ngstr\u00f6m")


def test_spellings_of_the_same_characters_are_one_group():
    for form in ("NFC", "NFD"):
        row = {"group": unicodedata.normalize(form, "café")}
        assert group_of(row, "group", "a:1") == "caf\u00e9"


def test_text_in_nfc_is_split_as_ever():
    for text in ("Où  est\nLE café ?", "STRASSE Straße", "İstanbul ǰ ΐ", "ﬁne ②", "日本語"):
        assert text == unicodedata.normalize("NFC", text)
        assert normal(text) == " ".join(text.casefold().split())


def test_the_hash_is_64_bits_of_blake2b():
    for text in ("", "List all machines", "é"):
        digits = hashlib.blake2b(text.encode(), digest_size=8).digest()[::-1].hex()
        assert hash64(text) == int(digits, 16)


def test_a_store_gives_back_what_it_was_given(tmp_path, monkeypatch):
    # The system's own folder for such files may be memory, or small.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    store, other = Store(tmp_path), {"text": "ünlike", "answers": []}
    added = [("a", 3, CHAT, "g"), ("a", 4, "text", "h"), ("b", 1, other, "g"), ("b", 2, CHAT, "g")]
    for row in added:
        store.add(*row)
    store.finish()
    assert len(store) == 4
    assert [store.example(i) for i in range(4)] == [example for _, _, example, _ in added]
    assert [store.where(i) for i in range(4)] == ["a:3", "a:4", "b:1", "b:2"]
    assert store.paths == ["a", "b"]
    assert store.groups.tolist() == [hash64(group) for *_, group in added]
    texts = [json.dumps(example) for _, _, example, _ in added]
    assert store.exacts.tolist() == [hash64(text) for text in texts]
    asked = [prompt_and_rest(example) for _, _, example, _ in added]
    assert store.prompts.tolist() == [hash64(prompt) for prompt, _ in asked]
    wholes = [hash64(f"{hash64(prompt)} {rest}") for prompt, rest in asked]
    assert store.wholes.tolist() == wholes
    assert [store.lines.dtype, store.prompts.dtype] == [np.uint32, np.uint64]
    assert store.size(np.array([0, 2])) == len(texts[0].encode()) + len(texts[2].encode())
    assert store.in_files(["b", "c"]).tolist() == [False, False, True, True]
    assert not list(tmp_path.iterdir())


def test_a_store_that_a_full_disk_did_not_take_ends_in_silence(tmp_path):
    def full():
        raise OSError("no space left")

    store = Store(tmp_path)
    store._file.close()
    store._file = SimpleNamespace(close=full)
    store.__del__()


def test_rows_are_ordered_by_prompt_then_by_the_whole_row():
    store = columns(prompts=[2, 1, 1, 1, 1], wholes=[0, 5, 4, 4, 9], exacts=[0, 0, 8, 7, 1])
    assert hash_order(store, all_of(store)).tolist() == [3, 2, 1, 4, 0]
    assert hash_order(store, np.array([4, 1, 0])).tolist() == [1, 4, 0]


def test_the_first_of_equal_rows_stays():
    store = columns(exacts=[7, 3, 7, 1, 3, 2])
    assert distinct(store, all_of(store)).tolist() == [0, 1, 3, 5]
    assert distinct(store, np.array([4, 2, 1, 0])).tolist() == [4, 2]


def test_rows_nearly_as_one_before(tmp_path):
    words = " ".join(f"word{i}" for i in range(40))
    half = " ".join(f"word{i}" for i in range(20)) + " other" * 20
    # Two words have no run of three.
    texts = [words, f"{words.upper()} more", half, "two words", "Two  words", "two", "words two"]
    store = stored(tmp_path, texts)
    found = near_duplicates(store, range(len(texts)))
    assert found.tolist() == [1, 4]
    assert near_duplicates(store, [1, 0]).tolist() == [0]
    none = near_duplicates(store, [])
    assert (len(none), none.dtype.kind) == (0, "i")


def test_runs_of_three_words_are_told_apart(tmp_path):
    """The same words in another order are another text."""
    words = [f"word{i}" for i in range(30)]
    store = stored(tmp_path, [" ".join(words), " ".join(words[::-1]), " ".join(words[:27])])
    assert near_duplicates(store, range(3)).tolist() == [2]


def test_runs_have_three_words_and_all_count(tmp_path):
    words = [f"word{i}" for i in range(30)]
    # In both orders the same runs of three words, and half of those of four.
    texts = [" ".join(f"x y {word}" for word in [*each, "x y"]) for each in (words, words[::-1])]
    store = stored(tmp_path, [*texts, "one two three four", "one two three five"])
    assert near_duplicates(store, range(4)).tolist() == [1]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 100])
def test_enough_is_left_to_train_on(count):
    most = may_be_held_out(np.arange(count))
    assert most.tolist() == list(range(len(most)))
    # With half as many between them, they are half of all at most, and no smaller than they may.
    assert 1.5 * len(most) <= 0.5 * count < 1.5 * (len(most) + 1)


def test_half_as_many_as_are_held_out_stand_between():
    store = columns(prompts=range(20))
    for held_out in range(10):
        left = after_held_out(store, all_of(store), held_out)
        assert left.tolist() == list(range(math.ceil(1.5 * held_out), 20))
    assert after_held_out(store, all_of(store), 15).tolist() == []


def test_rows_that_ask_the_same_stay_on_one_side():
    store = columns(prompts=[1, 1, 2, 2, 2, 3, 3])
    assert after_held_out(store, all_of(store), 0).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert after_held_out(store, all_of(store), 1).tolist() == [2, 3, 4, 5, 6]
    assert after_held_out(store, all_of(store), 2).tolist() == [5, 6]
    assert after_held_out(store, all_of(store), 4).tolist() == []
    # The first of an order that is not that of the rows.
    assert after_held_out(store, all_of(store)[::-1], 1).tolist() == [4, 3, 2, 1, 0]
    odd = columns(prompts=[1, 1, 1, 2, 2])
    assert after_held_out(odd, all_of(odd), 1).tolist() == [3, 4]
    alike = columns(prompts=[1, 1])
    assert after_held_out(alike, all_of(alike), 0).tolist() == [0, 1]
    assert after_held_out(alike, all_of(alike), 1).tolist() == []


def test_groups_take_turns():
    store = columns(groups=[5, 5, 5, 9, 9, 2])
    assert in_turn(store, all_of(store)).tolist() == [0, 3, 5, 1, 4, 2]
    assert in_turn(store, np.array([4, 2, 1, 3])).tolist() == [4, 2, 1, 3]
    assert in_turn(store, np.array([2, 1, 4, 3])).tolist() == [2, 4, 1, 3]
    assert in_turn(store, np.array([], int)).tolist() == []
    # So many that an unstable sort would reorder them.
    pairs = columns(groups=np.repeat(np.arange(100), 2))
    assert in_turn(pairs, all_of(pairs)).tolist() == [*range(0, 200, 2), *range(1, 200, 2)]


GROUPS = {
    # sizes of the groups in the order of their hashes, rows wanted -> to score, in no set
    "a tenth of the groups": ([10] * 20, 8, [0, 1], [2]),
    "a quarter more than wanted": ([10] * 20, 17, [0, 1, 2], [3, 4]),
    "a quarter more exactly": ([10] * 20, 16, [0, 1], [2]),
    "a tenth exactly": ([10] * 10, 8, [0], [1]),
    "a tenth and a bit": ([10] * 11, 8, [0, 1], [2]),
    "a group of half of all rows": ([5, 5], 2, [0], []),
    "a group above half of all rows": ([6, 5], 2, [1], []),
    "a large one in between": ([2, 90, 2, *[2] * 30], 3, [0, 2, 3, 4], [5, 6]),
    "spare ones that would be too many": ([4, 3, 3], 3, [0], []),
    "the last spare one that fits": ([4, 1, 5], 3, [0], [1]),
}


@pytest.mark.parametrize("case", GROUPS)
def test_whole_groups_are_held_out(case):
    sizes, wanted, scored, spare = GROUPS[case]
    hashes = np.arange(1, len(sizes) + 1, dtype=np.uint64) * np.uint64(2**57 + 1)
    groups = np.random.default_rng(0).permutation(np.repeat(hashes, sizes))
    store = columns(groups=groups)
    found = held_out_groups(store, all_of(store), wanted)
    assert [each.tolist() for each in found] == [hashes[scored].tolist(), hashes[spare].tolist()]
    # In float64, which holds 53 bits, groups would be taken for each other.
    assert {each.dtype for each in found} == {np.dtype(np.uint64)}


def test_only_the_rows_in_question_count():
    store = columns(groups=[1, 1, 1, 2, 2, 3])
    scored, spare = held_out_groups(store, np.array([0, 3, 4, 5]), 1)
    assert (scored.tolist(), spare.tolist()) == ([1, 3], [])
    assert [each.tolist() for each in held_out_groups(store, all_of(store), 1)] == [[1], []]


def test_groups_of_which_none_can_be_held_out():
    store = columns(groups=[1, 1, 1, 1])
    with pytest.raises(StageError) as fault:
        held_out_groups(store, all_of(store), 1)
    assert str(fault.value) == (
        "prepare.group_by: none of the 1 groups is small enough to hold out; "
        "name another column, or set it to null"
    )


def test_a_question_belongs_to_the_first_that_asks_it():
    store = columns(prompts=[1, 2, 3, 1, 2, 4, 4, 9, 3])
    of = np.array([0, 0, 0, 1, 1, 1, 2, 2, 0])
    rows, given = np.arange(8), np.array([8])
    assert asked_by(store, rows, given).tolist() == [2]
    assert asked_before(store, rows, given[:0], of).tolist() == [3, 4, 6]
    assert asked_before(store, rows, np.array([7]), of).tolist() == [3, 4, 6, 7]
    assert asked_before(store, rows[:3], given, of).tolist() == []
    assert asked_before(store, rows[:0], given, of).tolist() == []
    # A prompt that is not among the rows belongs to no earlier source.
    assert asked_before(store, rows[1:], given[:0], of).tolist() == [4, 6]


def options(**values):
    return SimpleNamespace(**{"group_by": None, "eval_rows": 1, "eval_file": None} | values)


def pools_of(store, given=(), **values):
    rows = np.setdiff1d(all_of(store), given)
    pools = make_pools(store, rows, np.array(given, int), options(**values))
    return [each.tolist() for each in (pools.train, pools.eval, pools.group)]


def table(**named):
    count = len(next(iter(named.values())))
    return columns(**{"wholes": [0] * count, "exacts": range(count), "groups": [0] * count} | named)


def test_pools_without_groups_begin_alike():
    store = table(prompts=[6, 5, 4, 3, 2, 1])
    assert pools_of(store) == [[5, 4, 3, 2, 1, 0], [5, 4], []]


def test_an_evaluation_file_is_the_held_out_set():
    store = table(prompts=[6, 5, 4, 3, 2, 1])
    assert pools_of(store, given=[0, 3], eval_file="f") == [[5, 4, 2, 1], [3, 0], []]


def test_held_out_groups_are_in_no_other_pool_and_share_no_question_with_one():
    groups = [1, 1, 2, 3, *range(4, 23), 22]
    prompts = [100, 50, 60, 70, *range(19), 50]
    store = table(groups=groups, prompts=prompts)
    train, evaluation, group = pools_of(store, group_by="g")
    scored, spare = held_out_groups(store, all_of(store), 1)
    kept = [i for i, number in enumerate(groups) if number not in {*scored, *spare}]
    assert train == sorted(kept, key=lambda i: prompts[i])
    assert evaluation == train[: len(evaluation)]
    assert (scored.tolist(), spare.tolist()) == ([1, 2, 3], [4, 5])
    # Row 1 asks what a row to train on asks; of the others the hashes of the prompts decide.
    assert group == [2, 3, 0]

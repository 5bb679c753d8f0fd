"""Rows and masks in the templates of many models, held to transformers and to trl.

trl ships the templates as models have them, and of each one for training, whose marks say what the
assistant wrote.
"""

from functools import cache

import pytest
from known_templates import FOLDER, TOOLS, ask, call, made_of, say, tell, template

from stages.preparing.messages import Unusable

THOUGHTS = [f"<think>\nr{i}\n</think>\n\na{i}" for i in range(2)]
CHATS = {
    "plain": [ask("q0"), say("a0"), ask("q1"), say("a1")],
    "inline": [ask("q0"), say(THOUGHTS[0]), ask("q1"), say(THOUGHTS[1])],
    "key": [ask("q0"), say("a0", reasoning="r0"), ask("q1"), say("a1", reasoning="r1")],
    "rounds": [ask("q0"), call("T0"), tell("18"), call("T1"), tell("19"), say("a1")],
    "turns": [
        ask("q0"), call("T0"), tell("18"), say("a1"), ask("q1"), call("T1"), tell("19"), say("a2"),
    ],
    "thoughts": [
        ask("q0"), call("T0", reasoning="r0"), tell("18"), say("a1", reasoning="r1"),
        ask("q1"), call("T1", reasoning="r2"), tell("19"), say("a2", reasoning="r3"),
    ],
}  # fmt: skip


def given(chat: str) -> dict:
    return {"tools": TOOLS} if chat in ("rounds", "turns", "thoughts") else {}


@cache
def made(text: str, chat: str, loss_on: str = "assistant"):
    return made_of(text, {"messages": CHATS[chat], **given(chat)}, loss_on)


# Of pictures as well as text: they take contents in parts alone.
PICTURES = ("idefics3", "llava_next", "smolvlm")
NAMES = sorted({path.stem for path in FOLDER.glob("*.jinja")} - {*PICTURES})
NAMES = [name for name in NAMES if name.removesuffix("_training") not in PICTURES]
# V3's for training drops thoughts too, so of it there is nothing to compare.
TRAINING = [n for n in NAMES if n.endswith("_training") and n != "deepseekv3_training"]
NO_TOOLS, NO_KEY = {"rounds", "turns", "thoughts"}, {"key", "thoughts"}
# What templates leave out or refuse, by the beginnings of their names, the longest that fits.
LACKS = {
    **dict.fromkeys(
        ("cohere", "gemma", "gemma3", "llama3", "phi3", "qwen2_5_vl"), NO_TOOLS | NO_KEY
    ),
    **dict.fromkeys(("llama3_1", "llama3_2"), NO_KEY),
    **dict.fromkeys(("gemma4", "lfm2_v2", "qwen2_5", "qwen3_instruct", "qwen3_vl"), NO_KEY),
    "gemma4_v5": {"thoughts"},
    "diffusion_gemma": {"thoughts"},
    "gptoss": {"thoughts"},
    "lfm2": NO_TOOLS | NO_KEY,
    "lfm2_2_5": set(),
    # A prompt that opens a thought, and no way to say that there is none.
    "deepseek": NO_TOOLS | {"plain"},
    # Nothing ends an answer.
    "glm4moe": {*CHATS},
    "glm4moe_training": set(),
}


def lacks(name: str) -> set[str]:
    fitting = [beginning for beginning in LACKS if name.startswith(beginning)]
    return LACKS[max(fitting, key=len)] if fitting else set()


@pytest.mark.parametrize("name", NAMES)
def test_row_is_what_transformers_writes(name):
    for chat in CHATS:
        tokenizer, row = made(template(name), chat)
        assert isinstance(row, Unusable) == (chat in lacks(name)), (chat, row)
        if isinstance(row, Unusable):
            continue
        *asked, _ = CHATS[chat]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **given(chat))
        assert row.ids[: row.prompt_tokens].tolist() == prompt["input_ids"]
        if name.startswith("deepseek"):
            continue  # It writes no thought; see below.
        whole = tokenizer.apply_chat_template(CHATS[chat], tokenize=False, **given(chat))
        text = tokenizer.decode(row.ids)
        # Behind the end comes a new line at most, which nobody generates.
        assert whole.rstrip() in (text, text.removesuffix(tokenizer.eos_token).rstrip())


@pytest.mark.parametrize("loss_on", ["completion", "assistant"])
@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_within_an_answer_are_no_scored_bytes(name, loss_on):
    """Such as those between gpt-oss's thought and answer, and Phi-3's first of two end tokens."""
    for chat in ("plain", "key"):
        tokenizer, row = made(template(name), chat, loss_on)
        if not isinstance(row, Unusable):
            text = tokenizer.decode(row.ids[row.learned], skip_special_tokens=True)
            assert row.scored_bytes == len(text.encode())


def learned_in_trl(tokenizer, chat: str) -> tuple[list[int], list[bool]]:
    """(ids, mask) of trl, the mask without what nobody generates: prompts, and new lines behind
    an answer's end."""
    messages, more = CHATS[chat], given(chat)
    whole = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **more)
    ids, mask = whole["input_ids"], [bool(each) for each in whole["assistant_masks"]]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, prompt = (
                tokenizer.apply_chat_template(messages[:i], add_generation_prompt=asked, **more)
                for asked in (False, True)
            )
            start, end = len(before["input_ids"]), len(prompt["input_ids"])
            if ids[:end] == prompt["input_ids"]:
                mask[start:end] = [False] * (end - start)
    for i in reversed(range(len(ids))):
        follows = i + 1 < len(ids) and mask[i + 1]
        mask[i] = mask[i] and (follows or bool(tokenizer.decode([ids[i]]).strip()))
    return ids, mask


OTHERWISE = {
    # After a tool's answer the prompt ends with nothing, so the header is learned.
    *(("diffusion_gemma_training", chat) for chat in ("rounds", "turns")),
    # The template has no place for the thought, and the prompt opens one.
    ("deepseek_r1_distill_training", "key"),
}


@pytest.mark.parametrize("name", TRAINING)
def test_what_is_learned_is_what_trl_learns(name):
    chats = [chat for chat in CHATS if chat not in lacks(name) and (name, chat) not in OTHERWISE]
    assert chats
    for chat in chats:
        tokenizer, row = made(template(name), chat)
        ids, mask = learned_in_trl(tokenizer, chat)
        count = min(len(ids), len(row.ids))
        assert row.ids[:count].tolist() == ids[:count]
        assert row.learned[:count].tolist() == mask[:count], chat
        assert not any(mask[count:])


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("deepseek")])
@pytest.mark.parametrize("chat", ["inline", "key"])
def test_thought_that_a_prompt_opens_is_learned_though_the_template_drops_it(name, chat):
    """What the template of R1 for training writes, and the prompt at inference before it."""
    tokenizer, row = made(template(name), chat, "completion")
    text = template("deepseek_r1_distill_training")
    whole = tokenizer.apply_chat_template(CHATS["inline"], chat_template=text, tokenize=False)
    answer = tokenizer.decode(row.ids[row.learned])
    assert answer == whole.rpartition("<think>\n")[2]
    assert row.learned.sum() == len(row.ids) - row.prompt_tokens


@pytest.mark.parametrize(
    ("name", "chat", "setting"),
    [
        ("nemotron_3_nano", "plain", "false"),
        ("nemotron_3_nano", "inline", None),
        ("qwen3_5_nothink", "inline", "true"),
        ("qwen3_5_nothink", "plain", None),
        ("qwen3", "plain", None),
    ],
)
def test_prompt_opens_a_thought_where_the_answers_have_one(name, chat, setting):
    tokenizer, _ = made(template(name), chat)
    added = tokenizer.chat_template.removesuffix(template(name))
    assert (f"default({setting})" in added) == (setting is not None)
    assert bool(added) == (setting is not None)

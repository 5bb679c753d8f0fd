"""What is learned, token by token, in the template shapes of known models."""

from functools import cache
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import Environment

from stages.preparing.encoding import Encoder
from stages.preparing.messages import Unusable
from stages.preparing.recognizing import recognize
from stages.preparing.templates import settle
from stages.shared.process import StageError
from templates import SHAPES, make_shape

CHATS = [name for name in SHAPES if name != "bare"]
QUESTIONS = ["hello az", "more ok"]
ANSWERS = [" first\naz", "\naz ok "]
CHAT = [
    {"role": role, "content": text}
    for pair in zip(QUESTIONS, ANSWERS, strict=True)
    for role, text in zip(("user", "assistant"), pair, strict=True)
]
MESSAGES = recognize("auto", None, {"messages": CHAT}, "a:1")
TEXT = recognize("auto", None, {"text": "a"}, "a:1")


def encoder_of(shape: str, form=MESSAGES, sample=CHAT, edit=None, **changes) -> Encoder:
    """An encoder of a settled tokenizer; `edit` changes the tokenizer before."""
    values = {"template": "chat", "loss_on": "completion", "max_length": 4000, "too_long": "drop"}
    params = SimpleNamespace(**values | changes)
    tokenizer = make_shape(shape)
    if edit:
        edit(tokenizer)
    settle(tokenizer, params, form, [sample])
    return Encoder(tokenizer, params)


cached_encoder = cache(encoder_of)


def encoded(encoder: Encoder, example=CHAT):
    (made,) = encoder.encode([example])
    assert isinstance(made, list), made.message
    (row,) = made
    return row


def learned_parts(encoder: Encoder, row) -> list[str]:
    """The text of each run of learned tokens."""
    pairs = zip(row.ids.tolist(), row.learned.tolist(), strict=True)
    runs = [(learned, [i for i, _ in run]) for learned, run in groupby(pairs, lambda p: p[1])]
    return [encoder.tokenizer.decode(ids) for learned, ids in runs if learned]


def words(part: str, shape: str) -> list[str]:
    """The words of an answer; the template of Qwen 3 puts an empty thought before the newest."""
    return part.removesuffix(SHAPES[shape].end).removeprefix("<think>\n\n</think>\n\n").split()


def prompt_ids(tokenizer, messages: list[dict]) -> list[int]:
    """Like a user who renders a prompt at inference with transformers alone."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("shape", CHATS)
def test_last_answer_and_its_end_are_learned(shape):
    encoder = encoder_of(shape)
    row = encoded(encoder)
    (part,) = learned_parts(encoder, row)
    assert words(part, shape) == ANSWERS[1].split()
    assert part.endswith(SHAPES[shape].end)
    assert row.learned.sum() == len(row.ids) - row.prompt_tokens


@pytest.mark.parametrize("shape", CHATS)
def test_every_answer_and_its_end_are_learned(shape):
    encoder = encoder_of(shape, loss_on="assistant")
    parts = learned_parts(encoder, encoded(encoder))
    assert len(parts) == 2
    for part, answer in zip(parts, ANSWERS, strict=True):
        assert words(part, shape) == answer.split()
        assert part.endswith(SHAPES[shape].end)


@pytest.mark.parametrize("shape", CHATS)
def test_all_but_the_first_token_is_learned(shape):
    row = encoded(encoder_of(shape, loss_on="all"))
    assert row.learned[1:].all()
    # Nothing predicts the first token.
    assert not row.learned[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_bos_stands_once_where_the_model_wants_it(shape):
    encoder = encoder_of(shape)
    bos = encoder.tokenizer.bos_token_id
    ids = encoded(encoder, CHAT[:2]).ids.tolist()
    assert (ids[0] == bos) == (SHAPES[shape].bos is not None)
    if shape != "smollm":  # whose BOS begins every turn
        assert ids.count(bos) == (SHAPES[shape].bos is not None)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("az k:\n[]ü😀", min_size=1, max_size=12), min_size=1, max_size=5),
    loss_on=st.sampled_from(["completion", "assistant", "all"]),
)
@example(texts=["a", "\n\na"], loss_on="completion")
@example(texts=["a ", " a"], loss_on="assistant")
def test_prompt_at_inference_is_the_beginning_of_the_row(shape, texts, loss_on):
    texts = [text if text.strip() else "a" for text in texts]
    if len(texts) % 2:
        texts.append("a")
    roles = ["user", "assistant"] * (len(texts) // 2)
    chat = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    encoder = cached_encoder(shape, loss_on=loss_on)
    (made,) = encoder.encode([chat])
    if shape == "bare" and loss_on == "assistant" and len(chat) > 2:
        assert made.reason == "template"
        return
    (row,) = made
    prompt = prompt_ids(encoder.tokenizer, chat[:-1])
    assert row.ids[: row.prompt_tokens].tolist() == prompt
    end = encoder.tokenizer.convert_tokens_to_ids(SHAPES[shape].end)
    assert row.ids[-1] == end
    assert row.learned[-1]
    if loss_on == "completion":
        assert not row.learned[: len(prompt)].any()
    if loss_on == "assistant":
        # Never a word of a prompt: only answers are learned, in order.
        parts = [words(part, shape) for part in learned_parts(encoder, row)]
        assert parts == [text.split() for text in texts[1::2]]


@pytest.mark.parametrize("shape", ["smollm", "gemma", "llama-2", "mistral"])
def test_row_is_tokenized_as_the_whole_text_where_nothing_merges(shape):
    encoder = encoder_of(shape)
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "az ok"}]
    text = encoder.tokenizer.apply_chat_template(chat, tokenize=False)
    whole = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = encoded(encoder, chat).ids.tolist()
    # The newline after the end token is not learned: nobody generates it.
    assert ids == whole[: len(ids)]


@pytest.mark.parametrize("shape", SHAPES)
def test_raw_text_gets_bos_once_and_an_end(shape):
    encoder = encoder_of(shape, TEXT, "az ok")
    row = encoded(encoder, "az ok")
    tokenizer = encoder.tokenizer
    assert row.ids.tolist() == [*tokenizer("az ok")["input_ids"], tokenizer.eos_token_id]
    assert row.learned.tolist() == [False] + [True] * (len(row.ids) - 1)
    # A BOS alone asks nothing.
    assert row.prompt_tokens == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_template_is_rendered_once_and_kept_for_inference(shape):
    encoder = encoder_of(shape, template="Q: {prompt}\nA:")
    tokenizer = encoder.tokenizer
    row = encoded(encoder, CHAT[:2])
    bos = SHAPES[shape].bos if SHAPES[shape].adds_bos else ""
    assert tokenizer.decode(row.ids[: row.prompt_tokens]).replace("> ", ">") == (
        f"{bos}Q: hello az\nA:\n"
    )
    assert learned_parts(encoder, row)[0].strip() == "first\naz" + SHAPES[shape].eos
    assert row.ids[: row.prompt_tokens].tolist() == prompt_ids(tokenizer, CHAT[:1])


def test_any_character_may_stand_in_a_plain_template():
    template = '🙂 "é" \\ {{ x }} {% y %}\n{prompt}\n'
    encoder = encoder_of("llama-3", template=template)
    text = encoder.tokenizer.decode(encoded(encoder, CHAT[:2]).ids)
    assert text.startswith("<|begin_of_text|>" + template.replace("{prompt}", "hello az"))


def test_backslash_and_n_in_a_plain_template_is_refused_with_what_works():
    for quoted in ("'Q: {prompt}\\nA: \"é\"'", "Q:\\n {prompt}\\n"):
        with pytest.raises(StageError, match=r"in double quotes in params\.yaml: ") as caught:
            encoder_of("llama-3", template=yaml.safe_load(quoted))
        meant = yaml.safe_load(str(caught.value).partition("params.yaml: ")[2])
        assert "\\n" not in meant
        text = encoder_of("llama-3", template=meant).tokenizer.apply_chat_template(
            CHAT[:1], tokenize=False
        )
        assert text == "<|begin_of_text|>" + meant.replace("{prompt}", "hello az") + (
            "" if meant.endswith("\n") else "\n"
        )


def test_template_file_gets_the_bos_of_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/mine.jinja").write_text(SHAPES["bare"].template)
    encoder = encoder_of("llama-3", template="templates/mine.jinja")
    text = encoder.tokenizer.decode(encoded(encoder, CHAT[:2]).ids)
    assert text == "<|begin_of_text|>user: hello az\nassistant: first\naz<|end_of_text|>".replace(
        "assistant:", "assistant: "
    )


def test_broken_template_file_is_named_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/mine.jinja").write_text("{% for m in messages %}\n{{ m['content' }}")
    with pytest.raises(StageError, match=r"^templates/mine.jinja:2: unexpected '}', expected '\]'"):
        encoder_of("llama-3", template="templates/mine.jinja")


def test_template_file_in_another_encoding_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates/mine.jinja").write_bytes(b"{{ '\xe9' }}")
    with pytest.raises(StageError, match=r"^templates/mine.jinja: not UTF-8 \(byte 4\)"):
        encoder_of("llama-3", template="templates/mine.jinja")


def test_template_cannot_reach_out_of_its_sandbox(tmp_path, monkeypatch):
    """Templates come with untrusted models. Outside the sandbox, this one would create a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "templates").mkdir()
    reach = "{{ cycler.__init__.__globals__.os.mkdir('reached') }}"
    assert Environment().from_string(reach).render() == "None"
    (tmp_path / "reached").rmdir()
    (tmp_path / "templates/mine.jinja").write_text(reach + SHAPES["bare"].template)
    (refused,) = encoder_of("llama-3", template="templates/mine.jinja").encode([CHAT])
    assert "access to attribute '__init__' of 'type' object is unsafe" in refused.message
    assert not (tmp_path / "reached").exists()


def test_template_with_a_date_gives_the_same_row_on_any_day():
    encoder = encoder_of("llama-3")
    assert "Today Date: 26 Jul 2024" in encoder.tokenizer.decode(encoded(encoder).ids)


@pytest.mark.parametrize(
    ("shape", "pad"),
    [
        ("llama-3", "<|finetune_right_pad_id|>"),
        ("gemma", "<pad>"),
        ("smollm", "<|im_end|>"),
        ("llama-2", "</s>"),
        ("qwen", "<|endoftext|>"),
    ],
)
def test_pad_token_is_settled(shape, pad):
    assert encoder_of(shape).tokenizer.pad_token == pad


@pytest.mark.parametrize("shape", CHATS)
def test_eos_becomes_what_ends_an_answer(shape):
    assert encoder_of(shape).tokenizer.eos_token == SHAPES[shape].end
    # Raw text has no answer.
    assert encoder_of(shape, TEXT, "az").tokenizer.eos_token == SHAPES[shape].eos


@pytest.mark.parametrize("model", ["phi3", "phi3_5"])
def test_marks_that_swallow_blanks_are_learned_as_trl_does(model):
    """Phi 3's template writes another end token after the last answer, as EOS."""
    folder = Path(trl.__file__).parent / "chat_templates"
    chat = [{**m, "content": m["content"].strip()} for m in CHAT * 2]

    def edit(tokenizer):
        tokenizer.chat_template = (folder / f"{model}.jinja").read_text()

    encoder = encoder_of("phi-3", sample=chat, edit=edit, loss_on="assistant")
    row = encoded(encoder, chat)
    theirs = encoder.tokenizer.apply_chat_template(
        chat,
        chat_template=(folder / f"{model}_training.jinja").read_text(),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert row.ids.tolist() == theirs["input_ids"]
    assert row.learned.tolist() == [bool(each) for each in theirs["assistant_masks"]]
    assert learned_parts(encoder, row)[0] == "first\naz<|end|>"
    assert encoder.tokenizer.eos_token == "<|endoftext|>"


def calls_end_otherwise(tokenizer):
    tokenizer.add_tokens(["<|call|>"], special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] + '<|im_end|>'",
        "(message['tool_calls'] | tojson + '<|call|>' if message.tool_calls else "
        "message['content'] + '<|im_end|>')",
    )


def test_commonest_end_becomes_eos():
    tokenizer = make_shape("smollm")
    calls_end_otherwise(tokenizer)
    values = {"template": "chat", "loss_on": "completion", "max_length": 4000, "too_long": "drop"}
    settle(tokenizer, SimpleNamespace(**values), MESSAGES, [[CHAT[0], CALL], CHAT[:2], CHAT])
    assert tokenizer.eos_token == "<|im_end|>"
    settle(tokenizer, SimpleNamespace(**values), MESSAGES, [[CHAT[0], CALL]] * 2 + [CHAT])
    assert tokenizer.eos_token == "<|call|>"


def test_eos_that_the_template_writes_stays():
    """Otherwise another token would replace it in every answer that does not end with a call."""
    tokenizer = make_shape("smollm")
    calls_end_otherwise(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("'] + '<|im_end|>'", "'] + eos_token")
    values = {"template": "chat", "loss_on": "completion", "max_length": 4000, "too_long": "drop"}
    settle(tokenizer, SimpleNamespace(**values), MESSAGES, [[CHAT[0], CALL]] * 2 + [CHAT])
    assert tokenizer.eos_token == "<|im_end|>"


def test_end_token_is_learned_where_it_pads_too():
    encoder = encoder_of("smollm")
    assert encoder.tokenizer.pad_token_id == encoder.tokenizer.eos_token_id
    row = encoded(encoder)
    assert row.ids[-1] == encoder.tokenizer.pad_token_id
    assert row.learned[-1]


RENDERED = {
    "llama-2": "<s>[INST] hello az [/INST] first ok </s><s>[INST] more [/INST] second az </s>",
    "chatml": "<|im_start|>user\nhello az<|im_end|>\n<|im_start|>assistant\nfirst ok<|im_end|>\n"
    "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nsecond az<|im_end|>\n",
    "llama-3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello az<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nfirst ok<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nsecond az<|eot_id|>",
    "gemma": "<bos><start_of_turn>user\nhello az<end_of_turn>\n<start_of_turn>model\nfirst ok"
    "<end_of_turn>\n<start_of_turn>user\nmore<end_of_turn>\n<start_of_turn>model\nsecond az"
    "<end_of_turn>\n",
}
TOKENIZERS = {"llama-2": "llama-2", "chatml": "qwen", "llama-3": "llama-3", "gemma": "gemma"}


@pytest.mark.parametrize("loss_on", ["completion", "assistant"])
@pytest.mark.parametrize("own", [True, False], ids=["with template", "base model"])
@pytest.mark.parametrize("shape", RENDERED)
def test_rendered_text_is_not_rendered_again(shape, own, loss_on):
    text = RENDERED[shape]
    form = recognize("auto", None, {"text": text}, "a:1")
    assert (form.name, form.shape.name) == ("rendered", shape)
    sample = form.example({"text": text}, "a:1")

    def edit(tokenizer):
        if not own:
            tokenizer.chat_template = None

    encoder = encoder_of(TOKENIZERS[shape], form, sample, edit, loss_on=loss_on)
    row = encoded(encoder, sample)
    ends = encoder.tokenizer.convert_tokens_to_ids(SHAPES[TOKENIZERS[shape]].end)
    whole = encoder.tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
    assert encoder.tokenizer.decode(row.ids) == encoder.tokenizer.decode(whole)
    assert row.ids[-1] == ends
    parts = [
        p.removesuffix(SHAPES[TOKENIZERS[shape]].end).strip() for p in learned_parts(encoder, row)
    ]
    assert parts == (["second az"] if loss_on == "completion" else ["first ok", "second az"])
    messages = [
        {"role": role, "content": content}
        for role, content in zip(
            ["user", "assistant", "user"], ["hello az", "first ok", "more"], strict=True
        )
    ]
    assert row.ids[: row.prompt_tokens].tolist() == prompt_ids(encoder.tokenizer, messages)


def llama_3(*turns: tuple[str, str]) -> str:
    marks = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    return "<|begin_of_text|>" + "".join(marks.format(*turn) for turn in turns)


CALLED = llama_3(
    ("user", "az?<|eot_id|>"),
    ("assistant", "call az<|eom_id|>"),
    ("ipython", "az is <|x|> ok<|eot_id|>"),
    ("assistant", "ok<|eot_id|>"),
)


@pytest.mark.parametrize("own", [True, False], ids=["with template", "base model"])
def test_turn_that_ends_otherwise_is_learned_up_to_its_end(own):
    form = recognize("auto", None, {"text": CALLED}, "a:1")
    sample = form.example({"text": CALLED}, "a:1")
    edit = None if own else lambda tokenizer: setattr(tokenizer, "chat_template", None)
    encoder = encoder_of("llama-3", form, sample, edit, loss_on="assistant")
    row = encoded(encoder, sample)
    assert learned_parts(encoder, row) == ["call az<|eom_id|>", "ok<|eot_id|>"]
    assert encoder.tokenizer.decode(row.ids) == CALLED
    assert encoder.tokenizer.eos_token == "<|eot_id|>"


CHATML = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
LLAMA_2 = "<s>[INST] q [/INST] a </s>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CHATML.replace("a<|im_end|>", "a"), "the assistant's turn does not end with '<|im_end|>'"),
        (CHATML.replace("q<|im_end|>", "q"), "the user's turn does not end with '<|im_end|>'"),
        (CHATML.replace("a<|im_end|>", "a") + CHATML, "the assistant's turn does not end with"),
        (CHATML + "<|im_start|>assistant\n", "the assistant's turn does not end with"),
        (CHATML.replace("q", "what is <|im_start|>, please"), "or '<|im_start|>' or"),
        (
            CHATML.replace("q", "what is <|im_end|>, please"),
            "'<|im_end|>' within one: the bounds",
        ),
        (CHATML.replace("user", "user, dear"), "the bounds of a turn are ambiguous; fix or"),
        (CHATML + "more", "text outside of turns"),
        (CHATML + "more" + CHATML, "text outside of turns"),
        (LLAMA_2.replace("q", "what is [INST]?"), "'[INST]' or '</s>' within one"),
        (LLAMA_2.replace("a ", "[INST] it is "), "text outside of turns, or '[INST]'"),
        (LLAMA_2.replace("a ", "<s>struck</s> is HTML"), "text outside of turns"),
        (LLAMA_2 + "more", "text outside of turns"),
    ],
)
def test_text_whose_turns_are_in_doubt_is_dropped(text, message):
    form = recognize("auto", None, {"text": text}, "a:1")
    with pytest.raises(Unusable) as caught:
        form.example({"text": text}, "a:1")
    assert message in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        CHATML + "<|endoftext|>",
        "<|begin_of_text|>" + CHATML.strip() + CHATML,
        CHATML.replace("a<|im_end|>", "a <|pad|> is </s> and <|im_sep|> b <eos>"),
        CHATML.replace("q<|im_end|>", "q<|endoftext|>"),
        "<bos>" + LLAMA_2 + "\n" + LLAMA_2 + "</s>",
    ],
)
def test_text_whose_turns_are_clear_is_taken(text):
    example = recognize("auto", None, {"text": text}, "a:1").example({"text": text}, "a:1")
    parts = [text[start:end].split() for start, end in example["answers"]]
    assert all(len(part) in (1, 2, 8) and part[0][0] == "a" for part in parts)
    assert all(part[-1].endswith(">") for part in parts)


@pytest.mark.parametrize(("shape", "known"), [("llama-2", True), ("qwen", False)])
def test_text_rendered_for_another_family_is_said(shape, known):
    """Its end marker is learned letter by letter, followed by the model's own."""
    form = recognize("auto", None, {"text": RENDERED["llama-2"]}, "a:1")
    sample = form.example({"text": RENDERED["llama-2"]}, "a:1")
    values = {"template": "chat", "loss_on": "completion", "max_length": 4000, "too_long": "drop"}
    said = settle(make_shape(shape), SimpleNamespace(**values), form, [sample])
    assert ("; </s> is not a token of this model" in said) != known


@pytest.mark.parametrize("length", [60, 61, 62, 63])
def test_truncated_answer_has_no_false_end(length):
    encoder = encoder_of("gemma", max_length=length, too_long="truncate")
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b" * 50}]
    whole = encoded(encoder_of("gemma"), chat)
    row = encoded(encoder, chat)
    assert len(row.ids) == min(length, len(whole.ids))
    end = encoder.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert (row.ids[-1] == end) == (length >= len(whole.ids))
    assert row.truncated == (length < len(whole.ids))
    assert row.ids.tolist() == whole.ids[:length].tolist()
    assert row.scored_bytes == min(50, len(row.ids) - row.prompt_tokens)


def test_split_row_keeps_every_token_and_one_end():
    encoder = encoder_of("gemma", TEXT, "a", max_length=20, too_long="split")
    whole = encoded(encoder_of("gemma", TEXT, "a"), "b" * 50)
    (parts,) = encoder.encode(["b" * 50])
    assert [len(part.ids) for part in parts] == [20, 20, 12]
    assert [i for part in parts for i in part.ids.tolist()] == whole.ids.tolist()
    assert [part.truncated for part in parts] == [True, True, False]
    assert [part.prompt_tokens for part in parts] == [0, 0, 0]
    # The first token of each part has nothing before it that could predict it.
    assert [int(part.learned.sum()) for part in parts] == [19, 19, 11]


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("too_long", ["split", "truncate"])
def test_part_of_a_prompt_is_never_the_question(loss_on, too_long):
    chat = [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "b" * 50}]
    whole = encoded(encoder_of("gemma"), chat)
    for length in (20, whole.prompt_tokens, whole.prompt_tokens + 1):
        options = {"loss_on": loss_on, "too_long": too_long}
        (parts,) = encoder_of("gemma", max_length=length, **options).encode([chat])
        if isinstance(parts, Unusable):
            continue
        for part in parts:
            start = part.part * length
            assert part.ids.tolist() == whole.ids[start : start + length].tolist()
            asked = start == 0 and length > whole.prompt_tokens
            assert part.prompt_tokens == (whole.prompt_tokens if asked else 0)


@pytest.mark.parametrize("bos", ["", "<|begin_of_text|>"])
def test_rendered_text_of_no_known_shape_asks_nothing(bos):
    form = recognize("rendered", None, {"text": f"{bos}a story"}, "a:1")
    sample = form.example({"text": f"{bos}a story"}, "a:1")
    row = encoded(encoder_of("llama-3", form, sample, loss_on="all"), sample)
    assert row.prompt_tokens == 0
    assert row.learned.tolist() == [False] + [True] * (len(row.ids) - 1)
    assert row.scored_bytes == len("a story")


@pytest.mark.parametrize("shape", CHATS)
@pytest.mark.parametrize("answer", ["az", " ok az ", "\né"])
def test_scored_bytes_of_an_answer_depend_on_no_loss_on(shape, answer):
    chat = [CHAT[0], {"role": "assistant", "content": answer}]
    rows = [encoded(cached_encoder(shape, loss_on=on), chat) for on in ("completion", "assistant")]
    assert rows[0].scored_bytes == rows[1].scored_bytes >= len(answer.strip().encode())


def no_answers(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    )


def other_prompt(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    )


def broken(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}"


def python_fault(tokenizer):
    tokenizer.chat_template += "{{ messages[0]['content'].index('absent') }}"


def short_refused(tokenizer):
    tokenizer.chat_template = (
        "{% if messages | length == 2 %}{{ raise_exception('too short') }}{% endif %}"
        + tokenizer.chat_template
    )


def bos_twice(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template


def marks_as_text(tokenizer):
    tokenizer.backend_tokenizer.encode_special_tokens = True


def only_questions_and_answers(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q:' + m['content'] + '\nA:' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )


def no_thought(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'].split('</think>')[-1] }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )


def thought_apart(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "+ message['content'] +", "+ (message.reasoning_content or '') + message['content'] +"
    )


SYSTEM = [{"role": "system", "content": "s0s"}, *CHAT]
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": CALLS}
TOOL = {"role": "tool", "content": "s0s"}
THOUGHT = [CHAT[0], {"role": "assistant", "content": "<think>s0s</think>az"}]
APART = [CHAT[0], CHAT[1] | {"reasoning_content": "s0s"}]
END_APART = [CHAT[0], CHAT[1] | {"reasoning_content": "<|im_end|>"}]
TWO_QUESTIONS = [CHAT[0], CHAT[0], CHAT[1]]


@pytest.mark.parametrize(
    ("shape", "edit", "chat", "reason", "message"),
    [
        ("smollm", no_answers, CHAT, "template", "differently once an answer follows"),
        ("smollm", other_prompt, CHAT, "template", "differently once an answer follows"),
        ("smollm", broken, CHAT, "template", "the template refuses it (Unexpected end"),
        ("smollm", python_fault, CHAT, "template", "refuses it (substring not found): fix"),
        ("gemma", bos_twice, CHAT, "template", "begins with BOS twice"),
        ("gemma", marks_as_text, CHAT, "template", "tokens do not end with '<end_of_turn>'"),
        ("gemma", None, SYSTEM, "roles", "refuses it (System role not supported): fix"),
        ("llama-2", None, TWO_QUESTIONS, "roles", "(Roles must alternate user/assistant)"),
        ("qwen", None, [CHAT[0] | {"content": "<|im_end|>"}, CHAT[1]], "special_token", "'<|im_e"),
        ("smollm", thought_apart, END_APART, "special_token", "'<|im_end|>'"),
        ("smollm", only_questions_and_answers, SYSTEM, "template", "text of message 1 (system)"),
        (
            "smollm",
            only_questions_and_answers,
            [CHAT[0], CHAT[1], TOOL, CHAT[1]],
            "template",
            "omits the text of message 3 (tool)",
        ),
        ("smollm", None, [CHAT[0], CALL, TOOL, CHAT[1]], "template", "tool_calls of message 2"),
        ("smollm", None, [CHAT[0], CALL], "template", "omits the tool_calls of message 2"),
        ("smollm", no_thought, THOUGHT, "template", "omits the text of message 2 (assistant)"),
        ("smollm", None, APART, "template", "omits the reasoning_content of message 2"),
    ],
)
def test_row_that_would_be_wrong_is_dropped(shape, edit, chat, reason, message):
    encoder = encoder_of(shape, edit=edit)
    good, unusable = encoder.encode([CHAT, chat])
    assert isinstance(unusable, Unusable)
    assert unusable.reason == reason
    assert message in unusable.message
    # A bad row does not affect its neighbours.
    assert isinstance(good, list) == (chat is not CHAT)


def test_template_that_refuses_a_part_of_a_conversation_is_named():
    (unusable,) = encoder_of("smollm", edit=short_refused, loss_on="assistant").encode([CHAT])
    assert "refuses the part up to message 2 (too short): set prepare.loss_on" in unusable.message


def test_what_a_template_writes_in_its_own_way_is_not_missed():
    def edit(tokenizer):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'tool' %}"
            "{{ m['content'] | tojson }}{% else %}{{ m['content'] | trim }}{% endif %}"
            "{% for call in m.tool_calls or [] %}{{ call['function'] | tojson }}{% endfor %}"
            "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
        )

    tool = {"role": "tool", "content": 'é "1"\n2'}
    chat = [
        {"role": "system", "content": " s\n"},
        CHAT[0],
        CALL,
        tool,
        {**CHAT[1], "content": "o "},
    ]
    row = encoded(encoder_of("llama-3", edit=edit), chat)
    assert row.learned.sum() == 2


def test_answer_rewritten_in_a_longer_conversation_is_not_learned_wrongly():
    def edit(tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "message['content'] + '<|im_end|>'",
            "('…' if message['role'] == 'assistant' and not loop.last else message['content'])"
            " + '<|im_end|>'",
        )

    (unusable,) = encoder_of("smollm", edit=edit, loss_on="assistant").encode([CHAT])
    assert "writes message 2 differently once the conversation goes on" in unusable.message


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: setattr(t, "chat_template", None), "no chat template .* templates/chatml.jinja"),
        (
            lambda t: setattr(t, "chat_template", {"tool_use": "a", "rag": "b"}),
            "chat templates are tool_use, rag and none is the default; .* in prepare.template",
        ),
        (lambda t: setattr(t, "eos_token", None), "no EOS token"),
    ],
)
def test_tokenizer_that_cannot_serve_is_refused(edit, message):
    with pytest.raises(StageError, match=message):
        encoder_of("smollm", edit=edit)

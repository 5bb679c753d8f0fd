"""Keys of a message besides role and content: used, mapped or reported, never silently lost."""

import io
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from known_templates import TOOLS, ask, call, made_of, make_tokenizer, say, tell, template
from prepare_folder import jsonl, make_folder, pairs
from transformers import AutoTokenizer

from stages import prepare
from stages.preparing.chat_template import ChatTemplate
from stages.preparing.formats import chat_of
from stages.preparing.messages import Unusable, conversation
from stages.preparing.recognizing import recognize
from stages.shared.process import StageError
from stages.shared.readers import read_file
from stages.shared.rows import read_rows

QUESTION, ANSWER = ask("q"), say("a")
CALL = call("T0")
TEXT_CALL = json.loads(json.dumps(CALL))
TEXT_CALL["tool_calls"][0]["function"]["arguments"] = '{"city": "T0"}'


def example_of(row: dict):
    return recognize("auto", None, row, "a:1").example(row, "a:1")


def text_of(name: str, row: dict, loss_on: str = "completion") -> tuple[str, str]:
    """(prompt, rest) of the row in a template of trl, what is learned of both in [[ ]]."""
    tokenizer, made = made_of(template(name), row, loss_on)
    assert not isinstance(made, Unusable), made.message
    texts = []
    for part in (slice(0, made.prompt_tokens), slice(made.prompt_tokens, None)):
        text, before = [], False
        for token, learned in zip(made.ids[part].tolist(), made.learned[part], strict=True):
            text += [("[[" if learned else "]]")] * bool(before != learned)
            text.append(tokenizer.convert_ids_to_tokens(token))
            before = learned
        text += ["]]"] * bool(before)
        texts.append("".join(text).replace("\u0120", " ").replace("\u010a", "\n"))
    return texts[0], texts[1]


DOCUMENTS = [{"title": "t", "text": "The lake is deep."}]
WITH_DOCUMENTS = "{% for d in documents or [] %}{{ d.text }}{% endfor %}"


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, CALL]},
        {"prompt": [QUESTION], "completion": [CALL]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", **CALL}]},
    ],
    ids=["messages", "prompt and completion", "ShareGPT"],
)
def test_tools_reach_the_template(row, tools):
    tokenizer, made = made_of(template("qwen2_5"), row | {"tools": tools})
    written = tokenizer.apply_chat_template([QUESTION, CALL], tools=TOOLS, tokenize=False)
    assert tokenizer.decode(made.ids) + "\n" == written
    prompt = tokenizer.apply_chat_template([QUESTION], tools=TOOLS, add_generation_prompt=True)
    assert made.ids[: made.prompt_tokens].tolist() == prompt["input_ids"]


def test_rows_with_tools_go_through_the_stage(tmp_path, monkeypatch):
    other = [{"type": "function", "function": TOOLS[0]["function"] | {"description": "Rain"}}]
    # Two of three rows are equal; the others differ only in their tools.
    rows = [
        {"messages": [ask(f"q{i}"), CALL], "tools": tools}
        for i in range(8)
        for tools in (TOOLS, other, TOOLS)
    ]
    tokenizer = make_tokenizer(template("qwen2_5"))
    make_folder(tmp_path, {"a.jsonl": jsonl(rows)}, tokenizer, max_length=1000)
    monkeypatch.chdir(tmp_path)
    prepare.main()
    metrics = json.loads((tmp_path / "metrics/data.json").read_text())
    assert (metrics["duplicate_examples"], metrics["dropped_examples"]) == (8, 0)
    saved = AutoTokenizer.from_pretrained(tmp_path / "data/prepared/tokenizer")
    for made in read_rows(tmp_path / "data/prepared/train.arrow"):
        row = rows[int(made["row"].partition(":")[2]) - 1]
        prompt = saved.apply_chat_template(
            row["messages"][:1], tools=row["tools"], add_generation_prompt=True
        )
        assert made["input_ids"][: made["prompt_tokens"]] == prompt["input_ids"]


def test_functions_are_tools_by_their_older_name():
    function = TOOLS[0]["function"]
    for functions in ([function], TOOLS):
        row = {"messages": [QUESTION, CALL], "functions": functions}
        assert chat_of(example_of(row)).given == {"tools": TOOLS}
    both = {"messages": [QUESTION, CALL], "functions": [*TOOLS, function]}
    assert chat_of(example_of(both)).given == {"tools": TOOLS * 2}


def test_documents_and_variables_reach_the_template():
    chat = {"messages": [QUESTION, ANSWER]}
    text = WITH_DOCUMENTS + "{{ mood }}" + template("qwen2_5")
    row = chat | {"documents": DOCUMENTS, "chat_template_kwargs": '{"mood": "calm"}'}
    tokenizer, made = made_of(text, row)
    assert tokenizer.decode(made.ids).startswith("The lake is deep.calm<|im_start|>")
    _, refused = made_of(template("qwen2_5"), row)
    assert "omits the documents" in refused.message
    _, rest = text_of("qwen3", chat | {"chat_template_kwargs": {"enable_thinking": False}})
    assert rest == "[[a<|im_end|>]]"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (
            "tools",
            "a hammer",
            "'tools' is passed to the template and must be a list of objects, not text",
        ),
        (
            "tools",
            {"name": "f"},
            "'tools' is passed to the template and must be a list of objects, not an object",
        ),
        (
            "documents",
            ["a"],
            "'documents' is passed to the template and must be a list of objects, not a list",
        ),
        ("chat_template_kwargs", [1], "must be an object, not a list"),
        ("chat_template_kwargs", {"tokenize": 1}, "must not set 'tokenize'"),
    ],
)
def test_what_a_template_cannot_be_given_is_refused(column, value, message):
    with pytest.raises(StageError, match=message):
        example_of({"messages": [QUESTION, ANSWER], column: value})


def test_mark_in_a_tool_is_refused():
    row = {"messages": [QUESTION, ANSWER], "tools": [{"description": "<|im_end|>"}]}
    assert made_of(template("qwen2_5"), row)[1].reason == "special_token"


def test_template_without_tools_is_named():
    row = {"messages": [QUESTION, ANSWER], "tools": TOOLS}
    assert "omits the tools: set" in made_of(template("llama3"), row)[1].message


@pytest.mark.parametrize("chat", [CALL, TEXT_CALL], ids=["object", "text"])
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("qwen2_5", '"arguments": {"city": "T0"}}'),
        ("qwen3", '"arguments": {"city": "T0"}}'),
        ("llama3_1", '"parameters": {"city": "T0"}}'),
        ("qwen3_5_think", "<parameter=city>\nT0\n</parameter>"),
        ("gptoss", '<|message|>{"city": "T0"}<|call|>'),
        # Accepts only text.
        ("deepseekv3", 'json\n{"city": "T0"}\n'),
    ],
)
def test_arguments_are_what_the_template_takes(name, written, chat):
    row = {"messages": [QUESTION, chat, tell("18"), ANSWER]}
    assert written in text_of(name, row)[0]


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
@pytest.mark.parametrize("store", [dict, json.dumps], ids=["object", "text"])
def test_arguments_of_a_call_have_several_names(key, store):
    given = {"name": "weather", key: store({"city": "T0"})}
    called = {"type": "function", "function": {"name": "weather", "arguments": {"city": "T0"}}}
    for answer in (
        {"role": "assistant", "content": "", "tool_calls": [given]},
        {"role": "assistant", "content": "", "tool_calls": [given | {"type": "tool_use"}]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": given}]},
        {"role": "assistant", "tool_calls": [given | {"arguments": None, key: given[key]}]},
        {"role": "assistant", "content": None, "function_call": given},
        {"from": "function_call", "value": json.dumps(given)},
    ):
        messages, _ = conversation([QUESTION, answer], "a:1", Counter())
        assert messages[1]["tool_calls"] == [called]
        _, rest = text_of("qwen3_5_think", {"messages": [QUESTION, messages[1]]})
        assert "<parameter=city>\nT0\n</parameter>" in rest


def test_a_schema_beside_arguments_is_not_taken_for_them():
    called = {"name": "f", "arguments": "{}", "parameters": {"type": "object"}}
    messages = example_of({"messages": [QUESTION, say("", tool_calls=[called])]})
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("called", "message"),
    [
        ({"arguments": {"a": 1}}, "message 2: a tool call without a name: fix"),
        ({"function": "f", "arguments": {"a": 1}}, "message 2: a tool call without a name: fix"),
    ],
)
def test_call_without_a_name_is_dropped(called, message):
    with pytest.raises(Unusable, match=message):
        example_of({"messages": [QUESTION, say("", tool_calls=[called])]})


def test_arguments_that_would_be_printed_by_python_are_given_as_text():
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    text += "{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}<|im_end|>"
    text += "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer, made = made_of(text, {"messages": [ask("Say {'city': 'T0'}"), CALL]})
    assert tokenizer.decode(made.ids[made.learned]) == '{"city": "T0"}<|im_end|>'


def test_nulls_that_parquet_fills_in_are_left_out_and_others_stay(tmp_path):
    calls = [{"name": "f", "arguments": arguments} for arguments in ({"city": "T0"}, {"days": 6})]
    rows = [{"messages": [QUESTION, say(None, tool_calls=[each])]} for each in calls]
    rows[1]["messages"][0] = QUESTION | {"name": "n"}
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    (tmp_path / "a.parquet").write_bytes(sink.getvalue())
    found = [example_of(row)[1]["tool_calls"][0] for _, row in read_file(tmp_path / "a.parquet")]
    assert [each["function"]["arguments"] for each in found] == [{"city": "T0"}, {"days": 6}]
    meant = {"name": "f", "arguments": {"city": None}}
    (example,) = [example_of({"messages": [QUESTION, say("", tool_calls=[meant])]})]
    assert example[1]["tool_calls"][0]["function"] == meant


@pytest.mark.parametrize(
    "switch",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"trainable": False}],
)
def test_message_that_is_switched_off_is_not_learned(switch):
    chat = [ask("q0"), say("wrong") | switch, ask("q1"), say("right", weight=1)]
    for loss_on, learned in (("assistant", "[[right"), ("completion", "[[right")):
        prompt, rest = text_of("qwen2_5", {"messages": chat}, loss_on)
        assert "[[" not in prompt
        assert learned in rest
    prompt, _ = text_of("qwen2_5", {"messages": chat}, "all")
    assert "assistant\n]]wrong<|im_end|>[[\n" in prompt


def test_switches_of_shared_turns_and_of_the_last_answer_count():
    turns = [("human", "q0"), ("gpt", "a0"), ("human", "q1"), ("gpt", "a1")]
    turns = [{"from": name, "value": text} for name, text in turns]
    turns[3]["weight"] = 0
    prompt, rest = text_of("qwen2_5", {"conversations": turns}, "assistant")
    assert "[[a0<|im_end|>]]" in prompt
    assert "[[" not in rest
    turns[1]["weight"] = 0
    _, refused = made_of(template("qwen2_5"), {"conversations": turns}, "assistant")
    assert refused.reason == "unlearnable"


def test_question_that_is_switched_off_is_not_learned_with_all():
    chat = [{"role": "system", "content": "s"}, ask("q0") | {"train": False}, ANSWER]
    prompt, _ = text_of("qwen2_5", {"messages": chat}, "all")
    assert "s<|im_end|>\n]]<|im_start|>user\nq0<|im_end|>\n[[<|im_start|>assistant" in prompt


@pytest.mark.parametrize("value", [0.5, "0", [1]])
def test_switch_that_is_neither_on_nor_off_is_refused(value):
    with pytest.raises(StageError, match=r"message 2: 'weight' holds .* where 0 or 1 belongs"):
        example_of({"messages": [QUESTION, say("a", weight=value)]})


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("qwen3", "[[<think>\nr0\n</think>\n\na<|im_end|>]]"),
        ("lfm2_2_5", "[[<think>r0</think>a<|im_end|>]]"),
        ("gptoss", "[[<|channel|>analysis<|message|>r0<|end|><|start|>assistant"),
    ],
)
def test_thought_is_learned_by_any_name(name, written, key):
    _, rest = text_of(name, {"messages": [QUESTION, say("a", **{key: "r0"})]})
    assert rest.startswith(written)


def test_older_names_of_calls_and_roles_are_mapped():
    function = {"name": "weather", "arguments": '{"city": "T0"}'}
    called = {"type": "function", "function": {"name": "weather", "arguments": {"city": "T0"}}}
    expected = [
        {"role": "system", "content": "s"},
        QUESTION,
        {"role": "assistant", "tool_calls": [called], "content": ""},
        {"role": "tool", "name": "weather", "content": "18"},
        ANSWER,
    ]
    for call_, result in (
        ({"role": "assistant", "content": None, "function_call": function}, "function"),
        ({"from": "function_call", "value": json.dumps(function)}, "observation"),
        ({"role": "assistant", "tool_calls": json.dumps([function])}, "ipython"),
    ):
        turns = [{"role": "developer", "content": "s"}, QUESTION, call_]
        turns += [{"role": result, "name": "weather", "content": "18"}, ANSWER]
        unused = Counter()
        assert conversation(turns, "a:1", unused) == (expected, [])
        assert not unused


@pytest.mark.parametrize("content", ["", None, " \n", []])
def test_empty_system_message_is_none(content):
    row = {"messages": [{"role": "system", "content": content}, QUESTION, ANSWER]}
    assert example_of(row) == [QUESTION, ANSWER]


@pytest.mark.parametrize("arguments", ['{"city": "T0', "{city}"])
def test_broken_arguments_are_refused(arguments):
    broken = {"name": "f", "arguments": arguments}
    with pytest.raises(Unusable, match="message 2: arguments that are broken JSON"):
        example_of({"messages": [QUESTION, say("", tool_calls=[broken])]})


@pytest.mark.parametrize("call_", ["no JSON", '{"a": ', [1]])
def test_call_that_is_none_is_refused(call_):
    with pytest.raises(Unusable, match="message 2: a tool call that is not a JSON object"):
        example_of(
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": call_},
                ]
            }
        )


def test_keys_that_are_not_used_are_counted_and_said(tmp_path, monkeypatch, capsys):
    rows = [
        {"messages": [ask(f"q{i}") | {"id": i}, say("a", plan="p", name="n", mood=None, weight=1)]}
        for i in range(1, 9)
    ]
    rows[0]["messages"][0]["weight"] = 1
    make_folder(tmp_path, {"a.jsonl": jsonl(rows)})
    monkeypatch.chdir(tmp_path)
    prepare.main()
    said = capsys.readouterr().out
    assert (
        "not used: message key id (8), message key plan (8), message key weight of role user (1)\n"
    ) in said


def test_two_thoughts_of_one_message_are_not_lost_in_silence():
    unused = Counter()
    both = say("a", reasoning="r", thinking="t", reasoning_content="r")
    messages, _ = conversation([QUESTION, both], "a:1", unused)
    assert messages[1]["reasoning_content"] == "r"
    assert unused == {"message key thinking": 1}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system": "s", "messages": [QUESTION, ANSWER]}, ["s", "q", "a"]),
        (
            {"system": "s", "messages": [{"role": "system", "content": "s"}, QUESTION, ANSWER]},
            ["s", "q", "a"],
        ),
        ({"system_prompt": "s", "prompt": "q", "completion": "a"}, ["s", "q", "a"]),
        ({"instruction": "q", "context": "c", "response": "a"}, ["q\n\nc", "a"]),
        (
            {"instruction": "q", "output": "a", "history": [["q0", "a0"], ["q1", "a1"]]},
            ["q0", "a0", "q1", "a1", "q", "a"],
        ),
        ({"instruction": "q", "output": "a", "history": []}, ["q", "a"]),
        ({"prompt": "q", "completion": "a", "label": True}, ["q", "a"]),
    ],
)
def test_column_that_changes_the_meaning_is_used(row, expected):
    assert [message["content"] for message in example_of(row)] == expected


def test_two_system_messages_are_not_one():
    messages = [{"role": "system", "content": "other"}, QUESTION, ANSWER]
    with pytest.raises(Unusable, match="message 2: system follows system"):
        example_of({"system": "s", "messages": messages})


@pytest.mark.parametrize("label", [False, "False", " false", 0, "0", 0.0, "0.0"])
@pytest.mark.parametrize(
    "row", [{"prompt": "q", "completion": "a"}, {"prompt": [QUESTION], "completion": [ANSWER]}]
)
def test_answer_that_is_labelled_bad_is_not_learned(row, label):
    with pytest.raises(Unusable, match="its label is false") as caught:
        example_of(row | {"label": label})
    assert caught.value.reason == "unlearnable"


@pytest.mark.parametrize("label", [True, "TRUE", 1, "1", 1.0, "1.0", None, ""])
def test_answer_that_is_labelled_good_or_not_at_all_is_learned(label):
    row = {"prompt": "q", "completion": "a", "label": label}
    assert example_of(row) == [QUESTION, ANSWER]


@pytest.mark.parametrize(
    ("label", "said"),
    [(2, r"a number \(2\)"), (0.5, r"a number \(0.5\)"), ("bad", "text"), ([0], "a list")],
)
def test_label_that_is_neither_true_nor_false_is_refused(label, said):
    row = {"prompt": "q", "completion": "a"}
    form = recognize("auto", None, row | {"label": 1}, "a:1")
    with pytest.raises(StageError, match=rf"^a:2: 'label' tells .* and holds {said} where true,"):
        form.example(row | {"label": label}, "a:2")
    # A class, as the first row says.
    assert example_of(row | {"label": label}) == [QUESTION | {"content": "q"}, ANSWER]
    named = {"prompt": "prompt", "completion": "completion"}
    for value in (label, 0):
        form = recognize("auto", named, row | {"label": value}, "a:1")
        assert form.example(row | {"label": value}, "a:1")
        assert form.not_used(row | {"label": value}) == ["label"]


def test_labels_of_a_csv_are_honoured(tmp_path, monkeypatch):
    made = "".join(f"q{i},{['BAD', 'GOOD'][i % 2]},{i % 2}\n" for i in range(12))
    make_folder(tmp_path, {"a.csv": b"prompt,completion,label\n" + made.encode()})
    monkeypatch.chdir(tmp_path)
    prepare.main()
    metrics = json.loads((tmp_path / "metrics/data.json").read_text())
    assert metrics["dropped_unlearnable_examples"] == 6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data/prepared/tokenizer")
    for row in read_rows(tmp_path / "data/prepared/train.arrow"):
        assert "GOOD" in tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (
            {"prompt": "q", "completion": "a", "context": "c"},
            "would not use 'context'; set prepare.columns: {instruction: prompt, output: "
            "completion, input: context}, or name prompt and completion alone to leave it out",
        ),
        (
            {"question": "q", "context": "c", "answer": "a"},
            "set prepare.columns: {instruction: question, output: answer, input: context}",
        ),
        (
            {"question": "q", "answer": "a", "system_prompt": "s"},
            "set prepare.columns: {prompt: question, completion: answer, system: system_prompt}",
        ),
        ({"question": "q", "answer": "a"}, "{prompt: question, completion: answer}"),
    ],
)
def test_advice_loses_no_column(row, remedy):
    with pytest.raises(StageError) as caught:
        example_of(row)
    assert str(caught.value).endswith(remedy)
    advised = remedy.partition("{")[2].partition("}")[0].split(", ")
    columns = dict(pair.split(": ") for pair in advised)
    texts = [m["content"] for m in recognize("auto", columns, row, "a:1").example(row, "a:1")]
    assert all(value in "\n".join(texts) for value in row.values())


def test_column_may_be_left_out_by_naming_the_others():
    row = {"prompt": "q", "completion": "a", "context": "c"}
    form = recognize("auto", {"prompt": "prompt", "completion": "completion"}, row, "a:1")
    assert form.example(row, "a:1") == [QUESTION, ANSWER]


@pytest.mark.parametrize("split", ["test", "validation", "dev", None])
def test_row_of_another_split_is_not_trained_on(split, tmp_path, monkeypatch):
    rows = [row | {"split": "train"} for row in pairs(9)]
    held = [row | {"split": split or "test"} for row in pairs(2, start=9)]
    files = {"a.jsonl": jsonl(rows + held if split else rows), "b.jsonl": jsonl(held)}
    if split:
        del files["b.jsonl"]
    make_folder(tmp_path, files, eval_file=None if split else "b.jsonl")
    monkeypatch.chdir(tmp_path)
    if split is None:
        return prepare.main()
    with pytest.raises(StageError, match=rf"a.jsonl:10: its column 'split' says '{split}', but"):
        prepare.main()


def trace(calls: int) -> dict:
    rounds = [turn for i in range(calls) for turn in (call(f"T{i}"), tell(f"{i}"))]
    return {"messages": [ask("q"), *rounds, say("a")], "tools": TOOLS}


def test_each_call_of_a_long_trace_is_looked_for():
    text = template("qwen3").replace(
        "if message.tool_calls ", "if message.tool_calls and loop.index0 != 7 "
    )
    assert text != template("qwen3")
    _, made = made_of(text, trace(6))
    assert isinstance(made, Unusable)
    assert "the template omits the tool_calls of message 8" in made.message
    # Of names that the template does not write it says nothing.
    _, made = made_of(text.replace("tool_call.name", "'weather'"), trace(3))
    assert not isinstance(made, Unusable)


def test_a_trace_is_rendered_as_often_whatever_its_length(monkeypatch):
    rendered = []
    apply = ChatTemplate.apply
    monkeypatch.setattr(
        ChatTemplate, "apply", lambda *given, **more: rendered.append(1) or apply(*given, **more)
    )
    counts = []
    for calls in (3, 30):
        rendered.clear()
        _, made = made_of(template("qwen3"), trace(calls))
        assert not isinstance(made, Unusable)
        counts.append(len(rendered))
    assert counts[0] == counts[1]

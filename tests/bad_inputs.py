"""Data that must be refused, as people really have it: a table that tests read and extend.

Each message names the file under data/raw, the line where there is one, and what to do.
"""

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Bad:
    """`data` in data/raw/`file` makes `python -m stages.prepare` fail in one line with `message`.

    params: changes to the section prepare, whose group_by is null and eval_rows 2 here.
    """

    name: str
    file: str
    data: bytes | Callable[[], bytes]  # a function where there is much of it
    message: str
    params: dict = field(default_factory=dict)

    def content(self) -> bytes:
        return self.data if isinstance(self.data, bytes) else self.data()


def rows(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


GOOD = {"prompt": "Say a", "completion": "a"}


def big() -> str:
    return "x" * 50_000_000


def chat(*turns: tuple[str, str]) -> bytes:
    return rows({"messages": [{"role": role, "content": text} for role, text in turns]})


def shared(*turns: tuple[str, str]) -> bytes:
    return rows({"conversations": [{"from": role, "value": text} for role, text in turns]})


BAD_INPUTS = [
    # JSONL
    Bad("cut off line", "a.jsonl", rows(GOOD) + b'{"prompt": "x', "a.jsonl:2: broken JSON at char"),
    Bad("no comma", "a.jsonl", b'{"prompt": "x" "completion": "y"}\n', "a.jsonl:1: broken JSON"),
    Bad("single quotes", "a.jsonl", b"{'prompt': 'x'}\n", "a.jsonl:1: broken JSON at character 2"),
    Bad("trailing comma", "a.jsonl", b'{"prompt": "x",}\n', "a.jsonl:1: broken JSON"),
    Bad("two objects in a line", "a.jsonl", b"{}{}\n", "a.jsonl:1: broken JSON at character 3"),
    Bad("pretty printed", "a.jsonl", b'{\n"prompt": "x"\n}\n', "a.jsonl:1: broken JSON"),
    Bad("array in a line", "a.jsonl", b'[{"prompt": "x"}]\n', "a.jsonl:1: an array where an obj"),
    Bad("text in a line", "a.jsonl", b'"hello"\n', "a.jsonl:1: text where an object"),
    Bad("number in a line", "a.jsonl", b"17\n", "a.jsonl:1: a number where an object"),
    Bad("null in a line", "a.jsonl", b"null\n", "a.jsonl:1: null where an object"),
    Bad(
        "key twice", "a.jsonl", b'{"prompt": "x", "prompt": "y"}\n', "'prompt' appears twice; keep"
    ),
    Bad("NaN", "a.jsonl", b'{"prompt": NaN, "completion": "y"}\n', "a.jsonl:1: NaN is not a JSON"),
    Bad("deep nesting", "a.jsonl", b"[" * 100_000, "a.jsonl:1: nested too deeply"),
    Bad("endless number", "a.jsonl", b'{"prompt": ' + b"1" * 9999 + b"}", "too many digits"),
    Bad("empty", "a.jsonl", b"", "a.jsonl: the file is empty; fetch it again"),
    Bad("blank lines only", "a.jsonl", b"\n\n \n", "a.jsonl: no row in the file"),
    Bad("byte order mark only", "a.jsonl", b"\xef\xbb\xbf", "a.jsonl: no row in the file"),
    Bad(
        "50 MB row",
        "a.jsonl",
        lambda: rows(GOOD, {"prompt": big()}),
        "a.jsonl:2: a row of more than 16 MB",
    ),
    Bad("NUL byte", "a.jsonl", rows(GOOD) + b'{"prompt": "\0"}\n', "a.jsonl:2: a NUL byte; remove"),
    Bad("escaped NUL", "a.jsonl", rows({**GOOD, "prompt": "a\0"}), "'prompt' holds a NUL char"),
    Bad(
        "half a surrogate pair",
        "a.jsonl",
        rows(GOOD, {**GOOD, "completion": "\ud83d"}),
        "a.jsonl:2: 'completion' holds half a surrogate pair (\\ud83d); write the whole character",
    ),
    # Encodings
    Bad(
        "Latin-1", "a.jsonl", rows(GOOD) + b'{"prompt": "\xe9"}', "a.jsonl:2: not UTF-8 (byte 0xe9)"
    ),
    Bad("Latin-1 CSV", "a.csv", b"prompt,completion\n\xe9,b\n", "a.csv:2: not UTF-8 (byte 0xe9)"),
    Bad("UTF-16", "a.jsonl", json.dumps(GOOD).encode("utf-16"), "a.jsonl:1: UTF-16 text; save"),
    Bad(
        "UTF-16 CSV", "a.csv", "prompt,completion\n".encode("utf-16"), "a.csv:1: UTF-16 text; save"
    ),
    Bad("UTF-16 JSON", "a.json", "[{}]".encode("utf-16"), "a.json:1: UTF-16 text; save"),
    Bad("Latin-1 JSON", "a.json", b'[\n{"a": "\xe9"}]', "a.json:2: not UTF-8 (byte 0xe9)"),
    # Other kinds of file under the name of text
    Bad("Parquet as JSONL", "a.jsonl", parquet(pa.table({"prompt": ["a"]})), "a Parquet file by i"),
    Bad("zip as CSV", "a.csv", b"PK\x03\x04" + b"\xff" * 9, "a.csv: a zip archive, as .xlsx is"),
    Bad(
        "picture as JSON", "a.json", b"\x89PNG\r\n\x1a\n\0", "a.json:1: binary data instead of text"
    ),
    Bad(
        "compressed twice",
        "a.jsonl.gz",
        gzip.compress(gzip.compress(rows(GOOD))),
        "a.jsonl.gz:1: binary data instead of text; another kind of file, or compressed twice?",
    ),
    # JSON
    Bad(
        "array not closed", "a.json", b'[{"prompt": "a", "completion": "b"}', "the array is not clo"
    ),
    Bad("value not closed", "a.json", b'[\n{"prompt": "a"', "a.json:2: broken JSON"),
    Bad(
        "no comma in array",
        "a.json",
        b"[" + rows(GOOD) + b"{}]",
        "a.json:2: broken JSON; a comma is missing",
    ),
    Bad(
        "text after array",
        "a.json",
        b"[" + rows(GOOD) + b"] x",
        "a.json:2: broken JSON; there is text after the clos",
    ),
    Bad("array of texts", "a.json", b'["a", "b"]', "a.json:1: text where an object"),
    Bad("array of arrays", "a.json", b"[[1], [2]]", "a.json:1: an array where an object"),
    Bad("array of nothing", "a.json", b"[]", "a.json: no row in the file"),
    Bad("NUL in JSON", "a.json", b'[\n{"a": "\0"}]', "a.json:2: a NUL byte; remove"),
    Bad(
        "key twice in JSON",
        "a.json",
        b'[\n\n{"a": 1, "a": 2}]',
        "a.json:3: the key 'a' appears twice",
    ),
    Bad(
        "50 MB row in JSON",
        "a.json",
        lambda: b"[" + rows({"prompt": big()}) + b"]",
        "a.json:1: a row of more",
    ),
    Bad(
        "object of arrays",
        "a.json",
        b'{"rows": [{"prompt": "a"}]}',
        "no known format has the columns",
    ),
    # CSV and TSV
    Bad("quote not closed", "a.csv", b'prompt,completion\na,"b\nc,d\n', "a.csv:2: broken quoting"),
    Bad(
        "carriage return inside",
        "a.csv",
        b"prompt,completion\na,b\rc\n",
        "a.csv:2: a carriage return within the line; put quotes around the field that has it",
    ),
    Bad("quote inside", "a.csv", b'prompt,completion\na,"b"c"\n', "a.csv:2: broken quoting"),
    Bad(
        "field too many", "a.csv", b"prompt,completion\na,b\nc,d,e\n", "a.csv:3: 3 fields where the"
    ),
    Bad("field too few", "a.csv", b"prompt,completion\na\n", "a.csv:2: 1 fields where the header"),
    Bad(
        "column twice",
        "a.csv",
        b"prompt,prompt\na,b\n",
        "a.csv:1: the column 'prompt' appears twice",
    ),
    Bad(
        "column unnamed",
        "a.csv",
        b"prompt,,completion\na,b,c\n",
        "a.csv:1: a column without a name",
    ),
    Bad(
        "semicolons", "a.csv", b"prompt;completion\na;b\n", "its separator seems to be ';': save it"
    ),
    Bad(
        "tabs in CSV",
        "a.csv",
        b"prompt\tcompletion\na\tb\n",
        "its separator seems to be '\\t': save",
    ),
    Bad(
        "commas in TSV", "a.tsv", b"prompt,completion\na,b\n", "its separator seems to be ',': save"
    ),
    Bad("header only", "a.csv", b"prompt,completion\n", "a.csv: no row in the file"),
    Bad("NUL in CSV", "a.csv", b"prompt,completion\na,\0\n", "a.csv:2: a NUL byte; remove"),
    Bad(
        "50 MB field",
        "a.csv",
        lambda: b"prompt,completion\na," + big().encode(),
        "a.csv:2: a row of more than",
    ),
    Bad(
        "no header",
        "a.csv",
        b"Say a,a\nSay b,b\n",
        "a.csv:2: no known format has the columns Say a, a",
    ),
    # Parquet and compression
    Bad("not Parquet", "a.parquet", b"hello, world", "a.parquet: cannot be read (Parquet magic"),
    Bad("half a Parquet", "a.parquet", b"PAR1" + b"\0" * 40, "a.parquet: cannot be read"),
    Bad(
        "Parquet column twice",
        "a.parquet",
        parquet(pa.table([["a"], ["b"]], names=["prompt", "prompt"])),
        "a.parquet: the column 'prompt' appears twice; rename one",
    ),
    Bad(
        "Parquet of numbers",
        "a.parquet",
        parquet(pa.table({"prompt": ["a"], "completion": [1.5]})),
        "a.parquet:1: 'completion' holds a number (1.5) where text belongs",
    ),
    Bad(
        "empty Parquet",
        "a.parquet",
        parquet(pa.table({"prompt": pa.array([], "string")})),
        "no row",
    ),
    Bad(
        "50 MB in Parquet",
        "a.parquet",
        lambda: parquet(pa.table({"prompt": [big()], "completion": ["a"]})),
        "a.parquet:1: a row of more than 16 MB",
    ),
    Bad("not gzip", "a.jsonl.gz", rows(GOOD), "a.jsonl.gz: cannot be read (Not a gzipped file"),
    Bad(
        "cut off gzip",
        "a.jsonl.gz",
        gzip.compress(rows(GOOD) * 99)[:-20],
        "gz: cannot be read (Com",
    ),
    Bad(
        "flipped gzip", "a.jsonl.gz", gzip.compress(b"")[:-8] + b"\1" * 8, "gz: cannot be read (CRC"
    ),
    Bad(
        "not xz", "a.jsonl.xz", rows(GOOD), "a.jsonl.xz: cannot be read (Input format not supported"
    ),
    Bad(
        "not bz2",
        "a.csv.bz2",
        b"prompt,completion\n",
        "a.csv.bz2: cannot be read (Invalid data str",
    ),
    Bad("not zst", "a.jsonl.zst", rows(GOOD), "a.jsonl.zst: cannot be read"),
    # Not data at all
    Bad(
        "Git LFS pointer", "a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "run git lfs"
    ),
    Bad("web page", "a.csv", b"<!DOCTYPE html><html></html>", "a.csv: a web page, not data; downl"),
    Bad("no data file", "notes.txt", b"hello", "data/raw: no data file"),
    # Columns
    Bad(
        "other columns",
        "a.jsonl",
        rows({"q": "a", "b": "c"}),
        "name yours in prepare.columns, such",
    ),
    Bad(
        "known other columns",
        "a.jsonl",
        rows({"question": "a", "answer": "b"}),
        "set prepare.columns: {prompt: question, completion: answer}",
    ),
    Bad(
        "column lost later",
        "a.jsonl",
        rows(GOOD, {"prompt": "b"}),
        "a.jsonl:2: no column 'completion'; this row has prompt",
    ),
    Bad(
        "columns name nothing",
        "a.jsonl",
        rows(GOOD),
        "no column 'question' (prepare.columns.prompt); the columns are prompt, completion",
        {"columns": {"prompt": "question"}},
    ),
    Bad(
        "columns misspelt",
        "a.jsonl",
        rows(GOOD),
        "prepare.columns: unknown name 'promt'; did you mean prompt?",
        {"columns": {"promt": "prompt"}},
    ),
    Bad(
        "format forced on other columns",
        "a.jsonl",
        rows(GOOD),
        "a.jsonl:1: no column 'instruction', which format alpaca needs",
        {"format": "alpaca"},
    ),
    Bad(
        "no group column",
        "a.jsonl",
        rows(GOOD),
        "a.jsonl:1: no column 'group' (prepare.group_by); the columns are prompt, completion: name",
        {"group_by": "group"},
    ),
    Bad(
        "no evaluation file",
        "a.jsonl",
        rows(GOOD),
        "prepare.eval_file: no file b.jsonl in data/raw; there is a.jsonl",
        {"eval_file": "b.jsonl"},
    ),
    # Values
    Bad(
        "number",
        "a.jsonl",
        rows({**GOOD, "completion": 4}),
        "'completion' holds a number (4) where",
    ),
    Bad(
        "boolean",
        "a.jsonl",
        rows({**GOOD, "completion": True}),
        "'completion' holds true where text",
    ),
    Bad(
        "list",
        "a.jsonl",
        rows({**GOOD, "completion": ["a"]}),
        "'completion' holds a list where text",
    ),
    Bad(
        "object",
        "a.jsonl",
        rows({**GOOD, "completion": {}}),
        "'completion' holds an object where te",
    ),
    Bad(
        "null",
        "a.jsonl",
        rows({**GOOD, "completion": None}),
        "a.jsonl:1: 'completion' is null: fill",
    ),
    Bad(
        "empty text",
        "a.jsonl",
        rows({**GOOD, "completion": ""}),
        "a.jsonl:1: 'completion' is empty: ",
    ),
    Bad(
        "spaces",
        "a.jsonl",
        rows({**GOOD, "prompt": " \n"}),
        "a.jsonl:1: 'prompt' is empty: fill it",
    ),
    Bad(
        "empty CSV field",
        "a.csv",
        b"prompt,completion\na,\n",
        "a.csv:2: 'completion' is empty: fill",
    ),
    Bad(
        "group is null",
        "a.jsonl",
        rows({**GOOD, "group": None}),
        "a.jsonl:1: 'group' is empty: name the row's group",
        {"group_by": "group"},
    ),
    # Conversations
    Bad(
        "messages as text",
        "a.jsonl",
        rows({"messages": "hi"}),
        "'messages' holds text where a list",
    ),
    Bad(
        "messages of texts",
        "a.jsonl",
        rows({"messages": ["hi"]}),
        "'messages' holds a list where a",
    ),
    Bad("no messages", "a.jsonl", rows({"messages": []}), "a.jsonl:1: 'messages' is empty"),
    Bad(
        "message no role",
        "a.jsonl",
        rows({"messages": [{"content": "a"}]}),
        "message 1 has no 'role'",
    ),
    Bad(
        "unknown role",
        "a.jsonl",
        chat(("narrator", "a")),
        "message 1: unknown role 'narrator': use",
    ),
    Bad(
        "answer first",
        "a.jsonl",
        chat(("assistant", "a")),
        "message 1: assistant comes first: fix",
    ),
    Bad(
        "question last",
        "a.jsonl",
        chat(("user", "a")),
        "ends with user: the last message must be the",
    ),
    Bad(
        "two questions",
        "a.jsonl",
        chat(("user", "a"), ("user", "b")),
        "message 2: user follows user",
    ),
    Bad(
        "two answers",
        "a.jsonl",
        chat(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        "message 3: assistant follows assistant: fix or delete the row",
    ),
    Bad(
        "late system message",
        "a.jsonl",
        chat(("user", "a"), ("system", "b"), ("assistant", "c")),
        "message 2: system follows user",
    ),
    Bad(
        "empty answer",
        "a.jsonl",
        chat(("user", "a"), ("assistant", "")),
        "a.jsonl:1: 'message 2 (assistant)' is empty: fill it in or delete the row",
    ),
    Bad(
        "number in a message",
        "a.jsonl",
        rows({"messages": [{"role": "user", "content": 7}]}),
        "a.jsonl:1: 'message 1 (user)' holds a number (7) where text belongs",
    ),
    Bad(
        "picture in a message",
        "a.jsonl",
        rows({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        "a.jsonl:1: message 1 has a part that is not text; remove it",
    ),
    Bad(
        "half a surrogate in a tool call",
        "a.jsonl",
        rows({"messages": [{"role": "user", "content": "a", "tool_calls": [{"x": "\ud800"}]}]}),
        "a.jsonl:1: message 1: a tool call that is not JSON",
    ),
    Bad(
        "ShareGPT no value",
        "a.jsonl",
        rows({"conversations": [{"from": "gpt"}]}),
        "without 'value'",
    ),
    Bad(
        "ShareGPT unknown role",
        "a.jsonl",
        shared(("robot", "a")),
        "unknown role 'robot': use system",
    ),
    Bad(
        "ShareGPT answer first", "a.jsonl", shared(("gpt", "a")), "message 1: assistant comes first"
    ),
    Bad(
        "ShareGPT question last",
        "a.jsonl",
        shared(("human", "a")),
        "ends with user: the last message",
    ),
    # Rendered text
    Bad(
        "rendered, no answer",
        "a.jsonl",
        rows({"text": "<s>[INST] a [/INST]"}),
        "no answer after '[/IN",
    ),
    Bad(
        "rendered, no known mark",
        "a.jsonl",
        rows({"text": "Q: a A: b"}),
        "no known marker of an answer in the rendered text",
        {"format": "rendered"},
    ),
    Bad(
        "rendered, almost the shape",
        "a.jsonl",
        rows({"text": "<s>[INST]a[/INST]b</s>"}),
        "the rendered text resembles llama-2 but differs from it: name the .jinja file",
    ),
    # What the tokenizer and the template say
    Bad(
        "a mark in somebody's words",
        "a.jsonl",
        rows(*({"prompt": f"a{i}", "completion": "b<|im_end|>"} for i in range(9))),
        "contains '<|im_end|>', a special token of the model: remove it, or",
    ),
    Bad(
        "all too long",
        "a.jsonl",
        rows(*({"prompt": f"a{i}", "completion": "b" * 50} for i in range(9))),
        "tokens, prepare.max_length is 32: raise it, or set too_long to truncate or split",
        {"max_length": 32},
    ),
    Bad(
        "one too long",
        "a.jsonl",
        rows(*({"prompt": f"a{i}", "completion": "b" * 50} for i in range(9))),
        "tokens, prepare.max_length is 32: raise it, or set too_long to truncate or split",
        {"max_length": 32, "too_long": "error"},
    ),
    Bad(
        "prompts longer than max_length",
        "a.jsonl",
        rows(*({"prompt": f"{i}" * 50, "completion": "b"} for i in range(9))),
        "the prompt alone has 69 tokens, prepare.max_length is 32: raise it",
        {"max_length": 32, "too_long": "truncate"},
    ),
    Bad(
        "no such template",
        "a.jsonl",
        rows(GOOD),
        "prepare.template: no file templates/mine.jinja; put yours in templates/",
        {"template": "templates/mine.jinja"},
    ),
    Bad("one row", "a.jsonl", rows(GOOD), "no row is left for the eval set; add rows"),
    Bad(
        "one group",
        "a.jsonl",
        rows(*({**GOOD, "prompt": f"a{i}", "group": "g"} for i in range(9))),
        "prepare.group_by: none of the 1 groups is small enough to hold out",
        {"group_by": "group"},
    ),
]

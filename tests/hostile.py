"""What others may write to do harm, as a table: tests try a part of it and `make chaos` all.

A case does to an empty folder what a hostile author would, and gives it to the code that reads
such things first. It may be taken as it is or refused by a StageError of one line; never may
there be a traceback, an end of the process, a wait of more than MOST_SECONDS or a character on
the screen that steers it.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from prepare_folder import jsonl, make_folder, pairs
from tiny import CHATML, make_model, make_tokenizer

from stages.shared import bounded, hub, sources
from stages.shared.process import StageError, sha256
from stages.shared.screen import on_screen

MOST_SECONDS = 30.0
# Escape sequences, line ends, marks of direction, half a surrogate pair: what must not be shown.
STEERING = "\x1b[2J\x1b]0;own\x07\nprepare: all is well\u2028\u202e\x9b31m"


@dataclass(frozen=True)
class Hostile:
    kind: str
    name: str
    run: Callable[[Path], object]
    # Whether it must be refused; None if both are correct.
    refused: bool | None = None


@dataclass
class Outcome:
    """The outcome of a case: `fault` is None if it was correct."""

    said: str
    fault: str | None


def attempt(case: Hostile, folder: Path) -> Outcome:
    """Run a case in a process of its own."""

    def work() -> tuple[str, str]:
        bounded.SECONDS = 4.0
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                case.run(folder)
            except StageError as error:
                return out.getvalue(), on_screen(error)
        return out.getvalue(), ""

    try:
        printed, refusal = bounded.bounded(work, "HANG", "", MOST_SECONDS / bounded.PATIENCE)
    except BaseException as error:
        return Outcome("", f"{type(error).__name__}: {on_screen(error, 300)}")
    odd = [c for line in printed.split("\n") for c in line if not c.isprintable()]
    # A line written by data must not look like one of ours.
    if odd or "\nprepare: all is well" in printed:
        return Outcome(refusal, f"steers the screen by {odd[:5]!r}")
    if "\n" in refusal or len(refusal) > 2100:
        return Outcome(refusal, "not one line")
    if case.refused is not None and bool(refusal) != case.refused:
        return Outcome(refusal, "taken" if case.refused else "refused")
    return Outcome(refusal, None)


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES: dict[str, object] = {
    "null": None,
    "true": True,
    "minus one": -1,
    "zero": 0,
    "a fraction": 2.5,
    "400 digits": 10**400,
    "huge": 1e308,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "text": "text",
    "no text": "",
    "steering": STEERING,
    "a list": [],
    "lists in a list": [[1], ["a"]],
    "an object": {},
    "objects in an object": {"a": {"b": [None]}},
    "deep": deep(300),
    "long": "x" * 200_000,
}
RAW: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "half": b'{"model_type": "lla',
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a login page": b"<!doctype html><html><body>Sign in</body></html>",
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "5000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "NaN": b'{"model_type": NaN}',
    "100,000 keys": json.dumps({f"key {i}": i for i in range(100_000)}).encode(),
}


@functools.cache
def model() -> Path:
    """A tiny model with its tokenizer, made once."""
    folder = Path(tempfile.mkdtemp(prefix="hostile"))
    make_model(folder / "model")
    make_tokenizer(folder / "model")
    return folder / "model"


@functools.cache
def mixture() -> Path:
    """The same of a mixture of experts."""
    import torch
    from moe import moe_config
    from transformers import AutoModelForCausalLM

    folder = model().parent / "mixture"
    made = AutoModelForCausalLM.from_config(moe_config("gpt_oss"), dtype=torch.bfloat16)
    made.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@functools.cache
def adapter():
    """(folder of an adapter, shapes of its base, the base itself)."""
    import torch
    from merging import make_adapter
    from transformers import AutoModelForCausalLM

    folder = model().parent / "adapter"
    make_adapter(model(), folder, target_modules=["q_proj", "v_proj"])
    base = AutoModelForCausalLM.from_pretrained(model(), dtype=torch.float32)
    shapes = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    return folder, shapes, base


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Each of the following gives a folder to what reads it first.


def read_model(folder: Path, change: Callable[[Path], object], of: Path | None = None) -> None:
    from stages.fetching.model_files import check_config, small_files, weight_files
    from stages.fetching.model_sizes import declared_shapes
    from stages.shared.workload import read_model as read_shapes

    shutil.copytree(of or model(), folder / "m")
    change(folder / "m")
    files = {f.name: f.stat().st_size for f in (folder / "m").iterdir()}
    small_files(files, "owner/model")
    check_config(folder / "m", "owner/model")
    declared_shapes(folder / "m", "owner/model")
    weight_files(folder / "m", files, "owner/model")
    read_shapes(folder / "m")


def read_tensors(folder: Path, name: str, dtype: str) -> None:
    """A mixture of experts whose files have one tensor more."""
    import torch
    from safetensors.torch import load_file, save_file

    from stages.fetching.model_files import check_weights
    from stages.quantizing.names import check_names

    shutil.copytree(mixture(), folder / "m")
    file = folder / "m/model.safetensors"
    save_file(load_file(file) | {name: torch.ones(4).to(getattr(torch, dtype))}, file)
    check_weights(folder / "m", ["model.safetensors"], "owner/model")
    check_names(folder / "m")


def read_index(folder: Path, content: bytes) -> None:
    from stages.fetching.model_files import check_weights, weight_files

    (folder / "model.safetensors.index.json").write_bytes(content)
    shutil.copy(model() / "model.safetensors", folder / "a.safetensors")
    files = {f.name: f.stat().st_size for f in folder.iterdir()}
    check_weights(folder, weight_files(folder, files, "owner/model"), "owner/model")


def read_adapter(folder: Path, change: Callable[[Path], object]) -> None:
    from stages.shared.adapter import read_adapter
    from stages.shared.model import load_adapter
    from stages.shared.named_base import check_named_base

    source, shapes, base = adapter()
    shutil.copytree(source, folder / "adapter")
    change(folder / "adapter")
    read_adapter(folder / "adapter", shapes)
    (folder / "base").mkdir()
    files = {"model.safetensors": sha256(model() / "model.safetensors")}
    record = {"source": "local", "id": "tiny", "commit": None, "files": files}
    (folder / "base/source.json").write_text(json.dumps(record))
    check_named_base(folder / "adapter", folder / "base")
    load_adapter(base, folder / "adapter")


def read_adapters_tokenizer(folder: Path, change: Callable[[Path], object]) -> None:
    import torch

    from stages.merging.companions import tokenizer_folder, write_companions

    (folder / "out").mkdir()
    shutil.copytree(model(), folder / "adapter")
    change(folder / "adapter")
    settled = tokenizer_folder(folder / "adapter", folder / "none")
    write_companions(folder / "out", model(), settled, torch.bfloat16)


def hub_section():
    from stages.shared.params import Source

    return Source(source="hub", id="owner/rows", revision="main", config=None, split=None)


def read_readme(folder: Path, head: bytes) -> None:
    from stages.fetching.data_files import of_configuration
    from stages.shared.dataset_card import license_in, read_card

    (folder / "README.md").write_bytes(b"---\n" + head + b"\n---\n# Rows\n")
    card = read_card(folder)
    licensed(license_in(card))
    of_configuration(["train.jsonl", "test.jsonl"], card, hub_section())


def licensed(license: str | None) -> None:
    from huggingface_hub import ModelCardData

    assert license is None or isinstance(license, str)
    ModelCardData(license=license.lower() if license else None).to_yaml()


def read_hub(folder: Path, **answer: object) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

    git, big = "a" * 40, {"size": 9, "sha256": "b" * 64, "pointerSize": 1}
    whole = {
        "id": "owner/model",
        "sha": "c" * 40,
        "cardData": {"license": "mit"},
        "siblings": [{"rfilename": "x.bin", "size": 9, "blobId": git, "lfs": big}],
    } | answer
    HfApi.repo_info = lambda *_, **__: ModelInfo(**whole)
    source = hub.Repository("model", "owner/model", "main")
    licensed(source.license)
    assert all(isinstance(size, int) for size in source.files.values())


def sibling(**changes: object) -> list[dict]:
    return [{"rfilename": "x.bin", "size": 9, "blobId": "a" * 40, "lfs": None} | changes]


def read_folder(folder: Path, make: Callable[[Path], object]) -> None:
    from stages.fetching.data_files import data_files

    root = folder / "rows"
    root.mkdir()
    (root / "rows.jsonl").write_bytes(jsonl(pairs(3)))
    make(root)
    source = sources.Folder(root)
    section = hub_section().model_copy(update={"source": "local"})
    source.get(data_files(source.files, section), folder / "out")


def prepare(folder: Path, files: dict[str, bytes], tokenizer: Path | None = None, **params) -> None:
    from stages import prepare as stage
    from stages.preparing import writing

    # A row of a sane template takes a millisecond.
    writing.seconds_for = lambda chunk: 3.0
    make_folder(folder, files, **params)
    if tokenizer:
        from stages.shared.outputs import write_sums

        shutil.copytree(tokenizer, folder / "models/tokenizer", dirs_exist_ok=True)
        write_sums(folder / "models/tokenizer")
    stage.main()


def with_template(folder: Path, text: str) -> None:
    (folder / "templates").mkdir()
    (folder / "templates/x.jinja").write_text(text)
    prepare(folder, {"a.jsonl": jsonl(pairs(20))}, template="templates/x.jinja")


def with_tokenizer(folder: Path, **changes: object) -> None:
    from stages.fetching.model_files import check_config

    shutil.copytree(model(), folder / "m")
    edit(folder / "m/tokenizer.json", **changes)
    check_config(folder / "m", "owner/model")
    prepare(folder, {"a.jsonl": jsonl(pairs(20))}, tokenizer=folder / "m")


def with_parquet(folder: Path, table: pa.Table, **params) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    prepare(folder, {"a.parquet": sink.getvalue()}, **params)


# The kinds.


def models() -> Iterator[Hostile]:
    own = json.loads((model() / "config.json").read_text())
    for key in sorted({*own, "auto_map", "quantization_config", "layer_types", "rope_scaling"}):
        for name, value in VALUES.items():
            change = functools.partial(edit_in, "config.json", {key: value})
            yield Hostile(
                "config.json", f"{key}: {name}", functools.partial(read_model, change=change)
            )
    for file, name, change in tokenizer_changes():
        yield Hostile(file, name, functools.partial(read_model, change=change))
    for name, content in RAW.items():
        change = functools.partial(write_in, "config.json", content)
        yield Hostile("config.json", name, functools.partial(read_model, change=change))
    for name, layers in (("10^9 layers", 10**9), ("10^6 layers", 10**6)):
        change = functools.partial(edit_in, "config.json", {"num_hidden_layers": layers})
        yield Hostile("config.json", name, functools.partial(read_model, change=change), True)


def mixtures() -> Iterator[Hostile]:
    for key in ("num_local_experts", "num_experts_per_tok", "quantization_config"):
        for name, value in {**VALUES, "10^9": 10**9}.items():
            change = functools.partial(edit_in, "config.json", {key: value})
            run = functools.partial(read_model, change=change, of=mixture())
            yield Hostile("mixture", f"{key}: {name}", run)
    layer = "model.layers.1.mlp.experts"
    names = {
        STEERING: False,
        f"{STEERING}_packed.codes": True,
        "x_packed.blocks": True,
        "x.quant_state.bitsandbytes__nf4": True,
        f"{layer}.gate_up_proj.0.0": True,
        f"{layer}.{'1' * 5000}.x": True,
        f"{layer}.{10**400}.gate_proj.weight": None,
        f"{layer}.gate_up_proj_scales": None,
        f"{layer}.gate_up_proj": True,
        "": None,
    }
    for name, refused in names.items():
        for dtype in ("bfloat16", "int8"):
            run = functools.partial(read_tensors, name=name, dtype=dtype)
            yield Hostile("mixture", f"{dtype} {name[:60]!r}", run, refused)


def tokenizer_changes() -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """(file, what is done to it, what does it) for the files of a tokenizer."""
    for file in ("tokenizer_config.json", "generation_config.json"):
        for key in ("eos_token", "eos_token_id", "pad_token", "model_max_length", "chat_template"):
            for name, value in VALUES.items():
                yield file, f"{key}: {name}", functools.partial(edit_in, file, {key: value})
    for file in ("tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        for name, content in RAW.items():
            yield file, name, functools.partial(write_in, file, content)


def adapters_tokenizers() -> Iterator[Hostile]:
    for file, name, change in tokenizer_changes():
        run = functools.partial(read_adapters_tokenizer, change=change)
        yield Hostile("adapter's tokenizer", f"{file}: {name}", run)


def edit_in(file: str, changes: dict, folder: Path) -> None:
    edit(folder / file, **changes)


def write_in(file: str, content: bytes, folder: Path) -> None:
    (folder / file).write_bytes(content)


def indexes() -> Iterator[Hostile]:
    for name, content in RAW.items():
        yield Hostile("index", name, functools.partial(read_index, content=content), True)
    names = ["../a", "/etc/passwd", "a\\b", "a\0b", "", ".", STEERING, "b.safetensors"]
    values = {**VALUES, **{f"file {name!r}": name for name in names}}
    for name, value in values.items():
        for map_name, weight_map in (("map", value), ("entry", {"x": value})):
            content = json.dumps({"weight_map": weight_map}).encode()
            run = functools.partial(read_index, content=content)
            yield Hostile("index", f"{map_name}: {name}", run, True)


def retype(folder: Path, dtype: str) -> None:
    """Give one factor of an adapter another type."""
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].to(getattr(torch, dtype))}, file)


def in_place_of(file: str, make: Callable[[Path], object], folder: Path) -> None:
    (folder / file).unlink()
    make(folder / file)


CATASTROPHIC = r"(([a-z_.0-9])*)*\1X"


def adapters() -> Iterator[Hostile]:
    folder = adapter()[0]
    own = json.loads((folder / "adapter_config.json").read_text())
    for key in sorted(own):
        for name, value in VALUES.items():
            change = functools.partial(edit_in, "adapter_config.json", {key: value})
            run = functools.partial(read_adapter, change=change)
            yield Hostile("adapter_config.json", f"{key}: {name}", run)
    patterns = {
        "target_modules": CATASTROPHIC,
        "exclude_modules": CATASTROPHIC,
        "rank_pattern": {CATASTROPHIC: 4},
        "alpha_pattern": {CATASTROPHIC: 4},
    }
    specials: list[tuple[str, dict]] = [(f"endless {k}", {k: v}) for k, v in patterns.items()]
    specials += [
        ("endless layers_pattern", {"layers_to_transform": 1, "layers_pattern": CATASTROPHIC}),
        ("no regular expression", {"target_modules": "("}),
        ("fewer modules than the file", {"target_modules": ["q_proj"]}),
        ("more modules than the file", {"target_modules": ["q_proj", "v_proj", "k_proj"]}),
        ("fewer layers than the file", {"layers_to_transform": [0]}),
        ("excluded modules", {"exclude_modules": ["q_proj"]}),
        ("all-linear", {"target_modules": "all-linear"}),
        ("alpha 1e30", {"lora_alpha": 1e30}),
        ("alpha by pattern", {"alpha_pattern": {"q_proj": -1e30}}),
        ("a module to import", {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}),
        ("100,000 keys", {f"key {i}": i for i in range(100_000)}),
        ("a steering key", {STEERING: 1}),
    ]
    for name, changes in specials:
        change = functools.partial(edit_in, "adapter_config.json", changes)
        run = functools.partial(read_adapter, change=change)
        yield Hostile("adapter_config.json", name, run, True)
    for dtype in ("int8", "int64", "bool", "float8_e4m3fn", "complex64"):
        run = functools.partial(read_adapter, change=functools.partial(retype, dtype=dtype))
        yield Hostile("adapter_model.safetensors", dtype, run, True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        for name, make in (("a FIFO", os.mkfifo), ("a folder", os.mkdir)):
            change = functools.partial(in_place_of, file, make)
            yield Hostile(file, name, functools.partial(read_adapter, change=change), True)
    for name, content in RAW.items():
        change = functools.partial(write_in, "adapter_config.json", content)
        run = functools.partial(read_adapter, change=change)
        yield Hostile("adapter_config.json", name, run, True)


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 112)
)
WIDE = b"a: &a [" + b"x," * 20_000 + b"x]\n"
YAML = {
    "2.0": b"2.0",
    "no": b"no",
    "null": b"null",
    "date": b"2024-01-01",
    "400 digits": b"1" * 400,
    "5000 digits": b"1" * 5000,
    "5000 hex digits": b"0x" + b"f" * 5000,
    "infinite": b".inf",
    "a list": b"[]",
    "lists": b"[[a], [b]]",
    "an object": b"{a: {b: c}}",
    "steering": json.dumps(STEERING).encode(),
    "code": b"!!python/object/apply:os.system [id]",
    "itself": b"&x [*x]",
    "bomb": b"*o",
    "binary": b"!!binary aGk=",
    "set": b"!!set {a, b}",
    "half": b"[a, b",
    "deep": b"[" * 20_000,
    "tab": b"\t- x",
    "long": b"x" * 300_000,
}


def readmes() -> Iterator[Hostile]:
    lines = {
        "license": b"license: %s",
        "license_name": b"license: other\nlicense_name: %s",
        "licence in a list": b"license: [mit, %s]",
        "configs": b"configs: %s",
        "a configuration": b"configs: [%s]",
        "config_name": b"configs: [{config_name: %s}]",
        "data_dir": b"configs: [{config_name: x, data_dir: %s}]",
        "data_files": b"configs: [{config_name: x, data_files: %s}]",
        "path": b"configs: [{config_name: x, data_files: [{split: train, path: %s}]}]",
        "key": b"%s: 1",
    }
    for key, line in lines.items():
        for name, value in YAML.items():
            head = (BOMB if name == "bomb" else b"") + line % value
            yield Hostile("README.md", f"{key}: {name}", functools.partial(read_readme, head=head))
    whole = {
        "100,000 keys": b"\n".join(b"key%d: 1" % i for i in range(100_000)),
        "no UTF-8": b"license: \xff",
        "a list": b"- a",
        "quadratic": WIDE
        + b"configs: [%s]"
        % b",".join(b"{config_name: c%d, data_files: *a}" % i for i in range(5000)),
    }
    for name, head in whole.items():
        yield Hostile("README.md", name, functools.partial(read_readme, head=head))


def hub_answers() -> Iterator[Hostile]:
    for name, value in VALUES.items():
        places: dict[str, dict] = {
            "sha": {"sha": value},
            "siblings": {"siblings": value},
            "cardData": {"cardData": value},
            "licence": {"cardData": {"license": value}},
            "licence name": {"cardData": {"license": "other", "license_name": value}},
            "safetensors": {"safetensors": value},
            "lastModified": {"lastModified": value},
            "a file": {"siblings": [value]},
            "file name": {"siblings": sibling(rfilename=value)},
            "size": {"siblings": sibling(size=value)},
            "blobId": {"siblings": sibling(blobId=value)},
            "lfs": {"siblings": sibling(lfs=value)},
            "sha256": {"siblings": sibling(lfs={"size": 9, "sha256": value, "pointerSize": 1})},
        }
        for place, answer in places.items():
            yield Hostile("hub", f"{place}: {name}", functools.partial(read_hub, **answer))


def ask_hub(folder: Path, answers: list[Callable[[socket.socket], object]]) -> None:
    """Download a file of a Hub whose connections get these answers, the last again and again."""
    from huggingface_hub import constants, file_download, hf_api

    server = socket.create_server(("127.0.0.1", 0))
    endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    for module in (constants, hf_api, file_download):
        for name, value in {
            "ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": False,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            if hasattr(module, name):
                setattr(module, name, value)
    # What hangs is waited for in full.
    hub.STALL_SECONDS, bounded.SECONDS = 3, 1.5

    def answer(connection: socket.socket, how: Callable[[socket.socket], object]) -> None:
        with contextlib.suppress(OSError), connection:
            connection.recv(65536)
            how(connection)

    def serve() -> None:
        for number in itertools.count():
            how = answers[min(number, len(answers) - 1)]
            threading.Thread(target=answer, args=(server.accept()[0], how), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    source = hub.Repository("model", "owner/model", "main")
    source.get(["x.bin"], folder)


def response(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None):
    lines = [f"HTTP/1.1 {status}", *headers, "Connection: close"]
    if length != -1:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def slowly(content: bytes, seconds: float = 0.5) -> Callable[[socket.socket], object]:
    def send(connection: socket.socket) -> None:
        for byte in content:
            connection.sendall(bytes([byte]))
            time.sleep(seconds)

    return send


def without_end(start: bytes) -> Callable[[socket.socket], object]:
    def send(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(bytes(100_000))

    return send


def hub_servers() -> Iterator[Hostile]:
    page = response(b"<!doctype html><html>Sign in</html>", "Content-Type: text/html")
    listing = json.dumps(
        {"id": "owner/model", "sha": "c" * 40, "siblings": sibling(size=100_000)}
    ).encode()
    known = response(listing, "Content-Type: application/json")
    bad: dict[str, Callable[[socket.socket], object]] = {
        "a login page": lambda c: c.sendall(page),
        "a redirect to itself": lambda c: c.sendall(
            response(b"", "Location: /api/models/owner/model", status="302 Found")
        ),
        "nothing": lambda c: None,
        "half": lambda c: c.sendall(response(listing[:50], length=5000)),
        "a list": lambda c: c.sendall(response(b"[]")),
        "a number": lambda c: c.sendall(response(b"1")),
        "deep": lambda c: c.sendall(response(b"[" * 200_000)),
        "no gzip": lambda c: c.sendall(response(b"abc", "Content-Encoding: gzip")),
        "status 500": lambda c: c.sendall(response(b"{}", status="500 No")),
        "status 999": lambda c: c.sendall(response(b"{}", status="999 " + "x" * 9000)),
        "no HTTP": lambda c: c.sendall(STEERING.encode()),
        "a steering header": lambda c: c.sendall(
            response(b"{}", "X-Error-Message: \x1b[2J", "X-Error-Code: \x1b[2J", status="404 No")
        ),
        "slow headers": slowly(known),
        "a slow body": slowly(response(b"", length=5000) + listing),
        "no end": without_end(response(b"", length=-1)),
        "silence": lambda c: time.sleep(60),
    }
    for name, how in bad.items():
        run = functools.partial(ask_hub, answers=[how])
        yield Hostile("hub server", f"listing: {name}", run, True)
        run = functools.partial(ask_hub, answers=[lambda c: c.sendall(known), how])
        yield Hostile("hub server", f"file: {name}", run, True)


def folders() -> Iterator[Hostile]:
    def in_bytes(name: bytes) -> Callable[[Path], object]:
        return lambda root: open(os.path.join(os.fsencode(root), name), "wb").close()

    makes: dict[str, Callable[[Path], object]] = {
        "a FIFO": lambda root: os.mkfifo(root / "a.jsonl"),
        "a FIFO as README.md": lambda root: os.mkfifo(root / "README.md"),
        "a socket": lambda root: socket.socket(socket.AF_UNIX).bind(str(root / "a.jsonl")),
        "a link to itself": lambda root: (root / "a.jsonl").symlink_to("a.jsonl"),
        "links in a circle": lambda root: [
            (root / a).symlink_to(b) for a, b in (("a.jsonl", "b"), ("b", "a.jsonl"))
        ],
        "a link to nothing": lambda root: (root / "a.jsonl").symlink_to("nothing"),
        "a link out": lambda root: (root / "a.jsonl").symlink_to("/etc/passwd"),
        "a link to a device": lambda root: (root / "a.jsonl").symlink_to("/dev/zero"),
        "a line end": in_bytes(b"a\nb.jsonl"),
        "an escape": in_bytes(b"\x1b[2Ja.jsonl"),
        "no UTF-8": in_bytes(b"\xff.jsonl"),
        "U+2028": in_bytes("a\u2028.jsonl".encode()),
    }
    for name, make in makes.items():
        yield Hostile("folder", name, functools.partial(read_folder, make=make), True)
    fine: dict[str, Callable[[Path], object]] = {
        "a link to its folder": lambda root: (root / "loop").symlink_to("."),
        "a folder like a file": lambda root: (root / "a.jsonl").mkdir(),
        "deep folders": lambda root: (root / "/".join("d" * 200)).mkdir(parents=True),
    }
    for name, make in fine.items():
        yield Hostile("folder", name, functools.partial(read_folder, make=make), False)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "endless loop": LOOP,
    "endless loop at one row": "{% if '7?' in messages[0].content %}"
    + LOOP
    + "{% endif %}"
    + CHATML,
    "endless power": "{{ 9 ** 9 ** 9 }}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "10 GB": "{{ 'x' * 10000000000 }}",
    "300 MB": "{{ 'x' * 300000000 }}" + CHATML,
    "doubling": "{% set n = namespace(s='xxxxxxxx') %}{% for a in range(60) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "padding": "{{ 'x'.center(9999999999) }}",
    "format": "{{ '%99999999999d' % 1 }}",
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "steering error": "{{ raise_exception(" + json.dumps(STEERING) + ") }}",
    "steering text": json.dumps(STEERING)[1:-1] + STEERING + CHATML,
    "index error": "{{ '{5}'.format(1) }}",
    "key error": "{{ '%(a)s' % {} }}",
    "undefined": "{{ a.b.c }}",
    "syntax": "{% if",
    "steering syntax": "{% " + STEERING + " %}",
    "include": "{% include '/etc/passwd' %}",
    "wrong types": "{{ messages + 1 }}",
    "deep": "(" * 5000,
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


def templates() -> Iterator[Hostile]:
    for name, text in TEMPLATES.items():
        yield Hostile("template", name, functools.partial(with_template, text=text))


def replace(pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def tokenizers() -> Iterator[Hostile]:
    doubling = [replace("(?s).", "xx")] * 45
    changes: dict[str, dict] = {
        "doubling normalizer": {"normalizer": {"type": "Sequence", "normalizers": doubling}},
        "endless normalizer": {"normalizer": replace(r"(\w|\s|[?])*!", "")},
        "endless normalizer at digits": {"normalizer": replace(r"((\w+\s?)+)+!", "")},
        "endless pretokenizer": {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"((\w+\s?)+)+!"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        "no regular expression": {"normalizer": replace("(", "")},
        "endless decoder": {"decoder": replace(r"(\w|\s|[?])*!", "")},
        "huge padding": {
            "padding": {
                "strategy": {"Fixed": 10**12},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            }
        },
    }
    for key in (
        "model",
        "normalizer",
        "pre_tokenizer",
        "added_tokens",
        "post_processor",
        "version",
    ):
        changes |= {f"{key}: {name}": {key: value} for name, value in VALUES.items()}
    for name, change in changes.items():
        yield Hostile("tokenizer.json", name, functools.partial(with_tokenizer, **change))


def parquet_values() -> dict[str, pa.Array]:
    n = 20
    twin = pa.StructArray.from_arrays([pa.array([1] * n), pa.array([2] * n)], names=["a", "a"])
    bad = pa.array([b"\xff"] * n).view(pa.string())
    return {
        "date": pa.array([10**7] * n, pa.date32()),
        "time": pa.array([2**62] * n, pa.timestamp("us")),
        "before": pa.array([-(2**62)] * n, pa.timestamp("ms")),
        "zone": pa.array([1] * n, pa.timestamp("us", "Nowhere/Nothing")),
        "nanoseconds": pa.array([1] * n, pa.timestamp("ns")),
        "duration": pa.array([2**62] * n, pa.duration("s")),
        "twin fields": twin,
        "twin fields in a list": pa.ListArray.from_arrays(range(n + 1), twin),
        "no UTF-8": bad,
    }


def parquets() -> Iterator[Hostile]:
    rows = pairs(20)
    plain = {key: pa.array([row[key] for row in rows]) for key in ("prompt", "completion")}
    for name, column in parquet_values().items():
        unused = functools.partial(with_parquet, table=pa.table({**plain, "other": column}))
        yield Hostile("Parquet", f"{name}, not used", unused, False)
        used = functools.partial(with_parquet, table=pa.table({**plain, "completion": column}))
        yield Hostile("Parquet", f"{name}, used", used, True)
        groups = functools.partial(
            with_parquet, table=pa.table({**plain, "other": column}), group_by="other"
        )
        # Nanoseconds are a value like others.
        yield Hostile("Parquet", f"{name}, groups", groups, None if name == "nanoseconds" else True)


def screens() -> Iterator[Hostile]:
    """Names and values with what steers a screen, where they are shown."""
    row = {"prompt": "Say a", "completion": "a"}
    extra = [pair | {STEERING: "x"} for pair in pairs(20)]
    cases: dict[str, tuple[dict, dict]] = {
        "column": ({"a.jsonl": jsonl(extra)}, {}),
        "only column": ({"a.jsonl": jsonl([{STEERING: "x"}])}, {}),
        "role": ({"a.jsonl": jsonl([{"messages": [{"role": STEERING, "content": "a"}]}])}, {}),
        "sender": ({"a.jsonl": jsonl([{"conversations": [{"from": STEERING, "value": "a"}]}])}, {}),
        "turn": ({"a.jsonl": jsonl([{"messages": [{STEERING: "a"}]}])}, {}),
        "group": ({"a.jsonl": jsonl([row])}, {"group_by": "x\x1b[2J"}),
        "text": ({"a.jsonl": jsonl([p | {"completion": STEERING + str(i)} for i, p in
                                    enumerate(pairs(20))])}, {}),
        "key twice": ({"a.jsonl": b'{"\\u001b[2J": 1, "\\u001b[2J": 2}\n'}, {}),
        "CSV column": ({"a.csv": b"\x1b[2J,b\n1,2\n"}, {}),
        "CSV column twice": ({"a.csv": b"\x1b[2J,\x1b[2J\n1,2\n"}, {}),
        "evaluation file": ({"a.jsonl": jsonl(pairs(9))}, {"eval_file": "b\x1b[2J.jsonl"}),
        "special token": ({"a.jsonl": jsonl([{"prompt": "<|im_end|>" + STEERING,
                                              "completion": "a"}])}, {}),
    }  # fmt: skip
    for name, (files, params) in cases.items():
        run = functools.partial(prepare, files=files, **params)
        yield Hostile("screen", name, run)


KINDS = (
    models,
    mixtures,
    indexes,
    adapters,
    adapters_tokenizers,
    readmes,
    hub_answers,
    hub_servers,
    folders,
    templates,
    tokenizers,
    parquets,
    screens,
)


def cases() -> list[Hostile]:
    return [case for kind in KINDS for case in kind()]


def counts(found: list[tuple[Hostile, Outcome]]) -> dict[str, int]:
    """For benchmarks/results/chaos.json."""
    faults = [outcome.fault for _, outcome in found if outcome.fault]
    hangs = sum("HANG: took more than" in fault for fault in faults)
    escapes = sum(fault.startswith("steers") for fault in faults)
    return {
        "hostile_inputs": len(found),
        "tracebacks": len(faults) - hangs - escapes,
        "hangs": hangs,
        "escapes": escapes,
    }


def try_all(chosen: list[Hostile], folder: Path) -> list[tuple[Hostile, Outcome]]:
    """Every case with what came of it, each in an empty folder."""
    found = []
    for case in chosen:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found.append((case, attempt(case, folder)))
    return found

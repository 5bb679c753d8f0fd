"""Reads folders of safetensors files by blocks of rows, without a model and without mapping a file.

Mapped pages would count as memory of the process: 140 GB for a 70B model.
"""

import json
from collections.abc import Callable, Set
from functools import cache, cached_property
from itertools import groupby, pairwise
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as SINGLE
from safetensors import SafetensorError, safe_open

from stages.shared.base_bytes import BLOCK, NESTED_BLOCK
from stages.shared.experts import PACKED, part_name, part_of
from stages.shared.mxfp4 import GROUP, decoded
from stages.shared.nf4 import dequantize, unnested, unpacked
from stages.shared.outputs import read_json
from stages.shared.process import StageError

LETTERS = {torch.float16: "F16", torch.bfloat16: "BF16"}
# Tensor names of the model -> names in the checkpoint, if names differ or the model lacks some
# (stages/shared/text_model.py).
NAMES = "names.json"
# `names` of tensors that keep the type and values of the checkpoint; `carried` are those of them
# that belong to no module of the model.
KEPT = "kept.json"
# What bitsandbytes saves beside a packed weight, as <weight name>.<part>.
NF4_STATE = "quant_state.bitsandbytes__nf4"
NF4_PARTS = (NF4_STATE, "absmax", "quant_map", "nested_absmax", "nested_quant_map")
TYPES = {"F64": torch.float64, "F32": torch.float32} | {v: k for k, v in LETTERS.items()}
# Types that can be read.
READ = TYPES | {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16}
READ |= {"I32": torch.int32, "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32}
READ |= {"U64": torch.uint64, "C64": torch.complex64, "F8_E8M0": torch.float8_e8m0fnu}
READ |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Values of one block: 1 MB in float32, which stays in the processor's cache. Blocks four times as
# large took 30 % longer, most of it in page faults.
BLOCK_VALUES = 2**18
# Of experts on a GPU, where a block is several: 256 MB in float32.
EXPERT_VALUES = 2**26
# With fewer rows a matrix product may use another kernel than the whole, and round differently.
# A multiple of 64 also begins at a block of NF4, which has one scale for 64 values.
UNIT_ROWS = 64


class Weights:
    """The tensors of a folder.

    An NF4 weight with its parts is one tensor. Packed experts are as many tensors as they are in
    the checkpoint (stages/shared/experts.py).

    renamed  name in the files -> name of the model, if they differ
    without  names to leave out
    names    the model's, sorted
    keys     name of the model -> name in the files, for those that are renamed
    nf4      names of those in NF4
    mxfp4    names of those in MXFP4
    shapes   of each, unpacked
    dtypes   of each as stored, in safetensors' letters (`U8` for NF4 and MXFP4)
    files    in which each is
    index    the weight_map of the folder's index; None if it has none

    Raises StageError if a file is missing, broken, or not what the index says.
    """

    def __init__(
        self,
        folder: Path,
        renamed: dict[str, str] | None = None,
        without: Set[str] = frozenset(),
    ):
        self.folder, self.index = folder, None
        renamed = renamed or {}
        self.keys = {name: key for key, name in renamed.items()}
        self.files: dict[str, Path] = {}
        if (folder / INDEX).exists():
            self.index = read_json(folder / INDEX)["weight_map"]
        shapes, dtypes, self._offsets = {}, {}, {}
        # Name -> the packed experts that contain it, and its place among their tensors.
        self._of_stack: dict[str, tuple[str, int]] = {}
        for file in sorted(set(self.index.values())) if self.index else [SINGLE]:
            for key, entry in _header(folder / file).items():
                self._check_place(key, file)
                name = renamed.get(key, key)
                shapes[name], dtypes[name] = tuple(entry["shape"]), entry["dtype"]
                self.files[name], self._offsets[name] = folder / file, entry["offset"]
        for key, file in sorted((self.index or {}).items()):
            if renamed.get(key, key) not in self.files:
                raise StageError(f"{folder / file} lacks {key}, which {INDEX} puts there")
        self.mxfp4: set[str] = set()
        self.nf4 = {k.removesuffix(f".{NF4_STATE}") for k in self.files if k.endswith(NF4_STATE)}
        parts = {f"{weight}.{part}" for weight in self.nf4 for part in NF4_PARTS}
        parts |= {key for key in self.files if f"{PACKED}." in key}
        self.names = sorted(self.files.keys() - parts - without)
        self._stored = {name: (dtypes[name], shapes[name]) for name in self.files}
        self.dtypes = {name: dtypes[name] for name in self.names}
        self.shapes = {name: shapes[name] for name in self.names}
        for name in self.nf4:
            self.shapes[name] = tuple(json.loads(bytes(self.read(f"{name}.{NF4_STATE}")))["shape"])
        for key in sorted(parts):
            if key.endswith(f"{PACKED}.codes"):
                self._add_stack(key.removesuffix(".codes"))
            elif key.endswith(f"{PACKED}.blocks"):
                self._add_mxfp4(key.removesuffix(".blocks"))
        self.names.sort()

    def _add_stack(self, stack: str) -> None:
        """Add the tensors of the checkpoint that are in the packed experts `stack`."""
        tensor = f"{stack.removesuffix(PACKED)}_proj"
        experts, *rest, rows, half = self._stored[f"{stack}.codes"][1]
        names, shape = [tensor], [experts, rows, 2 * half]
        if rest:
            names = [part_name(tensor, e, p) for e in range(experts) for p in range(rest[0])]
            shape = shape[1:]
        for place, name in enumerate(names):
            self._of_stack[name] = stack, place
            self.files[name] = self.files[f"{stack}.codes"]
            self.shapes[name], self.dtypes[name] = tuple(shape), "U8"
        self.names += names
        self.nf4 |= set(names)

    def _add_mxfp4(self, stack: str) -> None:
        """Add the tensor of the model that is in the packed experts `stack`, in MXFP4."""
        name = f"{stack.removesuffix(PACKED)}_proj"
        experts, columns, groups, _ = self._stored[f"{stack}.blocks"][1]
        self._of_stack[name] = stack, 0
        self.files[name] = self.files[f"{stack}.blocks"]
        self.shapes[name], self.dtypes[name] = (experts, groups * GROUP, columns), "U8"
        self.names.append(name)
        self.mxfp4.add(name)

    def parts(self, name: str) -> list[str]:
        """The tensors that make up the model's `name`, in the order of its rows; none if it is
        missing."""
        if name in self.shapes:
            return [name]
        return self._parts.get(name, [])

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        found = sorted((part, name) for name in self.names if (part := part_of(name)))
        return {
            tensor: [name for _, name in of_tensor]
            for tensor, of_tensor in groupby(found, lambda item: item[0][0])
        }

    def _check_place(self, key: str, file: str) -> None:
        place = self.index.get(key, "no file") if self.index else file
        if place != file:
            raise StageError(
                f"{self.folder / file} holds {key}, which {INDEX} puts into {place}; it is the "
                "wrong shard"
            )

    def read(self, key: str) -> torch.Tensor:
        """One tensor as stored. Raises StageError for an unknown type."""
        letters, shape = self._stored[key]
        if letters not in READ:
            raise StageError(f"{self.files[key]}: {key} is {letters}, which is not known here")
        return self._fill(torch.empty(shape, dtype=READ[letters]), key, 0)

    def _values(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Values [start, stop) of a tensor, flat."""
        dtype = READ[self._stored[key][0]]
        part = torch.empty(stop - start, dtype=dtype)
        return self._fill(part, key, start * dtype.itemsize)

    def key(self, name: str) -> str:
        """The name of the tensor `name` in the files."""
        return self.keys.get(name, name)

    def reader(self, name: str, device: torch.device) -> Callable[[slice], torch.Tensor]:
        """A function that reads rows of one tensor, in any thread; NF4 and MXFP4 in bfloat16.

        Its argument is one of `row_blocks`. Raises StageError if the tensor is not of a float type.
        """
        if name in self.mxfp4:
            return self._mxfp4_reader(name, device)
        if name in self._of_stack:
            return self._stack_reader(name, device)
        if name in self.nf4:
            return self._nf4_reader(name, device)
        if self.dtypes[name] not in TYPES:
            raise StageError(f"{self.files[name]}: {name} is {self.dtypes[name]}, not a float type")
        dtype, shape = TYPES[self.dtypes[name]], self.shapes[name]
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize

        def read(block: slice) -> torch.Tensor:
            part = torch.empty((block.stop - block.start, *shape[1:]) if shape else (), dtype=dtype)
            return self._fill(part, name, block.start * row_bytes).to(device)

        return read

    def _nf4_reader(self, name: str, device: torch.device) -> Callable[[slice], torch.Tensor]:
        parts = [part for part in NF4_PARTS if f"{name}.{part}" in self.files]
        whole = bnb.QuantState.from_dict({p: self.read(f"{name}.{p}") for p in parts}, device)
        scales = whole.absmax
        if whole.nested:
            scales = bnb.dequantize_blockwise(scales, whole.state2) + whole.offset
        columns, size = whole.shape[1], whole.blocksize

        def read(block: slice) -> torch.Tensor:
            first, last = block.start * columns, block.stop * columns
            state = bnb.QuantState(
                scales[first // size : -(-last // size)],
                shape=torch.Size((block.stop - block.start, columns)),
                blocksize=size,
                quant_type=whole.quant_type,
                dtype=whole.dtype,
            )
            packed = torch.empty(-(-last // 2) - first // 2, 1, dtype=torch.uint8)
            return dequantize(self._fill(packed, name, first // 2).to(device), state)

        return read

    def _stack_reader(self, name: str, device: torch.device) -> Callable[[slice], torch.Tensor]:
        (stack, place), shape = self._of_stack[name], self.shapes[name]
        rows, columns = shape[-2:]
        blocks = rows * columns // BLOCK
        seconds = -(-blocks // NESTED_BLOCK)

        def scales_of(i: int) -> torch.Tensor:
            found = self._values(f"{stack}.absmax", i * blocks, (i + 1) * blocks).to(device)
            if f"{stack}.nested" not in self.files:
                return found
            nested = self._values(f"{stack}.nested", i * seconds, (i + 1) * seconds).to(device)
            offset = self._values(f"{stack}.offset", i, i + 1).to(device)
            return unnested(found[None], nested[None], offset, _dynamic_map().to(device))[0]

        def decoded(i: int, scales: torch.Tensor, first: int, last: int) -> torch.Tensor:
            start = i * rows * columns
            codes = self._values(
                f"{stack}.codes", (start + first * columns) // 2, (start + last * columns) // 2
            )
            own = scales[first * columns // BLOCK : last * columns // BLOCK]
            return unpacked(codes.to(device), own, torch.bfloat16).view(-1, columns)

        if len(shape) == 2:
            every = scales_of(place)
            return lambda block: decoded(place, every, block.start, block.stop)
        return lambda block: torch.stack(
            [decoded(i, scales_of(i), 0, rows) for i in range(block.start, block.stop)]
        )

    def _mxfp4_reader(self, name: str, device: torch.device) -> Callable[[slice], torch.Tensor]:
        stack, (_, rows, columns) = self._of_stack[name][0], self.shapes[name]
        groups = columns * rows // GROUP

        def read(block: slice) -> torch.Tensor:
            blocks, scales = (
                self._values(f"{stack}.{part}", block.start * size, block.stop * size).to(device)
                for part, size in (("blocks", groups * GROUP // 2), ("scales", groups))
            )
            shape = block.stop - block.start, columns, rows // GROUP
            return decoded(blocks.view(*shape, -1), scales.view(shape), torch.bfloat16).mT

        return read

    def _fill(self, part: torch.Tensor, name: str, start: int) -> torch.Tensor:
        """Fill `part` with a tensor's bytes from `start` on."""
        with self.files[name].open("rb") as file:
            file.seek(self._offsets[name] + start)
            file.readinto(part.reshape(-1).view(torch.uint8).numpy().data)
        return part


def other_names(folder: Path) -> dict[str, str] | None:
    """Names in the checkpoint -> names of the model in `folder`; None if they have the same names
    and tensors."""
    if not (folder / NAMES).exists():
        return None
    return {key: name for name, key in read_json(folder / NAMES).items()}


def model_weights(folder: Path) -> Weights:
    """The weights of models/quantized or the like, by the model's names, without what belongs to no
    module."""
    renamed = other_names(folder) or {}
    parts = {key: name for key, name in renamed.items() if part_of(name)}
    return Weights(folder, parts, carried_names(folder))


def kept_names(folder: Path) -> set[str]:
    """Names of the tensors in models/quantized or the like that keep their type and values."""
    return set(read_json(folder / KEPT)["names"]) if (folder / KEPT).exists() else set()


def carried_names(folder: Path) -> set[str]:
    """Those of `kept_names` that belong to no module of the model."""
    return set(read_json(folder / KEPT).get("carried", ())) if (folder / KEPT).exists() else set()


@cache
def _dynamic_map() -> torch.Tensor:
    return bnb.create_dynamic_map()


def _header(file: Path) -> dict[str, dict]:
    """Entries of a safetensors file: dtype, shape, and the offset of the data in the file."""
    try:
        # Checks the header against the file's size and refuses overlaps and holes.
        with safe_open(file, framework="pt"):
            pass
    except (FileNotFoundError, SafetensorError) as error:
        raise StageError(f"{file}: cannot be read ({error})") from None
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["offset"] = 8 + length + entry["data_offsets"][0]
    return header


def row_blocks(shape: tuple[int, ...], device: torch.device) -> list[slice]:
    """Row blocks of similar size for a tensor of `shape`; on a GPU one block.

    cuBLAS chooses its kernel by the shape, so a block's product could differ from the whole one's.
    Tensors of experts, which have three dimensions, are multiplied expert by expert: on a GPU as
    many make a block as EXPERT_VALUES hold, and at least one.
    """
    rows, values = shape[0] if shape else 1, torch.Size(shape).numel()
    unit = 1 if len(shape) > 2 else UNIT_ROWS
    units, count = rows // unit, 1
    if device.type == "cpu" or unit == 1:
        most = BLOCK_VALUES if device.type == "cpu" else EXPERT_VALUES
        count = max(1, min(-(-values // most), units))
    bounds = [unit * (units * i // count) for i in range(count)]
    return [slice(a, b) for a, b in pairwise([*bounds, rows])]

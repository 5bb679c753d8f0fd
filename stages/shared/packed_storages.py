"""The storage formats of packed experts (stages/shared/packed.py): NF4 and MXFP4."""

import torch
from bitsandbytes.functional import create_dynamic_map
from torch import nn

from stages.shared.mxfp4 import GROUP, decoded, experts_at_once
from stages.shared.nf4 import unnested, unpacked
from stages.shared.packed import Packed


class Nf4Experts(Packed):
    """NF4. Each checkpoint tensor is quantized separately, to the bytes that a Linear4bit has.

    codes   uint8: [E, a, b / 2] if the checkpoint stores all experts in one tensor, else
            [E, pieces, a / pieces, b / 2]
    absmax  one scale per 64 values, [E, (pieces,) n]: uint8 with double quantization, else float32
    nested  float32 [E, (pieces,) n / 256, rounded up]
    offset  float32 [E(, pieces)]
    """

    FIRST = "codes"
    absmax: torch.Tensor
    nested: torch.Tensor | None
    offset: torch.Tensor
    code: torch.Tensor

    def __init__(
        self,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        nested: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ):
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.pieces = codes.shape[1] if codes.ndim == 4 else 1
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested", nested)
        self.register_buffer("offset", offset)
        self.register_buffer("code", create_dynamic_map().to(absmax.device), persistent=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, *rows, half = self.codes.shape
        return experts, torch.Size(rows).numel(), 2 * half

    def dense(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        part = slice(first, last)
        scales = self.absmax[part]
        if self.nested is not None:
            scales = unnested(scales, self.nested[part], self.offset[part], self.code)
        values = unpacked(self.codes[part], scales, dtype)
        return values.view(last - first, *self.shape[1:])


class Mxfp4Experts(Packed):
    """MXFP4, unchanged from the checkpoint: blocks uint8 [E, b, a / 32, 16], scales uint8
    [E, b, a / 32]."""

    FIRST = "blocks"
    scales: torch.Tensor

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor):
        super().__init__()
        self.blocks = nn.Parameter(blocks, requires_grad=False)
        self.register_buffer("scales", scales)

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, columns, groups, _ = self.blocks.shape
        return experts, groups * GROUP, columns

    def dense(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        _, rows, columns = self.shape
        values = self.blocks.new_empty((last - first, columns, rows), dtype=dtype)
        step = experts_at_once(rows * columns)
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            values[start - first : part.stop - first] = decoded(
                self.blocks[part], self.scales[part], dtype
            )
        return values.mT


# Storage formats by the name of a tensor that only they have.
STORAGES: dict[str, type[Packed]] = {kind.FIRST: kind for kind in (Nf4Experts, Mxfp4Experts)}

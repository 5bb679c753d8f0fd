"""Two products of the training step in one pass over memory each (Triton, on a GPU with Liger).

- NF4 weights to 16 bit, with doubly quantized constants: bitsandbytes launches three kernels
  through torch's dispatcher, which in small steps takes longer than the kernels themselves.
- The backward pass of SwiGLU together with its product, which down_proj's adapter needs again. All
  three results overwrite the inputs, so the product needs no memory of its own.

Both are bit-identical to what they replace (tests/test_gpu.py).
"""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState
from liger_kernel.ops.swiglu import swiglu_forward

BLOCKS_PER_PROGRAM = 64
VALUES_PER_PROGRAM = 1024


@triton.jit
def _dequantize(
    packed,
    table,
    absmax,
    absmax_table,
    absmax_scale,
    offset,
    out,
    blocks,
    count,
    NESTED: tl.constexpr,
    OUTER: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    if NESTED:
        index = tl.load(absmax + block, there, 0).to(tl.int32)
        scale = tl.load(absmax_table + index) * tl.load(absmax_scale + block // OUTER, there, 0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + block, there, 0)
    pairs = block[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    pair = tl.load(packed + pairs, 2 * pairs < count, 0).to(tl.int32)
    high = tl.load(table + (pair >> 4)) * scale[:, None]
    low = tl.load(table + (pair & 15)) * scale[:, None]
    values = tl.join(high, low).reshape(BLOCKS, 2 * PAIRS).to(out.dtype.element_ty)
    places = block[:, None] * 2 * PAIRS + tl.arange(0, 2 * PAIRS)[None, :]
    tl.store(out + places, values, places < count)


def dequantize(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The weight `state.shape` in `state.dtype`, of uint8 `packed`, two values in each."""
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    blocks = state.absmax.numel()
    nested = state.state2 if state.nested else state
    _dequantize[(triton.cdiv(blocks, BLOCKS_PER_PROGRAM),)](
        packed,
        state.code,
        state.absmax,
        nested.code,
        nested.absmax,
        state.offset if state.nested else state.absmax,
        out,
        blocks,
        out.numel(),
        NESTED=state.nested,
        OUTER=nested.blocksize,
        PAIRS=state.blocksize // 2,
        BLOCKS=BLOCKS_PER_PROGRAM,
        # A fused multiply-add would round once instead of twice.
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def _swiglu_gradients(gate, up, gradient, count, VALUES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    there = at < count
    g = tl.load(gate + at, there, 0).to(tl.float32)
    u = tl.load(up + at, there, 0)
    dh = tl.load(gradient + at, there, 0)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    tl.store(gradient + at, silu.to(u.dtype) * u, there)
    tl.store(gate + at, dh * (silu * (1 - sigmoid) + sigmoid) * u, there)
    tl.store(up + at, dh * silu, there)


class LigerSwiglu:
    """fused_lora.TorchSwiglu in one pass each, on contiguous 16-bit tensors of one shape."""

    @staticmethod
    def forward(g, u):
        return swiglu_forward(g, u)[2]

    @staticmethod
    def backward(g, u, dh):
        """The results overwrite dh, g and u."""
        count = g.numel()
        grid = (triton.cdiv(count, VALUES_PER_PROGRAM),)
        _swiglu_gradients[grid](g, u, dh, count, VALUES=VALUES_PER_PROGRAM)
        return dh, g, u

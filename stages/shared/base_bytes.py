"""Bytes of the base model on the GPU: as stored, and what is dequantized at once.

NF4 has 4 bits per parameter and an fp32 constant for each block of 64: 0.5 + 4/64 bytes. Double
quantization stores the constant in 8 bits, with an fp32 one for each 256 of them: 0.5 + 1/64 +
4/16384 bytes, 4.127 bits (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3).
Every Linear except the output head is quantized (transformers, get_keys_to_not_convert).
"""

from stages.shared.decoder_shape import Experts, Shape, Training, adapted, layer_of
from stages.shared.mxfp4 import lookup_bytes

# Experts that are dequantized at once, in bytes. A whole layer of Qwen3-30B-A3B (0.8 GB) or of
# gpt-oss-20b (1.06 GB) fits: one launch of a grouped product, and no waiting for the device to tell
# where a chunk's rows begin. Larger layers (Mixtral 8x7B 1.9 GB, DeepSeek-V3 15 GB) are split.
CHUNK_BYTES = 2**30

# Values of NF4 that share a scale, and scales that share a second one.
BLOCK, NESTED_BLOCK = 64, 256
MXFP4_BYTES = 0.5 + 1 / 32
NF4_BYTES = {True: 0.5 + 1 / BLOCK + 4 / (BLOCK * NESTED_BLOCK), False: 0.5 + 4 / BLOCK}


def weights_bytes(shape: Shape, method: str, double_quant: bool) -> float:
    """Bytes of the base model on the GPU."""
    others = 2.0 * shape.float32_parameters
    rest = shape.parameters - shape.expert_parameters
    experts = expert_bytes(shape, method, double_quant)
    packed = sum(x.parameters for x in shape.linears if x.quantized) if method == "qlora" else 0
    return NF4_BYTES[double_quant] * packed + 2.0 * (rest - packed) + experts + others


def expert_bytes(shape: Shape, method: str, double_quant: bool) -> float:
    """Bytes of all experts as stored."""
    each = NF4_BYTES[double_quant] if method == "qlora" else 2.0
    return (MXFP4_BYTES if shape.mxfp4 else each) * shape.expert_parameters


def dense_bytes(shape: Shape, run: Training) -> tuple[float, ...]:
    """Of each layer: the additional bytes of those NF4 weights that the fused products read
    (stages/training/fused_lora.py), if they are in 16 bit. Empty if there are none."""
    found = [0.0] * shape.layers
    if run.method == "qlora" and run.fused_lora:
        for linear in adapted(shape, run.targets):
            layer = layer_of(linear.name)
            if linear.quantized and layer is not None and layer < shape.layers:
                found[layer] += (2.0 - NF4_BYTES[run.double_quant]) * linear.parameters
    return tuple(found) if any(found) else ()


def dequantized_bytes(shape: Shape, run: Training) -> float:
    """Bytes of a 16-bit copy of one weight or of a chunk of experts, and of bitsandbytes' fp32
    constants."""
    experts = max((chunk_bytes(shape, run, each) for each in shape.experts), default=0.0)
    if run.method != "qlora":
        return experts
    constants = 0 if run.fused_lora and run.liger else 4 / 64
    linear = max((x.parameters for x in shape.linears if x.quantized), default=0)
    return max((2 + constants) * linear, experts)


def chunk_bytes(shape: Shape, run: Training, each: Experts) -> float:
    """The same of the experts of one tensor that are dequantized at once."""
    if run.method != "qlora" and not shape.mxfp4:
        return 0.0
    values = at_once(each)
    return 2.0 * values + (lookup_bytes(values) if shape.mxfp4 else 4 / 64 * values)


def at_once(each: Experts) -> int:
    """Number of values of `each` that are dequantized at once."""
    one = each.rows * each.columns
    return one * min(each.count, max(1, CHUNK_BYTES // (2 * one)))


def chunk_values(shape: Shape) -> int:
    """Number of values of the experts that are dequantized at once."""
    return max(map(at_once, shape.experts), default=0)

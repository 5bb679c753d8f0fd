"""4-bit weights of any shape are decoded and multiplied on the CPU as defined."""

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from stages.quantize import quantize
from stages.quantizing.nf4_tensors import quantized_tensors
from stages.shared.model import load_base
from stages.shared.nf4 import dequantize, unpack_odd_layers
from stages.shared.weights import Weights, row_blocks
from tests.tiny import make_model

CPU = torch.device("cpu")
# Rows of whole blocks, of half and quarter ones, and of lengths that kernels treat one by one.
WIDTHS = (2, 8, 16, 24, 32, 48, 64, 80, 96, 112, 120, 128, 176, 192, 240, 320, 328, 576, 720)
HEIGHTS = (1, 3, 64, 65)
SHAPES = [(height, width) for width in WIDTHS for height in HEIGHTS]


def made(shape, double_quant):
    torch.manual_seed(shape[1])
    weight = torch.randn(shape, dtype=torch.bfloat16)
    return quantized_tensors("w", weight, double_quant, CPU)


def by_definition(tensors, shape):
    """Code times scale of every value, in float64 (QLoRA, section 3)."""
    part = {name.removeprefix("w."): tensor for name, tensor in tensors.items()}
    state = bnb.QuantState.from_dict({k: v for k, v in part.items() if k != "w"}, CPU)
    scales = state.absmax
    if state.nested:
        blocks = torch.arange(len(scales)) // 256
        scales = state.state2.code[scales.long()] * state.state2.absmax[blocks] + state.offset
    packed = tensors["w"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: shape[0] * shape[1]]
    scale = scales.double().repeat_interleave(64)[: len(codes)]
    return (state.code.double()[codes.long()] * scale).view(shape)


def layer(tensors, shape):
    """Like load_base on the CPU."""
    linear = Linear4bit(shape[1], shape[0], bias=True, compute_dtype=torch.float32)
    state = {k.removeprefix("w."): v for k, v in tensors.items() if k != "w"}
    linear.weight = Params4bit.from_prequantized(tensors["w"], state, device=CPU)
    linear.weight.quant_state.dtype = torch.float32
    linear.compute_type_is_set, linear.support_avx512bf16_for_cpu = True, False
    return linear


def close(found, expected):
    return (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_decoded_weight(shape, double_quant):
    tensors = made(shape, double_quant)
    expected = by_definition(tensors, shape)
    model = torch.nn.Sequential(layer(tensors, shape))
    bias = model[0].bias.data.double()
    unpack_odd_layers(model)
    x = torch.randn(5, shape[1]).requires_grad_()
    y = model(x)
    assert close(y.double(), x.double() @ expected.t() + bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert close(x.grad.double(), dy.double() @ expected)
    assert isinstance(model[0], Linear4bit) == (shape[1] % 64 == 0)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_is_decoded_whole_and_in_blocks(shape, double_quant, tmp_path):
    tensors = made(shape, double_quant)
    expected = by_definition(tensors, shape)
    weight = layer(tensors, shape).weight
    assert close(dequantize(weight.data, weight.quant_state).double(), expected)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    read = weights.reader("w", CPU)
    found = torch.cat([read(block) for block in row_blocks(shape, CPU)])
    assert torch.equal(found, expected.to(torch.bfloat16).view(shape))


def test_a_base_of_odd_widths_computes_what_its_decoded_weights_do(tmp_path):
    plain = make_model(tmp_path / "base", hidden_size=48, intermediate_size=80)
    (tmp_path / "nf4").mkdir()
    quantize(tmp_path / "base", tmp_path / "nf4", double_quant=True)
    decoded = plain.float().state_dict()
    weights = Weights(tmp_path / "nf4")
    stored = load_file(tmp_path / "nf4/model.safetensors")
    for name in weights.nf4:
        parts = {"w" + k.removeprefix(name): v for k, v in stored.items() if k.startswith(name)}
        decoded[name] = by_definition(parts, weights.shapes[name]).float()
    plain.load_state_dict(decoded)
    ids = torch.arange(3, 40)[None]
    model = load_base(tmp_path / "nf4", CPU)
    assert close(model(ids).logits, plain(ids).logits)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert sum(isinstance(module, LoraLayer) for module in adapted.modules()) == 2 * 7

"""The sizes of a training step, in bytes, from the model's shape and the run's settings.

Base. stages/shared/base_bytes.py.

Adapter. A Linear of `in` x `out` gets r (in + out) parameters (Hu et al. 2021,
https://arxiv.org/abs/2106.09685): weights, gradients and two Adam moments, all fp32. PEFT's own
layers, under autocast, also keep a bf16 copy of the weights until the backward pass.

Activations. stages/shared/activations.py.

Output head. trl scores the learned tokens in tiles of 4,096 x 32,768 and never has the logits of
all of them (trl/kernels/chunked_logprob.py).

stages/shared/placement.py decides where all of it is placed, and finds the peak of a step.
"""

from dataclasses import dataclass

from stages.shared.activations import (
    attention_saved,
    attention_sums,
    attention_working,
    copied_gates,
    mlp_saved,
    mlp_working,
)
from stages.shared.base_bytes import dense_bytes, dequantized_bytes, weights_bytes
from stages.shared.decoder_shape import (
    ATTENTION_INPUTS,
    MLP_INPUTS,
    Shape,
    Training,
    in_halves,
    liger_modules,
    trained_parameters,
)

# The usual sizes of cards.
CARDS_GB = (4, 6, 8, 12, 16, 24, 40, 48, 80)
# Tiles of trl's fused head: tokens x vocabulary.
HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768
MOMENT_BYTES = {"adamw_torch_fused": 8, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2 + 8 / 256}


def mask_bytes(run: Training) -> float:
    """Bytes of the attention mask, shared by all layers: one per pair of positions of a row."""
    return 0.0 if run.attention == "varlen" else run.tokens * run.tokens / run.rows


def trainable_bytes(shape: Shape, run: Training) -> tuple[float, float, float]:
    """Bytes of trained (weights, gradients, bf16 copies); a full model's weights are the base."""
    if run.method == "full":
        return 0.0, 2.0 * shape.parameters, 0.0
    count = trained_parameters(shape, run)
    # Autocast keeps a bf16 copy of each weight; the fused path makes one when needed.
    return 4.0 * count, 4.0 * count, 0.0 if run.fused_lora else 2.0 * count


def head_bytes(shape: Shape, run: Training) -> tuple[float, float]:
    """Bytes of the output head, forward and backward."""
    h, n = shape.hidden, run.learned_tokens
    tile = 2.0 * min(n, HEAD_TOKENS) * HEAD_VOCABULARY
    # In full fine-tuning, the gradient of its weight is summed in fp32, then cast.
    weight = 6.0 * shape.vocabulary * h if run.method == "full" else 0.0
    return tile + 2.0 * h * n, tile + 6.0 * h * n + weight


@dataclass(frozen=True)
class Sizes:
    """The parts of a step in bytes, for any placement (stages/shared/placement.py).

    norm_keeps_input   norms save the input of a half, which need not be saved again
    layer_weights      the streamable part of a layer's weights
    dense              of each layer: bytes that `Placement.dense` adds; may be empty
    casts              autocast's copies of the adapter
    stream             the residual stream
    …_saved, …_working of half a layer, for the tokens of a step (stages/shared/activations.py)
    attention_sums     the part of attention_working that a single operation allocates and frees
    copied_gates       the part of mlp_working that is freed at once
    always             needed during the whole step
    embedded           the part of attention_saved that the first layer lacks if nothing is
                       recomputed: its input, which then needs no gradient
    operations         half those of a step that recomputes nothing: of all frozen weights, 2 a
                       token, and of attention, whose backward pass takes 2.5 times the forward
                       pass's; mlp_operations and attention_operations: of those that recomputing
                       half a layer repeats
    """

    layers: int
    tokens: int
    halves: bool
    accumulation: int
    norm_keeps_input: bool
    weights: float
    layer_weights: float
    dense: tuple[float, ...]
    adapter: float
    gradients: float
    casts: float
    optimizer: float
    stream: float
    attention_saved: float
    attention_working: float
    attention_sums: float
    mlp_saved: float
    mlp_working: float
    copied_gates: float
    dequantized: float
    always: float
    embedded: float
    final_norm: float
    final_norm_working: float
    head_forward: float
    head_backward: float
    checkpointing: bool
    offloading: bool
    operations: float
    mlp_operations: float
    attention_operations: float


def sizes_of(shape: Shape, run: Training) -> Sizes:
    """The parts of a step of `run`."""
    adapter, gradients, casts = trainable_bytes(shape, run)
    moments = MOMENT_BYTES[run.optimizer] * trained_parameters(shape, run)
    stream, tokens, known = 2.0 * shape.hidden * run.tokens, run.tokens, liger_modules(shape, run)
    head_forward, head_backward = head_bytes(shape, run)
    linears = sum(x.parameters for x in shape.linears)
    # Only NF4's codes; its constants stay on the GPU.
    each = 0.5 if run.method == "qlora" else 2.0
    of_experts = (0.5 if shape.mxfp4 else each) * shape.expert_parameters
    packed = (each * linears + of_experts) / shape.layers
    # Operations for one parameter of a matrix, and of the attention scores of a layer.
    product = 2.0 * tokens
    scores = 2.0 * tokens * tokens / run.sequences * (shape.heads * shape.head_dim)
    mlp, attention = (_parameters(shape, names) for names in (MLP_INPUTS, ATTENTION_INPUTS))
    return Sizes(
        layers=shape.layers,
        tokens=tokens,
        halves=in_halves(shape, run),
        accumulation=run.accumulation,
        norm_keeps_input=known,
        weights=weights_bytes(shape, run.method, run.double_quant),
        layer_weights=packed,
        dense=dense_bytes(shape, run),
        adapter=adapter,
        gradients=gradients,
        casts=casts,
        optimizer=4.0 * shape.parameters if run.method == "full" else moments,
        stream=stream,
        attention_saved=tokens * attention_saved(shape, run),
        attention_working=attention_working(shape, run),
        attention_sums=attention_sums(shape, run),
        mlp_saved=tokens * mlp_saved(shape, run),
        mlp_working=mlp_working(shape, run),
        copied_gates=copied_gates(shape, run),
        dequantized=dequantized_bytes(shape, run),
        # The mask, and cosines and sines of the positions.
        always=mask_bytes(run) + 4.0 * shape.head_dim * tokens,
        # Trained embeddings need a gradient.
        embedded=0.0 if run.method == "full" or run.token_rows else stream,
        final_norm=stream if known else 2 * stream,
        # Without Liger, the norm's backward pass makes several fp32 copies; LayerNorm's makes the
        # gradients of its output and input.
        final_norm_working=stream * (1 if known else 5 if shape.layer_norms else 10),
        head_forward=head_forward,
        head_backward=head_backward,
        checkpointing=run.checkpointing,
        offloading=run.offloading,
        operations=product * (linears + shape.active_experts + shape.hidden * shape.vocabulary)
        + 1.75 * scores * shape.layers,
        mlp_operations=product * (mlp + shape.active_experts) / shape.layers,
        attention_operations=product * attention / shape.layers + scores,
    )


def _parameters(shape: Shape, names: frozenset[str]) -> int:
    """Parameters of all Linears of these short names."""
    return sum(x.parameters for x in shape.linears if x.short in names)

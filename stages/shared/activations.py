"""Bytes that the halves of a decoder layer, attention and MLP, save and work with in training.

Symbols: H hidden size, I intermediate size, A = heads x head size, K = kv heads x head size,
r rank. bf16 and fp32 take 2 and 4 bytes.

Saved. What autograd saves for one token of one layer is the sum over its operations, as in
Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), whose layer differs from this one:

    attention   RMSNorm 2H (Liger; 4H without), the projections' input 2H (after a LayerNorm, which
                returns fp32, each projection's own copy), q and output 4A,
                k and v 4K, log-sum-exp 4 per head; if one Linear makes q, k and v, the tensor that
                they are views of, 2A + 2K; further norms (of q and k, of results) 2 or 4 per value
    MLP         RMSNorm 2H or 4H, input 2H, gate and up 4I (6I without Liger), and their product 2I
                unless the MLP is one operation (stages/training/fused_lora.py)
    adapters    x A^T, 2r each, and in PEFT's own layers with dropout 3 bytes per input value

(transformers modeling_llama.py, peft/tuners/lora/bnb.py, liger_kernel/ops; counted by
tests/test_vram.py.) With checkpointing, a layer or each half of it saves only its input, 2H.

Layers of families that Liger does not know differ in more than that: in norms, in the rotation of
only a part of q and k, in activations. stages/shared/kept.py counts what theirs save.

Experts. A router gives each token k of E experts of width J, so there are k rows per token. Saved
for one token of one layer are the router's scores 4E, and k times what is between the products (of
SwiGLU 6J: gate and up 4J, the activated gate 2J; counted by running it), the result before it is
weighted, 2H, and 24 for the order of the rows and the router's choice and weights. With adapters on
experts (r values more for each row and column of every expert) the inputs of the two products are
saved too, 2H + 2J, and x A^T.

Working. Beyond that, one layer at a time needs gradients and one dequantized weight.
"""

from dataclasses import replace

from stages.shared.base_bytes import chunk_bytes, dequantized_bytes
from stages.shared.decoder_shape import (
    FUSED_INPUTS,
    GATES,
    MLP_INPUTS,
    MLP_OUTPUT,
    Experts,
    Shape,
    Training,
    adapted,
    adapts,
    attention_names,
    liger_modules,
    one_operation_mlp,
)

# Of an H100 or H200. Most consumer cards have fewer and need less than predicted.
MULTIPROCESSORS = 132
# Attention of few long rows is computed for so many queries at a time, on every GPU.
QUERIES = 16384


def attention_saved(shape: Shape, run: Training) -> float:
    """Bytes per token that the attention half of a layer saves for its backward pass."""
    h, a = shape.hidden, shape.heads * shape.head_dim
    k, row = shape.kv_heads * shape.head_dim, run.tokens / run.rows
    if shape.attention_bytes and run.method != "full" and not liger_modules(shape, run):
        # The MLP's half has a norm of its own.
        kept = shape.attention_bytes - norm_saved(h, shape, run)
    else:
        # q, k, v, the output and an fp32 log-sum-exp.
        kept = norm_saved(h + shape.more_norms, shape, run) + 4 * a + 4 * k + 4 * shape.heads
        if any(x.short in FUSED_INPUTS for x in shape.linears):
            # v is a view of all three; the rotary embedding makes q and k anew.
            kept += 2 * a + 2 * k
    kept += h * shape.drops
    if run.attention != "varlen":
        # A mask makes transformers expand K and V to all heads (use_gqa_in_sdpa).
        kept += 4 * (a - k)
    if run.attention == "sdpa":
        # It becomes an additive bf16 one in every layer.
        kept += 2 * row
    if run.attention == "eager":
        # The softmax in fp32 and bf16; with sinks only in bf16.
        kept += shape.heads * row * (2 if shape.sinks else 4 + 2)
    if run.attention == "varlen" and in_parts(run.sequences, run.tokens, shape.heads):
        # The output of every part, beside their concatenation.
        kept += 2 * a
    return kept + projections_saved(shape, run, attention=True)


def mlp_saved(shape: Shape, run: Training) -> float:
    """Bytes per token that the MLP half of a layer saves for its backward pass."""
    if shape.experts:
        return experts_saved(shape, run)
    h, i = shape.hidden, shape.intermediate
    short = liger_modules(shape, run) or one_operation_mlp(shape, run)
    gates = 4 * i if short else shape.between_bytes or 6 * i
    kept = norm_saved(h, shape, run) + gates + h * shape.drops
    return kept + projections_saved(shape, run, attention=False)


def experts_saved(shape: Shape, run: Training) -> float:
    """`mlp_saved` of a layer of experts, whose products save nothing (stages/shared/packed.py).
    Experts that compute every token are an MLP in addition."""
    h, i = shape.hidden, shape.expert_width
    scores = 4 * max(each.count for each in shape.experts)
    of_16_bit = 0 if run.method == "qlora" else 2 * h + 2 * i
    ordered = 24
    adapter = 2 * h + 2 * i + 4 * run.rank if run.experts else 0
    each = shape.gate_bytes + 2 * h + of_16_bit + ordered + adapter
    shared = 8 * shape.shared_width + (2 * h if shape.shared_width else 0)
    return norm_saved(h, shape, run) + scores + shape.chosen * each + shared


def experts_working(shape: Shape, run: Training) -> float:
    """`mlp_working` of a layer of experts: rows are counted once for each expert of a token."""
    h, i, rows = shape.hidden, shape.expert_width, run.tokens * shape.chosen
    down = [x for x in shape.experts if x.name.endswith("down_proj")]
    others = [x for x in shape.experts if x not in down]

    def chunk(stacks: list[Experts]) -> float:
        """A chunk of dequantized experts."""
        return max((chunk_bytes(shape, run, x) for x in stacks), default=0.0)

    def gradients(stacks: list[Experts]) -> float:
        """Of the experts' adapters."""
        factors = sum(x.count * (x.rows + x.columns) for x in stacks) / shape.layers
        return 4.0 * run.rank * factors if run.experts else 0.0

    # On the way, saved values are freed: results once they are weighted (Llama 4 weights the input
    # instead), what is between the products, and the inputs of adapters.
    results, read = 0 if shape.own_code else 2 * h, 2 * i if run.experts else 0
    return 2.0 * h * run.tokens + max(
        # Backward through the weighted sum: gradients of the results, weighted, and of the weights.
        6 * h * rows,
        # Through the second product: gradients of result and input.
        (2 * h + 2 * i - results) * rows + chunk(down) + gradients(down),
        # Through the activation: gradients of the product and of its factors.
        (6 * i - results - read) * rows + gradients(down),
        # Through the first product.
        (4 * i + 2 * h - results - shape.gate_bytes - read) * rows
        + chunk(others)
        + gradients([*down, *others]),
    )


def norm_saved(hidden: float, shape: Shape, run: Training) -> float:
    """Bytes per token of a norm, which saves its input: Liger in bf16, others in fp32. RMSNorm of
    transformers saves the normalized values too if its weight is trained."""
    if liger_modules(shape, run):
        return 2 * hidden
    return hidden * (6 if run.method == "full" and not shape.layer_norms else 4)


def projections_saved(shape: Shape, run: Training, attention: bool) -> float:
    """Bytes per token that the Linears of a half save: their inputs, if they are trained."""
    full = run.method == "full"
    trained, inside = shape.linears if full else adapted(shape, run.targets), attention_names(shape)
    mine = [x for x in trained if (x.name in inside) == attention]
    # Where attention and MLP read the same norm, attention's copy counts.
    before = {""} | {x.input_of for x in trained if not attention and x.name in inside}
    if not attention and one_operation_mlp(shape, run):
        # It casts its input once, and recomputes x A^T of down_proj from the product.
        mine = [x for x in mine if x.short in MLP_INPUTS]
        reading = [x for x in mine if x.short == "gate_proj"]
    else:
        reading = mine
    copies = {x.input_of: 2 * x.inputs for x in reading if x.input_of not in before}
    shared = sum(copies.values()) / shape.layers
    if full:
        return shared
    inner = 2 * run.rank * len(mine) / shape.layers
    if run.fused_lora:
        return inner + shared
    if run.dropout > 0:
        # Each adapter saves its own dropped copy in bf16, and a mask of a byte per value.
        return inner + sum(3 * x.inputs for x in mine) / shape.layers
    if run.method == "lora":
        # PEFT casts the input of a 16-bit layer to fp32, and autocast makes a new bf16 copy.
        return inner + sum(2 * x.inputs for x in mine) / shape.layers
    return inner + shared


def mlp_working(shape: Shape, run: Training) -> float:
    """Peak bytes of the MLP half of a layer beyond what it saved, forward or backward."""
    if shape.experts:
        return experts_working(shape, run)
    h, i, t = shape.hidden, shape.intermediate, run.tokens
    one = one_operation_mlp(shape, run)
    if one and run.liger:
        # Backward through down_proj: the product's gradient and the weight. The product is
        # recomputed in the gradient's memory.
        return t * (2 * h + 2 * i) + dequantized_bytes(shape, run)
    trained = run.method != "full" and adapts(shape, run, MLP_OUTPUT)
    dropped = run.dropout > 0 and run.method != "full"
    dequantized = dequantized_bytes(shape, run)
    # The product of gate and up, which down_proj needs, if it is not among what is saved.
    product = 0 if run.method == "full" or (trained and not dropped and not one) else 2 * i
    # down_proj's adapter drops its input after that.
    later = 3 * i if trained and dropped else 0
    known, copied = liger_modules(shape, run), copied_gates(shape, run)
    candidates = [
        # down_proj, forward: the product, the residual stream and the output; with the weight, or
        # after it.
        t * (product + 6 * h - later) + dequantized,
        t * (product + 8 * h),
    ]
    if copied:
        # down_proj, recomputed: the output and the gradient of the residual stream.
        last = replace(shape, linears=tuple(x for x in shape.linears if x.short in MLP_OUTPUT))
        candidates.append(t * (product + 4 * h - later) + dequantized_bytes(last, run) + copied)
        candidates.append(t * (product + 4 * h) + copied)
    if run.method == "full" or run.fused_lora:
        # down_proj, backward: the product, its gradient and the weight.
        candidates.append(t * (2 * h + (product if trained else 0) + 2 * i) + dequantized)
        if not known:
            # SwiGLU as one operation, backward: six values in addition to its inputs.
            candidates.append(t * (2 * h + (12 * i if one else activation_working(shape))))
        return max(candidates)
    # What down_proj's adapter saved is freed before the gradient through the base is computed.
    freed = 3 * i if trained and dropped else 2 * i if trained else 0
    gradients = 4 * i if trained else 2 * i
    candidates.append(t * (2 * h - freed + gradients) + dequantized)
    # Two gradients and their sum, since autograd adds out of place. Without Liger, the gradients of
    # the product and of its factors are as large.
    if trained or not known:
        candidates.append(t * (2 * h - freed + 6 * i))
    if not known and (made := activation_working(shape)) > 4 * i:
        candidates.append(t * (2 * h + made))
    if trained and run.method == "lora":
        # Forward: PEFT's fp32 copy of the product, and with dropout the dropped copy.
        candidates.append(t * (2 * i + (8 * i if dropped else 4 * i) + 6 * h) + copied)
    return max(candidates)


def activation_working(shape: Shape) -> float:
    """Bytes per token of the backward pass through the activation and gate of an MLP, by autograd:
    SwiGLU makes two values and GELU one; in fp32, powers seven, with a gate eleven."""
    i = shape.intermediate
    kept, gated = shape.between_bytes or 6 * i, any(x.short in GATES for x in shape.linears)
    if kept <= 2 * i:
        return 2 * i
    if gated and kept <= 6 * i:
        return 4 * i
    return (22 if gated else 14) * i


def copied_gates(shape: Shape, run: Training) -> float:
    """Bytes of gate and up in one tensor, which Liger copies them from. It is there until the end
    of the MLP's forward pass."""
    together = any(x.short == "gate_up_proj" for x in shape.linears)
    copied = together and liger_modules(shape, run)
    return 4.0 * shape.intermediate * run.tokens if copied else 0.0


def attention_working(shape: Shape, run: Training) -> float:
    """Bytes of the backward pass of the attention half of a layer beyond what it saved."""
    a, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # The gradients of the residual stream, of the output, and of q, k and v.
    live: float = 2 * shape.hidden + 4 * a + 4 * k
    live += 4 * shape.heads if run.attention == "varlen" else 4 * (a - k)
    if run.attention == "eager":
        # Gradients of the softmax, in fp32 and bf16; with sinks only in bf16. Those of q, k and v
        # are made afterwards.
        softmax = shape.heads * run.tokens / run.rows * (2 + 2 + 2 if shape.sinks else 4 + 4 + 2)
        live = max(live, 2 * shape.hidden + softmax)
    sums = attention_sums(shape, run)
    if run.attention != "varlen" or not in_parts(run.sequences, run.tokens, shape.heads):
        return run.tokens * live + sums
    if run.packed:
        # There may be more sequences, which are not computed in parts: nothing is concatenated.
        return run.tokens * (live - 2 * a) + sums
    # The last part comes first: of the queries' gradient only its own is there, and the
    # concatenated outputs are gone. In the second, the keys' gradients of both.
    second = 4 * k * (run.tokens - QUERIES) - (4 * a * QUERIES if a != k else 0)
    return run.tokens * (live - 4 * a) + 2 * a * QUERIES + max(0, second) + sums


def in_parts(sequences: int, tokens: int, heads: int) -> bool:
    """Whether attention is computed for QUERIES queries at a time (stages/training/attention.py):
    so few sequences that a deterministic backward pass sums several copies of dq."""
    return tokens > QUERIES and sequences * heads < MULTIPROCESSORS


def attention_sums(shape: Shape, run: Training) -> float:
    """Bytes that FlashAttention 2 allocates in its backward pass and frees at its end."""
    if run.attention != "varlen":
        return 0.0
    a, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # It sums dq in fp32, and dk and dv for every query head. If deterministic, it has as many
    # copies of dq as it needs to fill the GPU (ATen, flash_api.cpp).
    parallel, tokens = run.sequences * shape.heads, run.tokens
    if in_parts(run.sequences, tokens, shape.heads):
        parallel, tokens = shape.heads, QUERIES
    copies = tokens * ((MULTIPROCESSORS + parallel - 1) // parallel)
    # More sequences than the fewest that a pack may have are not computed in parts.
    copies = max(copies, run.tokens) if run.packed else copies
    return 4.0 * a * copies + run.tokens * (4 * a if a != k else 0)

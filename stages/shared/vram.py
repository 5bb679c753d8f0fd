"""The sizes of a training step, part by part, from shapes and settings alone.

Symbols: H hidden size, I intermediate size, A = heads x head size, K = kv heads x head size,
L layers, r rank, T tokens a step on the device, N of them learned. All sizes are bytes; GB is 10^9
bytes; bf16 and fp32 take 2 and 4.

Weights. NF4 keeps 4 bits a parameter and an fp32 constant for each block of 64: 0.5 + 4/64 bytes.
Double quantization keeps the constant in 8 bits and an fp32 one for each 256 of them: 0.5 + 1/64 +
4/16384 bytes, 4.127 bits (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3).
Every Linear but the output head is quantized (transformers, get_keys_to_not_convert).

Adapter. A Linear of `in` x `out` gets r (in + out) parameters (Hu et al. 2021,
https://arxiv.org/abs/2106.09685): weights, gradients and two Adam moments, all fp32. PEFT's own
layers, under autocast, also keep a bf16 copy of the weights until the backward pass.

Activations. What autograd keeps for one token of one layer is the sum over its operations, as in
Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), whose layer is another one:

    attention   RMSNorm 2H (Liger; 4H without), the projections' input 2H, q and output 4A,
                k and v 4K, log-sum-exp 4 per head; what q, k and v are views of, where one Linear
                makes them, 2A + 2K more; further norms (of q and k, of results) 2 or 4 a value
    MLP         RMSNorm 2H or 4H, input 2H, gate and up 4I (6I without Liger), and their product 2I
                unless the MLP is one operation (stages/training/fused_lora.py)
    adapters    x A^T, 2r each, and in PEFT's own layers with dropout 3 bytes for each input

(transformers modeling_llama.py, peft/tuners/lora/bnb.py, liger_kernel/ops; counted by
tests/test_vram.py.) Checkpointing keeps the input of a layer, or of each half of it, 2H, and
recomputes the rest.

Experts. A router gives each token k of E experts of width J, so that their rows are k times the
tokens. Saved for one token of one layer are the router's scores 10E, and k times what lies
between the products (of SwiGLU 6J: gate and up 4J, the activated gate 2J; counted by running it)
and the result before it is weighted, 2H; in which order the rows lie, and the choice and the
weights of the router, 24 for each of k. With adapters on experts (r values more for each row and
column of every expert) what the two products read is kept too, k (2H + 2J), and x A^T. All
experts of a product are in 16 bit at once, CHUNK_BYTES of them at most (stages/shared/packed.py).

Output head. trl scores the learned tokens in tiles of 4,096 x 32,768 and never makes the logits of
all of them (trl/kernels/chunked_logprob.py).

Beyond what is saved, one layer works with gradients and with one dequantized weight
(`mlp_working`, `attention_working`). Where all of it lies, and what the worst moment of a step then
takes, is stages/shared/placement.py.
"""

from dataclasses import dataclass

from stages.shared.mxfp4 import lookup_bytes
from stages.shared.outputs import GB

# The usual sizes of cards.
CARDS_GB = (4, 6, 8, 12, 16, 24, 40, 48, 80)

# Of an H100 or H200. Most consumer cards have fewer and need less than is counted.
MULTIPROCESSORS = 132
# Tiles of trl's fused head: tokens x vocabulary.
HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768

# Experts that are dequantized at once, in bytes. All of a layer of Qwen3-30B-A3B (0.8 GB) and of
# gpt-oss-20b (1.06 GB) fits: one launch of a grouped product, and no wait for the device to learn
# where a chunk's rows begin. Larger ones (Mixtral 8x7B 1.9 GB, DeepSeek-V3 15 GB) come in parts.
CHUNK_BYTES = 2**30

MXFP4_BYTES = 0.5 + 1 / 32
NF4_BYTES = {True: 0.5 + 1 / 64 + 4 / 16384, False: 0.5 + 4 / 64}
# Names that say which tensor of a layer a Linear reads, as Llama and its relatives use them.
FUSED_INPUTS = frozenset({"qkv_proj", "query_key_value", "Wqkv", "c_attn"})
ATTENTION_INPUTS = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj"})
ATTENTION = ATTENTION_INPUTS | {"o_proj"}
MLP_INPUTS = frozenset({"gate_proj", "up_proj", "gate_up_proj"})
MLP_OUTPUT = frozenset({"down_proj"})
MLP = MLP_INPUTS | MLP_OUTPUT
MOMENT_BYTES = {"adamw_torch_fused": 8, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2 + 8 / 256}


@dataclass(frozen=True)
class Linear:
    """One Linear of the base model; `quantized` says whether NF4 replaces it, `adaptable` whether
    it can have an adapter (stages/shared/linears.py)."""

    name: str
    inputs: int
    outputs: int
    quantized: bool = True
    adaptable: bool = True

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Experts:
    """One tensor [count, rows, columns] of a layer's experts."""

    name: str
    count: int
    rows: int
    columns: int

    @property
    def parameters(self) -> int:
        return self.count * self.rows * self.columns


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that decide its memory. `other_parameters` are those outside of
    `linears` and `experts` (embeddings, output head, norms, biases, routers), a tied head counted
    once. Of a mixture of experts, `chosen` compute each token and have `expert_width` values
    between their products; `shared_width` are those of the experts that compute every token.
    `gate_bytes` are what the backward pass keeps of one expert's row between them.
    `float32_parameters` stay in float32. `sinks`: attention has a score more, of its own."""

    layers: int
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    silu: bool
    plain: bool  # its layers are plain_layers of stages/shared/fast_path.py
    linears: tuple[Linear, ...]
    other_parameters: int
    # Values of a token that a layer's norms read beside the two of H that every layer has.
    more_norms: float = 0.0
    experts: tuple[Experts, ...] = ()
    chosen: int = 0
    expert_width: int = 0
    gate_bytes: int = 0
    shared_width: int = 0
    float32_parameters: int = 0
    sinks: bool = False
    own_code: bool = False  # its experts, in transformers
    mxfp4: bool = False  # experts come in MXFP4, and stay so

    @property
    def parameters(self) -> int:
        linears = sum(linear.parameters for linear in self.linears)
        return self.other_parameters + linears + self.expert_parameters

    @property
    def expert_parameters(self) -> int:
        return sum(each.parameters for each in self.experts)

    @property
    def active_experts(self) -> int:
        """Parameters of the experts that compute a token."""
        return sum(self.chosen * each.rows * each.columns for each in self.experts)

    @property
    def active_parameters(self) -> int:
        """Those that compute a token."""
        return self.parameters - self.expert_parameters + self.active_experts


@dataclass(frozen=True)
class Training:
    """How the shape is trained. `targets` are names of Linears, as peft matches them."""

    method: str  # qlora | lora | full
    double_quant: bool
    rank: int
    targets: frozenset[str]
    dropout: float
    optimizer: str
    rows: int  # rows a step on the device; 1 when packed into one
    sequences: int  # rows in it, at the least: what attention keeps apart
    tokens: int  # T
    learned_tokens: int  # N
    accumulation: int
    checkpointing: bool
    offloading: bool
    attention: str  # varlen | sdpa | eager
    liger: bool  # Liger's RMSNorm, RoPE and SwiGLU
    fused_lora: bool  # stages/training/fused_lora.py
    token_rows: int = 0  # of the embeddings and the head
    experts: bool = False  # experts have adapters


def adapted(shape: Shape, targets: frozenset[str]) -> list[Linear]:
    """The Linears that get an adapter."""
    return [x for x in shape.linears if x.name in targets]


def adapter_parameters(shape: Shape, rank: int, targets: frozenset[str]) -> int:
    """Trainable parameters of LoRA: peft's A (r x in) and B (out x r), no bias."""
    return sum(rank * (x.inputs + x.outputs) for x in adapted(shape, targets))


def expert_adapter_parameters(shape: Shape, rank: int) -> int:
    """Those of LoRA on all experts (stages/shared/expert_lora.py)."""
    return sum(rank * x.count * (x.rows + x.columns) for x in shape.experts)


def trained_parameters(shape: Shape, run: Training) -> int:
    """Those of the adapter, with rows of the embeddings (stages/training/token_rows.py)."""
    count = adapter_parameters(shape, run.rank, run.targets) + run.token_rows * shape.hidden
    return count + (expert_adapter_parameters(shape, run.rank) if run.experts else 0)


def weights_bytes(shape: Shape, method: str, double_quant: bool) -> float:
    """The base model on the GPU."""
    others = 2.0 * shape.float32_parameters
    rest = shape.parameters - shape.expert_parameters
    experts = expert_bytes(shape, method, double_quant)
    packed = sum(x.parameters for x in shape.linears if x.quantized) if method == "qlora" else 0
    return NF4_BYTES[double_quant] * packed + 2.0 * (rest - packed) + experts + others


def expert_bytes(shape: Shape, method: str, double_quant: bool) -> float:
    """All experts as they are stored."""
    each = NF4_BYTES[double_quant] if method == "qlora" else 2.0
    return (MXFP4_BYTES if shape.mxfp4 else each) * shape.expert_parameters


def adapts(shape: Shape, run: Training, names: frozenset[str]) -> bool:
    """Whether a Linear of one of these short names gets an adapter."""
    return any(x.name.rsplit(".", 1)[-1] in names for x in adapted(shape, run.targets))


def one_operation_mlp(shape: Shape, run: Training) -> bool:
    """Whether the MLP runs as one operation (stages/training/fused_lora.py)."""
    parts = [frozenset({name}) for name in ("gate_proj", "up_proj", "down_proj")]
    return run.fused_lora and shape.silu and all(adapts(shape, run, part) for part in parts)


def attention_saved(shape: Shape, run: Training) -> float:
    """Bytes per token that the attention half of a layer keeps for its backward pass."""
    h, a = shape.hidden, shape.heads * shape.head_dim
    k, row = shape.kv_heads * shape.head_dim, run.tokens / run.rows
    # q, k, v, the output and an fp32 log-sum-exp.
    kept = norm_saved(h, run) + 4 * a + 4 * k + 4 * shape.heads
    kept += norm_saved(shape.more_norms, run)
    if any(x.name.rsplit(".", 1)[-1] in FUSED_INPUTS for x in shape.linears):
        # v is a view of all three; q and k are made anew when they are turned.
        kept += 2 * a + 2 * k
    if run.attention != "varlen":
        # A mask makes transformers expand K and V to all heads (use_gqa_in_sdpa) and becomes an
        # additive bf16 one in every layer.
        kept += 4 * (a - k) + 2 * row
    if run.attention == "eager":
        # The softmax in fp32 and in bf16; with sinks in bf16 alone.
        kept += shape.heads * row * (2 if shape.sinks else 4 + 2)
    return kept + projections_saved(shape, run, ATTENTION, {2 * h: ATTENTION_INPUTS})


def mlp_saved(shape: Shape, run: Training) -> float:
    """Bytes per token that the MLP half of a layer keeps for its backward pass."""
    if shape.experts:
        return experts_saved(shape, run)
    h, i = shape.hidden, shape.intermediate
    gates, names, inputs = (4 if run.liger else 6) * i, MLP, {2 * h: MLP_INPUTS, 2 * i: MLP_OUTPUT}
    if one_operation_mlp(shape, run):
        # x A^T of down_proj is made again, from the product.
        gates, names, inputs = 4 * i, MLP_INPUTS, {2 * h: MLP_INPUTS}
    return norm_saved(h, run) + gates + projections_saved(shape, run, names, inputs)


def experts_saved(shape: Shape, run: Training) -> float:
    """`mlp_saved` of a layer of experts: the norm, the router's scores, for each expert of a token
    gate and up, what the activation makes of them, and the result before it is weighted; the
    product itself keeps nothing (stages/shared/packed.py). Experts of every token are an MLP
    besides."""
    h, i = shape.hidden, shape.expert_width
    scores = 10 * max(each.count for each in shape.experts)
    of_16_bit = 0 if run.method == "qlora" else 2 * h + 2 * i
    ordered = 24
    adapter = 2 * h + 2 * i + 4 * run.rank if run.experts else 0
    each = shape.gate_bytes + 2 * h + of_16_bit + ordered + adapter
    shared = 8 * shape.shared_width + (2 * h if shape.shared_width else 0)
    return norm_saved(h, run) + scores + shape.chosen * each + shared


def experts_working(shape: Shape, run: Training) -> float:
    """`mlp_working` of a layer of experts: rows are counted once for each expert of a token."""
    h, i, rows = shape.hidden, shape.expert_width, run.tokens * shape.chosen
    dequantized = dequantized_bytes(shape, run)
    factors = max((run.rank * x.count * (x.rows + x.columns) for x in shape.experts), default=0)
    # In 16 bit, with their gradients, beside the gradient of what they read.
    adapter = 4.0 * factors + 2 * max(h, i) * rows if run.experts else 0.0
    return 2.0 * h * run.tokens + max(
        # Backward through the weighted sum: the results' gradient, weighted, and the weights'.
        6 * h * rows,
        # Through the activation: gradients of all that it kept, and of gate and up.
        (shape.gate_bytes + 4 * i) * rows,
        # Through the products: what comes, what goes, and a chunk of experts.
        max(2 * h + 2 * i, 4 * i + 2 * h) * rows + max(dequantized, adapter),
    )


def norm_saved(hidden: float, run: Training) -> float:
    """RMSNorm keeps its input: Liger in bf16, transformers in fp32 and, to learn its weight, the
    normalized values as well."""
    return hidden * (2 if run.liger else 6 if run.method == "full" else 4)


def projections_saved(
    shape: Shape, run: Training, names: frozenset[str], inputs: dict[int, frozenset[str]]
) -> float:
    """Bytes per token that the Linears of these names keep: what they read, if they train.

    `inputs` says which Linears share an input and how many bytes it has; o_proj reads what
    attention keeps anyway.
    """
    if run.method == "full":
        return sum(inputs)
    shared = sum(size for size, group in inputs.items() if adapts(shape, run, group))
    mine = [x for x in adapted(shape, run.targets) if x.name.rsplit(".", 1)[-1] in names]
    inner = 2 * run.rank * len(mine) / shape.layers
    if run.fused_lora:
        return inner + shared
    if run.dropout > 0:
        # Each adapter keeps a dropped copy of its own in bf16 and a mask of a byte an element.
        return inner + sum(3 * x.inputs for x in mine) / shape.layers
    if run.method == "lora":
        # PEFT casts the input of a 16-bit layer to fp32, autocast back to a bf16 of its own.
        return inner + sum(2 * x.inputs for x in mine) / shape.layers
    return inner + shared


def dequantized_bytes(shape: Shape, run: Training) -> float:
    """A 16-bit copy of one weight or of a chunk of experts, and bitsandbytes' constants in fp32."""
    values = chunk_values(shape)
    experts = 2.0 * values + (lookup_bytes(values) if shape.mxfp4 else 4 / 64 * values)
    if run.method != "qlora":
        return experts if shape.mxfp4 else 0.0
    constants = 0 if run.fused_lora and run.liger else 4 / 64
    linear = max((x.parameters for x in shape.linears if x.quantized), default=0)
    return max((2 + constants) * linear, experts)


def chunk_values(shape: Shape) -> int:
    """Values of the experts that are dequantized at once."""

    def of(each: Experts) -> int:
        one = each.rows * each.columns
        return one * min(each.count, max(1, CHUNK_BYTES // (2 * one)))

    return max(map(of, shape.experts), default=0)


def one_operation_working(shape: Shape, run: Training, again: bool) -> float:
    """`mlp_working` of an MLP that is one operation, with Liger's kernels."""
    h, i, t = shape.hidden, shape.intermediate, run.tokens
    # Backward through down_proj: the product's gradient beside the weight. The product itself is
    # made again where its gradient was.
    backward = t * (2 * h + 2 * i)
    # Forward: the product, the stream and the output. In the first of two passes nothing is saved,
    # and gate and up are gone.
    forward = t * (2 * i + 6 * h - (4 * i if again and shape.plain else 0))
    return max(backward, forward) + dequantized_bytes(shape, run)


def mlp_working(shape: Shape, run: Training, again: bool) -> float:
    """Bytes beyond what the MLP half of a layer saved, at its worst moment, forward or backward.

    again  it is computed twice, and nothing is saved the first time
    """
    if shape.experts:
        return experts_working(shape, run)
    h, i, t = shape.hidden, shape.intermediate, run.tokens
    one = one_operation_mlp(shape, run)
    if one and run.liger:
        return one_operation_working(shape, run, again)
    trained = run.method != "full" and adapts(shape, run, MLP_OUTPUT)
    dropped = run.dropout > 0 and run.method != "full"
    dequantized = dequantized_bytes(shape, run)
    # The product of gate and up is there in any case when down_proj runs; is it saved?
    product = 0 if run.method == "full" or (trained and not dropped and not one) else 2 * i
    candidates = [
        # down_proj, forward: the product, the stream and the output; the weight or the rest.
        t * (product + 6 * h - (3 * i if trained and dropped else 0)) + dequantized,
        t * (product + 8 * h),
    ]
    if run.method == "full" or run.fused_lora:
        # down_proj, backward: the product and its gradient beside the weight.
        candidates.append(t * (2 * h + (product if trained else 0) + 2 * i) + dequantized)
        if not run.liger:
            # SwiGLU, backward: six values besides its inputs; autograd's own makes two.
            candidates.append(t * (2 * h + (12 * i if run.fused_lora else 4 * i)))
        return max(candidates)
    # What the adapter of down_proj saved is free when the gradient through the base comes.
    freed = 3 * i if trained and dropped else 2 * i if trained else 0
    gradients = 4 * i if trained else 2 * i
    candidates.append(t * (2 * h - freed + gradients) + dequantized)
    # Two gradients and their sum: autograd adds out of place. Without Liger, the product's
    # gradient and those of its factors are as many.
    if trained or not run.liger:
        candidates.append(t * (2 * h - freed + 6 * i))
    if trained and run.method == "lora":
        # Forward: PEFT's fp32 copy of the product, and with dropout the dropped one.
        candidates.append(t * (2 * i + (8 * i if dropped else 4 * i) + 6 * h))
    return max(candidates)


def attention_working(shape: Shape, run: Training) -> float:
    """Bytes beyond what the attention half of a layer saved, at its backward pass."""
    a, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # The gradients of the stream, of the output, of q, k and v.
    live: float = 2 * shape.hidden + 4 * a + 4 * k
    if run.attention == "varlen":
        # FlashAttention 2 sums dq in fp32 and dk, dv for every query head first. Deterministic, it
        # has a dq for each share of a sequence's keys that fills the GPU (ATen, flash_api.cpp).
        parallel = run.sequences * shape.heads
        sums = (MULTIPROCESSORS + parallel - 1) // parallel
        live += 4 * a * sums + 4 * shape.heads + (4 * a if a != k else 0)
    else:
        live += 4 * (a - k)
    if run.attention == "eager":
        # Of the weights, in fp32 and bf16; with sinks in bf16 alone.
        live += shape.heads * run.tokens / run.rows * (2 + 2 + 2 if shape.sinks else 4 + 4 + 2)
    return run.tokens * live


def in_halves(shape: Shape, run: Training) -> bool:
    """Whether attention and MLP are placed apart (stages/training/fused_lora.py)."""
    return run.fused_lora and shape.plain


def mask_bytes(run: Training) -> float:
    """The attention mask, shared by all layers: a byte for each pair of positions of a row."""
    return 0.0 if run.attention == "varlen" else run.tokens * run.tokens / run.rows


def trainable_bytes(shape: Shape, run: Training) -> tuple[float, float, float]:
    """(weights, gradients, copies in bf16) of what trains; a full model's weights are the base."""
    if run.method == "full":
        return 0.0, 2.0 * shape.parameters, 0.0
    count = trained_parameters(shape, run)
    # Autocast keeps a bf16 copy of each weight; the fused path makes one when it needs it.
    return 4.0 * count, 4.0 * count, 0.0 if run.fused_lora else 2.0 * count


def head_bytes(shape: Shape, run: Training) -> tuple[float, float]:
    """Bytes of the output head, forward and backward."""
    h, n = shape.hidden, run.learned_tokens
    tile = 2.0 * min(n, HEAD_TOKENS) * HEAD_VOCABULARY
    # Training all of it, the gradient of its weight is summed in fp32, then cast.
    weight = 6.0 * shape.vocabulary * h if run.method == "full" else 0.0
    return tile + 2.0 * h * n, tile + 6.0 * h * n + weight


@dataclass(frozen=True)
class Sizes:
    """A step in bytes, whatever lies where: what stages/shared/placement.py places.

    What a half of a layer saves for its backward pass and works with beyond that is for a step's
    tokens; `mlp_working_again` is that of an MLP computed twice. `layer_weights` are a layer's
    that can be streamed. `casts` are autocast's copies of the adapter.
    """

    layers: int
    tokens: int
    halves: bool
    accumulation: int
    norm_keeps_input: bool
    weights: float
    layer_weights: float
    adapter: float
    gradients: float
    casts: float
    optimizer: float
    stream: float
    attention_saved: float
    attention_working: float
    mlp_saved: float
    mlp_working: float
    mlp_working_again: float
    dequantized: float
    always: float
    final_norm: float
    final_norm_working: float
    head_forward: float
    head_backward: float
    checkpointing: bool
    offloading: bool
    # What the time of a step is made of: operations of all layers' frozen weights, forward, and
    # of those that a half computed again repeats, a layer each.
    operations: float
    mlp_operations: float
    attention_operations: float


def sizes_of(shape: Shape, run: Training) -> Sizes:
    """What a step of `run` is made of."""
    adapter, gradients, casts = trainable_bytes(shape, run)
    moments = MOMENT_BYTES[run.optimizer] * trained_parameters(shape, run)
    stream, tokens = 2.0 * shape.hidden * run.tokens, run.tokens
    head_forward, head_backward = head_bytes(shape, run)
    linears = sum(x.parameters for x in shape.linears)
    # Of NF4 the codes; the constants stay on the GPU.
    each = 0.5 if run.method == "qlora" else 2.0
    of_experts = (0.5 if shape.mxfp4 else each) * shape.expert_parameters
    packed = (each * linears + of_experts) / shape.layers
    width, attention = shape.heads * shape.head_dim, 2.0 * tokens * tokens / run.sequences
    return Sizes(
        layers=shape.layers,
        tokens=tokens,
        halves=in_halves(shape, run),
        accumulation=run.accumulation,
        norm_keeps_input=run.liger,
        weights=weights_bytes(shape, run.method, run.double_quant),
        layer_weights=packed,
        adapter=adapter,
        gradients=gradients,
        casts=casts,
        optimizer=4.0 * shape.parameters if run.method == "full" else moments,
        stream=stream,
        attention_saved=tokens * attention_saved(shape, run),
        attention_working=attention_working(shape, run),
        mlp_saved=tokens * mlp_saved(shape, run),
        mlp_working=mlp_working(shape, run, again=False),
        mlp_working_again=mlp_working(shape, run, again=True),
        dequantized=dequantized_bytes(shape, run),
        # The whole step: mask, cosines and sines of the positions.
        always=mask_bytes(run) + 4.0 * shape.head_dim * tokens,
        final_norm=stream if run.liger else 2 * stream,
        # Without Liger, the norm's backward pass makes several fp32 copies.
        final_norm_working=stream if run.liger else 10 * stream,
        head_forward=head_forward,
        head_backward=head_backward,
        checkpointing=run.checkpointing,
        offloading=run.offloading,
        operations=2.0
        * tokens
        * (linears + shape.active_experts + shape.hidden * shape.vocabulary),
        mlp_operations=2.0
        * tokens
        * (_parameters(shape, MLP_INPUTS) + shape.active_experts)
        / shape.layers,
        attention_operations=2.0 * tokens * _parameters(shape, ATTENTION_INPUTS) / shape.layers
        + attention * width,
    )


def _parameters(shape: Shape, names: frozenset[str]) -> int:
    """Of all Linears of these short names."""
    return sum(x.parameters for x in shape.linears if x.name.rsplit(".", 1)[-1] in names)


def fitting_cards(needed: float) -> list[int]:
    """Sizes in GB of the usual cards that hold `needed` bytes."""
    return [size for size in CARDS_GB if needed <= size * GB]

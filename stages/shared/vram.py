"""How much VRAM training needs, part by part, from shapes and settings alone.

Symbols: H hidden size, I intermediate size, A = heads x head size, K = kv heads x head size,
V vocabulary, L layers, r rank, T tokens a step on the device (padding included), N of them learned.
All sizes are bytes; GB is 10^9 bytes.

Weights. NF4 keeps 4 bits a parameter and one fp32 constant for each block of 64 (0.5 + 4/64 bytes);
double quantization keeps that constant in 8 bits and one fp32 for each 256 of them
(0.5 + 1/64 + 4/16384 = 4.127 bits; Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section
3). Every Linear but the output head is quantized (transformers, get_keys_to_not_convert); the rest
is bf16.

Adapter. A Linear of `in` x `out` gets r * (in + out) parameters (Hu et al. 2021,
https://arxiv.org/abs/2106.09685): fp32 weights, fp32 gradients, two Adam moments. Under autocast
each is also cast to bf16, and the cast lives until the backward pass used it.

Activations. What autograd keeps for one token of one layer is the sum over its operations
(`saved_per_token`, read off modeling_llama.py, peft/tuners/lora/bnb.py and, fused, Liger's ops; the
idea is Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, whose layer is another one).
Checkpointing keeps 2H of it, the layer's input in bf16, and recomputes one layer at a time.

Output head. trl scores learned tokens in tiles of 4,096 x 32,768 and never keeps full logits
(trl/kernels/chunked_logprob.py).

The peak is the worst of four moments of a step (`moments`), since what one of them needs is freed
before the next. The card must also hold the CUDA context and what the allocator reserves in vain.
"""

from dataclasses import dataclass, replace

GB = 1e9
CARDS_GB = (8, 12, 16, 24, 40, 48, 80)

# CUDA context, cuBLAS workspaces and loaded kernels: on the card, unseen by the allocator.
CONTEXT = 0.5e9
# What the caching allocator reserves and cannot use, as a share of what comes and goes each step.
FRAGMENTATION = 0.05
# Layer inputs that trl's offloading still holds on the GPU (max_fwd_stash_size).
OFFLOAD_STASH = 5
# Tiles of trl's fused head: tokens x vocabulary.
HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768

NF4_BYTES = {True: 0.5 + 1 / 64 + 4 / 16384, False: 0.5 + 4 / 64}
MOMENT_BYTES = {"adamw_torch_fused": 8, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2}


@dataclass(frozen=True)
class Linear:
    """One Linear of the base model that quantization replaces."""

    name: str
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that decide its memory. `other_parameters` are those outside of
    `linears` (embeddings, output head, norms, biases), a tied head counted once."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    linears: tuple[Linear, ...]
    other_parameters: int

    @property
    def parameters(self) -> int:
        return self.other_parameters + sum(linear.parameters for linear in self.linears)


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
    tokens: int  # T
    learned_tokens: int  # N
    accumulation: int
    checkpointing: bool
    offloading: bool
    attention: str  # varlen (also flash_attention_2) | sdpa | eager
    fused: bool  # Liger's RMSNorm, RoPE and SwiGLU


@dataclass(frozen=True)
class Prediction:
    """Bytes at the worst moment of a step. `peak` is what training allocates (allocator and managed
    memory), `device` what the card must have."""

    moment: str
    weights: float
    adapter: float
    optimizer: float
    activations: float
    logits: float
    overhead: float

    @property
    def peak(self) -> float:
        return self.weights + self.adapter + self.optimizer + self.activations + self.logits

    @property
    def device(self) -> float:
        return self.peak + self.overhead


def adapted(shape: Shape, targets: frozenset[str]) -> list[Linear]:
    """The Linears that get an adapter."""
    return [x for x in shape.linears if x.name in targets]


def adapter_parameters(shape: Shape, rank: int, targets: frozenset[str]) -> int:
    """Trainable parameters of LoRA: peft's A (r x in) and B (out x r), no bias."""
    return sum(rank * (x.inputs + x.outputs) for x in adapted(shape, targets))


def weights_bytes(shape: Shape, method: str, double_quant: bool) -> float:
    """The base model on the GPU."""
    if method != "qlora":
        return 2.0 * shape.parameters
    linear = sum(x.parameters for x in shape.linears)
    return NF4_BYTES[double_quant] * linear + 2.0 * shape.other_parameters


def saved_per_token(shape: Shape, run: Training) -> float:
    """Bytes that one layer keeps for its backward pass, per token."""
    h, i = shape.hidden, shape.intermediate
    a, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 4 * h if run.fused else 8 * h
    inputs_of_projections = 4 * h
    attention = 4 * a + 4 * k + 4 * shape.heads
    if run.attention != "varlen":
        # A mask makes transformers expand K and V to all heads (use_gqa_in_sdpa).
        attention += 4 * (a - k)
    if run.attention == "eager":
        attention += shape.heads * run.tokens / run.rows * (2 + 4 + 2)
    mlp = 6 * i if run.fused else 8 * i
    inner = 0.0
    if run.method != "full":
        mine = adapted(shape, run.targets)
        inner = sum(2 * run.rank for x in mine) / shape.layers
        if run.dropout > 0:
            # The dropped copy in bf16 and its mask, one of each for every adapter.
            inner += sum(3 * x.inputs for x in mine) / shape.layers
    return norms + inputs_of_projections + attention + mlp + inner


def backward_per_token(shape: Shape) -> float:
    """Bytes of gradients that live at once while one layer runs backward, per token."""
    return 4 * shape.hidden + 4 * shape.intermediate


def mask_bytes(run: Training) -> float:
    """The attention mask, shared by all layers: a byte for each pair of positions of a row."""
    return 0.0 if run.attention == "varlen" else run.tokens * run.tokens / run.rows


def moments(shape: Shape, run: Training) -> dict[str, tuple[float, float, float]]:
    """(adapter or weight gradients, activations, logits) at each moment that can be the worst."""
    if run.method == "full":
        trainable, gradient_bytes, cast_bytes = shape.parameters, 2.0, 0.0
    else:
        trainable = adapter_parameters(shape, run.rank, run.targets)
        gradient_bytes, cast_bytes = 4.0, 2.0
    h, t, n, layers = shape.hidden, run.tokens, run.learned_tokens, shape.layers
    layer = saved_per_token(shape, run) * t
    kept = 2 * h * t if run.checkpointing else layer
    stored = kept * (min(OFFLOAD_STASH, layers) if run.offloading else layers)
    largest = max(shape.linears, key=lambda x: x.parameters).parameters
    dequantized = 2.0 * largest if run.method == "qlora" else 0.0
    working = backward_per_token(shape) * t + dequantized + (layer if run.checkpointing else 0.0)
    tile = 2.0 * min(n, HEAD_TOKENS) * HEAD_VOCABULARY
    head = tile + 2 * h * n + 4 * h * n + 2 * h * t
    # Gradients of an earlier micro-step are still there when a step adds several up.
    before = trainable * gradient_bytes if run.accumulation > 1 else 0.0
    casts = trainable * cast_bytes
    mask = mask_bytes(run)
    one = kept if run.checkpointing else layer
    return {
        "scoring the output head": (before + casts, stored + mask, head),
        "backward through the last layer": (before + casts, stored + working + mask, 0.0),
        "backward through the first layer": (
            trainable * gradient_bytes + casts / layers,
            one + working + mask,
            0.0,
        ),
        "the optimizer's step": (trainable * gradient_bytes, 0.0, 0.0),
    }


def predict(shape: Shape, run: Training) -> Prediction:
    """The parts at the moment of a step that needs most."""
    weights = weights_bytes(shape, run.method, run.double_quant)
    if run.method == "full":
        trainable, own, state = shape.parameters, 0.0, 4
    else:
        trainable, own = adapter_parameters(shape, run.rank, run.targets), 4.0
        state = MOMENT_BYTES[run.optimizer]
    name, (gradients, activations, logits) = max(
        moments(shape, run).items(), key=lambda item: sum(item[1])
    )
    return Prediction(
        moment=name,
        weights=weights,
        adapter=own * trainable + gradients,
        optimizer=float(state * trainable),
        activations=activations,
        logits=logits,
        overhead=CONTEXT + FRAGMENTATION * (gradients + activations + logits),
    )


def methods(shape: Shape, run: Training) -> dict[str, Prediction]:
    """The same rows by full fine-tuning (bf16 weights, gradients and moments), LoRA and QLoRA."""
    return {name: predict(shape, replace(run, method=name)) for name in ("full", "lora", "qlora")}


def fitting_cards(needed: float) -> list[int]:
    """Sizes in GB of the usual cards that hold `needed` bytes."""
    return [size for size in CARDS_GB if needed <= size * GB]

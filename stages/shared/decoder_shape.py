"""A decoder's shape and a run's settings: all that the memory of a training step depends on."""

import re
from dataclasses import dataclass

# Short names of Linears: those that read a half's input, and all. FUSED_INPUTS make q, k and v at
# once. Attention's output projection has many names (`attention_names`).
FUSED_INPUTS = frozenset({"qkv_proj", "query_key_value", "Wqkv", "c_attn"})
ATTENTION_INPUTS = FUSED_INPUTS | {"q_proj", "k_proj", "v_proj"}
ATTENTION = ATTENTION_INPUTS | {"o_proj"}
GATES = frozenset({"gate_proj", "gate_up_proj"})
MLP_INPUTS = GATES | {"up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"}
MLP_OUTPUT = frozenset({"down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h"})


@dataclass(frozen=True)
class Linear:
    """One Linear of the base model. `quantized`: NF4 replaces it; `adaptable`: it can have an
    adapter (stages/shared/linears.py). `reads`: identifies its input, which Linears of the same one
    save once; empty if autograd keeps it anyway; None if its name says so (`input_of`)."""

    name: str
    inputs: int
    outputs: int
    quantized: bool = True
    adaptable: bool = True
    reads: str | None = None

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs

    @property
    def short(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def input_of(self) -> str:
        """What identifies its input. Attention keeps that of its output projection anyway."""
        if self.reads is not None:
            return self.reads
        if self.short in ATTENTION_INPUTS | MLP_INPUTS:
            return self.parent
        return "" if self.short in ATTENTION else self.name


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
    """The numbers of a decoder that decide its memory.

    other_parameters    outside of `linears` and `experts` (embeddings, output head, norms, biases,
                        routers); a tied head counts once
    more_norms          values of a token that a layer's norms read, beside the usual two of H
    chosen              experts that compute each token
    expert_width        values between the products of an expert
    gate_bytes          saved for the backward pass between them, for one row of one expert
    shared_width        like expert_width, of the experts that compute every token
    float32_parameters  that stay in float32
    sinks               attention has an additional, learned score
    swiglu              its MLPs compute what Llama's do
    liger               Liger has norms and an MLP for the family
    layer_norms         norms are LayerNorms, which autocast computes in float32
    drops               dropout of the results of attention and MLP, which keeps a mask
    between_bytes       that an MLP saves for a token between its products; 0 if as SwiGLU
    attention_bytes     that attention and all norms save for a token, without masks; 0 if unknown
    """

    layers: int
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    swiglu: bool
    plain: bool  # its layers are plain_layers of stages/shared/fast_path.py
    linears: tuple[Linear, ...]
    other_parameters: int
    more_norms: float = 0.0
    experts: tuple[Experts, ...] = ()
    chosen: int = 0
    expert_width: int = 0
    gate_bytes: int = 0
    shared_width: int = 0
    float32_parameters: int = 0
    sinks: bool = False
    liger: bool = True
    layer_norms: bool = False
    drops: bool = False
    between_bytes: float = 0.0
    attention_bytes: float = 0.0
    own_code: bool = False  # transformers computes the experts by code of the family
    mxfp4: bool = False  # experts are in MXFP4 and stay so

    @property
    def parameters(self) -> int:
        linears = sum(linear.parameters for linear in self.linears)
        return self.other_parameters + linears + self.expert_parameters

    @property
    def expert_parameters(self) -> int:
        return sum(each.parameters for each in self.experts)

    @property
    def active_experts(self) -> int:
        """Parameters of experts that compute a token."""
        return sum(self.chosen * each.rows * each.columns for each in self.experts)

    @property
    def active_parameters(self) -> int:
        """Parameters that compute a token."""
        return self.parameters - self.expert_parameters + self.active_experts


@dataclass(frozen=True)
class Training:
    """How the model is trained. `targets`: full names of the Linears that get an adapter."""

    method: str  # qlora | lora | full
    double_quant: bool
    rank: int
    targets: frozenset[str]
    dropout: float
    optimizer: str
    rows: int  # rows of a step on the device; 1 if packed into one
    sequences: int  # smallest number of sequences in it, which attention separates
    tokens: int  # of a step on the device
    learned_tokens: int
    accumulation: int
    checkpointing: bool
    offloading: bool
    attention: str  # varlen | sdpa | eager
    liger: bool  # Liger's kernels; its modules only in families that it knows
    fused_lora: bool  # stages/training/fused_lora.py
    token_rows: int = 0  # of the embeddings and the head
    experts: bool = False  # experts have adapters
    packed: bool = False  # there may be more sequences


def adapted(shape: Shape, targets: frozenset[str]) -> list[Linear]:
    """The Linears that get an adapter."""
    return [x for x in shape.linears if x.name in targets]


def layer_of(name: str) -> int | None:
    """The number of the layer that the module of this full name is in; None outside of layers."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def attention_names(shape: Shape) -> frozenset[str]:
    """Full names of the Linears of attention: those beside one of a known name."""
    parents = {x.parent for x in shape.linears if x.short in ATTENTION}
    return frozenset(x.name for x in shape.linears if x.parent in parents)


def adapter_parameters(shape: Shape, rank: int, targets: frozenset[str]) -> int:
    """Trainable parameters of LoRA: A (r x in) and B (out x r), no bias."""
    return sum(rank * (x.inputs + x.outputs) for x in adapted(shape, targets))


def expert_adapter_parameters(shape: Shape, rank: int) -> int:
    """Trainable parameters of LoRA on all experts (stages/shared/expert_lora.py)."""
    return sum(rank * x.count * (x.rows + x.columns) for x in shape.experts)


def trained_parameters(shape: Shape, run: Training) -> int:
    """Parameters of the adapter and of trained rows (stages/training/token_rows.py)."""
    count = adapter_parameters(shape, run.rank, run.targets) + run.token_rows * shape.hidden
    return count + (expert_adapter_parameters(shape, run.rank) if run.experts else 0)


def adapts(shape: Shape, run: Training, names: frozenset[str]) -> bool:
    """Whether a Linear of one of these short names gets an adapter."""
    return any(x.short in names for x in adapted(shape, run.targets))


def liger_modules(shape: Shape, run: Training) -> bool:
    """Whether Liger replaces norms, rotary embedding and MLP (stages/training/adjusting.py)."""
    return run.liger and shape.liger


def one_operation_mlp(shape: Shape, run: Training) -> bool:
    """Whether the MLP runs as one operation (stages/training/fused_lora.py)."""
    parts = [frozenset({name}) for name in ("gate_proj", "up_proj", "down_proj")]
    return run.fused_lora and shape.swiglu and all(adapts(shape, run, part) for part in parts)


def in_halves(shape: Shape, run: Training) -> bool:
    """Whether attention and MLP are checkpointed separately (stages/training/fused_lora.py)."""
    return run.fused_lora and shape.plain

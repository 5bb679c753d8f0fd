"""Reads LoRA on experts from an adapter's file and computes what merge adds to each tensor.

PEFT nests one wrapper per adapted tensor around the module that owns the experts. The factors of
the first tensor have the innermost name (experts.base_layer), those of the last the module's own
(experts). A is [E r, in], with the r rows of an expert together; B is [out, r E], with the expert
as the fastest index.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open

from stages.shared.experts import OWN_CODE, TENSORS, expert_stacks, part_name
from stages.shared.process import StageError


@dataclass(frozen=True)
class Target:
    """A stacked tensor [count, a, b] of a layer's experts that PEFT adapts.

    turned  whether it is [count, in, out] instead of [count, out, in]
    parts   number of checkpoint tensors per expert; 0 if the checkpoint has the stack
    """

    tensor: str
    count: int
    inputs: int
    outputs: int
    turned: bool
    parts: int

    def factor_shapes(self, rank: int) -> dict[str, tuple[int, int]]:
        return {"A": (self.count * rank, self.inputs), "B": (self.outputs, rank * self.count)}


@dataclass(frozen=True)
class ExpertUpdate:
    """The low-rank update of one checkpoint tensor, still on disk: of `rows` of one `expert`, or of
    all experts [E, a, b] if `expert` is None."""

    file: Path
    module: str
    scaling: float
    rank: int
    turned: bool
    expert: int | None = None
    rows: tuple[int, int] = (0, 0)

    # PEFT rounds this product to the weight's dtype before adding it.
    rounded_first = True

    def deltas(self, device: torch.device) -> Callable[[slice], torch.Tensor]:
        """A function that returns scaling * B A for a block of the tensor's rows, in float32."""
        a, b = (_factor(self.file.resolve(), self.module, half) for half in "AB")

        def of(expert: int, rows: slice) -> torch.Tensor:
            own_a = a[expert * self.rank : (expert + 1) * self.rank].to(device)
            own_b = b[rows].view(-1, self.rank, len(a) // self.rank)[..., expert].to(device)
            product = own_a.mT @ own_b.mT if self.turned else own_b @ own_a
            return product.mul_(self.scaling)

        if self.expert is None:
            every = slice(None)
            return lambda block: torch.stack([of(e, every) for e in range(block.start, block.stop)])
        expert, start = self.expert, self.rows[0]
        return lambda block: of(expert, slice(start + block.start, start + block.stop))


@lru_cache(maxsize=4)
def _factor(file: Path, module: str, half: str) -> torch.Tensor:
    """A or B of all experts in float32. Cached, since the tensors of a layer are merged in turn."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(f"base_model.model.{module}.lora_{half}.weight").float()


def expert_targets(
    wanted: Iterable[str], base: Path | None, shapes: dict[str, tuple[int, ...]], where: str
) -> dict[str, Target]:
    """The tensors that PEFT adapts for target_parameters `wanted`, by the name of its wrapper.

    base    folder of the model's config.json
    shapes  of the checkpoint's tensors

    Raises StageError for a parameter that is no tensor of experts, and for experts without
    transformers' experts interface.
    """
    # merge loads transformers without models if it does not come here.
    from stages.shared.text_model import language_model, read_config

    wanted, found, used = set(wanted), dict[str, Target](), set[str]()
    config = read_config(base) if base else None
    model = language_model(config) if config else None
    for name, stack in (expert_stacks(model) if model else {}).items():
        if type(stack).__name__ in OWN_CODE:
            code = type(stack).__name__
            raise StageError(f"{where}: LoRA on experts is not supported for those of {code}")
        own = []
        tensors = dict(stack.named_parameters(recurse=False))
        # Biases are no tensors of experts.
        for key, tensor in ((key, tensors[key]) for key in tensors if key in TENSORS):
            full = f"{name}.{key}"
            if matched := {x for x in wanted if full == x or full.endswith(f".{x}")}:
                own.append((full, tuple(tensor.shape)))
                used |= matched
        for depth, (full, (count, rows, columns)) in enumerate(reversed(own)):
            turned = bool(stack.is_transposed)
            inputs, outputs = (rows, columns) if turned else (columns, rows)
            pieces = sum(part_name(full, 0, piece) in shapes for piece in (0, 1))
            whole = full in shapes and full.endswith(TENSORS)
            if not whole and not pieces:
                raise StageError(f"{where}: {full} has LoRA, and is no tensor of experts")
            found[name + ".base_layer" * depth] = Target(
                full, count, inputs, outputs, turned, pieces
            )
    if unused := sorted(wanted - used):
        raise StageError(
            f"{where}: {unused[0]} of target_parameters is no tensor of experts of the base, which "
            "alone are supported"
        )
    return found


def expert_updates(
    file: Path, module: str, target: Target, rank: int, scaling: float
) -> dict[str, ExpertUpdate]:
    """The updates of the checkpoint tensors that make up `target`, by name."""
    if not target.parts:
        return {target.tensor: ExpertUpdate(file, module, scaling, rank, target.turned)}
    rows = target.outputs // target.parts
    return {
        part_name(target.tensor, expert, piece): ExpertUpdate(
            file, module, scaling, rank, False, expert, (rows * piece, rows * (piece + 1))
        )
        for expert in range(target.count)
        for piece in range(target.parts)
    }


def check_finite(file: Path, module: str, where: str) -> None:
    """Raise StageError if a factor has NaN or infinite values."""
    for half in "AB":
        if not _factor(file.resolve(), module, half).isfinite().all():
            raise StageError(f"{where}: lora_{half} has NaN or infinite values; train it again")

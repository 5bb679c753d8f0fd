"""Quantizes the tensors of a checkpoint to NF4, as bitsandbytes stores them.

Weights of Linears are quantized one by one. Experts are too, and then stacked: a layer's experts
share one module (stages/shared/packed.py).
"""

import torch
from bitsandbytes import functional as bnb

from stages.quantizing.names import Names
from stages.shared.base_bytes import BLOCK
from stages.shared.experts import packed_name, part_of, width_refused
from stages.shared.process import StageError

# NF4's code of zero, twice.
TWO_ZEROS = 0x77


def quantized_tensors(
    name: str, weight: torch.Tensor, double_quant: bool, device: torch.device
) -> dict[str, torch.Tensor]:
    """NF4 form of one weight [out, in] as bitsandbytes saves it."""
    packed, state = nf4(weight, double_quant, device)
    return {name: packed} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}


def nf4(
    weight: torch.Tensor, double_quant: bool, device: torch.device
) -> tuple[torch.Tensor, bnb.QuantState]:
    """The packed nibbles of one weight, and the state to undo them, on the host.

    The same bytes on every device: a GPU scales each block as the CPU does, and what it would do
    otherwise is left to the host.
    """
    if weight.numel() % BLOCK:
        device = torch.device("cpu")  # It divides by the scale of a block that is not full.
    weight = weight.to(device, torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    packed, state.absmax, state.code = packed.cpu(), state.absmax.cpu(), state.code.cpu()
    if device.type != "cpu":
        # A block of zeros has no scale: the CPU writes zeros, a GPU the code of NaN.
        packed.view(-1, BLOCK // 2)[state.absmax == 0] = TWO_ZEROS
    if double_quant:
        _quantize_constants(state)
    return packed, state


def _quantize_constants(state: bnb.QuantState) -> None:
    """Double quantization (QLoRA, section 3), as bnb.quantize_4bit does it, on the host.

    By one thread: the mean's last bit depends on how many add it up.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state.offset = state.absmax.mean()
    torch.set_num_threads(threads)
    state.absmax, state.state2 = bnb.quantize_blockwise(state.absmax - state.offset, blocksize=256)
    state.nested = True


class Stacks:
    """Collects quantized experts until a stacked tensor of the model is complete.

    A checkpoint stores the experts of a layer near each other, so at most two layers wait.
    """

    def __init__(self, names: Names, double_quant: bool, device: torch.device):
        self.shapes, self.double_quant, self.device = names.experts, double_quant, device
        self.waiting: dict[str, dict[tuple[int, int], dict[str, torch.Tensor]]] = {}
        parts = [part for name in names.of.values() if (part := part_of(name))]
        # Number of checkpoint tensors per expert.
        self.pieces = {tensor: 1 + piece for tensor, _, piece in sorted(parts)}

    def made(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The packed tensors of the stack that `name` completes, else nothing."""
        tensor, expert, piece = part_of(name) or (name, None, 0)
        if weight.shape[-1] % BLOCK:
            raise StageError(width_refused(name, weight.shape[-1]))
        waiting = self.waiting.setdefault(tensor, {})
        if expert is None:
            waiting |= {(i, 0): self._packed(each) for i, each in enumerate(weight)}
        else:
            waiting[expert, piece] = self._packed(weight)
        experts, pieces = self.shapes[tensor][0], self.pieces.get(tensor, 1)
        if len(waiting) < experts * pieces:
            return {}
        del self.waiting[tensor]
        stack = packed_name(tensor)
        own = () if expert is None else (pieces,)
        found = {}
        for key in waiting[0, 0]:
            values = torch.stack(
                [waiting[e, p][key] for e in range(experts) for p in range(pieces)]
            )
            found[f"{stack}.{key}"] = values.view(experts, *own, *values.shape[1:])
        return found

    def _packed(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, state = nf4(weight, self.double_quant, self.device)
        found = {"codes": packed.view(len(weight), -1), "absmax": state.absmax}
        if self.double_quant:
            found |= {"nested": state.state2.absmax, "offset": state.offset}
        return found

    def check_whole(self) -> None:
        """Raise StageError if an expert is missing."""
        for tensor, found in sorted(self.waiting.items()):
            raise StageError(
                f"{tensor}: the files have {len(found)} tensors of its experts and lack others; "
                "the model is incomplete: name another model.revision or model.id"
            )

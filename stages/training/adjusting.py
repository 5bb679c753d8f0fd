"""Adjusts a loaded model for training: without attention dropout, for DDP, faster."""

from typing import Any

import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from stages.shared.experts import expert_stacks
from stages.shared.ranks import World


def leave_out_attention_dropout(model: PreTrainedModel) -> float:
    """Switch attention dropout off; returns the largest rate that was set.

    varlen attention has no dropout, and a layer checkpointed in halves would drop other weights
    when it is recomputed. Without it, the result is the same on all hardware.
    """
    dropped = 0.0
    module: Any
    for module in model.modules():
        if isinstance(share := getattr(module, "attention_dropout", None), float):
            dropped, module.attention_dropout = max(dropped, share), 0.0
    return dropped


def apply_liger(model: PreTrainedModel) -> None:
    """Let `model` use Liger's norms, rotary embedding and SwiGLU, but not its loss.

    A mixture of experts keeps its own SwiGLU: Liger's comes with experts that read dense weights.
    """
    from liger_kernel.backends import set_impl
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # Where CUTLASS is installed, as with FlashAttention 4, Liger takes a rotary embedding that is
    # compiled anew for every number of tokens.
    set_impl("nvidia-triton")
    parts = {
        "rope": True,
        "rms_norm": True,
        "swiglu": not expert_stacks(model),
        "cross_entropy": False,
    }
    _apply_liger_kernel_to_instance(model=model, **parts, fused_linear_cross_entropy=False)


def train_together(model: PeftModel, world: World, seed: int) -> None:
    """Prepare `model` for DDP, with the same adapter on every rank."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    trained = {name for name, tensor in named.items() if tensor.requires_grad}
    world.equalize(named[name].data for name in sorted(trained))
    # DDP would broadcast the frozen base too, even from host memory.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, list(named.keys() - trained)
    )
    if world.rank:
        # Otherwise the dropout masks of all ranks would be the same.
        torch.manual_seed(seed + world.rank)


def remember_parameters(model: torch.nn.Module) -> None:
    """Cache the results of methods of `model` that transformers calls at every step.

    With adapters there are thousands of modules. Walking through them takes longer than computing a
    small step, and the GPU waits.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    set_mode = model.train
    # The loaded base is in evaluation mode but its adapters are not; put all into the same.
    set_mode(True)

    def train(mode: bool = True) -> torch.nn.Module:
        return model if model.training == mode else set_mode(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    # Only for this object, which mypy takes for a mistake.
    model.train, model.zero_grad = train, zero_grad  # type: ignore[method-assign]
    model.parameters = lambda recurse=True: iter(parameters)  # type: ignore[method-assign]

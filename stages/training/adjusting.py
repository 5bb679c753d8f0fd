"""Adjusts a loaded model for training: without attention dropout, for DDP, faster."""

import importlib.util
from typing import Any

import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from stages.shared.experts import expert_stacks
from stages.shared.ranks import World

# Of modules, which hold a rate or a Dropout, and of configurations.
ATTENTION_DROPOUT = ("attention_dropout", "attn_dropout", "attn_dropout_p")


def leave_out_attention_dropout(model: PreTrainedModel) -> float:
    """Switch attention dropout off; returns the largest rate that was set.

    varlen attention has no dropout, and a layer checkpointed in halves would drop other weights
    when it is recomputed. Without it, the result is the same on all hardware.
    """
    dropped = 0.0
    holder: Any
    for holder in (*model.modules(), model.config.get_text_config()):
        for name in ATTENTION_DROPOUT:
            share = getattr(holder, name, None)
            if isinstance(share, torch.nn.Dropout):
                dropped, share.p = max(dropped, share.p), 0.0
            elif isinstance(share, float):
                dropped = max(dropped, share)
                setattr(holder, name, 0.0)
    return dropped


def apply_liger(model: PreTrainedModel) -> None:
    """Let `model` use what Liger has for its family, but not Liger's loss.

    A mixture of experts keeps its own SwiGLU: Liger's comes with experts that read dense weights.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    if importlib.util.find_spec("liger_kernel.backends"):
        from liger_kernel.backends import set_impl

        # Where CUTLASS is installed, as with FlashAttention 4, Liger would take a rotary embedding
        # that is compiled anew for every number of tokens.
        set_impl("nvidia-triton")
    # Of the rest Liger's defaults hold: some families raise an error if asked for what they lack.
    parts = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    if expert_stacks(model):
        parts["swiglu"] = False
    _apply_liger_kernel_to_instance(model=model, **parts)


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

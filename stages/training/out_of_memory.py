"""Explains running out of GPU memory: the parts, the prediction of plan, and what to change."""

from pathlib import Path

import torch

from stages.shared.outputs import GB, read_json
from stages.shared.params import Params
from stages.shared.placement import Prediction
from stages.shared.process import StageError
from stages.training.paged import state_bytes
from stages.training.probe import ADAM_BYTES, needs_probe
from stages.training.trainer import Trainer

PLAN = Path("metrics/plan.json")


def no_memory_for_base(prediction: Prediction | None) -> StageError:
    """The GPU ran out of memory while loading the base."""
    return StageError(
        f"out of GPU memory{of_the_card()} while the base model was loaded; "
        f"{predicted(prediction)}; set quantize.type: nf4 or use a smaller base, or see with "
        "nvidia-smi what else uses the GPU"
    )


def no_memory_for_step(
    trainer: Trainer | None, base_bytes: int, params: Params, prediction: Prediction | None
) -> StageError:
    """The GPU ran out of memory in training, or before there was a `trainer`.

    base_bytes  bytes of the model as loaded
    """
    peak = torch.cuda.max_memory_allocated()
    parts = {"base model": base_bytes}
    if trainer:
        parts = {"base model": base_bytes + trainer.dense_bytes, **trained_parts(trainer)}
    rest = max(0, peak - sum(parts.values()))
    if trainer:
        # Managed memory is not the allocator's.
        parts |= {"paged optimizer, besides": state_bytes(trainer.optimizer)[1]}
    parts |= {"activations and the rest": rest}
    listed = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    return StageError(
        f"out of GPU memory{of_the_card()} with {peak / GB:.2f} GB allocated ({listed}); "
        f"{predicted(prediction)}; {cheaper(params)}"
    )


def trained_parts(trainer: Trainer) -> dict[str, int]:
    """Allocated bytes of adapter, gradients and optimizer."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    own, paged = state_bytes(trainer.optimizer)
    made = own + paged or trainer.args.optim.startswith("paged")
    if not made and needs_probe(trainer.train_dataset):
        # Reserved by the probe.
        own = ADAM_BYTES * sum(p.numel() for p in trained)
    return {
        "adapter": sum(p.nbytes for p in trained),
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "optimizer": own,
    }


def of_the_card() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    return f" of {total / GB:.1f} GB, of which other processes and CUDA use {others / GB:.1f},"


def predicted(prediction: Prediction | None) -> str:
    """The prediction for the placement, else that of plan, which may be missing."""
    if prediction:
        return (
            f"predicted were {prediction.peak / GB:.2f} GB, and {prediction.device / GB:.2f} "
            "GB with CUDA's own"
        )
    if not PLAN.exists():
        return "plan left no prediction"
    plan = read_json(PLAN)
    return (
        f"plan predicted {plan['predicted_peak_vram_gb']:.2f} GB, and "
        f"{plan['predicted_device_gb']:.2f} GB with CUDA's own"
    )


def cheaper(params: Params) -> str:
    """The parameter to change first."""
    train, first = params.train, ""
    if train.batch_size > 1:
        first = f"lower train.batch_size (now {train.batch_size})"
        first += " and raise train.gradient_accumulation accordingly"
    elif train.gradient_checkpointing is False:
        first = "set train.gradient_checkpointing: auto"
    elif params.lora.dropout:
        first = "set lora.dropout: 0"
    elif not train.optimizer.startswith("paged"):
        first = "set train.optimizer: paged_adamw_8bit"
    else:
        first = "lower prepare.max_length or use a smaller base"
    return f"{first}, or set plan.vram_limit_gb to the card's size and let plan choose"

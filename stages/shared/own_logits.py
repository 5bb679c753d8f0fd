"""The model's own logits of two short rows, the reference for every faster path."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from transformers import PreTrainedModel

from stages.shared.experts import OWN_CODE, expert_stacks
from stages.shared.process import StageError
from stages.shared.scoring import head
from stages.shared.text_model import kept_in_float32

# Tokens of the two rows, different so that one is padded.
LENGTHS = (24, 17)
# Allowed difference of logits, relative to their size, by compute type. Rounding to bfloat16 adds
# up to some hundredths in a deep model; attention across rows, a missing scale or a wrong product
# changes tenths or more (tests/test_gpu.py).
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def short_rows(rows: list[list[int]]) -> list[list[int]]:
    """The beginnings of two rows of token ids; twice the same if there is one row."""
    return [
        row[:length] for row, length in zip(islice(cycle(rows), len(LENGTHS)), LENGTHS, strict=True)
    ]


@contextmanager
def as_trained(model: torch.nn.Module, gradients: bool = False) -> Iterator[torch.device]:
    """Products in the type that training has them in; gives the device.

    On a GPU every token has the same experts: rounded otherwise, a router chooses others, and what
    is compared here is everything but its choice.

    gradients  from the embeddings on, as with checkpointing: for products without, bitsandbytes
               has other kernels, which training does not use
    """
    device = next(model.parameters()).device
    gpu = device.type == "cuda"
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=gpu))
        if gpu:
            stack.enter_context(same_experts(model))
        if gradients:
            embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
            stack.enter_context(
                # A copy, since some families change it in place.
                embeddings.register_forward_hook(lambda *args: args[2].requires_grad_().clone())
            )
        yield device


@contextmanager
def same_experts(model: torch.nn.Module) -> Iterator[None]:
    """Let the first experts of every layer of `model` compute each token, the first with the
    largest weight that the router gave any: that changes little with rounding.

    With equal weights where a bias takes part in the choice: the largest of the biased scores are
    not the largest weights.
    """
    biased = bool(kept_in_float32(model))  # type: ignore[arg-type]  # asked for attributes alone

    def choose(_module, args):
        hidden, chosen, weights, *rest = args
        first = torch.arange(chosen.shape[-1], device=chosen.device).expand_as(chosen)
        equal = torch.full_like(weights, 1 / chosen.shape[-1])
        return hidden, first, equal if biased else weights.sort(-1, descending=True)[0], *rest

    routed = [m for m in expert_stacks(model).values() if type(m).__name__ not in OWN_CODE]
    hooks = [module.register_forward_pre_hook(choose) for module in routed]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logits_alone(
    model: torch.nn.Module, rows: list[list[int]], gradients: bool = False
) -> torch.Tensor:
    """The model's own logits of each row by itself, concatenated: [tokens, vocabulary].

    gradients  as of as_trained
    """
    with as_trained(model, gradients) as device:
        ids = [torch.tensor([row], device=device) for row in rows]
        logits = [model(input_ids=x, use_cache=False).logits[0].detach().float() for x in ids]
    return torch.cat(logits)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Difference of two tensors, relative to the spread of `expected`; infinite if one is NaN."""
    spread = (expected - expected.mean()).norm()
    share = float((found - expected).norm() / spread.clamp(min=1e-30))
    return share if share == share else float("inf")


def rounding(model: PreTrainedModel) -> float:
    """The `difference` that rounding may cause."""
    exact = model.device.type == "cpu" and model.dtype == torch.float32
    return ROUNDING[torch.float32 if exact else torch.bfloat16]


def check_head(model: PreTrainedModel, rows: list[list[int]]) -> None:
    """Raise StageError if the logits of scoring (stages/shared/scoring.py) are not the model's."""
    rows = short_rows(rows)
    if found := fault(lambda: _by_head(model, rows), logits_alone(model, rows), rounding(model)):
        raise StageError(
            f"{model.config.model_type}: scoring does not reproduce the model's logits ({found}); "
            "choose another base model"
        )


def _by_head(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    with as_trained(model) as device:
        ids = [torch.tensor([row], device=device) for row in rows]
        hidden = [model.base_model(input_ids=x, use_cache=False).last_hidden_state[0] for x in ids]
        return torch.cat([head(model, x).float() for x in hidden])


def fault(compute: Callable[[], torch.Tensor], expected: torch.Tensor, limit: float) -> str | None:
    """What is wrong with the result of `compute`, if it differs by more than `limit`."""
    if not expected.isfinite().all():
        # If the model itself returns NaN, training and scoring report it better.
        return None
    try:
        share = difference(compute(), expected)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the code of a family may raise anything
        return " ".join(f"{type(error).__name__}: {error}"[:200].split())
    return None if share <= limit else f"they differ by {share:.2g} of their size"

"""Checks on two short rows, before training starts, that it computes the model's own logits.

It uses the real weights, device and kernels, so it finds what no list of families can. If a slower
method is correct, that is used instead, and a message says so. The check changes nothing that is
trained and draws no random numbers.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from stages.shared.fast_path import VARLEN, FastPath
from stages.shared.own_logits import (
    as_trained,
    check_head,
    fault,
    logits_alone,
    rounding,
    short_rows,
)
from stages.shared.process import StageError


class Trial:
    """Made from a base model as loaded and the training rows.

    Raises StageError if varlen attention differs from transformers'.
    """

    def __init__(self, model: PreTrainedModel, rows: Dataset):
        self.rows = short_rows(rows[:2]["input_ids"])
        self.family, self.limit = model.config.model_type, rounding(model)
        attention = model.config._attn_implementation
        if attention == VARLEN:
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        self.own = logits_alone(model, self.rows, gradients=True)
        if attention == VARLEN:
            model.set_attn_implementation(VARLEN)
            if found := self._fault(lambda: logits_alone(model, self.rows, True), self.own):
                raise StageError(
                    f"train.attention: with varlen, {self.family} does not give the logits that it "
                    f"has with transformers' attention ({found}); set sdpa"
                )
        check_head(model, self.rows)

    def batches(self, model: PreTrainedModel, fast: FastPath, packing: bool) -> FastPath:
        """`fast`, with padding if the model would attend across concatenated rows.

        Raises StageError if it would attend across packed or padded rows.
        """
        flat = packing or fast.padding_free
        if not (found := self._fault(lambda: _together(model, self.rows, flat), self.own)):
            return fast
        if packing:
            raise StageError(
                f"train.batching: packed rows of {self.family} do not give the logits of each row "
                f"alone ({found}); set group_by_length"
            )
        if not flat:
            raise StageError(
                f"padded rows of {self.family} do not give the logits of each row alone ({found}); "
                "set train.batch_size: 1, or choose another base model"
            )
        print(
            f"train: concatenated rows of {self.family} do not give the logits of each row alone "
            f"({found}); they are padded instead, which needs more time and memory"
        )
        return self.batches(model, replace(fast, padding_free=False), packing)

    def fused_head(self, causal: torch.nn.Module) -> bool:
        """Whether trl's output head gives the same results as the model's own."""
        chances = self.own.log_softmax(-1)
        after, start = [], 0
        for row in self.rows:
            following = torch.tensor(row[1:], dtype=torch.long, device=chances.device)[:, None]
            after.append(chances[start : start + len(row) - 1].gather(1, following)[:, 0])
            start += len(row)
        found = self._fault(lambda: _fused_chances(causal, self.rows), torch.cat(after))
        if found:
            print(
                f"train: trl's output head does not give the logits of {self.family} ({found}); "
                "the model's own is used, which needs more memory than plan says"
            )
        return not found

    def fused_layers(self, model: PeftModel, fuse: Callable[[], Any]) -> bool:
        """Fuse the layers of `model`; returns whether they give the outputs of PEFT's layers. If
        not, those are restored."""
        before = {module: vars(module).get("forward") for module in model.modules()}
        with _random_updates(model):
            expected = logits_alone(model, self.rows, gradients=True)
            fuse()
            found = self._fault(lambda: _trained_once(model, self.rows), expected)
            model.zero_grad(set_to_none=True)
        if found:
            for module, forward in before.items():
                vars(module).pop("forward", None)
                if forward is not None:
                    module.forward = forward
            print(
                f"train: the fused layers do not give the outputs of PEFT's for {self.family} "
                f"({found}); PEFT's are used, which are slower and need more memory than plan says"
            )
        return not found

    def _fault(self, compute: Callable[[], torch.Tensor], expected: torch.Tensor) -> str | None:
        """How the result of `compute` differs from `expected`; None if it agrees."""
        return fault(compute, expected, self.limit)


def _together(model: PreTrainedModel, rows: list[list[int]], flat: bool) -> torch.Tensor:
    """Logits of rows in one batch, in the order of logits_alone."""
    batch = DataCollatorForLanguageModeling(pad_token_id=rows[0][0], padding_free=flat)(
        [{"input_ids": row} for row in rows]
    )
    del batch["labels"]
    with as_trained(model, gradients=True) as device:
        inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
        logits = model(**inputs, use_cache=False).logits.detach()
    if flat:
        return logits[0].float()
    return torch.cat([of_row[: len(row)] for of_row, row in zip(logits, rows, strict=True)]).float()


def _fused_chances(causal: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """Log-probabilities, by trl's head, of all tokens of the rows but the first of each."""
    found = []
    with as_trained(causal, gradients=True) as device:
        for row in rows:
            ids = torch.tensor([row], device=device)
            output: Any = causal(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True)
            found.append(output.log_probs[0].detach().float())
    return torch.cat(found)


def _trained_once(model: PeftModel, rows: list[list[int]]) -> torch.Tensor:
    """Like logits_alone, with a backward pass, which fails in the code of some families."""
    found = []
    with as_trained(model, gradients=True) as device:
        for row in rows:
            logits = model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0]
            logits.float().sum().backward()
            found.append(logits.detach().float())
    return torch.cat(found)


@contextmanager
def _random_updates(model: PeftModel) -> Iterator[None]:
    """Fill every B so that adapters contribute to the outputs as much as their base layers.

    PEFT initializes B with zeros, which are restored.
    """
    modules: list[Any] = list(model.modules())
    # Experts are not fused, so their adapters are left as they are.
    wrappers = {module for module in modules if isinstance(module, ParamWrapper)}
    layers = [m for m in modules if isinstance(m, LoraLayer) and m not in wrappers]
    halves = [(m.lora_B.get_parameter("default.weight"), m.scaling["default"]) for m in layers]
    for b, scaling in halves:
        draw = torch.Generator(b.device).manual_seed(0)
        b.data.normal_(0, 1 / (scaling * math.sqrt(b.shape[1])), generator=draw)
    try:
        yield
    finally:
        for b, _ in halves:
            b.data.zero_()

"""Does training compute what the model itself computes? Tried on two short rows before it begins.

With the real weights, on the real device, by the real kernels: it finds what no list of families
can. Where there is a slower way that is right, that is taken, and said. Nothing that is trained is
changed by it, and no random number drawn.
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
    """Made of a base model as it was loaded; `rows` are those of training.

    Raises StageError where its attention is not that of transformers.
    """

    def __init__(self, model: PreTrainedModel, rows: Dataset):
        self.rows = short_rows(rows[:2]["input_ids"])
        self.family, self.limit = model.config.model_type, rounding(model)
        attention = model.config._attn_implementation
        if attention == VARLEN:
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        self.own = logits_alone(model, self.rows)
        if attention == VARLEN:
            model.set_attn_implementation(VARLEN)
            if found := self._fault(lambda: logits_alone(model, self.rows), self.own):
                raise StageError(
                    f"train.attention: varlen does not have the logits of {self.family} with that "
                    f"of transformers ({found}); set sdpa"
                )
        check_head(model, self.rows)

    def batches(self, model: PreTrainedModel, fast: FastPath, packing: bool) -> FastPath:
        """`fast`, with padding where rows laid behind each other would not keep apart.

        Raises StageError for packs of them, and where rows that are padded do not keep apart.
        """
        flat = packing or fast.padding_free
        if not (found := self._fault(lambda: _together(model, self.rows, flat), self.own)):
            return fast
        if packing:
            raise StageError(
                f"train.batching: packed rows of {self.family} do not have the logits of each row "
                f"alone ({found}); set group_by_length"
            )
        if not flat:
            raise StageError(
                f"padded rows of {self.family} do not have the logits of each row alone ({found}); "
                "set train.batch_size: 1, or choose another base model"
            )
        print(
            f"train: rows of {self.family} that lie behind each other do not have the logits of "
            f"each row alone ({found}); they are padded, which takes longer and more memory"
        )
        return self.batches(model, replace(fast, padding_free=False), packing)

    def fused_head(self, causal: torch.nn.Module) -> bool:
        """Whether trl's output head gives what the model's own does."""
        chances = self.own.log_softmax(-1)
        after, start = [], 0
        for row in self.rows:
            following = torch.tensor(row[1:], dtype=torch.long, device=chances.device)[:, None]
            after.append(chances[start : start + len(row) - 1].gather(1, following)[:, 0])
            start += len(row)
        found = self._fault(lambda: _fused_chances(causal, self.rows), torch.cat(after))
        if found:
            print(
                f"train: trl's output head does not have the logits of {self.family} ({found}); "
                "its own is taken, with more memory than plan says"
            )
        return not found

    def fused_layers(self, model: PeftModel, fuse: Callable[[], Any]) -> bool:
        """Fuse the layers of `model`; whether they give what PEFT's do. If not, PEFT's are back."""
        before = {module: vars(module).get("forward") for module in model.modules()}
        with _random_updates(model):
            # With gradients too: bitsandbytes has other kernels for products without.
            expected = _with_gradients(model, self.rows, backward=False)
            fuse()
            found = self._fault(lambda: _with_gradients(model, self.rows, backward=True), expected)
            model.zero_grad(set_to_none=True)
        if found:
            for module, forward in before.items():
                vars(module).pop("forward", None)
                if forward is not None:
                    module.forward = forward
            print(
                f"train: the fused layers do not have the outputs of PEFT's for {self.family} "
                f"({found}); PEFT's are taken, which are slower and take more memory than plan says"
            )
        return not found

    def _fault(self, compute: Callable[[], torch.Tensor], expected: torch.Tensor) -> str | None:
        """What is wrong with what `compute` gives."""
        return fault(compute, expected, self.limit)


def _together(model: PreTrainedModel, rows: list[list[int]], flat: bool) -> torch.Tensor:
    """Logits of rows in one batch, in the order of logits_alone."""
    batch = DataCollatorForLanguageModeling(pad_token_id=rows[0][0], padding_free=flat)(
        [{"input_ids": row} for row in rows]
    )
    del batch["labels"]
    with as_trained(model) as device:
        inputs = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
        logits = model(**inputs, use_cache=False).logits
    if flat:
        return logits[0].float()
    return torch.cat([of_row[: len(row)] for of_row, row in zip(logits, rows, strict=True)]).float()


def _fused_chances(causal: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the rows' tokens but the first of each, by trl's head."""
    found = []
    with as_trained(causal) as device:
        for row in rows:
            ids = torch.tensor([row], device=device)
            output: Any = causal(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True)
            found.append(output.log_probs[0].float())
    return torch.cat(found)


def _with_gradients(model: PeftModel, rows: list[list[int]], backward: bool) -> torch.Tensor:
    """As logits_alone, computed as in training; `backward` runs the backward pass too, which some
    code of families does not bear."""
    found = []
    # As checkpointing has it: otherwise the first products are computed without gradients.
    learns = model.get_input_embeddings().register_forward_hook(
        lambda *args: args[2].requires_grad_()
    )
    try:
        for row in rows:
            with as_trained(model) as device, torch.enable_grad():
                ids = torch.tensor([row], device=device)
                logits = model(input_ids=ids, use_cache=False).logits[0]
                if backward:
                    logits.float().sum().backward()
            found.append(logits.detach().float())
    finally:
        learns.remove()
    return torch.cat(found)


@contextmanager
def _random_updates(model: PeftModel) -> Iterator[None]:
    """Give every adapter a part in the outputs as large as its base's: with B at zero it has none.

    PEFT begins with zeros, and zeros are put back.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    halves = [(m.lora_B.get_parameter("default.weight"), m.scaling["default"]) for m in layers]
    for b, scaling in halves:
        draw = torch.Generator(b.device).manual_seed(0)
        b.data.normal_(0, 1 / (scaling * math.sqrt(b.shape[1])), generator=draw)
    try:
        yield
    finally:
        for b, _ in halves:
            b.data.zero_()

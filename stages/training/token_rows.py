"""Trains single rows of the embeddings and the output head, with memory for those rows alone.

PEFT inserts them into a copy of the whole matrix in each pass, and autograd makes a gradient of all
of it: several times the matrix. Here the frozen matrix contains the current rows, so that every
product is the model's own. The rows' contribution is added once more as zero, `x - x.detach()`,
which has their gradient.
"""

from typing import Any

import torch
import trl.trainer.utils
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch.nn import functional

LogProbs = trl.trainer.utils._ChunkedLogProbFunction


class Rows:
    """The trained rows of one matrix. `wrapper`: PEFT's module around embeddings or head."""

    def __init__(self, wrapper: Any):
        self.adapter, self.module = wrapper.token_adapter, wrapper.original_module
        ids = self.adapter.token_indices["default"]
        self.ids = torch.tensor(ids, device=self.weight.device)
        # Which of them a token's is, -1 for none.
        self.place = torch.full((len(self.weight),), -1, device=self.weight.device)
        self.place[self.ids] = torch.arange(len(ids), device=self.weight.device)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen matrix, [vocabulary, width]."""
        return self.module.weight

    @property
    def values(self) -> torch.Tensor:
        """The trained rows, [rows, width] in float32."""
        return self.adapter.trainable_tokens_delta["default"]

    def settle(self) -> None:
        """Copy the current rows into the matrix."""
        self.weight.data.index_copy_(0, self.ids, self.values.detach().to(self.weight.dtype))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The embeddings of `tokens`."""
        found, at = self.module(tokens), self.place[tokens]
        own = functional.embedding(at.clamp(min=0), self.values)
        if (scale := self.adapter._get_embed_scale()) is not None:
            own = own * scale
        own = own.to(found.dtype)
        return found + torch.where(at[..., None] >= 0, own - own.detach(), 0)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, as the head gives them."""
        logits, own = self.module(hidden), self.products(hidden)
        return logits.index_add(-1, self.ids, (own - own.detach()).to(logits.dtype))

    def products(self, hidden: torch.Tensor) -> torch.Tensor:
        """Products of hidden states and rows, [..., rows], with a gradient for the rows."""
        return functional.linear(hidden.detach(), self.values.to(hidden.dtype))


class LogProbsOfRows:
    """trl's log-probabilities, with a gradient for the rows of the head's matrix."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk, cap, scale, outputs):
        """trl's arguments: hidden states [N, width], targets [N]."""
        options = (temperature, chunk, cap, scale, outputs)
        found, *others = LogProbs.apply(hidden, weight, bias, targets, *options)
        rows: Rows | None = getattr(weight, "rows", None)
        if rows is None:  # Of another model of this process.
            return found, *others

        def logits(products: torch.Tensor) -> torch.Tensor:
            capped = products.float() * scale
            capped = cap * torch.tanh(capped / cap) if cap else capped
            return capped / temperature

        own, at = logits(rows.products(hidden)), rows.place[targets]
        with torch.no_grad():
            chosen = torch.einsum("nh,nh->n", hidden.to(weight.dtype), weight[targets])
            chances = torch.exp(own - (logits(chosen) - found)[:, None])
        learned = torch.where(at >= 0, own.gather(1, at.clamp(min=0)[:, None])[:, 0], 0)
        zero = learned - (chances * own).sum(1)
        return found + (zero - zero.detach()), *others


def train_rows(model: PeftModel) -> None:
    """Make PEFT's wrappers in `model`, if any, compute as above."""
    causal: Any = model.get_base_model()
    wrappers = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    if not isinstance(wrappers[0], TrainableTokensWrapper):
        return
    rows = [Rows(wrapper) for wrapper in wrappers]

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        # Of the head as well: trl's does not call it.
        for each in rows:
            each.settle()
        return rows[0].embed(tokens)

    for wrapper, each, forward in zip(wrappers, rows, (embed, rows[1].project), strict=True):
        wrapper.forward = forward
        # Not as a parameter of the wrapper, which would be saved.
        vars(wrapper).update(weight=each.weight, bias=getattr(each.module, "bias", None))
    # An attribute of the tensor, which is all of the head that trl passes on.
    rows[1].weight.rows = rows[1]  # type: ignore[attr-defined]
    setattr(trl.trainer.utils, "_ChunkedLogProbFunction", LogProbsOfRows)  # noqa: B010
    # Or a checkpoint would hold the whole of embeddings that were extended.
    model.peft_config["default"].base_model_name_or_path = ""

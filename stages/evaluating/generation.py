"""Greedy answers to prompts in batches of similar length, with a KV cache of bounded size.

With streamed weights, each new token of a batch streams all of them once, so batches are as large
as memory allows: long prompts are read in chunks, each of which takes another pass.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from peft import PeftModel
from transformers import GenerationConfig

from stages.shared.fitting import Scored
from stages.shared.outputs import GB
from stages.shared.params import Evaluate
from stages.shared.streaming import Streamer
from stages.shared.text_model import head_size, number_of, positions_of

# KV cache of one batch. The longest prompts come first, so that running out of memory shows early.
CACHE_BYTES = {"cuda": 2**31, "cpu": 2**29}
# Padded prompt tokens of one batch (prefill).
PROMPT_TOKENS = 16384
# Tokens of each prompt in the smallest chunk with streamed weights.
CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """An answer: its text, its tokens before the end token, and whether there was an end token."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Resident:
    """A resident model, whose KV cache may have `cached` tokens."""

    cached: int

    def batches(self, lengths: list[int], limit: int) -> list[int]:
        """Sizes of batches of prompts, whose lengths fall, with answers of `limit` tokens. A batch
        has at least one prompt."""
        found, longest = list[int](), 0
        for length in lengths:
            rows = found[-1] + 1 if found else 0
            if rows and rows * longest <= PROMPT_TOKENS and rows * (longest + limit) <= self.cached:
                found[-1] = rows
            else:
                found.append(1)
                longest = length
        return found


@dataclass(frozen=True)
class Room:
    """The streamer of a model with `sizes`, and what fits in the memory that scoring used and in
    what is left beside it.

    in_chunks  prompts can be read in chunks: all that a layer remembers is in the KV cache
    """

    streamer: Streamer
    sizes: Scored
    in_chunks: bool = True

    def batches(self, lengths: list[int], limit: int) -> list[int]:
        """Like Resident.batches: the sizes that stream the weights least often."""
        splits, count = [], len(lengths)
        for parts in range(1, count + 1):
            bounds = [count * i // parts for i in range(parts + 1)]
            sizes = [b - a for a, b in pairwise(bounds)]
            widths = [lengths[a] for a in bounds[:-1]]
            rows = list(zip(sizes, widths, strict=True))
            if parts == count or all(self._fits(*each, limit) for each in rows):
                splits.append((sum(self.passes(*each, limit) for each in rows), parts, sizes))
        return min(splits)[2] if splits else []

    def _fits(self, rows: int, width: int, limit: int) -> bool:
        """Whether `rows` prompts of `width` tokens and their answers fit at once."""
        smallest = min(width, CHUNK_TOKENS) if self.in_chunks else width
        return rows * smallest <= self._computed(rows, width, limit)

    def chunk(self, rows: int, width: int, limit: int) -> int:
        """Tokens of each prompt to read at once."""
        fitting = int(self._computed(rows, width, limit) / rows)
        return min(width, max(fitting, CHUNK_TOKENS)) if self.in_chunks else width

    def passes(self, rows: int, width: int, limit: int) -> int:
        """How often the weights are streamed at most."""
        return math.ceil(width / self.chunk(rows, width, limit)) + limit - 1

    def _computed(self, rows: int, width: int, limit: int) -> float:
        """Tokens that can be computed at once beside the KV cache."""
        free = self.streamer.room + self.sizes.working - self.sizes.dequantized
        return (free - rows * (width + limit) * self.sizes.cached) / self.sizes.token


def answering_bytes(sizes: Scored, sets: dict[str, list[dict]], params: Evaluate) -> float:
    """Bytes of the largest batch of answers, with resident weights."""
    longest = max(row["prompt_tokens"] for rows in sets.values() for row in rows)
    prompts = params.samples * longest
    cached = (prompts + params.samples * params.max_answer_tokens) * sizes.cached
    working = min(prompts, PROMPT_TOKENS) * sizes.token + sizes.dequantized
    return working + min(cached, CACHE_BYTES["cuda"])


def forecast(prompts: list[list[int]], limit: int, room: Room) -> str:
    """How long answering takes at most with streamed weights, and what would shorten it."""
    batches = _batches(prompts, room, limit)
    seconds = room.streamer.pass_seconds()

    def minutes(rows: int, width: int) -> float:
        """For the answers of both models."""
        return 2 * seconds / 60 * room.passes(rows, width, limit)

    each = [minutes(len(batch), len(prompts[batch[0]])) for batch in batches]
    one = minutes(1, len(prompts[batches[0][0]]))
    size = room.streamer.bytes / GB
    said = (
        f"{len(prompts)} prompts are answered {len(batches[0])} at once; each token streams "
        f"{size:.1f} GB in about {seconds:.2g} s: at most {sum(each):.3g} minutes for "
        f"{limit} tokens of both models; "
    )
    if len(batches) > 1:
        return said + f"evaluate.samples: {len(batches[0])} would take at most {each[0]:.3g}"
    if one < each[0]:
        return said + f"evaluate.samples: 1 would take at most {one:.3g}"
    return said + "fewer samples take as long, evaluate.samples: 0 none"


def answers(
    model,
    tokenizer,
    prompts: list[list[int]],
    ends: list[int],
    limit: int,
    room: Room | None = None,
) -> list[Answer]:
    """Greedy answers to `prompts` (token ids), in their order.

    An answer ends with one of `ends` or after `limit` tokens. `room` is given for a model with
    streamed weights.
    """
    # The adapter's layers are inside the base model; PEFT's wrapper adds only its own defaults.
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    found: dict[int, Answer] = {}
    for batch in _batches(prompts, room or Resident(_cached_tokens(causal)), limit):
        chunk = room.chunk(len(batch), len(prompts[batch[0]]), limit) if room else None
        written = _generate(causal, [prompts[i] for i in batch], ends, limit, chunk)
        for i, ids in zip(batch, written, strict=True):
            end = next((at for at, token in enumerate(ids) if token in ends), None)
            text = tokenizer.decode(ids[:end], skip_special_tokens=True)
            found[i] = Answer(text, len(ids[:end]), end is not None)
    return [found[i] for i in range(len(prompts))]


def _batches(prompts: list[list[int]], room: Resident | Room, limit: int) -> list[list[int]]:
    """Indices of `prompts` in batches, longest first."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    sizes = room.batches([len(prompts[i]) for i in order], limit)
    ends = list(accumulate(sizes))
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _cached_tokens(model) -> int:
    """Tokens that fit the KV cache, assuming standard attention heads."""
    config = model.config.get_text_config()
    heads = number_of(config, "num_key_value_heads") or config.num_attention_heads
    width = head_size(config, model)
    size = torch.finfo(model.get_output_embeddings().weight.dtype).bits // 8
    return CACHE_BYTES[model.device.type] // (2 * config.num_hidden_layers * heads * width * size)


@torch.no_grad()
def _generate(
    model, prompts: list[list[int]], ends: list[int], limit: int, chunk: int | None
) -> list[list[int]]:
    """New token ids for each prompt, padded after the end token.

    chunk  tokens of each prompt to read at once; None: all
    """
    width = max(map(len, prompts))
    if positions := positions_of(model.config):
        limit = max(1, min(limit, positions - width))
    # Any token will do: the mask hides it, and everything after an end token is cut off.
    pad = ends[0] if ends else 0
    # Generation continues on the right, so prompts are padded on the left.
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    greedy = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad,
        prefill_chunk_size=chunk if chunk and chunk < width else None,
    )
    # The model's own config would fill in unset options, such as a repetition penalty.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=greedy,
        )
    finally:
        model.generation_config = own
    return output[:, width:].tolist()

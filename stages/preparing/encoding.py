"""Rows as token ids, the same as at inference, with a mask of the learned tokens.

Prompt and answer are tokenized separately, so that the ids of a prompt at inference are a prefix
of the row, whatever the tokenizer would merge across the boundary. Rendered text is encoded
without special tokens, since the template writes them; only raw text gets its BOS from the
tokenizer. Labels come from character spans, not from token ids, so the pad token may equal the end
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.preparing.formats import Example
from stages.preparing.messages import Unusable
from stages.preparing.rendering import Rendered, Renderer
from stages.shared.opening import MAX_ROW_BYTES
from stages.shared.params import Prepare


@dataclass(frozen=True)
class Encoded:
    """One row: `ids` int32 [T], `learned` bool [T] (False at 0, which is not predicted).

    `part` counts the parts of a split row from 0. `prompt_tokens` is 0 if nothing can be asked.
    """

    ids: np.ndarray
    learned: np.ndarray
    prompt_tokens: int
    scored_bytes: int
    truncated: bool
    part: int


def _of_bearable_size(row: Rendered | Unusable) -> Rendered | Unusable:
    """`row`, or Unusable if the template made it absurdly large."""
    if isinstance(row, Unusable) or len(row.prompt) + len(row.answer) <= 2 * MAX_ROW_BYTES:
        return row
    return Unusable(
        "template",
        f"the template expands it to {(len(row.prompt) + len(row.answer)) / 1e6:.0f} MB: set "
        "another prepare.template",
    )


class Encoder:
    """Examples to rows of token ids."""

    def __init__(self, tokenizer, params: Prepare):
        """`tokenizer` has passed through `settle`; reads loss_on, max_length, too_long."""
        self.tokenizer, self.loss_on = tokenizer, params.loss_on
        self.max_length, self.too_long = params.max_length, params.too_long
        self.renderer = Renderer(tokenizer, params.loss_on)
        self.backend = tokenizer.backend_tokenizer
        self.end_ids = {tokenizer.convert_tokens_to_ids(t) for t in self.renderer.template.special}
        # Sentencepiece models put a space before any text, hence also before a separate answer.
        self.anchor, joined, alone = self._ids(["\n", "\nx", "x"])
        self.dummy_space = joined != self.anchor + alone

    def encode(self, examples: list[Example]) -> list[list[Encoded] | Unusable]:
        """The rows of each example (several with too_long: split), or the reason to drop it."""
        rendered = [_of_bearable_size(row) for row in self.renderer.render(examples)]
        whole = [r for r in rendered if isinstance(r, Rendered)]
        prompts = self._ids([r.prompt for r in whole])
        pairs = iter(zip(prompts, self._answer_ids(whole, prompts), strict=True))
        return [r if isinstance(r, Unusable) else self._rows(r, *next(pairs)) for r in rendered]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _answer_ids(self, rows: list[Rendered], prompts: list[list[int]]) -> list[list[int]]:
        """Ids of the answers as continuations of the prompts."""
        if not self.dummy_space:
            return self._ids([row.answer for row in rows])
        made = []
        whole = self._ids([row.prompt + row.answer for row in rows])
        for row, prompt, both in zip(rows, prompts, whole, strict=True):
            if row.raw:
                made.append(self._ids([row.answer])[0])
            elif both[: len(prompt)] == prompt:
                made.append(both[len(prompt) :])
            else:
                after = self._ids(["\n" + row.answer])[0]
                # Empty, and so refused, if the tokenizer merges even the anchor.
                made.append(
                    after[len(self.anchor) :] if after[: len(self.anchor)] == self.anchor else []
                )
        return made

    def _rows(self, row: Rendered, prompt: list[int], answer: list[int]) -> list | Unusable:
        ids = np.array(prompt + answer, np.int32)
        if not answer or answer[-1] not in self.end_ids:
            return Unusable(
                "template", f"its tokens do not end with {row.end!r}: set another prepare.template"
            )
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            return Unusable(
                "template", "begins with BOS twice: remove it from the template or from the text"
            )
        learned = np.zeros(len(ids), bool)
        learned[len(prompt) :] = row.learned
        learned[: len(prompt)] = self.loss_on == "all"
        if row.spans:
            begins, ends = self._bounds(row.prompt)
            for start, end in row.spans:
                inside = (begins >= start) & (ends <= end) & (begins < ends)
                learned[: len(prompt)][inside] = self.loss_on != "all"
        asked = len(prompt) if prompt != [self.tokenizer.bos_token_id] else 0
        return self._fit(row, ids, learned, asked)

    def _bounds(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of each token of `text`, int [T]; special tokens without the white space
        that lstrip or rstrip adds to them (Phi 3)."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        begins, ends = np.array(encoding.offsets).T
        for i in np.flatnonzero(np.isin(encoding.ids, list(self.end_ids))):
            mark = text[begins[i] : ends[i]]
            begins[i] += len(mark) - len(mark.lstrip())
            ends[i] -= len(mark) - len(mark.rstrip())
        return begins, ends

    def _fit(self, row: Rendered, ids, learned, prompt_tokens: int) -> list | Unusable:
        """The row cut to max_length by too_long. Only the last part has the end token."""
        length, most = len(ids), self.max_length
        if length <= most:
            starts: Sequence[int] = [0]
        elif self.too_long in ("drop", "error"):
            return Unusable(
                "too_long",
                f"{length} tokens, prepare.max_length is {most}: raise it, or set too_long to "
                "truncate or split",
            )
        else:
            starts = [0] if self.too_long == "truncate" else range(0, length, most)
        made = []
        for number, start in enumerate(starts):
            part, mask = ids[start : start + most], learned[start : start + most].copy()
            mask[0] = False
            if mask.any():
                # A part of a prompt asks nothing, and a later part lacks the beginning of it.
                asked = prompt_tokens if not start and prompt_tokens < len(part) else 0
                words = self._scored_bytes(row, ids, part, mask)
                made.append(Encoded(part, mask, asked, words, start + most < length, number))
        return made or Unusable(
            "unlearnable",
            f"the prompt alone has {prompt_tokens} tokens, prepare.max_length is {most}: raise it",
        )

    def _scored_bytes(self, row: Rendered, ids, part, mask) -> int:
        """UTF-8 bytes of the learned text without special tokens."""
        words = part[mask].tolist()
        if (
            len(part) == len(ids)
            and self.loss_on == "completion"
            and not (row.raw or self.dummy_space)
            and self.end_ids.isdisjoint(words[:-1])
        ):
            return len(row.answer.removesuffix(row.end).encode())
        # Decoding drops the first space, which sentencepiece models add to a text and behind a
        # special token; behind another token it is text.
        at = int(mask.argmax())
        before = part[at - 1 : at].tolist() if self.dummy_space else []
        return self._bytes(before + words) - self._bytes(before)

    def _bytes(self, ids: list[int]) -> int:
        return len(self.backend.decode(ids, skip_special_tokens=True).encode())

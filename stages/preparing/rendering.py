"""The template, rendered once; the learned part, masked; token ids that inference sees too.

A row is tokenized as a person will feed it: the prompt by itself, then the answer. So the ids of
a prompt rendered at inference are the first ids of the row, whatever the tokenizer would merge
across the boundary. Rendered text is encoded without special tokens, since the template writes
them itself; only raw text gets its BOS from the tokenizer. Labels come from character spans and
never from token ids, so a pad token equal to the end token does no harm.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from stages.preparing.formats import Example, Format, Unusable, read_rendered
from stages.shared.params import Prepare
from stages.shared.process import StageError

# Templates that print today's date would make other bytes tomorrow, and a prompt at inference
# that no row begins with: the date that Llama 3 documents is written into them.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26'}.get(format, '26 Jul 2024') }}"
    "{%- endmacro -%}"
)
# Unused tokens that models ship for padding, then unk, then the end token itself.
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


# Of the rendered rows that are looked at, so many must be what the template would have written.
_MOST_WRITTEN = 0.5
_ASKED = [{"role": "user", "content": "a"}]
# Keys of a message in which models' reasoning is kept apart from the answer.
_REASONING = ("reasoning_content", "thinking")
# What a template raises about a row: raise_exception() and Python's own, as of "".index("a").
_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError)


@dataclass(frozen=True)
class Encoded:
    """One row: `ids` int32 [T], `learned` bool [T] (False at 0, which nothing predicts)."""

    ids: np.ndarray
    learned: np.ndarray
    prompt_tokens: int
    scored_bytes: int
    truncated: bool = False


def settle(tokenizer, params: Prepare, form: Format, samples: list[Example]) -> str:
    """Give `tokenizer` its pad token and what rows and inference share: template and EOS.

    Its EOS becomes the token that ends an answer: Gemma's template, for one, ends turns with
    another, and who generates until the EOS would wait for it in vain. Returns what was settled,
    in words. Raises StageError for a template that cannot serve.
    """
    if not tokenizer.is_fast:
        raise StageError("models/tokenizer: no tokenizer.json; choose a model that ships one")
    if tokenizer.eos_token is None:
        raise StageError("models/tokenizer: no EOS token, so no answer could end; set one there")
    if tokenizer.pad_token is None:
        known = tokenizer.get_vocab()
        spare = [t for t in (*_PAD_TOKENS, tokenizer.unk_token) if t in known]
        tokenizer.pad_token = (spare or [tokenizer.eos_token])[0]
    pad = f"pad token {tokenizer.pad_token}"
    if form.name == "text":
        return f"raw text, all of it learned, {pad}"
    text, said = _template(tokenizer, params, form, samples)
    if "strftime_now" in text:
        text, said = _FIXED_DATE + text, f"{said} with a fixed date"
    tokenizer.chat_template = text
    end = next(Renderer(tokenizer, params).ends(samples), tokenizer.eos_token)
    if end != tokenizer.eos_token:
        tokenizer.eos_token = end
    said = f"{said}, answers end with {end}, {pad}"
    if form.shape and form.shape.end not in tokenizer.get_vocab():
        said += (
            f"; {form.shape.end} is no token of this model and would be learned letter by letter: "
            "better bring messages or prompt and completion, which are rendered for it"
        )
    return said


def _template(tokenizer, params: Prepare, form: Format, samples: list[Example]) -> tuple[str, str]:
    template = params.template
    if form.name == "rendered":
        if form.shape is None and params.loss_on != "all":
            raise StageError(
                "no known mark of an answer in the rendered text ([/INST], <|im_start|>assistant, "
                "…); set prepare.loss_on: all, or bring columns with prompt and completion"
            )
        return _rendered_template(tokenizer, template, form, samples)
    if template.endswith(".jinja"):
        return _with_bos(
            tokenizer, _from_file(tokenizer, template), samples
        ), f"template {template}"
    if template != "chat":
        return _plain_template(tokenizer, template), "plain template"
    if not tokenizer.chat_template:
        raise StageError(
            "the tokenizer has no chat template (a base model?); set prepare.template to "
            "templates/chatml.jinja, or to plain text with {prompt} in it"
        )
    return tokenizer.get_chat_template(), "the tokenizer's chat template"


def _from_file(tokenizer, template: str) -> str:
    path = Path(template)
    if not path.is_file():
        raise StageError(f"prepare.template: no file {template}; put yours in templates/")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StageError(f"{template}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    try:
        tokenizer.apply_chat_template(_ASKED, chat_template=text, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise StageError(f"{template}:{error.lineno}: {error.message}; mend the template") from None
    except _TEMPLATE_FAULTS:
        pass  # It asks for more than this one message, and will say so of the rows.
    return text


def _with_bos(tokenizer, template: str, samples: list[Example]) -> str:
    """The template with the BOS that the tokenizer would have put before plain text."""
    for chat in samples:
        try:
            made = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        except _TEMPLATE_FAULTS:
            continue
        if _adds_bos(tokenizer) and not made.startswith(tokenizer.bos_token):
            return "{{ bos_token }}" + template
        break
    return template


def _rendered_template(
    tokenizer, template: str, form: Format, samples: list[Example]
) -> tuple[str, str]:
    """The template, of the file, the tokenizer or the shape, that writes most samples as they are.

    The text is not rendered again: the template is what prompts at inference are rendered with.
    """
    own = tokenizer.chat_template and tokenizer.get_chat_template()
    if form.shape is None:
        return own or "", "text as it stands, all of it learned"
    text = samples[0]["text"]
    opening = text[: form.shape.turn.search(text).start()]
    if not opening and _adds_bos(tokenizer) and not text.startswith(tokenizer.bos_token):
        opening = tokenizer.bos_token
    shaped = (f"{{{{ {_quoted(opening)} }}}}" if opening else "") + form.shape.template
    if template.endswith(".jinja"):
        candidates = [_from_file(tokenizer, template)]
    else:
        candidates = [own, shaped] if own else [shaped]
    count, _, chosen = max(
        (sum(_writes(tokenizer, candidate, form, sample) for sample in samples), -i, candidate)
        for i, candidate in enumerate(candidates)
    )
    if count < _MOST_WRITTEN * len(samples):
        raise StageError(
            f"the rendered text looks like {form.shape.name} and is not quite: bring the .jinja "
            "file it was rendered with in prepare.template, or columns with prompt and completion"
        )
    return chosen, f"text as it stands, in the {form.shape.name} shape"


def _writes(tokenizer, template: str, form: Format, sample: dict) -> bool:
    """Whether the template writes the sample's prompt as it stands, a BOS aside."""
    turns = read_rendered(form.shape, sample["text"])
    messages = [{"role": role, "content": content} for role, content, *_ in turns[:-1]]
    try:
        made = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except _TEMPLATE_FAULTS:
        return False
    bos = tokenizer.bos_token or ""
    prompt = sample["text"][: sample["answers"][-1][0]]
    return made.removeprefix(bos) == prompt.removeprefix(bos)


def _plain_template(tokenizer, template: str) -> str:
    """Plain text around {prompt} as a chat template; the answer never sticks to its last word."""
    before, after = template.split("{prompt}")
    after += "" if after[-1:].isspace() else "\n"
    bos = "{{ bos_token }}" if _adds_bos(tokenizer) else ""
    return (
        bos + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ m['content'] + eos_token }}{% elif m['role'] == 'system' %}"
        "{{ m['content'] + '\\n\\n' }}"
        f"{{% else %}}{{{{ {_quoted(before)} + m['content'] + {_quoted(after)} }}}}"
        "{% endif %}{% endfor %}"
    )


def _quoted(text: str) -> str:
    """`text` as a literal of Jinja, which takes JSON's escape of an emoji for two characters."""
    return json.dumps(text, ensure_ascii=False)


def _adds_bos(tokenizer) -> bool:
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


@dataclass(frozen=True)
class _Rendered:
    """A row as text: `answer` ends with `end`, `spans` are earlier answers within `prompt`.

    With `raw` nothing is rendered: the prompt is the BOS at most, and the answer is the text.
    """

    prompt: str
    answer: str
    end: str
    spans: list[tuple[int, int]]
    raw: bool


def _words(message: dict) -> str:
    """All that a template may write of a message."""
    return message["content"] if len(message) == 2 else json.dumps(message, ensure_ascii=False)


def _holds(text: str, part: str) -> bool:
    """Whether `part` is in `text`, white space aside, or in quotes as Llama 3 has tool output."""
    if part.strip() in text:
        return True
    text, quoted = "".join(text.split()), json.dumps(part, ensure_ascii=False)[1:-1]
    return any("".join(each.split()) in text for each in (part, quoted))


class Renderer:
    """Examples to rows of token ids with the learned part marked."""

    def __init__(self, tokenizer, params: Prepare):
        """A tokenizer that `settle` has seen; loss_on, max_length and too_long of `params`."""
        self.tokenizer, self.loss_on = tokenizer, params.loss_on
        self.max_length, self.too_long = params.max_length, params.too_long
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.bos = tokenizer.bos_token if _adds_bos(tokenizer) else ""
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special = tuple(sorted({*special, tokenizer.eos_token}, key=lambda t: (-len(t), t)))
        self.any_special = re.compile("|".join(map(re.escape, self.special)))
        self.end_ids = {tokenizer.convert_tokens_to_ids(token) for token in self.special}
        # Sentencepiece models put a space before any text, so before an answer by itself too.
        self.anchor, joined, alone = self._ids(["\n", "\nx", "x"])
        self.dummy_space = joined != self.anchor + alone

    def encode(self, examples: list[Example]) -> list[list[Encoded] | Unusable]:
        """The rows of each example (several with too_long: split), or why it is dropped."""
        rendered = self._render(examples)
        whole = [r for r in rendered if isinstance(r, _Rendered)]
        prompts = self._ids([r.prompt for r in whole])
        pairs = iter(zip(prompts, self._answer_ids(whole, prompts), strict=True))
        return [r if isinstance(r, Unusable) else self._rows(r, *next(pairs)) for r in rendered]

    def ends(self, examples: list[Example]) -> Iterator[str]:
        """The end token of each example that can be used."""
        return (made.end for made in self._render(examples) if isinstance(made, _Rendered))

    def _render(self, examples: list[Example]) -> list[_Rendered | Unusable]:
        refused = [self._special_in(example) for example in examples]
        chats = [
            e for e, no in zip(examples, refused, strict=True) if isinstance(e, list) and not no
        ]
        made = iter(self._render_chats(chats))
        return [
            no or (next(made) if isinstance(example, list) else self._render_text(example))
            for example, no in zip(examples, refused, strict=True)
        ]

    def _render_text(self, example: str | dict) -> _Rendered:
        if isinstance(example, str):
            return self._finish(self.bos, example, [], raw=True)
        text, answers = example["text"], example["answers"] or [[0, len(example["text"])]]
        bos = "" if text.startswith(self.bos) else self.bos
        *earlier, (start, end) = [(len(bos) + s, len(bos) + e) for s, e in answers]
        text = bos + text
        spans = earlier if self.loss_on == "assistant" else []
        return self._finish(text[:start], text[start:end], spans)

    def _special_in(self, example: Example) -> Unusable | None:
        """A mark such as <|im_end|> in somebody's words would end a turn that they did not end."""
        if isinstance(example, dict):
            return None
        texts = [example] if isinstance(example, str) else map(_words, example)
        for found in filter(None, map(self.any_special.search, texts)):
            return Unusable(
                "special_token",
                f"holds {found[0]!r}, which the model reads as a mark of its own: remove it, or "
                "set prepare.format: rendered if a template is applied already",
            )
        return None

    def _render_chats(self, chats: list[list[dict]]) -> list[_Rendered | Unusable]:
        """Whole conversations and their prompts, by the template; one by one if any fails."""
        if not chats:
            return []
        try:
            whole = self._apply(chats)
            prompts = self._apply([chat[:-1] for chat in chats], prompt=True)
        except _TEMPLATE_FAULTS as error:
            if len(chats) == 1:
                # raise_exception() in a template raises the base class.
                reason = "roles" if type(error) is jinja2.TemplateError else "template"
                said = " ".join(str(error).split())
                return [Unusable(reason, f"the template refuses it ({said}): mend the row")]
            return [self._render_chats([chat])[0] for chat in chats]
        return [self._cut(*each) for each in zip(chats, whole, prompts, strict=True)]

    def _apply(self, chats: list[list[dict]], prompt: bool = False) -> list[str]:
        return self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=prompt
        )

    def _cut(self, chat: list[dict], whole: str, prompt: str) -> _Rendered | Unusable:
        answer = whole[len(prompt) :]
        if not whole.startswith(prompt) or not answer.strip():
            return Unusable(
                "template",
                "the template writes the prompt differently once an answer follows, so no prompt "
                "would be a row's beginning: set prepare.template to another .jinja file",
            )
        if lost := self._lost(chat, whole, answer):
            return Unusable(
                "template",
                f"the template leaves out the {lost}: set prepare.template to a .jinja file that "
                "writes it, or take it out of the row",
            )
        spans = []
        if self.loss_on == "assistant":
            try:
                spans = self._earlier_answers(chat, prompt)
            except Unusable as unusable:
                return unusable
        return self._finish(prompt, answer, spans)

    def _lost(self, chat: list[dict], whole: str, answer: str) -> str | None:
        """What the row would lack without a word, as many templates know no system and no tools.

        Not looked for are the earlier answers, of which templates drop the reasoning on purpose.
        """
        for number, message in enumerate(chat, 1):
            last = number == len(chat)
            if (last or message["role"] != "assistant") and not _holds(
                answer if last else whole, message["content"]
            ):
                return f"text of message {number} ({message['role']})"
            for key in ("tool_calls", *_REASONING) if last else ("tool_calls",):
                if key not in message:
                    continue
                less = {k: v for k, v in message.items() if k != key}
                try:
                    if self._apply([[*chat[: number - 1], less, *chat[number:]]])[0] != whole:
                        continue
                except _TEMPLATE_FAULTS:
                    continue
                return f"{key} of message {number}"
        return None

    def _earlier_answers(self, chat: list[dict], prompt: str) -> list[tuple[int, int]]:
        """Character spans in `prompt` of every answer but the last, with their end tokens.

        An answer begins where the prompt for it ends. It ends where the conversation up to it
        ends, or, with a template that writes the newest answer in another way than earlier ones
        (Qwen 3 drops their reasoning), at the end token that follows.
        """
        spans = []
        for i, message in enumerate(chat[:-1]):
            if message["role"] != "assistant":
                continue
            try:
                before = self._apply([chat[:i]], prompt=True)[0]
                after = self._apply([chat[: i + 1]])[0]
            except _TEMPLATE_FAULTS as error:
                said = " ".join(str(error).split())
                raise Unusable(
                    "template",
                    f"the template refuses the part up to message {i + 1} ({said}): set "
                    "prepare.loss_on: completion, or another template",
                ) from None
            start, end = len(before), len(after)
            if not prompt.startswith(after) and "tool_calls" not in message:
                found = self.any_special.search(prompt, start)
                end = found.end() if found else start
            part = prompt[start:end].rstrip()
            if not (
                prompt.startswith(before)
                and message["content"].strip() in part
                and part.endswith(self.special)
            ):
                raise Unusable(
                    "template",
                    f"the template writes message {i + 1} differently once the conversation goes "
                    "on, or does not end it: set prepare.loss_on: completion, or another template",
                )
            spans.append((start, start + len(part)))
        return spans

    def _finish(self, prompt: str, answer: str, spans: list, raw: bool = False) -> _Rendered:
        """The answer cut after its end token, or given one."""
        bare = answer.rstrip()
        end = next((t for t in self.special if bare.endswith(t)), None)
        if end is None:
            end = self.tokenizer.eos_token
            bare = answer.removesuffix("\n") + end
        return _Rendered(prompt, bare, end, spans, raw)

    def _ids(self, texts: list[str], special: bool = False) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=special)]

    def _answer_ids(self, rows: list[_Rendered], prompts: list[list[int]]) -> list[list[int]]:
        """Ids of the answers as the prompts' continuation."""
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
                # Empty, and so refused, where the tokenizer merges even the anchor.
                made.append(
                    after[len(self.anchor) :] if after[: len(self.anchor)] == self.anchor else []
                )
        return made

    def _rows(self, row: _Rendered, prompt: list[int], answer: list[int]) -> list | Unusable:
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
        learned[0 if self.loss_on == "all" else len(prompt) :] = True
        if row.spans:
            encoding = self.backend.encode(row.prompt, add_special_tokens=False)
            begins, ends = np.array(encoding.offsets).T
            for start, end in row.spans:
                inside = (begins >= start) & (ends <= end) & (begins < ends)
                learned[: len(prompt)] |= inside
        return self._fit(row, ids, learned, len(prompt))

    def _fit(self, row: _Rendered, ids, learned, prompt_tokens: int) -> list | Unusable:
        """The row cut to max_length as too_long says. Only the last part holds the end token."""
        length, most = len(ids), self.max_length
        if length <= most:
            starts = [0]
        elif self.too_long in ("drop", "error"):
            return Unusable(
                "too_long",
                f"{length} tokens, prepare.max_length is {most}: raise it, or set too_long to "
                "truncate or split",
            )
        else:
            starts = [0] if self.too_long == "truncate" else range(0, length, most)
        made = []
        for start in starts:
            part, mask = ids[start : start + most], learned[start : start + most].copy()
            mask[0] = False
            if mask.any():
                words = self._scored_bytes(row, ids, part, mask)
                cut = start + most < length
                made.append(
                    Encoded(part, mask, max(min(prompt_tokens - start, len(part)), 0), words, cut)
                )
        return made or Unusable(
            "unlearnable",
            f"the prompt alone has {prompt_tokens} tokens, prepare.max_length is {most}: raise it",
        )

    def _scored_bytes(self, row: _Rendered, ids, part, mask) -> int:
        """UTF-8 bytes of the learned text, end tokens and other marks left out."""
        if len(part) == len(ids) and self.loss_on == "completion" and not row.raw:
            return len(row.answer.removesuffix(row.end).encode())
        text = self.backend.decode(part[mask].tolist(), skip_special_tokens=True)
        return len(text.encode())

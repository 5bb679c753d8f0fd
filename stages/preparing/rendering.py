"""Examples as text: the template, rendered once, and where its answers begin and end."""

import json
import re
from dataclasses import dataclass

import jinja2

from stages.preparing.formats import Example, Unusable

# Keys of a message in which models' reasoning is kept apart from the answer.
_REASONING = ("reasoning_content", "thinking")
# What a template raises about a row: raise_exception() and Python's own, as of "".index("a").
TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,  # as of a macro that calls itself for ever
    TypeError,
    ValueError,
)


def bos_of(tokenizer) -> str:
    """The BOS that the tokenizer puts before plain text; empty where it puts none."""
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[:1]
    adds = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return tokenizer.bos_token if adds else ""


@dataclass(frozen=True)
class Rendered:
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
    """Examples to text that is rendered once."""

    def __init__(self, tokenizer, loss_on: str):
        """A tokenizer with its template; loss_on of the params section prepare."""
        self.tokenizer, self.loss_on = tokenizer, loss_on
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.bos = bos_of(tokenizer)
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special = tuple(sorted({*special, tokenizer.eos_token}, key=lambda t: (-len(t), t)))
        self.any_special = re.compile("|".join(map(re.escape, self.special)))

    def render(self, examples: list[Example]) -> list[Rendered | Unusable]:
        """The text of each example, or why it is dropped."""
        refused = [self._special_in(example) for example in examples]
        chats = [
            e for e, no in zip(examples, refused, strict=True) if isinstance(e, list) and not no
        ]
        made = iter(self._render_chats(chats))
        return [
            no or (next(made) if isinstance(example, list) else self._render_text(example))
            for example, no in zip(examples, refused, strict=True)
        ]

    def _render_text(self, example: str | dict) -> Rendered:
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

    def _render_chats(self, chats: list[list[dict]]) -> list[Rendered | Unusable]:
        """Whole conversations and their prompts, by the template; one by one if any fails."""
        if not chats:
            return []
        try:
            whole = self._apply(chats)
            prompts = self._apply([chat[:-1] for chat in chats], prompt=True)
        except TEMPLATE_FAULTS as error:
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

    def _cut(self, chat: list[dict], whole: str, prompt: str) -> Rendered | Unusable:
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
                except TEMPLATE_FAULTS:
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
            except TEMPLATE_FAULTS as error:
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

    def _finish(self, prompt: str, answer: str, spans: list, raw: bool = False) -> Rendered:
        """The answer cut after its end token, or given one."""
        bare = answer.rstrip()
        end = next((t for t in self.special if bare.endswith(t)), None)
        if end is None:
            end = self.tokenizer.eos_token
            bare = answer.removesuffix("\n") + end
        return Rendered(prompt, bare, end, spans, raw)

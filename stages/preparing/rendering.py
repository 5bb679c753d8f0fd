"""Examples as text: the template, rendered once, and where its answers begin and end."""

import json
import re
from dataclasses import dataclass, replace

import jinja2

from stages.preparing.answers import (
    EMPTY_THOUGHT,
    OPENED,
    after_header,
    holds,
    longest_end,
    printed,
    thought_and_answer,
    with_text_arguments,
)
from stages.preparing.formats import Chat, Example, chat_of, text_and_answers
from stages.preparing.messages import Unusable

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
    """A row as text: `answer` ends with `end`. `spans` of `prompt` are learned too, or with
    loss_on: all are what is not; `learned` says whether the answer is.

    With `raw` nothing is rendered: the prompt is the BOS at most, and the answer is the text.
    """

    prompt: str
    answer: str
    end: str
    spans: list[tuple[int, int]]
    raw: bool
    learned: bool = True


def _words(message: dict) -> str:
    """All that a template may write of a message."""
    return message["content"] if len(message) == 2 else json.dumps(message, ensure_ascii=False)


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
        chats = [chat_of(example) for example in examples]
        refused = [self._special_in(*each) for each in zip(examples, chats, strict=True)]
        pairs = zip(chats, refused, strict=True)
        made = iter(self._render_chats([chat for chat, no in pairs if chat and not no]))
        return [
            no or (next(made) if chat else self._render_text(example))
            for example, chat, no in zip(examples, chats, refused, strict=True)
        ]

    def _render_text(self, example: Example) -> Rendered:
        text, answers = text_and_answers(example)
        if isinstance(example, str):
            return self._finish(self.bos, text, [], raw=True)
        bos = "" if text.startswith(self.bos) else self.bos
        *earlier, (start, end) = [
            (len(bos) + s, len(bos) + e) for s, e in answers or [[0, len(text)]]
        ]
        text = bos + text
        spans = earlier if self.loss_on == "assistant" else []
        return self._finish(text[:start], text[start:end], spans)

    def _special_in(self, example: Example, chat: Chat | None) -> Unusable | None:
        """A mark such as <|im_end|> in somebody's words would end a turn that they did not end."""
        texts = [example] if isinstance(example, str) else []
        if chat:
            texts = [*map(_words, chat.messages), json.dumps(chat.given, ensure_ascii=False)]
        for found in filter(None, map(self.any_special.search, texts)):
            return Unusable(
                "special_token",
                f"holds {found[0]!r}, which the model reads as a mark of its own: remove it, or "
                "set prepare.format: rendered if a template is applied already",
            )
        return None

    def _render_chats(self, chats: list[Chat]) -> list[Rendered | Unusable]:
        """Conversations as text, in one call; one by one those that the template cannot take so."""
        try:
            texts = self._texts(chats)
        except TEMPLATE_FAULTS:
            return [self._render_chat(chat) for chat in chats]
        return [
            self._render_chat(chat) if printed(chat, whole) else self._cut(chat, whole, prompt)
            for chat, whole, prompt in zip(chats, *texts, strict=True)
        ]

    def _render_chat(self, chat: Chat) -> Rendered | Unusable:
        """One conversation, with the arguments of calls as objects or else as text."""
        faults = []
        for form in (chat, with_text_arguments(chat)):
            try:
                (whole,), (prompt,) = self._texts([form])
            except TEMPLATE_FAULTS as error:
                faults.append(error)
                continue
            if form is not chat or not printed(chat, whole):
                return self._cut(form, whole, prompt)
        # raise_exception() in a template raises the base class.
        reason = "roles" if type(faults[0]) is jinja2.TemplateError else "template"
        said = " ".join(str(faults[0]).split())
        return Unusable(reason, f"the template refuses it ({said}): mend the row")

    def _texts(self, chats: list[Chat]) -> tuple[list[str], list[str]]:
        """Whole conversations, and the prompts for their last answers."""
        prompts = [chat.first(-1) for chat in chats]
        return self._apply(chats), self._apply(prompts, prompt=True)

    def _apply(self, chats: list[Chat], prompt: bool = False) -> list[str]:
        def applied(messages: list, **given) -> list[str]:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **given
            )

        if any(chat.given for chat in chats):
            return [applied([chat.messages], **chat.given)[0] for chat in chats]
        return applied([chat.messages for chat in chats]) if chats else []

    def _cut(self, chat: Chat, whole: str, prompt: str) -> Rendered | Unusable:
        if not whole.startswith(prompt):
            whole = prompt + thought_and_answer(chat.messages[-1], whole, prompt)
        answer = whole[len(prompt) :]
        if not answer.strip():
            return Unusable(
                "template",
                "the template writes the prompt differently once an answer follows, so no prompt "
                'would be a row\'s beginning: give the row {"enable_thinking": true} or false in '
                "chat_template_kwargs if that decides it, or set another prepare.template",
            )
        if lost := self._lost(chat, whole, whole[len(OPENED.sub("", prompt)) :]):
            return Unusable(
                "template",
                f"the template leaves out the {lost}: set prepare.template to a .jinja file that "
                "writes it, or take it out of the row",
            )
        try:
            spans = self._spans(chat, prompt)
        except Unusable as unusable:
            return unusable
        learned = len(chat.messages) - 1 not in chat.silent
        if not learned and not spans and self.loss_on != "all":
            return Unusable(
                "unlearnable",
                "its answer is marked as not to be learned: delete it, or set prepare.loss_on: "
                "assistant if earlier ones are",
            )
        return replace(self._finish(prompt, answer, spans), learned=learned)

    def _lost(self, chat: Chat, whole: str, answer: str) -> str | None:
        """What the row would lack without a word, as many templates know no system and no tools.

        Not looked for are the earlier answers, of which templates drop the reasoning on purpose.
        """
        for number, message in enumerate(chat.messages, 1):
            last = number == len(chat.messages)
            if (last or message["role"] != "assistant") and not holds(
                answer if last else whole, message["content"]
            ):
                return f"text of message {number} ({message['role']})"
            for key in ("tool_calls", "reasoning_content") if last else ("tool_calls",):
                less = [*chat.messages]
                less[number - 1] = {k: v for k, v in message.items() if k != key}
                if key in message and self._writes(chat._replace(messages=less), whole):
                    return f"{key} of message {number}"
        for key in chat.given.keys() & {"tools", "documents"}:
            given = {k: v for k, v in chat.given.items() if k != key}
            if self._writes(chat._replace(given=given), whole):
                return key
        return None

    def _writes(self, chat: Chat, text: str) -> bool:
        try:
            return self._apply([chat])[0] == text
        except TEMPLATE_FAULTS:
            return False

    def _spans(self, chat: Chat, prompt: str) -> list[tuple[int, int]]:
        """Character spans in `prompt` of what Rendered says of them, their end marks too."""
        everything = self.loss_on == "all"
        return [
            self._span(chat, i, prompt)
            for i, message in enumerate(chat.messages[:-1])
            if (everything and i in chat.silent)
            or (
                self.loss_on == "assistant"
                and message["role"] == "assistant"
                and i not in chat.silent
            )
        ]

    def _span(self, chat: Chat, i: int, prompt: str) -> tuple[int, int]:
        """Where message `i` stands in `prompt`.

        An answer begins where the prompt for it ends, and is written as when it was the newest,
        but for two things: templates drop the thought of earlier answers (Qwen 3), or end them
        with another mark (gpt-oss).
        """
        message = chat.messages[i]
        asked = message["role"] == "assistant"
        try:
            before = self._apply([chat.first(i)], prompt=asked)[0] if i else ""
            after = self._apply([chat.first(i + 1)])[0]
            start: int | None = len(before)
            if asked and not prompt.startswith(before):
                start = after_header(before, self._apply([chat.first(i)])[0], prompt)
        except TEMPLATE_FAULTS as error:
            said = " ".join(str(error).split())
            raise Unusable(
                "template",
                f"the template refuses the part up to message {i + 1} ({said}): set "
                "prepare.loss_on: completion, or another template",
            ) from None
        if not asked and prompt.startswith(after) and after.startswith(before):
            return len(before), len(after)
        span = self._written(message, before, after, prompt, start) if asked else None
        if span is None:
            raise Unusable(
                "template",
                f"the template writes message {i + 1} differently once the conversation goes "
                "on, or does not end it: set prepare.loss_on: completion, or another template",
            )
        return span

    def _written(
        self, message: dict, before: str, after: str, prompt: str, start: int | None
    ) -> tuple[int, int] | None:
        """The span from `start` in `prompt` of an answer that is the newest in `after`."""
        opening = before if after.startswith(before) else OPENED.sub("", before)
        written = after[len(opening) :].rstrip()
        if start is None or not after.startswith(opening) or not written.endswith(self.special):
            return None
        words = message["content"].split("</think>")[-1].strip()
        bare = self._without_marks(written)
        # Nemotron puts an empty thought where it drops one.
        thought = EMPTY_THOUGHT.match(prompt, start)
        for place in (start, thought.end()) if thought else (start,):
            if part := longest_end(written, prompt, place):
                end = place + len(part)
            elif part := longest_end(bare, prompt, place):
                mark = self.any_special.match(prompt, place + len(part))
                end = mark.end() if mark else place
            if part and words in prompt[place:end]:
                return start, end
        return None

    def _without_marks(self, text: str) -> str:
        while mark := next((t for t in self.special if text.endswith(t)), None):
            text = text.removesuffix(mark).rstrip()
        return text

    def _finish(self, prompt: str, answer: str, spans: list, raw: bool = False) -> Rendered:
        """The answer cut after its end token, or given one."""
        bare = answer.rstrip()
        end = next((t for t in self.special if bare.endswith(t)), None)
        if end is None:
            end = self.tokenizer.eos_token
            bare = answer.removesuffix("\n") + end
        return Rendered(prompt, bare, end, spans, raw)

"""Examples as text: rendered once with the template, and the spans of their answers."""

import json
from dataclasses import dataclass, replace

import jinja2

from stages.preparing.answers import OPENED, holds, printed, thought_and_answer, with_text_arguments
from stages.preparing.chat_template import TEMPLATE_FAULTS, ChatTemplate
from stages.preparing.formats import Chat, Example, chat_of, text_and_answers
from stages.preparing.messages import Unusable
from stages.preparing.spans import learned_spans


@dataclass(frozen=True)
class Rendered:
    """A row as text; `answer` ends with `end`, and `learned` says whether it is learned.

    `spans` of `prompt` are learned too; with loss_on: all they are the parts that are not. With
    `raw` nothing is rendered: the prompt is at most the BOS, and the answer is the text.
    """

    prompt: str
    answer: str
    end: str
    spans: list[tuple[int, int]]
    raw: bool
    learned: bool = True


def _words(message: dict) -> str:
    """Everything that a template may write of a message."""
    return message["content"] if len(message) == 2 else json.dumps(message, ensure_ascii=False)


class Renderer:
    """Renders examples to text."""

    def __init__(self, tokenizer, loss_on: str):
        """`tokenizer` has its final template; loss_on as in params.yaml."""
        self.template, self.loss_on = ChatTemplate(tokenizer), loss_on

    def render(self, examples: list[Example]) -> list[Rendered | Unusable]:
        """The text of each example, or the reason to drop it."""
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
            return self._finish(self.template.bos, text, [], raw=True)
        bos = "" if text.startswith(self.template.bos) else self.template.bos
        *earlier, (start, end) = [
            (len(bos) + s, len(bos) + e) for s, e in answers or [[0, len(text)]]
        ]
        text = bos + text
        spans = earlier if self.loss_on == "assistant" else []
        return self._finish(text[:start], text[start:end], spans)

    def _special_in(self, example: Example, chat: Chat | None) -> Unusable | None:
        """A special token such as <|im_end|> within a text would end the turn early."""
        texts = [example] if isinstance(example, str) else []
        if chat:
            texts = [*map(_words, chat.messages), json.dumps(chat.given, ensure_ascii=False)]
        for found in filter(None, map(self.template.any_special.search, texts)):
            return Unusable(
                "special_token",
                f"contains {found[0]!r}, a special token of the model: remove it, or set "
                "prepare.format: rendered if a template is already applied",
            )
        return None

    def _render_chats(self, chats: list[Chat]) -> list[Rendered | Unusable]:
        """Conversations as text, in one call if possible, else one by one."""
        try:
            texts = self._texts(chats)
        except TEMPLATE_FAULTS:
            return [self._render_chat(chat) for chat in chats]
        return [
            self._render_chat(chat) if printed(chat, whole) else self._cut(chat, whole, prompt)
            for chat, whole, prompt in zip(chats, *texts, strict=True)
        ]

    def _render_chat(self, chat: Chat) -> Rendered | Unusable:
        """One conversation, with the arguments of calls as objects or, failing that, as text."""
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
        return Unusable(reason, f"the template refuses it ({said}): fix the row")

    def _texts(self, chats: list[Chat]) -> tuple[list[str], list[str]]:
        """Texts of the whole conversations, and of the prompts for their last answers."""
        prompts = [chat.first(-1) for chat in chats]
        return self.template.apply(chats), self.template.apply(prompts, prompt=True)

    def _cut(self, chat: Chat, whole: str, prompt: str) -> Rendered | Unusable:
        if not whole.startswith(prompt):
            whole = prompt + thought_and_answer(chat.messages[-1], whole, prompt)
        answer = whole[len(prompt) :]
        if not answer.strip():
            return Unusable(
                "template",
                "the template writes the prompt differently once an answer follows, so the row "
                "would not start with its prompt: set enable_thinking to true or false in the "
                "row's chat_template_kwargs if that decides it, or set another prepare.template",
            )
        if lost := self._lost(chat, whole, whole[len(OPENED.sub("", prompt)) :]):
            return Unusable(
                "template",
                f"the template omits the {lost}: set prepare.template to a .jinja file that "
                "writes it, or remove it from the row",
            )
        try:
            spans = learned_spans(self.template, chat, prompt, self.loss_on)
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
        """What the template silently omits: many know no system message and no tools.

        Earlier answers are not checked, since templates drop their reasoning on purpose.
        """
        shown = self._shown_calls(chat, whole)
        for number, message in enumerate(chat.messages, 1):
            last = number == len(chat.messages)
            if (last or message["role"] != "assistant") and not holds(
                answer if last else whole, message["content"]
            ):
                return f"text of message {number} ({message['role']})"
            for key in ("tool_calls", "reasoning_content") if last else ("tool_calls",):
                if key == "tool_calls" and number in shown:
                    continue
                less = [*chat.messages]
                less[number - 1] = {k: v for k, v in message.items() if k != key}
                if key in message and self.template.writes(chat._replace(messages=less), whole):
                    return f"{key} of message {number}"
        for key in chat.given.keys() & {"tools", "documents"}:
            given = {k: v for k, v in chat.given.items() if k != key}
            if self.template.writes(chat._replace(given=given), whole):
                return key
        return None

    def _shown_calls(self, chat: Chat, whole: str) -> set[int]:
        """Numbers of messages whose calls appear if their functions have other names.

        This takes one rendering, where leaving out the calls of each message takes one for each, so
        that the time for a long trace would grow with the square of its length.
        """
        marks, messages = {}, []
        for number, message in enumerate(chat.messages, 1):
            if calls := message.get("tool_calls"):
                marks[number] = mark = f"call{number}of{len(chat.messages)}"
                renamed = [each | {"function": each["function"] | {"name": mark}} for each in calls]
                message = message | {"tool_calls": renamed}
            messages.append(message)
        if len(marks) < 2:
            return set()
        try:
            (text,) = self.template.apply([chat._replace(messages=messages)])
        except TEMPLATE_FAULTS:
            return set()
        return {number for number, mark in marks.items() if mark in text and mark not in whole}

    def _finish(self, prompt: str, answer: str, spans: list, raw: bool = False) -> Rendered:
        """The row with its answer cut after the end token, or given one."""
        bare = answer.rstrip()
        end = next((t for t in self.template.special if bare.endswith(t)), None)
        if end is None:
            end = self.template.tokenizer.eos_token
            bare = answer.removesuffix("\n") + end
        return Rendered(prompt, bare, end, spans, raw)

"""Chooses the chat template that renders prompts, in training rows and at inference."""

import json
from collections import Counter
from pathlib import Path

import jinja2

from stages.preparing.chat_template import TEMPLATE_FAULTS, bos_of
from stages.preparing.formats import Example, Format, chat_of, text_and_answers
from stages.preparing.messages import Unusable
from stages.preparing.new_tokens import check_marks
from stages.preparing.rendering import Rendered, Renderer
from stages.preparing.shapes import Shape, read_rendered
from stages.shared.params import Prepare
from stages.shared.process import StageError

# With today's date, a template would write other bytes tomorrow, and prompts at inference that no
# row begins with. So templates print a fixed date, the one of Llama 3's documentation.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26'}.get(format, '26 Jul 2024') }}"
    "{%- endmacro -%}"
)
# Tried in this order as pad token, then unk, then the EOS itself.
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
# Share of the sampled rendered rows that the template must reproduce.
_MOST_WRITTEN = 0.5
_ASKED = [{"role": "user", "content": "a"}]


def settle(tokenizer, params: Prepare, form: Format, samples: list[Example]) -> str:
    """Set the pad token, the chat template and the EOS of `tokenizer`; returns a description.

    The EOS becomes the token that ends most answers. Gemma's template, for example, ends turns with
    another token, so that generating until the EOS would not stop. Raises StageError if no template
    can be used.
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
    made, tokenizer.chat_template, thoughts = _thinking(tokenizer, params, text, samples)
    marks = check_marks(tokenizer, params, samples, made)
    _settle_eos(tokenizer, params, samples, made)
    said += thoughts
    said = f"{said}, answers end with {tokenizer.eos_token}, {pad}{marks}"
    if form.shape and form.shape.end not in tokenizer.get_vocab():
        said += (
            f"; {form.shape.end} is not a token of this model and would be learned letter by "
            "letter: name it in lora.new_tokens, or bring messages or prompt and completion, which "
            "are rendered for the model"
        )
    return said


def _settle_eos(
    tokenizer, params: Prepare, samples: list[Example], before: list[Rendered | Unusable]
) -> None:
    eos = tokenizer.eos_token
    ends = Counter(row.end for row in _rendered(before))
    tokenizer.eos_token = max(ends, key=ends.__getitem__, default=eos)
    # A template that uses `eos_token` would write the new one.
    if tokenizer.eos_token != eos and "eos_token" in tokenizer.chat_template:
        after = Renderer(tokenizer, params.loss_on).render(samples)
        if _rendered(after) != _rendered(before):
            tokenizer.eos_token = eos


def _rendered(rows: list[Rendered | Unusable]) -> list[Rendered]:
    return [row for row in rows if isinstance(row, Rendered)]


def _template(tokenizer, params: Prepare, form: Format, samples: list[Example]) -> tuple[str, str]:
    template = params.template
    if form.name == "rendered":
        if form.shape is None and params.loss_on != "all":
            raise StageError(
                "no known marker of an answer in the rendered text ([/INST], "
                "<|im_start|>assistant, …); set prepare.loss_on: all, or bring columns with prompt "
                "and completion"
            )
        return _rendered_template(tokenizer, template, form, samples)
    if template.endswith(".jinja"):
        text = _with_bos(tokenizer, _from_file(tokenizer, template), samples)
        return text, f"template {template}"
    if template != "chat":
        return _plain_template(tokenizer, template), "plain template"
    own = _own_template(tokenizer)
    if not own and isinstance(tokenizer.chat_template, dict):
        raise StageError(
            f"the tokenizer's chat templates are {', '.join(tokenizer.chat_template)} and none is "
            "the default; copy the one to use into templates/ and name it in prepare.template"
        )
    if not own:
        raise StageError(
            "the tokenizer has no chat template (a base model?); set prepare.template to plain "
            "text that contains {prompt}, or to templates/chatml.jinja with lora.new_tokens: "
            "['<|im_start|>']"
        )
    tools = any(chat and chat.given.get("tools") for chat in map(chat_of, samples))
    # Some tokenizers have a separate template for tools.
    return tokenizer.get_chat_template(tools=tools or None), "the tokenizer's chat template"


def _thinking(
    tokenizer, params: Prepare, text: str, samples: list[Example]
) -> tuple[list[Rendered | Unusable], str, str]:
    """(rows, template, description of the change) with the setting of enable_thinking that renders
    most samples: the default, or another if its prompt opens a thought that answers lack, or lacks
    one that they have."""
    tries = []
    for value in ("", "false", "true"):
        setting = f"{{%- set enable_thinking = enable_thinking | default({value}) -%}}"
        changed, said = (setting + text, f", enable_thinking {value}") if value else (text, "")
        tokenizer.chat_template = changed
        made = Renderer(tokenizer, params.loss_on).render(samples)
        tries.append((len(_rendered(made)), made, changed, said))
        if "enable_thinking" not in text or tries[-1][0] == len(samples):
            break
    return max(tries, key=lambda each: each[0])[1:]


def _own_template(tokenizer) -> str | None:
    """The tokenizer's default template; it may have others, for tools or documents."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


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
        raise StageError(f"{template}:{error.lineno}: {error.message}; fix the template") from None
    except TEMPLATE_FAULTS:
        pass  # It needs more than this one message; errors are reported with a row.
    return text


def _with_bos(tokenizer, template: str, samples: list[Example]) -> str:
    """The template, with a BOS added if the tokenizer adds one to plain text and it has none."""
    for chat in filter(None, map(chat_of, samples)):
        try:
            made = tokenizer.apply_chat_template(
                chat.messages, chat_template=template, tokenize=False, **chat.given
            )
        except TEMPLATE_FAULTS:
            continue
        return template if made.startswith(bos_of(tokenizer)) else "{{ bos_token }}" + template
    return template


def _rendered_template(
    tokenizer, template: str, form: Format, samples: list[Example]
) -> tuple[str, str]:
    """The template, from the file, the tokenizer or the shape, that reproduces most samples.

    The text is not rendered again; the template is for prompts at inference.
    """
    own = _own_template(tokenizer)
    if form.shape is None:
        return own or "", "text as it is, all of it learned"
    shape, (text, _) = form.shape, text_and_answers(samples[0])
    opening, bos = text[: next(shape.turn.finditer(text)).start()], bos_of(tokenizer)
    opening = opening or ("" if text.startswith(bos) else bos)
    shaped = (f"{{{{ {_quoted(opening)} }}}}" if opening else "") + shape.template
    if template.endswith(".jinja"):
        candidates = [_from_file(tokenizer, template)]
    else:
        candidates = [own, shaped] if own else [shaped]
    count, _, chosen = max(
        (sum(_writes(tokenizer, candidate, shape, sample) for sample in samples), -i, candidate)
        for i, candidate in enumerate(candidates)
    )
    if count < _MOST_WRITTEN * len(samples):
        raise StageError(
            f"the rendered text resembles {shape.name} but differs from it: name the .jinja file "
            "that rendered it in prepare.template, or bring columns with prompt and completion"
        )
    return chosen, f"text as it is, in the {shape.name} shape"


def _writes(tokenizer, template: str, shape: Shape, sample: Example) -> bool:
    """Whether the template reproduces the sample's prompt, except for a BOS and for end markers,
    which may depend on a turn's content."""
    text, _ = text_and_answers(sample)
    turns = read_rendered(shape, text)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns[:-1]]
    try:
        made = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except TEMPLATE_FAULTS:
        return False
    bos = tokenizer.bos_token or ""
    prompt, before = "", 0
    for turn in turns[:-1]:
        prompt += text[before : turn.stop].removesuffix(turn.end)
        prompt, before = prompt + (turn.end and shape.end), turn.stop
    prompt += text[before : turns[-1].start]
    return made.removeprefix(bos) == prompt.removeprefix(bos)


def _plain_template(tokenizer, template: str) -> str:
    """A chat template of plain text around {prompt}, with white space before the answer."""
    if (meant := template.replace("\\n", "\n")) != template:
        raise StageError(
            "prepare.template: contains a backslash and an n instead of a line break; write it in "
            f"double quotes in params.yaml: {_quoted(meant)}"
        )
    before, after = template.split("{prompt}")
    after += "" if after[-1:].isspace() else "\n"
    bos = "{{ bos_token }}" if bos_of(tokenizer) else ""
    return (
        bos + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ m['content'] + eos_token }}{% elif m['role'] == 'system' %}"
        "{{ m['content'] + '\\n\\n' }}"
        f"{{% else %}}{{{{ {_quoted(before)} + m['content'] + {_quoted(after)} }}}}"
        "{% endif %}{% endfor %}"
    )


def _quoted(text: str) -> str:
    """`text` as a Jinja literal, unescaped: Jinja reads JSON's escape of an emoji as two
    characters."""
    return json.dumps(text, ensure_ascii=False)

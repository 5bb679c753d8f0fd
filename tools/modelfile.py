"""Write a Modelfile for Ollama: the chat template of a release in Go, and the stop tokens.

    python -m tools.modelfile > models/Modelfile && ollama create NAME -f models/Modelfile

Converts templates that put fixed texts around each message, and compares the result with the
tokenizer's rendering of several conversations. Writes nothing for any other template.
Exit status: 0 written, 1 the template cannot be converted, 2 no release.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.shared.process import StageError
from tools.screen import fail

RELEASE = Path("models/release")
ROLES = ("system", "user", "assistant")
# Messages with texts that no template contains.
TEXTS = ("Alpha one", "Beta two", "Gamma three", "Delta four", "Epsilon five")
CONVERSATIONS = (
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
)


class Parts(NamedTuple):
    """The texts around messages; `default` is the system message if none is given."""

    start: str
    before: dict[str, str]
    behind: dict[str, str]
    answer: str
    default: str | None

    def render(self, messages: list[dict[str, str]]) -> str:
        if self.default is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        texts = [self.before[m["role"]] + m["content"] + self.behind[m["role"]] for m in messages]
        return self.start + "".join(texts) + self.answer

    def go(self) -> str:
        cases = [
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{self.behind[role]}'
            for role, before in self.before.items()
        ]
        ends = "{{ end }}{{ end }}"
        choice = "{{ else ".join(cases)
        return self.start + "{{ range .Messages }}{{ " + choice + ends + self.answer


def conversation(roles: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(roles, TEXTS, strict=False)]


def rendered(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...], answer: bool) -> str:
    """The tokenizer's rendering, without the BOS, which llama.cpp adds itself."""
    text = str(
        tokenizer.apply_chat_template(
            conversation(roles), tokenize=False, add_generation_prompt=answer
        )
    )
    begin = tokenizer.bos_token
    adds = begin and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(begin) if begin and adds else text


def parts(tokenizer: PreTrainedTokenizerBase, system: bool, start: str) -> Parts:
    """The texts around messages after `start`, if they are the same everywhere.

    Raises ValueError if the template changes or omits the text of a message.
    """
    first = ("system",) if system else ()

    def around(*roles: str) -> list[str]:
        text = rendered(tokenizer, (*first, *roles), False).removeprefix(start)
        return _around(text, len(first) + len(roles))

    one, two = around("user"), around("user", "assistant")
    three = around("user", "assistant", "user")
    behind = {"user": one[-1], "assistant": two[-1]}
    before = {"user": three[-2].removeprefix(behind["assistant"])}
    before["assistant"] = two[-2].removeprefix(behind["user"])
    if system:
        before = {"system": one[0]} | before
        behind["system"] = one[1].removesuffix(before["user"])
    whole = rendered(tokenizer, (*first, "user"), True)
    answer = whole.removeprefix(rendered(tokenizer, (*first, "user"), False))
    made = Parts(start, before, behind, answer, None)
    alone = rendered(tokenizer, ("user",), True)
    if system and alone != made.render(conversation(("user",))):
        rest = behind["system"] + made._replace(start="").render(conversation(("user",)))
        default = alone.removeprefix(start).removeprefix(before["system"]).removesuffix(rest)
        # In Ollama an empty system message is none.
        made = made._replace(default=default or None)
    return made


def _around(text: str, messages: int) -> list[str]:
    found = []
    for content in TEXTS[:messages]:
        before, content, text = text.partition(content)
        if not content:
            raise ValueError("it leaves out a message")
        found.append(before)
    return [*found, text]


def turned(tokenizer: PreTrainedTokenizerBase) -> Parts:
    """The template's parts. Raises ValueError, with the reason, if they are not enough."""
    why = ValueError("it refuses a conversation")
    for system in (True, False):
        # The BOS comes before the first message only, or before each.
        for start in ("", tokenizer.bos_token or ""):
            try:
                made = parts(tokenizer, system, start)
                check(tokenizer, made)
            except ValueError as error:
                why = error
            except TemplateError:
                # The template has no system message.
                break
            else:
                return made
    raise why


def check(tokenizer: PreTrainedTokenizerBase, made: Parts) -> None:
    """Raise ValueError unless `made` renders conversations as the tokenizer does."""
    for first in ((), ("system",)) if "system" in made.before else ((),):
        for roles in CONVERSATIONS:
            said = (*first, *roles)
            if rendered(tokenizer, said, True) != made.render(conversation(said)):
                raise ValueError(f"its text around {', '.join(said)} is not fixed")
    texts = [*made.before.values(), *made.behind.values(), made.answer, made.default or ""]
    if any(mark in text for text in texts for mark in ("{{", '"""')):
        raise ValueError('it contains {{ or """')


def modelfile(release: Path) -> str:
    """Raises StageError without a release, ValueError if the template cannot be converted."""
    settings = release / "generation_config.json"
    if not settings.exists():
        raise StageError(f"{release} does not exist; run dvc repro")
    tokenizer = AutoTokenizer.from_pretrained(release, local_files_only=True)
    if not tokenizer.chat_template:
        raise ValueError("there is none")
    made = turned(tokenizer)
    ends = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id") or []
    stops = tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])
    lines = ["FROM ./release.gguf", f'TEMPLATE """{made.go()}"""']
    if "system" not in made.before:
        lines.insert(0, "# The template has no system message: Ollama ignores one that is given.")
    lines += [f'SYSTEM """{made.default}"""'] if made.default else []
    return "\n".join([*lines, *(f"PARAMETER stop {json.dumps(stop)}" for stop in stops), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", type=Path, default=RELEASE)
    try:
        print(modelfile(parser.parse_args().release), end="")
    except (StageError, OSError) as error:
        fail("modelfile", error)
    except (ValueError, TemplateError) as error:
        print(
            f"modelfile: the chat template cannot be converted: {' '.join(str(error).split())}; "
            "write TEMPLATE by hand, or use another server (docs/serving.md)",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Templates that trl ships as models have them, tokenizers for them, and rows made with both."""

import re
from pathlib import Path
from types import SimpleNamespace

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stages.preparing.encoding import Encoded, Encoder
from stages.preparing.messages import Unusable
from stages.preparing.recognizing import recognize
from stages.preparing.templates import settle

FOLDER = Path(trl.__file__).parent / "chat_templates"
BAR = "\uff5c"  # DeepSeek's
MARK = re.compile(
    rf"<\|[A-Za-z_/]+\|?>|<[a-z_/]+\|>|<{BAR}[A-Za-z\u2581]+{BAR}>|<[a-z]+_of_[a-z]+>"
)
ENDS = (
    "<|im_end|>", f"<{BAR}end\u2581of\u2581sentence{BAR}>", "<|eot_id|>", "<|end|>", "<turn|>",
    "<end_of_turn>", "<|eot|>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip


def template(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text()


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each mark of the template."""
    marks = sorted({*MARK.findall(text), "<|bos|>", "<|eos|>"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*marks, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token=next((end for end in ENDS if end in marks), "<|eos|>"),
        pad_token="<|eos|>",
    )
    fast.chat_template = text
    return fast


def ask(text: str) -> dict:
    return {"role": "user", "content": text}


def say(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def call(city: str, **more) -> dict:
    function = {"name": "weather", "arguments": {"city": city}}
    return say(
        "", tool_calls=[{"id": "call00001", "type": "function", "function": function}], **more
    )


def tell(text: str) -> dict:
    return {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": text}


PROPERTIES = {"city": {"type": "string", "description": "Its name"}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Weather of a city", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": WEATHER}]


def made_of(
    text: str, row: dict, loss_on: str = "completion"
) -> tuple[PreTrainedTokenizerFast, Encoded | Unusable]:
    """(settled tokenizer, what becomes of the row) with the template `text`."""
    tokenizer = make_tokenizer(text)
    form = recognize("auto", None, row, "a:1")
    example = form.example(row, "a:1")
    values = {"template": "chat", "loss_on": loss_on, "max_length": 9999, "too_long": "drop"}
    params = SimpleNamespace(**values)
    settle(tokenizer, params, form, [example])
    (made,) = Encoder(tokenizer, params).encode([example])
    return tokenizer, made if isinstance(made, Unusable) else made[0]

"""Tokenizers and chat templates in the shapes that models come in, made here, a few KB each.

Each shape names what is peculiar to it: who writes the BOS, what ends a turn, what pads, and
whether the tokenizer puts a space before any text (sentencepiece) or takes bytes as they are.
"""

from dataclasses import dataclass, field

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

# Merges across the places where a prompt meets its answer, so that the tests would notice.
_MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "a"), ("a", "z"), ("Ġa", "z"), (":", "Ċ"), ("o", "k")]
_PIECES = [("▁", "a"), ("a", "z"), ("▁a", "z"), ("▁", "["), ("o", "k"), ("]", "▁")]


@dataclass(frozen=True)
class Shape:
    template: str
    special: list[str]
    bos: str | None
    eos: str
    end: str  # what ends an answer
    pad: str | None = None
    adds_bos: bool = False
    sentencepiece: bool = False
    system: bool = True  # whether the template takes a system message
    plain: list[str] = field(default_factory=list)  # added tokens that are not special
    rstrip: list[str] = field(default_factory=list)  # special ones that swallow what blanks follow


_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip()"
    " + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA_3 = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: '"
    " + strftime_now('%d %b %Y') + '\\n\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role']"
    " + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
# The newest answer gets an empty thought, earlier ones lose theirs.
_QWEN_3 = (
    "{% set last = namespace(user=0) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > last.user %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_PHI_3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# No mark ends an answer.
_BARE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

SHAPES = {
    "llama-2": Shape(
        _LLAMA_2, ["<unk>", "<s>", "</s>"], "<s>", "</s>", "</s>", adds_bos=True, sentencepiece=True
    ),
    "mistral": Shape(
        _MISTRAL, ["<unk>", "<s>", "</s>"], "<s>", "</s>", "</s>", adds_bos=True, sentencepiece=True
    ),
    "llama-3": Shape(
        _LLAMA_3,
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|finetune_right_pad_id|>",
        ],
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        adds_bos=True,
    ),
    "qwen": Shape(
        _QWEN_3,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        None,
        "<|im_end|>",
        "<|im_end|>",
        pad="<|endoftext|>",
        plain=["<think>", "</think>"],
    ),
    "gemma": Shape(
        _GEMMA,
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        pad="<pad>",
        adds_bos=True,
        system=False,
        plain=["\n\n"],
    ),
    "smollm": Shape(
        _SMOLLM,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        pad="<|im_end|>",
    ),
    "phi-3": Shape(
        _PHI_3,
        ["<unk>", "<|endoftext|>"],
        None,
        "<|endoftext|>",
        "<|end|>",
        pad="<|endoftext|>",
        sentencepiece=True,
        rstrip=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    ),
    "bare": Shape(_BARE, ["<unk>", "</s>"], None, "</s>", "</s>"),
}


def make_shape(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a shape, with its chat template."""
    shape = SHAPES[name]
    tokenizer = _sentencepiece(shape) if shape.sentencepiece else _byte_level(shape)
    for text in (*shape.special, *shape.rstrip):
        strips = text in shape.rstrip
        added = AddedToken(text, special=True, normalized=False, rstrip=strips)
        tokenizer.add_special_tokens([added])
    for text in shape.plain:
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    if shape.adds_bos:
        bos = (shape.bos, tokenizer.token_to_id(shape.bos))
        post = processors.TemplateProcessing(single=f"{shape.bos} $A", special_tokens=[bos])
        tokenizer.post_processor = post
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=shape.bos, eos_token=shape.eos, pad_token=shape.pad
    )
    fast.chat_template = shape.template
    return fast


def _byte_level(shape: Shape) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*shape.special, *alphabet, *(a + b for a, b in _MERGES)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(shape: Shape) -> Tokenizer:
    """As Llama 2 has it: bytes for what is not in the vocabulary, a space before any text."""
    tokens = [*shape.special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(code) for code in range(33, 127)] + [a + b for a, b in _PIECES]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    bpe = models.BPE(
        vocab=vocabulary, merges=_PIECES, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer

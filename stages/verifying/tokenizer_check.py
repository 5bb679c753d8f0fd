"""Checks on the held-out texts that the released tokenizer behaves as evaluated."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from stages.shared.outputs import read_json
from stages.shared.process import StageError
from stages.verifying.folder_check import AGAIN, TAKEN

# Characters shown of two texts from where they differ.
SHOWN = 40


def check_tokenizer(folder: Path, prepared: Path, adapter: Path, rows: list[dict]) -> None:
    """Compare the tokenizer in `folder` with that of the rows, `prepared`: vocabulary, end token,
    prompts, ids and texts of the held-out rows. Raises StageError.

    It is the adapter's own if that has one, and may have further tokens, as long as each has a row
    in the embeddings.
    """
    found, expected = (AutoTokenizer.from_pretrained(f) for f in (folder, prepared))
    fault = vocabulary_fault(found, expected, folder) or text_fault(found, expected, rows)
    if fault:
        raise StageError(
            f"{folder}: its tokenizer {fault}; delete the tokenizer's files from {adapter}, "
            f"then: {TAKEN}"
        )
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    if expected.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        raise StageError(
            f"{folder / 'generation_config.json'}: eos_token_id lacks {expected.eos_token_id} "
            f"({expected.eos_token}), which ends an answer; {AGAIN}"
        )


def vocabulary_fault(
    found: PreTrainedTokenizerBase, expected: PreTrainedTokenizerBase, folder: Path
) -> str | None:
    rows = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    ids, known = found.get_vocab(), expected.get_vocab()
    wrong = [token for token, id in known.items() if ids.get(token) != id]
    wrong += [token for token in ids.keys() - known.keys() if ids[token] >= rows]
    if not wrong:
        return None
    token = min(wrong)
    return (
        f"has {token!r} as {ids.get(token)} and that of the held-out rows as {known.get(token)} "
        f"({len(wrong)} tokens differ; the embeddings have {rows} rows)"
    )


def text_fault(
    found: PreTrainedTokenizerBase, expected: PreTrainedTokenizerBase, rows: list[dict]
) -> str | None:
    """The first difference between the two tokenizers on the held-out rows."""
    if found.eos_token != expected.eos_token:
        return (
            f"ends with {found.eos_token} and that of the held-out rows with {expected.eos_token}"
        )
    ids = [row["input_ids"] for row in rows]
    texts = expected.batch_decode(ids)
    asked = expected.batch_decode([row["input_ids"][: row["prompt_tokens"]] for row in rows])
    prompts = [rendered(expected, messages) for messages in conversations(asked)]
    made = zip(conversations(asked), prompts, strict=True)
    pairs: list[tuple[str, Sequence, Sequence]] = [
        ("renders a prompt", rendered(found, messages), prompt) for messages, prompt in made
    ]
    pairs += [
        ("shows an answer", *both) for both in zip(found.batch_decode(ids), texts, strict=True)
    ]
    whole = texts + prompts
    pairs += [
        ("splits a text", *both)
        for both in zip(split(found, whole), split(expected, whole), strict=True)
    ]
    for does, one, other in pairs:
        if one != other:
            same = zip(one, other, strict=False)
            at = next((i for i, (a, b) in enumerate(same) if a != b), min(len(one), len(other)))
            one, other = (value[at : at + SHOWN] for value in (one, other))
            return f"{does} as {one!r} and that of the held-out rows as {other!r}"
    return None


def conversations(texts: list[str]) -> list[list[dict]]:
    """Each text as a question, and the first in every place that a conversation has."""
    asked = [[{"role": "user", "content": text}] for text in texts]
    [question] = asked[0]
    system = {"role": "system", "content": texts[0]}
    answer = {"role": "assistant", "content": texts[0]}
    return [*asked, [system, question], [question, answer], [question, answer, question]]


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> str:
    """The prompt, or the template's error, which must be the same in both tokenizers."""
    try:
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
        )
    except Exception as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return cast(str, prompt)  # Other arguments give other types.


def split(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Sequence[str]]:
    """The tokens of each text, including added special tokens."""
    return [list(tokenizer.convert_ids_to_tokens(ids)) for ids in tokenizer(texts)["input_ids"]]

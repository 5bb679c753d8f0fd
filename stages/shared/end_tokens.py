"""The tokens that end an answer, from a tokenizer's folder."""

from pathlib import Path

from tokenizers import Tokenizer

from stages.shared.outputs import read_json

# Present if there are several end tokens; its eos_token_id lists them all.
GENERATION = "generation_config.json"


def end_tokens(folder: Path, known: int | list[int] | None = None) -> list[int]:
    """The known end tokens, the EOS of the tokenizer in `folder`, and other learned ones."""
    token = read_json(folder / "tokenizer_config.json").get("eos_token")
    token = token["content"] if isinstance(token, dict) else token
    eos = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token) if token else None
    others = folder / GENERATION
    learned = read_json(others).get("eos_token_id") if others.exists() else None
    ids: list[int | None] = []
    for each in (known, eos, learned):
        ids += each if isinstance(each, list) else [each]
    return [i for i in dict.fromkeys(ids) if i is not None]

"""The tokens that end an answer, where a tokenizer's folder says so."""

from pathlib import Path

from tokenizers import Tokenizer

from stages.shared.outputs import read_json

# Beside the tokenizer where answers end in several ways; its eos_token_id lists them all.
GENERATION = "generation_config.json"


def end_tokens(folder: Path, known: int | list[int] | None = None) -> list[int]:
    """The known end tokens, the EOS of the tokenizer in `folder`, and the others it learned."""
    ids = known if isinstance(known, list) else [] if known is None else [known]
    config = read_json(folder / "tokenizer_config.json")
    token = config.get("eos_token")
    token = token["content"] if isinstance(token, dict) else token
    learned: list[int | None] = []
    if token is not None:
        # None where tokenizer.json lacks what its configuration names.
        learned = [Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)]
    if (folder / GENERATION).exists():
        others = read_json(folder / GENERATION).get("eos_token_id") or []
        learned += others if isinstance(others, list) else [others]
    return list(dict.fromkeys(id for id in [*ids, *learned] if id is not None))

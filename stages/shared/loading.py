"""Checks that transformers can load a downloaded tokenizer and its generation settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig

from stages.shared.bounded import bounded
from stages.shared.end_tokens import GENERATION
from stages.shared.foreign import Foreign, held_to, read_object
from stages.shared.process import StageError


class TokenIds(Foreign):
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


def check_tokenizer(folder: Path, id: str, remedy: str) -> None:
    """Raise StageError, naming the model `id`, unless `folder` has a fast tokenizer that loads and
    runs. Generation settings, if there are any, must load too."""
    config, generation = folder / "tokenizer_config.json", folder / GENERATION
    if config.exists() and "auto_map" in read_object(config, f"{id}: {config.name}"):
        raise StageError(f"{id}: its tokenizer needs code of its own, which is never run; {remedy}")
    if generation.exists():
        where = f"{id}: {GENERATION}"
        held_to(TokenIds, read_object(generation, where), where)
    bounded(partial(_load, folder, id, remedy), f"{id}: loading its tokenizer", remedy)


def _load(folder: Path, id: str, remedy: str) -> None:
    with one_line(f"{id}: its tokenizer does not load", remedy):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        vocabulary, special = tokenizer.get_vocab(), tokenizer.all_special_tokens
        tokenizer.decode(tokenizer.encode("Two words.\n"))
    if not tokenizer.is_fast:
        missing = "has no fast tokenizer (tokenizer.json), which this pipeline needs"
        raise StageError(f"{id} {missing}; {remedy}")
    # If tokenizer.json is missing, transformers silently makes an empty tokenizer.
    if len(vocabulary) <= len(special):
        raise StageError(f"{id}: its tokenizer has no vocabulary; is tokenizer.json missing?")
    if (folder / GENERATION).exists():
        with one_line(f"{id}: its {GENERATION} does not load", remedy):
            GenerationConfig.from_pretrained(folder, local_files_only=True)


@contextmanager
def one_line(what: str, remedy: str) -> Iterator[None]:
    """Turn any error into a StageError of one line. A library may raise anything for a foreign
    file; panics of Rust code are no Exception."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        reason = " ".join(str(error)[:1000].split())[:120] or type(error).__name__
        raise StageError(f"{what}: {reason.rstrip('.')}; {remedy}") from None

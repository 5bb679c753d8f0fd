"""Checks that every token id has a row in the embeddings; otherwise training would crash."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
from transformers import AutoTokenizer, PretrainedConfig

from stages.shared.process import StageError


def check_token_ids(
    config: PretrainedConfig, prepared: Path, trained: tuple[int, ...] = ()
) -> None:
    """Refuse rows with a token beyond the embeddings. Print tokens of the tokenizer without a row,
    and tokens of `trained` that occur in no training row.

    Raises StageError naming the first such row.
    """
    size = config.get_text_config().vocab_size
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    beyond = {id: token for token, id in tokenizer.get_vocab().items() if id >= size}
    lacks = f"and the embeddings have {size} rows (vocab_size)"
    for file in sorted(prepared.glob("*.arrow")):
        with pa.memory_map(str(file)) as source:
            table = pyarrow.ipc.open_stream(source).read_all()
            largest = pc.max(pc.list_flatten(table["input_ids"])).as_py()
            if file.stem == "train" and trained:
                tell_unseen(tokenizer, trained, pc.unique(pc.list_flatten(table["input_ids"])))
            if largest < size:
                continue
            at = pc.index(pc.greater_equal(pc.list_flatten(table["input_ids"]), size), True)
            row = table["row"][pc.list_parent_indices(table["input_ids"])[at.as_py()].as_py()]
        raise StageError(
            f"{row}: has the token {beyond.get(largest)!r}, which is {largest}, {lacks}; take it "
            "out of the data or the template (prepare.template), name it in lora.new_tokens, or "
            "choose another model"
        )
    if tokenizer.pad_token_id in beyond:
        raise StageError(
            f"{prepared}/tokenizer: rows are padded with {tokenizer.pad_token}, which is "
            f"{tokenizer.pad_token_id}, {lacks}; set another pad_token in the model's "
            "tokenizer_config.json, in a copy with model.source: local"
        )
    if beyond:
        first = min(beyond)
        print(
            f"plan: warning: the tokenizer knows {len(beyond)} tokens that no row of the data has, "
            f"such as {beyond[first]!r}, which is {first}, {lacks}: a prompt with one of them "
            "would stop the model"
        )


def tell_unseen(tokenizer, trained: tuple[int, ...], seen: pa.Array) -> None:
    """Print the trained tokens that occur in no training row."""
    unseen = set(trained) - set(seen.to_pylist())
    if unseen:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(unseen))))
        print(f"plan: warning: lora.new_tokens: no training row has {names}")

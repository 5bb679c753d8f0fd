"""Further rows for the embeddings and the output head, of tokens that a base model lacks.

Each is the mean of the model's own rows. transformers' resize_token_embeddings adds a noise of a
billionth to it; here it is the same each time.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from stages.shared.outputs import read_json
from stages.shared.process import StageError

# More new rows than any template needs.
MOST_NEW_ROWS = 2**16
# Rows that are in float64 at once.
BLOCK_ROWS = 4096


def mean_row(read: Callable[[slice], torch.Tensor], rows: int) -> torch.Tensor:
    """The mean of `rows` rows, [width] in bfloat16; `read` gives those of a slice."""
    starts = range(0, rows, BLOCK_ROWS)
    blocks = (read(slice(start, min(start + BLOCK_ROWS, rows))) for start in starts)
    sums = torch.stack([block.double().sum(0) for block in blocks])
    return (sums.sum(0) / rows).to(torch.bfloat16)


def extended(weight: torch.Tensor, count: int) -> torch.Tensor:
    """`weight` [rows, width] with `count` rows, if it has fewer."""
    if (more := count - len(weight)) <= 0:
        return weight
    mean = mean_row(weight.__getitem__, len(weight)).to(weight)
    return torch.cat([weight, mean.expand(more, -1)])


def copy_bytes(vocabulary: int, width: int, on_gpu: bool) -> float:
    """Bytes of the copy of the embeddings that PEFT makes in each pass for an adapter's rows."""
    return (2.0 if on_gpu else 4.0) * vocabulary * width


def set_vocabulary(config: PretrainedConfig, count: int) -> None:
    """Set `config` to a model extended to `count` rows."""
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, count)


def extend(model: PreTrainedModel, count: int, start: Sequence[int] = ()) -> None:
    """Give `model` `count` rows, if it has fewer; rows of `start` begin as the mean too.

    One matrix at a time, so that no more than one is there twice. Raises StageError for far more
    rows than the model has.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    rows = len(embeddings.weight)
    if count > rows + MOST_NEW_ROWS:
        raise StageError(f"the adapter has rows of {count} tokens, and the base has {rows} rows")
    if count <= rows and not start:
        return
    for part in (embeddings,) if head.weight is embeddings.weight else (embeddings, head):
        own = part.weight.data
        mean = mean_row(own.__getitem__, len(own)).to(own)
        # A copy in any case: the base's own may be those of a mapped file.
        weight = own.new_empty(max(count, len(own)), own.shape[1])
        weight[: len(own)] = own
        weight[len(own) :] = mean
        weight[list(start)] = mean
        part.weight.data = weight
    embeddings.num_embeddings = head.out_features = len(embeddings.weight)
    set_vocabulary(model.config, len(embeddings.weight))
    model.vocab_size = len(embeddings.weight)


def names_of_embeddings(model: PreTrainedModel) -> list[str]:
    """The modules that have rows of their own: the embeddings, and a head that is not tied."""
    wanted = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        wanted.append(model.get_output_embeddings())
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in wanted]


def has_own_head(base: Path, quantized: Path) -> bool:
    """Whether quantize found that the output head of `base` differs from the embeddings, to which
    its configuration ties it."""
    if read_json(quantized / "config.json").get("tie_word_embeddings") is not False:
        return False
    config = AutoConfig.from_pretrained(base)
    # One family says it only of the text.
    says = config if hasattr(config, "tie_word_embeddings") else config.get_text_config()
    return bool(getattr(says, "tie_word_embeddings", False))


def untied(config: dict) -> dict:
    """`config` (a config.json) with an output head of its own.

    Of several towers transformers 4 asks that of the text, 5 that of the whole.
    """
    made = config | {"tie_word_embeddings": False}
    if "text_config" in made:
        made["text_config"] = made["text_config"] | {"tie_word_embeddings": False}
    return made


def with_vocabulary(config: dict, base: Path, count: int) -> dict:
    """`config` (a config.json of the model of `base`) with at least `count` rows."""
    if not count or AutoConfig.from_pretrained(base).get_text_config().vocab_size >= count:
        return config
    rows = {"vocab_size": count}
    if "text_config" not in config:
        return config | rows
    # Some with several towers say it of the whole too.
    whole = rows if "vocab_size" in config else {}
    return config | {"text_config": config["text_config"] | rows} | whole

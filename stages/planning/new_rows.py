"""Checks that the model can get and train rows for tokens that it lacks."""

from pathlib import Path
from typing import Any

import torch

from stages.shared.process import StageError
from stages.shared.text_model import language_model, read_config
from stages.shared.workload import Lengths


def check_new_rows(folder: Path, rows: Lengths) -> None:
    """Raise StageError if PEFT could not train, or transformers could not serve, the new tokens of
    `rows` in the model of `folder`/config.json."""
    if not rows.trained:
        return
    model = language_model(read_config(folder))
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    text: Any = model.config.get_text_config()
    fault = ""
    if not isinstance(embeddings, torch.nn.Embedding) or not isinstance(head, torch.nn.Linear):
        fault = "its embeddings or its output head are of a kind that PEFT does not know"
    elif getattr(head, "bias", None) is not None:
        fault = "its output head has a bias, which PEFT leaves out where it trains rows"
    elif rows.vocabulary > text.vocab_size and getattr(text, "vocab_size_per_layer_input", 0):
        fault = "it has embeddings for each layer, which would need further rows too"
    if fault:
        raise StageError(
            f"lora.new_tokens: not supported for {text.model_type}: {fault}; leave it empty, and "
            "set prepare.template to text without marks, with {prompt} in it"
        )

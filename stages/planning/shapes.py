"""The shape of a base model, read off its configuration: no weights are loaded."""

import difflib
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from stages.shared import vram
from stages.shared.process import StageError


def read_model(folder: Path) -> tuple[PretrainedConfig, vram.Shape]:
    """The model of `folder`/config.json; no weights are read."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config, shape_of(config)
    except (AttributeError, KeyError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"{folder}/config.json: not a decoder that plan knows: {reason}") from None


def shape_of(config: PretrainedConfig) -> vram.Shape:
    """The shape of the model, read off its modules, which are built on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if any(".experts." in name for name, _ in model.named_parameters()):
        # peft would also adapt the fused experts, which merge refuses when all is trained.
        raise ValueError("mixtures of experts cannot be merged; choose a dense base model")
    text = config.get_text_config()
    heads, head = text.num_attention_heads, model.get_output_embeddings()
    linears = tuple(
        vram.Linear(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head
    )
    return vram.Shape(
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        silu=getattr(text, "hidden_act", None) == "silu",
        plain=any(type(module).__name__ in vram.PLAIN_LAYERS for module in model.modules()),
        linears=linears,
        other_parameters=model.num_parameters() - sum(x.parameters for x in linears),
    )


def match_targets(shape: vram.Shape, wanted: str | list[str]) -> frozenset[str]:
    """Names of the Linears that get an adapter, matched as peft does (by the end of the name).

    Raises StageError for a name that is no Linear of the base: peft would skip it in silence.
    """
    names = [x.name for x in shape.linears]
    if wanted == "all-linear":
        return frozenset(names)
    found = set()
    for target in wanted:
        matches = [n for n in names if n == target or n.endswith(f".{target}")]
        if not matches:
            short = sorted({n.rsplit(".", 1)[-1] for n in names})
            near = difflib.get_close_matches(target, short, 1, 0.4)
            raise StageError(
                f"params.yaml: lora.target_modules: {target} is no linear layer of the base "
                f"that can be adapted; "
                + (f"did you mean {near[0]}? " if near else "")
                + f"It has {', '.join(short)}"
            )
        found.update(matches)
    return frozenset(found)

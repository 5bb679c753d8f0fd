"""Checks that PEFT adapted exactly the modules that were asked for.

In families whose experts were Linears in transformers 4 (Mixtral and relatives of Qwen2-MoE), PEFT
takes the layers of any MLP for experts. A dense MLP or a shared expert then gets no adapter, with
only a warning.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import transformers_weight_conversion as conversion

from stages.shared.process import StageError


@contextmanager
def targets_as_written() -> Iterator[None]:
    """Keep PEFT from rewriting target_modules."""
    mapping = conversion._MOE_TARGET_MODULE_MAPPING
    kept = dict(mapping)
    mapping.clear()
    try:
        yield
    finally:
        mapping.update(kept)


def lost_elsewhere(family: str, modules: Collection[str]) -> list[str]:
    """Those of `modules` that PEFT by itself leaves out, since it takes them for experts."""
    names = conversion._MOE_TARGET_MODULE_MAPPING.get(
        conversion._MODEL_TO_CONVERSION_PATTERN.get(family, ""), {}
    )
    return sorted(module for module in modules if module.rsplit(".", 1)[-1] in names)


def check_adapted(model: PeftModel, asked: Collection[str], what: str, remedy: str) -> None:
    """Raise StageError unless exactly the modules `asked` for have an adapter.

    what    the parameter or folder that asks for them
    remedy  what the user can do
    """
    base: Any = model.get_base_model()
    asked = set(asked)
    # Modules shared by several layers have several names.
    every = {n for n, m in base.named_modules(remove_duplicate=False) if isinstance(m, LoraLayer)}
    found = {n for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    lists = {"no adapter": sorted(asked - every), "one": sorted(found - asked)}
    told = [
        f"{names[0]}{f' (and {len(names) - 1} others)' if len(names) > 1 else ''} gets {given}"
        for given, names in lists.items()
        if names
    ]
    if told:
        raise StageError(
            f"{what}: PEFT does otherwise for {base.config.model_type}: {', '.join(told)}; {remedy}"
        )

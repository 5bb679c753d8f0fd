"""Reading a LoRA adapter for a merge: what cannot be merged right is refused by name.

An adapter is a folder as PEFT saves it (adapter_config.json, adapter_model.safetensors), made by
`train` or by any other tool. For a module with weight W [out, in] it holds A [r, in] and
B [out, r]; the merged weight is W + (B A) * alpha / r, or alpha / sqrt(r) with rsLoRA
(LoRA: arXiv 2106.09685; rsLoRA: arXiv 2312.03732). Beside them it may hold whole rows of the
embeddings and of the output head, of tokens that were trained (PEFT's trainable_token_indices).
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from stages.shared.adapter_config import (
    CONFIG,
    Config,
    indices,
    is_target,
    rank_and_scaling,
    read_config,
)
from stages.shared.bounded import bounded
from stages.shared.embeddings import MOST_NEW_ROWS
from stages.shared.expert_updates import (
    ExpertUpdate,
    Target,
    check_finite,
    expert_targets,
    expert_updates,
)
from stages.shared.foreign import held_to, read_object
from stages.shared.outputs import SUMS, check_sums
from stages.shared.process import StageError
from stages.shared.weights import TYPES

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
ROWS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
EMBEDDING = re.compile(r"(^|\.)(lm_head|embed_tokens|embed_out|wte)\.weight$")
# What lies in one of the layers.
LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Update:
    """One module's low-rank update, still on disk."""

    file: Path
    module: str
    scaling: float

    # What is added to the weight is not rounded before.
    rounded_first = False

    def deltas(self, device: torch.device) -> Callable[[slice], torch.Tensor]:
        """A function that gives scaling * B A for a block of the weight's rows, float32."""
        a, b = self.factors(device)
        return lambda block: (b[block] @ a).mul_(self.scaling)

    def factors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] in float32, as PEFT computes with them."""
        with safe_open(self.file, framework="pt") as tensors:
            return tuple(
                tensors.get_tensor(f"base_model.model.{self.module}.lora_{half}.weight").to(
                    device, torch.float32
                )
                for half in "AB"
            )


@dataclass(frozen=True)
class Rows:
    """Rows of the embeddings or the output head that take the base's place, still on disk.

    key  of the tensor in the file, [len(ids), width]
    ids  which rows; those beyond the base's come to it
    """

    file: Path
    key: str
    ids: tuple[int, ...]

    def values(self) -> torch.Tensor:
        """[len(ids), width] in float32."""
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(self.key).float()

    @property
    def count(self) -> int:
        """Rows that a tensor must have to hold them."""
        return max(self.ids) + 1


# What is added to a tensor of the base, or takes the place of some of its rows.
Change = Update | ExpertUpdate | Rows


def check_adapter_sums(folder: Path) -> None:
    """Compare the adapter with its SHA256SUMS. One that was copied in may carry none."""
    if (folder / SUMS).exists():
        check_sums(folder, "train")
    else:
        print(f"{folder} has no {SUMS}: taken as it is")


def read_adapter(
    folder: Path, shapes: dict[str, tuple[int, ...]], base: Path | None = None
) -> dict[str, Change]:
    """Updates by the name of the weight they are added to, or whose rows they take.

    `shapes` are those of the base's tensors, and `base` the folder of its config.json. Every
    factor is read once and must be finite, of the rank that the configuration says, and fit its
    weight; PEFT must put an update onto exactly the modules that the file has one for. Raises
    StageError.
    """
    config, (halves, trained) = read_config(folder), factor_shapes(folder)
    experts: dict[str, Target] = {}
    if config.target_parameters:
        experts = expert_targets(config.target_parameters, base, shapes, str(folder))
    modules = sorted({module for module, _ in halves} - experts.keys())
    for module in modules:
        _check_module(f"{folder}: {module}", f"{module}.weight", shapes)
    named, settings = bounded(
        partial(_as_peft, config, modules, [x.tensor for x in experts.values()], shapes),
        f"{folder / CONFIG}: target_modules, exclude_modules or a pattern",
        "write them as plain names",
    )
    _check_complete(folder, set(modules), named)
    updates: dict[str, Change] = {}
    for module in modules:
        where, weight = f"{folder}: {module}", f"{module}.weight"
        rank, scaling = settings[module]
        of_module = {half: halves.get((module, half)) for half in "AB"}
        out, into = shapes[weight]
        _check_factors(where, of_module, {"A": (rank, into), "B": (out, rank)}, rank)
        updates[weight] = update = Update(folder / WEIGHTS, module, scaling)
        for half, factor in zip("AB", update.factors(torch.device("cpu")), strict=True):
            if not factor.isfinite().all():
                raise StageError(f"{where}: lora_{half} has NaN or infinite values; train it again")
    for module, target in experts.items():
        where, file = f"{folder}: {module}", folder / WEIGHTS
        rank, scaling = settings[target.tensor]
        of_module = {half: halves.get((module, half)) for half in "AB"}
        _check_factors(where, of_module, target.factor_shapes(rank), rank)
        check_finite(file, module, where)
        updates |= expert_updates(file, module, target, rank, scaling)
    return updates | _read_rows(folder, config, trained, shapes, base)


def rows_needed(folder: Path) -> int:
    """How many rows the embeddings must have for the adapter in `folder`; 0 for any."""
    wanted = held_to(Config, read_object(folder / CONFIG), str(folder / CONFIG))
    return max((max(ids) + 1 for ids in indices(wanted).values() if ids), default=0)


def _read_rows(
    folder: Path,
    config: Config,
    trained: dict[str, tuple[int, ...]],
    shapes: dict,
    base: Path | None,
) -> dict[str, Rows]:
    """`trained` are the shapes of rows by module. Raises StageError where PEFT would not have
    exactly these."""
    found: dict[str, Rows] = {}
    wanted = indices(config)
    for module, shape in trained.items():
        where, weight = f"{folder}: {module}", f"{module}.weight"
        ids = next((ids for end, ids in wanted.items() if module.endswith(end)), [])
        if len(shapes.get(weight, ())) != 2 or LAYER.search(weight):
            raise StageError(f"{where}: has rows, and is no embedding or head of the base")
        rows, width = shapes[weight]
        if not ids or shape != (len(ids), width) or len(set(ids)) < len(ids):
            raise StageError(
                f"{where}: has {_by(shape)} values of rows and must have {len(ids)} x {width}, one "
                f"for each of trainable_token_indices in {CONFIG}"
            )
        if max(ids) >= rows + MOST_NEW_ROWS:
            raise StageError(f"{where}: a row for token {max(ids)}, and the base has {rows} rows")
        key = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
        found[weight] = Rows(folder / WEIGHTS, key, tuple(ids))
        if not found[weight].values().isfinite().all():
            raise StageError(f"{where}: a row has NaN or infinite values; train it again")
    tied = bool(found and base and AutoConfig.from_pretrained(base).tie_word_embeddings)
    without = [end for end in wanted if not any(module.endswith(end) for module in trained)]
    if wanted and (not found or (without and not tied)):
        of = f" of {without[0]}" if found else ""
        raise StageError(f"{folder}: trainable_token_indices has no rows{of}; it is incomplete")
    if tied and len({tuple(sorted(ids)) for ids in wanted.values()}) > 1:
        names = ", ".join(wanted)
        raise StageError(
            f"{folder}: trainable_token_indices has other tokens for each of {names}, which are "
            "tied"
        )
    return found | _rows_of_twins(folder, found, shapes, tied)


def _rows_of_twins(
    folder: Path, found: dict[str, Rows], shapes: dict, tied: bool
) -> dict[str, Rows]:
    """Rows of the embeddings or the head where only the other has its own: those of a tied one."""
    made = {}
    for name, rows in found.items():
        twins = [n for n, s in shapes.items() if s == shapes[name] and not LAYER.search(n)]
        for twin in set(twins) - found.keys():
            if tied:
                made[twin] = rows
            elif rows.count > shapes[twin][0]:
                raise StageError(
                    f"{folder}: brings tokens that the base lacks and no rows of theirs for "
                    f"{twin}, which is not tied; train it again with trainable_token_indices for "
                    "both"
                )
    return made


def factor_shapes(
    folder: Path,
) -> tuple[dict[tuple[str, str], tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shape of every factor by module and half (A or B), and of the trained rows by module. Raises
    StageError."""
    shapes, rows = {}, {}
    if (folder / WEIGHTS).exists() and not (folder / WEIGHTS).is_file():
        raise StageError(f"{folder / WEIGHTS}: not a file")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                if (letters := tensors.get_slice(key).get_dtype()) not in TYPES:
                    raise StageError(
                        f"{folder / WEIGHTS}: {key} is {letters}, not a float type; an adapter "
                        "that is quantized is not supported"
                    )
                if of_rows := ROWS.fullmatch(key):
                    rows[of_rows["module"]] = tuple(tensors.get_slice(key).get_shape())
                    continue
                match = KEY.fullmatch(key)
                if not match:
                    raise StageError(
                        f"{folder / WEIGHTS}: {key} is no lora_A or lora_B of a Linear "
                        "(DoRA, an embedding or a retrained module?), which is not supported"
                    )
                shapes[match["module"], match["half"]] = tuple(tensors.get_slice(key).get_shape())
    except (FileNotFoundError, SafetensorError) as error:
        if (folder / PICKLED).exists() and not (folder / WEIGHTS).exists():
            raise StageError(
                f"{folder} has pickled weights only ({PICKLED}), which can run code when loaded; "
                "convert it on a machine you can spare with PEFT's save_pretrained"
            ) from None
        raise StageError(f"{folder / WEIGHTS}: cannot be read ({error})") from None
    if not shapes:
        raise StageError(f"{folder / WEIGHTS} holds no LoRA tensor")
    return shapes, rows


def _check_module(where: str, weight: str, shapes: dict) -> None:
    """The base must have the weight, in a Linear that a merge can add to."""
    if EMBEDDING.search(weight):
        raise StageError(f"{where}: LoRA on the embeddings or the output head is not supported")
    if weight not in shapes:
        near = difflib.get_close_matches(weight, shapes, 1, 0)
        raise StageError(
            f"{where}: the base has no such module (nearest: "
            f"{near[0].removesuffix('.weight')}); was the adapter made for another base model?"
        )
    if len(shapes[weight]) != 2:
        raise StageError(f"{where}: not a Linear of the base but a fused layout, not supported")


def _check_factors(where: str, found: dict, wanted: dict, rank: int) -> None:
    """The shapes `found` of A and B must be those `wanted`."""
    for half, expected in wanted.items():
        if not found[half]:
            raise StageError(f"{where}: lora_{half} is missing; the adapter is incomplete")
        if found[half] != expected:
            raise StageError(
                f"{where}: lora_{half} is {_by(found[half])} and must be {_by(expected)} (rank "
                f"{rank}, weight {_by((wanted['B'][0], wanted['A'][1]))}); wrong rank, transposed, "
                "or made for another base model"
            )


def _as_peft(
    config: Config, modules: list[str], tensors: list[str], shapes: dict
) -> tuple[set[str], dict[str, tuple[int, float]]]:
    """The Linears that PEFT puts an update onto, and rank and scaling of `modules` and of `tensors`
    of experts.

    Both come from regular expressions in the configuration, so call it with `bounded`.
    """
    weights = [w for w, shape in shapes.items() if w.endswith(".weight") and len(shape) == 2]
    # Experts that files hold one by one are no modules of a model.
    none = re.compile(rf"{EMBEDDING.pattern}|\.experts\.")
    linears = [weight.removesuffix(".weight") for weight in weights if not none.search(weight)]
    try:
        if config.target_modules == "all-linear":
            named = set(linears)
        else:
            named = {name for name in linears if is_target(config, name)}
        return named, {name: rank_and_scaling(config, name) for name in [*modules, *tensors]}
    except (re.error, RecursionError, OverflowError) as error:
        raise StageError(
            f"{CONFIG}: target_modules, exclude_modules or a pattern is no regular expression "
            f"that matches ({error})"
        ) from None


def _check_complete(folder: Path, modules: set[str], named: set[str]) -> None:
    """The modules of the file must be the ones that the configuration names."""
    if missing := sorted(named - modules):
        raise StageError(
            f"{folder}: {missing[0]} is among the adapter's target_modules and has no tensors; "
            "the adapter is incomplete or was made for another base model"
        )
    if unnamed := sorted(modules - named):
        raise StageError(
            f"{folder}: {unnamed[0]} has tensors and is not among the adapter's target_modules "
            f"(nor are {len(unnamed) - 1} others), so PEFT would leave it out; name it in {CONFIG}"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

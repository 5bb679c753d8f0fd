"""Builds the trainer of a base, with an adapter, the fast path and a placement.

For the train stage and for benchmarks.
"""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages.shared.adapted import check_adapted, lost_elsewhere, targets_as_written
from stages.shared.expert_lora import stand_ins, use_factors, wrapper_names
from stages.shared.fast_path import VARLEN, FastPath, plain_layers
from stages.shared.linears import adaptable_linears, targets_of
from stages.shared.params import Params
from stages.shared.placement import Placement
from stages.shared.ranks import ALONE, World
from stages.shared.rows import token_counts
from stages.shared.streaming import Streamer
from stages.shared.text_model import head_size
from stages.training.adjusting import (
    apply_liger,
    leave_out_attention_dropout,
    remember_parameters,
    train_together,
)
from stages.training.attention import use_flash_4
from stages.training.fused_lora import fuse_lora, keep_dense
from stages.training.offload import HostStash
from stages.training.settings import lora_config, optimizer_steps, trainer_config
from stages.training.token_rows import train_rows
from stages.training.trainer import Trainer
from stages.training.trial import Trial


@dataclass(frozen=True)
class TrainingSet:
    """`rows` with input_ids and labels; packing fills rows up to `max_length` tokens. `trained`:
    ids of tokens whose rows of the embeddings and the head are trained too."""

    rows: Dataset
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    trained: tuple[int, ...] = ()


def build_trainer(
    model: PreTrainedModel,
    data: TrainingSet,
    params: Params,
    fast: FastPath,
    placement: Placement,
    folder: Path,
    world: World = ALONE,
    streamer: Streamer | None = None,
) -> Trainer:
    """A trainer of a float32 adapter on a frozen base from load_base.

    Each rank builds its own, with the batch size and accumulation of its share.

    folder    for checkpoints
    streamer  of the base, if its layers are streamed

    Raises StageError if the check on two rows finds that these settings cannot train the model.
    """
    trial = Trial(model, data.rows)
    if fast.liger:
        apply_liger(model)
    fast = trial.batches(model, fast, params.train.batching == "packing")
    if dropped := leave_out_attention_dropout(model):
        print(f"train: the base's attention_dropout ({dropped:g}) is switched off")
    targets = targets_of(params.lora.target_modules, adaptable_linears(model))
    experts = wrapper_names(model) if params.lora.experts else set()
    with targets_as_written(), stand_ins(model):
        trainer = Trainer(
            model=model,
            args=trainer_config(model, data.max_length, params, fast, placement, folder),
            train_dataset=data.rows,
            processing_class=data.tokenizer,
            peft_config=lora_config(params.lora, model, data.trained),
            world=world,
        )
    check_adapted(
        trainer.model,
        targets | experts,
        "lora.target_modules",
        "name modules that it takes as they are",
    )
    use_factors(trainer.model)
    tell_lost(model.config.model_type, targets)
    assert trainer.args.train_batch_size == params.train.batch_size
    if optimizer_steps(len(trainer.train_dataset), params.train) == 1:
        # The first step of a warmup has a learning rate of zero.
        trainer.args.warmup_steps = 0
    # trl casts the adapter of a quantized base to bfloat16, and loading a checkpoint casts it back
    # to float32, so that a resumed run would differ. Use float32 from the start.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    train_rows(trainer.model)
    trainer.model.eval()
    trainer.fused_head = trial.fused_head(trainer.model.get_base_model())
    trainer.streamer = streamer

    def fuse() -> None:
        stash = host_stash(trainer, fast, placement)
        fuse_lora(trainer.model, fast.liger, placement, stash, streamer)

    fused = fast.fused_lora and trial.fused_layers(trainer.model, fuse)
    trainer.fast_path = replace(fast, fused_lora=fused)
    if fused and placement.dense:
        trainer.dense_bytes = keep_dense(trainer.model, fast.liger, placement.dense)
    if not fused and not placement.kept_mlp:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.enable_input_require_grads()
    remember_parameters(trainer.model)
    if world.size > 1:
        train_together(trainer.model, world, params.seed)
    return trainer


def as_installed(fast: FastPath, config: PretrainedConfig) -> FastPath:
    """`fast`, with FlashAttention 4 if it is installed, and without Liger's kernels if they are
    not; a message says so."""
    if fast.attention == VARLEN:
        flash_4 = use_flash_4(head_size(config.get_text_config()))
        fast = replace(fast, flash_attention_4=flash_4)
    if not fast.liger or importlib.util.find_spec("liger_kernel"):
        return fast
    print(
        "train: Liger's kernels are not installed: training needs more time and memory than plan "
        "says; pip install --no-deps --require-hashes -r requirements-kernels.lock"
    )
    return replace(fast, liger=False)


def host_stash(trainer: Trainer, fast: FastPath, placement: Placement) -> HostStash | None:
    """Host memory for the inputs of layers checkpointed in halves; None if there are none."""
    if not placement.offload or not plain_layers(trainer.model):
        return None
    size = trainer.args.per_device_train_batch_size
    tokens = largest_pass(trainer.train_dataset, size, fast.padding_free)
    token = trainer.model.get_input_embeddings().weight[0]
    return HostStash(trainer.model.device, tokens * token.nbytes)


def largest_pass(rows: Dataset, batch_size: int, padding_free: bool) -> int:
    """Tokens of the largest forward pass over `rows` (packs, when packed), padding counted."""
    longest = sorted(token_counts(rows.with_format("arrow")[:]))[-batch_size:]
    return sum(longest) if padding_free else len(longest) * longest[-1]


def tell_lost(family: str, targets: set[str]) -> None:
    """Print which modules of the adapter PEFT alone would not load."""
    if lost := lost_elsewhere(family, targets):
        print(
            f"train: PEFT alone would skip {len(lost)} of the adapter's {len(targets)} modules, "
            f"such as {lost[0]}, since it mistakes them for experts of {family}; serve "
            "models/release, which has all of them"
        )

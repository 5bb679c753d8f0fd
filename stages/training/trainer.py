"""The trainer of this pipeline, for the train stage and for the benchmarks alike."""

import importlib.util
import math
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from stages.shared.adapted import check_adapted, lost_elsewhere, targets_as_written
from stages.shared.embeddings import names_of_embeddings
from stages.shared.expert_lora import stand_ins, target_parameters, use_factors, wrapper_names
from stages.shared.experts import expert_stacks
from stages.shared.fast_path import FastPath, plain_layers
from stages.shared.linears import adaptable_linears, targets_of, unadaptable_linears
from stages.shared.params import Lora, Params, Train
from stages.shared.placement import Placement
from stages.shared.ranks import ALONE, World
from stages.shared.rows import IGNORED, token_counts
from stages.shared.scoring import Scores, score
from stages.shared.streaming import Streamer
from stages.training import attention
from stages.training.dealing import Dealt, GroupedByLength, no_rows
from stages.training.fused_lora import fuse_lora
from stages.training.offload import HostStash
from stages.training.token_rows import train_rows
from stages.training.trial import Trial

# trl's output head leaves out what is not learned where it can have Triton; elsewhere it scores
# every position, which on a CPU took half of a step. (Its kernels ask another function.)
trl.trainer.utils._use_triton = lambda device: True
# Before a model is loaded that asks for it.
attention.register()


@dataclass(frozen=True)
class TrainingSet:
    """`rows` with input_ids and labels; packing fills rows up to `max_length` tokens. `trained` are
    tokens whose rows of the embeddings and the head train too."""

    rows: Dataset
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    trained: tuple[int, ...] = ()


class Trainer(SFTTrainer):
    """trl's trainer without its per-step statistics, each of which waits for the GPU.

    `tokens` counts those that were trained on, padding not counted.
    """

    model: PeftModel
    train_dataset: Dataset
    tokens = 0
    # Whether trl's output head gives the model's own logits (stages/training/trial.py).
    fused_head = True
    # Of the base, where its layers' weights are streamed.
    streamer: Streamer | None = None

    def __init__(self, world: World = ALONE, **options):
        self.world = world
        super().__init__(**options)
        # Whatever a family says of its own loss, this one needs the tokens of a whole step.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        # The tokens of every batch are counted on the host, where it is made ahead of its step.
        self.ahead: deque[int] = deque()
        collate = self.data_collator

        def counting(examples):
            self.ahead.append(sum(len(example["input_ids"]) for example in examples))
            return collate(examples or no_rows(self.train_dataset))

        self.data_collator = counting

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean NLL of the learned tokens of a whole step, through trl's fused output head."""
        self.tokens += self.ahead.popleft()
        # The tokens of all ranks, whose gradients DDP averages.
        tokens = num_items_in_batch / self.world.size
        if self.fused_head:
            output = model(**inputs, use_cache=False, fused_lm_head=True)
            return -output.log_probs.sum() / tokens
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        learned = labels != IGNORED
        logits, labels = logits[learned].float(), labels[learned]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / tokens

    def score(self, rows: list[dict], tokens_per_batch: int) -> Scores:
        """Score `rows` with the adapter as it is; streamed weights pass once."""
        return score(self.model, rows, tokens_per_batch, self.world, self.streamer)

    def _get_train_sampler(self, train_dataset=None):
        """As transformers does, told the lengths: it would decode every row to count its tokens."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = token_counts(rows.with_format("arrow")[:])
        return GroupedByLength(self.rows_per_step, lengths, self)

    @property
    def rows_per_step(self) -> int:
        """Of all ranks together."""
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * self.world.size

    def get_train_dataloader(self):
        """As transformers does; of several ranks each has its share of the rows of every step."""
        loader = super().get_train_dataloader()
        if self.world.size > 1:
            shard: Any = loader.batch_sampler
            lengths = token_counts(self.train_dataset.with_format("arrow")[:])
            order = shard.batch_sampler.sampler
            shard.batch_sampler = Dealt(order, lengths, self)
            # Passed through: what comes is this rank's already.
            shard.num_processes, shard.process_index = 1, 0
            shard.batch_size, shard.even_batches = None, False
        return loader

    def _prepare_for_training(self, *positional, **named):
        """As transformers does; the wrapper of several ranks answers from memory too."""
        model, loader = super()._prepare_for_training(*positional, **named)
        if model is not self.model:
            model.parameters, model.zero_grad = self.model.parameters, self.model.zero_grad
        return model, loader

    def floating_point_ops(self, inputs) -> int:
        """Not estimated: the estimate walks through all modules at every step."""
        return 0


def lora_config(
    lora: Lora, model: PreTrainedModel | None = None, trained: tuple[int, ...] = ()
) -> LoraConfig:
    """params.lora in PEFT's words; of `model`, what PEFT would refuse and what chooses experts is
    left out, and the rows of the tokens `trained` train."""
    names = names_of_embeddings(model) if model and trained else []
    return LoraConfig(
        exclude_modules=(unadaptable_linears(model) if model else None) or None,
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number: PEFT divides it
        use_rslora=lora.scaling == "rslora",
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        target_parameters=target_parameters(model) if model and lora.experts else None,
        trainable_token_indices={name: list(trained) for name in names} or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def tell_lost(family: str, targets: set[str]) -> None:
    """Say which modules of the adapter PEFT by itself would not load."""
    if lost := lost_elsewhere(family, targets):
        print(
            f"train: PEFT by itself leaves out {len(lost)} of the adapter's {len(targets)} modules "
            f"such as {lost[0]}, whose names it takes for those of experts of {family}; serve "
            "models/release, which has all of them"
        )


def optimizer_steps(rows: int, train: Train) -> int:
    """Optimizer steps of a run over `rows` rows (or packs), as transformers counts them."""
    batches = math.ceil(rows / train.batch_size)
    return math.ceil(train.epochs * max(1, math.ceil(batches / train.gradient_accumulation)))


def largest_pass(rows: Dataset, batch_size: int, padding_free: bool) -> int:
    """Tokens of the largest forward pass over `rows` (packs, when packed), padding counted."""
    longest = sorted(token_counts(rows.with_format("arrow")[:]))[-batch_size:]
    return sum(longest) if padding_free else len(longest) * longest[-1]


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
    """A trainer of a float32 adapter on a frozen base of load_base; `folder` takes checkpoints.

    Of several ranks each has one, whose batch size and accumulation are those of its share.

    streamer  of the base, where its layers' weights are streamed

    Raises StageError where a trial on two rows shows that the model cannot be trained so.
    """
    trial = Trial(model, data.rows)
    if fast.liger:
        apply_liger(model)
    fast = trial.batches(model, fast, params.train.batching == "packing")
    if dropped := leave_out_attention_dropout(model):
        print(f"train: the base's attention_dropout ({dropped:g}) is left out")
    targets = targets_of(params.lora.target_modules, adaptable_linears(model))
    experts = wrapper_names(model) if params.lora.experts else set()
    with targets_as_written(), stand_ins(model):
        trainer = Trainer(
            model=model,
            args=trainer_config(model, data, params, fast, placement, folder),
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
        # The first step of a warm-up has a learning rate of zero.
        trainer.args.warmup_steps = 0
    # trl casts the adapter of a quantized base to bfloat16, and loading a checkpoint casts it
    # back to float32: a resumed run would differ. In float32 from the start both are the same.
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
    if not fused and not placement.kept_mlp:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.enable_input_require_grads()
    remember_parameters(trainer.model)
    if world.size > 1:
        train_together(trainer.model, world, params.seed)
    return trainer


def as_installed(fast: FastPath) -> FastPath:
    """`fast` without the kernels that this machine lacks, which is said."""
    if not fast.liger or importlib.util.find_spec("liger_kernel"):
        return fast
    print(
        "train: Liger's kernels are not installed: training takes longer and more memory than plan "
        "says; pip install --no-deps --require-hashes -r requirements-kernels.lock"
    )
    return replace(fast, liger=False)


def leave_out_attention_dropout(model: PreTrainedModel) -> float:
    """Let attention keep all of its weights in training too; the largest share it would drop.

    varlen attention has no dropout, and a layer that is checkpointed in two parts would drop other
    weights in its second pass. The result is the same wherever it is trained.
    """
    dropped = 0.0
    module: Any
    for module in model.modules():
        if isinstance(share := getattr(module, "attention_dropout", None), float):
            dropped, module.attention_dropout = max(dropped, share), 0.0
    return dropped


def train_together(model: PeftModel, world: World, seed: int) -> None:
    """Prepare `model` for DDP: the same adapter on every rank, and a frozen base that stays."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    trained = {name for name, tensor in named.items() if tensor.requires_grad}
    world.equalize(named[name].data for name in sorted(trained))
    # DDP would send every rank the whole base, wherever it lies.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, list(named.keys() - trained)
    )
    if world.rank:
        # Or the same values of different rows would be dropped.
        torch.manual_seed(seed + world.rank)


def apply_liger(model: PreTrainedModel) -> None:
    """Let `model` take Liger's norms, rotary embedding and SwiGLU, and keep its own loss.

    Of a mixture of experts not the SwiGLU: with it come Liger's experts, which read dense weights.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    parts = {
        "rope": True,
        "rms_norm": True,
        "swiglu": not expert_stacks(model),
        "cross_entropy": False,
    }
    _apply_liger_kernel_to_instance(model=model, **parts, fused_linear_cross_entropy=False)


def trainer_config(
    model: PreTrainedModel,
    data: TrainingSet,
    params: Params,
    fast: FastPath,
    placement: Placement,
    folder: Path,
) -> SFTConfig:
    """params.train in trl's words. Checkpointing of gradients is switched on elsewhere."""
    train, gpu = params.train, model.device.type == "cuda"
    packing = train.batching == "packing"
    grouped = train.batching == "group_by_length"
    config = SFTConfig(
        output_dir=str(folder),
        seed=params.seed,
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        # A share: transformers takes it of the steps that it counts after packing.
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        # bitsandbytes pages optimizer state on a GPU only.
        optim=train.optimizer if gpu else "adamw_torch",
        gradient_checkpointing=False,
        # Layers that are checkpointed in two parts have a stash of their own.
        activation_offloading=placement.offload and not (fast.fused_lora and plain_layers(model)),
        train_sampling_strategy="group_by_length" if grouped else "random",
        packing=packing,
        padding_free=fast.padding_free,
        max_length=data.max_length if packing else None,
        bf16=gpu,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        # Every step, though it waits for the device: a fault stops at its own step, before a
        # checkpoint is written of it, and a mean over several steps would not survive a resume.
        logging_steps=1,
        logging_nan_inf_filter=False,
        # The router is frozen, so that there is nothing to balance.
        router_aux_loss_coef=0.0,
        save_strategy="no",
        # Trackers are called by stages/training/tracking.py.
        report_to="none",
        disable_tqdm=True,
        # Every rank computes with the whole adapter in every pass.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    # transformers takes every GPU that it sees into DataParallel, with a batch for each.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def host_stash(trainer: Trainer, fast: FastPath, placement: Placement) -> HostStash | None:
    """Host memory for what layers that are checkpointed in two parts keep; None without such."""
    if not placement.offload or not plain_layers(trainer.model):
        return None
    size = trainer.args.per_device_train_batch_size
    tokens = largest_pass(trainer.train_dataset, size, fast.padding_free)
    token = trainer.model.get_input_embeddings().weight[0]
    return HostStash(trainer.model.device, tokens * token.nbytes)


def remember_parameters(model: torch.nn.Module) -> None:
    """Let `model` answer from memory what transformers asks of it at every step.

    With adapters it has thousands of modules. Walking through them takes longer than a small step
    computes, and the GPU waits.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    set_mode = model.train
    # The base comes in evaluation mode, its adapters do not: from here on all are in one.
    set_mode(True)

    def train(mode: bool = True) -> torch.nn.Module:
        return model if model.training == mode else set_mode(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    # This object's own, which mypy takes for a mistake.
    model.train, model.zero_grad = train, zero_grad  # type: ignore[method-assign]
    model.parameters = lambda recurse=True: iter(parameters)  # type: ignore[method-assign]

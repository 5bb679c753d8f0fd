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

# trl's output head skips positions that are not learned only if this says that Triton is available;
# scoring all took half of a step on a CPU. (trl's kernels ask another function.)
trl.trainer.utils._use_triton = lambda device: True
# Must come before a model that uses it is loaded.
attention.register()


@dataclass(frozen=True)
class TrainingSet:
    """`rows` with input_ids and labels; packing fills rows up to `max_length` tokens. `trained`:
    ids of tokens whose rows of the embeddings and the head are trained too."""

    rows: Dataset
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    trained: tuple[int, ...] = ()


class Trainer(SFTTrainer):
    """trl's trainer without its per-step statistics, each of which waits for the GPU.

    `tokens` is the number of tokens trained on so far, without padding.
    """

    model: PeftModel
    train_dataset: Dataset
    tokens = 0
    # Whether trl's output head gives the model's own logits (stages/training/trial.py).
    fused_head = True
    # Set if layers of the base model are streamed.
    streamer: Streamer | None = None

    def __init__(self, world: World = ALONE, **options):
        self.world = world
        super().__init__(**options)
        # compute_loss needs num_items_in_batch, even if the family's own loss does not.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        # Batches are collated ahead of their step; their tokens are counted then, on the host.
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
        """Pass the rows' lengths, which transformers would find by decoding every row."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = token_counts(rows.with_format("arrow")[:])
        return GroupedByLength(self.rows_per_step, lengths, self)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, of all ranks together."""
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * self.world.size

    def get_train_dataloader(self):
        """With several ranks, give each its share of the rows of every step."""
        loader = super().get_train_dataloader()
        if self.world.size > 1:
            shard: Any = loader.batch_sampler
            lengths = token_counts(self.train_dataset.with_format("arrow")[:])
            order = shard.batch_sampler.sampler
            shard.batch_sampler = Dealt(order, lengths, self)
            # Dealt yields only this rank's rows, so accelerate must not shard them again.
            shard.num_processes, shard.process_index = 1, 0
            shard.batch_size, shard.even_batches = None, False
        return loader

    def _prepare_for_training(self, *positional, **named):
        """Give DDP's wrapper the cached methods of `remember_parameters` too."""
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
    """params.lora as PEFT's configuration.

    Layers of `model` that PEFT refuses and routers are excluded; the rows of the tokens `trained`
    are trained too.
    """
    names = names_of_embeddings(model) if model and trained else []
    return LoraConfig(
        exclude_modules=(unadaptable_linears(model) if model else None) or None,
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number: PEFT divides it
        use_rslora=lora.scaling == "rslora",
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        trainable_token_indices={name: list(trained) for name in names} or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def tell_lost(family: str, targets: set[str]) -> None:
    """Print which modules of the adapter PEFT alone would not load."""
    if lost := lost_elsewhere(family, targets):
        print(
            f"train: PEFT alone would skip {len(lost)} of the adapter's {len(targets)} modules, "
            f"such as {lost[0]}, since it mistakes them for experts of {family}; serve "
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
    with targets_as_written():
        trainer = Trainer(
            model=model,
            args=trainer_config(model, data, params, fast, placement, folder),
            train_dataset=data.rows,
            processing_class=data.tokenizer,
            peft_config=lora_config(params.lora, model, data.trained),
            world=world,
        )
    check_adapted(
        trainer.model, targets, "lora.target_modules", "name modules that it takes as they are"
    )
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
    if not fused and not placement.kept_mlp:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.enable_input_require_grads()
    remember_parameters(trainer.model)
    if world.size > 1:
        train_together(trainer.model, world, params.seed)
    return trainer


def as_installed(fast: FastPath) -> FastPath:
    """`fast`, without Liger's kernels if they are not installed; a message says so."""
    if not fast.liger or importlib.util.find_spec("liger_kernel"):
        return fast
    print(
        "train: Liger's kernels are not installed: training needs more time and memory than plan "
        "says; pip install --no-deps --require-hashes -r requirements-kernels.lock"
    )
    return replace(fast, liger=False)


def leave_out_attention_dropout(model: PreTrainedModel) -> float:
    """Switch attention dropout off; returns the largest rate that was set.

    varlen attention has no dropout, and a layer checkpointed in halves would drop other weights
    when it is recomputed. Without it, the result is the same on all hardware.
    """
    dropped = 0.0
    module: Any
    for module in model.modules():
        if isinstance(share := getattr(module, "attention_dropout", None), float):
            dropped, module.attention_dropout = max(dropped, share), 0.0
    return dropped


def train_together(model: PeftModel, world: World, seed: int) -> None:
    """Prepare `model` for DDP, with the same adapter on every rank."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    trained = {name for name, tensor in named.items() if tensor.requires_grad}
    world.equalize(named[name].data for name in sorted(trained))
    # DDP would broadcast the frozen base too, even from host memory.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, list(named.keys() - trained)
    )
    if world.rank:
        # Otherwise the dropout masks of all ranks would be the same.
        torch.manual_seed(seed + world.rank)


def apply_liger(model: PreTrainedModel) -> None:
    """Let `model` use Liger's norms, rotary embedding and SwiGLU, but not its loss.

    A mixture of experts keeps its own SwiGLU: Liger's comes with experts that read dense weights.
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
    """params.train as trl's configuration; `build_trainer` switches gradient checkpointing on."""
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
        # A ratio: transformers multiplies it by the number of steps after packing.
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        # bitsandbytes pages optimizer state on a GPU only.
        optim=train.optimizer if gpu else "adamw_torch",
        gradient_checkpointing=False,
        # Layers checkpointed in halves have their own (stages/training/offload.py).
        activation_offloading=placement.offload and not (fast.fused_lora and plain_layers(model)),
        train_sampling_strategy="group_by_length" if grouped else "random",
        packing=packing,
        padding_free=fast.padding_free,
        max_length=data.max_length if packing else None,
        bf16=gpu,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        # Every step, although it waits for the device: a fault ends training before a checkpoint
        # of it is written, and a mean over several steps would be wrong after a resume.
        logging_steps=1,
        logging_nan_inf_filter=False,
        # Routers are frozen, so there is nothing to balance.
        router_aux_loss_coef=0.0,
        save_strategy="no",
        # Trackers are called by stages/training/tracking.py.
        report_to="none",
        disable_tqdm=True,
        # Every pass uses the whole adapter.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    # transformers would use DataParallel on all visible GPUs, with a batch for each.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def host_stash(trainer: Trainer, fast: FastPath, placement: Placement) -> HostStash | None:
    """Host memory for the inputs of layers checkpointed in halves; None if there are none."""
    if not placement.offload or not plain_layers(trainer.model):
        return None
    size = trainer.args.per_device_train_batch_size
    tokens = largest_pass(trainer.train_dataset, size, fast.padding_free)
    token = trainer.model.get_input_embeddings().weight[0]
    return HostStash(trainer.model.device, tokens * token.nbytes)


def remember_parameters(model: torch.nn.Module) -> None:
    """Cache the results of methods of `model` that transformers calls at every step.

    With adapters there are thousands of modules. Walking through them takes longer than computing a
    small step, and the GPU waits.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    set_mode = model.train
    # The loaded base is in evaluation mode but its adapters are not; put all into the same.
    set_mode(True)

    def train(mode: bool = True) -> torch.nn.Module:
        return model if model.training == mode else set_mode(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    # Only for this object, which mypy takes for a mistake.
    model.train, model.zero_grad = train, zero_grad  # type: ignore[method-assign]
    model.parameters = lambda recurse=True: iter(parameters)  # type: ignore[method-assign]

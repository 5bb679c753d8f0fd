"""The trainer of this pipeline, for the train stage and for the benchmarks alike."""

import importlib.util
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from stages.shared.params import Lora, Params, Train
from stages.shared.process import StageError
from stages.shared.rows import token_counts
from stages.training import attention
from stages.training.fused_lora import fuse_lora, plain_layers
from stages.training.offload import HostStash

# Below this the inputs of the checkpointed layers are not worth a trip to host memory.
OFFLOADED_BYTES = 1e9
LIGER_PARTS = {"rope": True, "rms_norm": True, "swiglu": True}
LIGER_OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}
# trl's output head leaves out what is not learned where it can have Triton; elsewhere it scores
# every position, which on a CPU took half of a step. (Its kernels ask another function.)
trl.trainer.utils._use_triton = lambda device: True


@dataclass(frozen=True)
class FastPath:
    """What a run uses beyond plain PyTorch. Chosen by the hardware and the parameters."""

    attention: str
    padding_free: bool
    liger: bool
    fused_lora: bool
    offload: bool

    def __str__(self) -> str:
        used = [name.replace("_", " ") for name, on in vars(self).items() if on is True]
        return ", ".join([f"{self.attention} attention", *used])


def choose_attention(train: Train, config: PretrainedConfig, device: torch.device) -> str | None:
    """`auto` takes varlen on a GPU, else what transformers takes; what cannot run is refused."""
    attention.register()
    attention.check(train, config)
    if train.attention == "auto":
        return attention.NAME if device.type == "cuda" and attention.supports(config) else None
    if train.attention in ("varlen", "flash_attention_2") and device.type != "cuda":
        raise StageError(f"train.attention: {train.attention} needs a GPU; set auto")
    if train.attention == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        raise StageError("train.attention: flash_attention_2 needs flash-attn; set auto")
    return train.attention


def choose_fast_path(
    model: PreTrainedModel, lora: Lora, train: Train, tokens_per_step: int
) -> FastPath:
    """Decide what can run on the model's device. `tokens_per_step` is of one forward pass."""
    gpu = model.device.type == "cuda"
    kind = model.config._attn_implementation
    config = model.config.get_text_config()
    kept = tokens_per_step * config.hidden_size * 2 * config.num_hidden_layers
    return FastPath(
        attention=kind,
        padding_free=kind in (attention.NAME, "flash_attention_2"),
        liger=gpu and importlib.util.find_spec("liger_kernel") is not None,
        fused_lora=gpu and lora.dropout == 0,
        offload=gpu and train.gradient_checkpointing and kept >= OFFLOADED_BYTES,
    )


class Trainer(SFTTrainer):
    """trl's trainer without its per-step statistics, each of which waits for the GPU.

    `tokens` counts those that were trained on, padding not counted.
    """

    tokens = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean NLL of the learned tokens of a whole step, through trl's fused output head."""
        self.tokens += self.ahead.popleft()
        output = model(**inputs, use_cache=False, fused_lm_head=True)
        return -output.log_probs.sum() / num_items_in_batch

    def floating_point_ops(self, inputs) -> int:
        """Not estimated: the estimate walks through all modules at every step."""
        return 0

    def count_tokens(self) -> None:
        """Count the tokens of every batch on the host, where it is made ahead of its step."""
        collate, self.ahead = self.data_collator, deque()

        def counting(examples):
            self.ahead.append(sum(len(example["input_ids"]) for example in examples))
            return collate(examples)

        self.data_collator = counting


def lora_config(lora: Lora) -> LoraConfig:
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
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
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    params: Params,
    max_length: int,
    folder: Path,
    fast: FastPath,
) -> Trainer:
    """A trl trainer over a frozen base of load_base and `rows` with input_ids and labels.

    The adapter and its optimizer state are float32. `folder` takes the checkpoints.
    """
    if fast.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, **LIGER_PARTS, **LIGER_OFF)
    train = params.train
    two_parts = fast.fused_lora and bool(plain_layers(model))
    gpu = model.device.type == "cuda"
    packing = train.batching == "packing"
    grouped = train.batching == "group_by_length"
    args = SFTConfig(
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
        activation_offloading=fast.offload and not two_parts,
        train_sampling_strategy="group_by_length" if grouped else "random",
        packing=packing,
        padding_free=fast.padding_free,
        max_length=max_length if packing else None,
        bf16=gpu,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        # Every step, though it waits for the device: a fault stops at its own step, before a
        # checkpoint is written of it, and a mean over several steps would not survive a resume.
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=train.report_to,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(params.lora),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.count_tokens()
    # trl casts the adapter of a quantized base to bfloat16, and loading a checkpoint casts it
    # back to float32: a resumed run would differ. In float32 from the start both are the same.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if fast.fused_lora:
        stash = None
        if fast.offload and two_parts:
            tokens = largest_pass(trainer.train_dataset, train.batch_size, fast.padding_free)
            token = model.get_input_embeddings().weight[0]
            stash = HostStash(model.device, tokens * token.nbytes)
        fuse_lora(trainer.model, fast.liger, train.gradient_checkpointing, stash)
    elif train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.enable_input_require_grads()
    remember_parameters(trainer.model)
    return trainer


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

    model.train, model.zero_grad = train, zero_grad
    model.parameters = lambda recurse=True: iter(parameters)

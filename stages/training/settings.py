"""The parameters as the configurations of PEFT and trl."""

import math
from pathlib import Path

from peft import LoraConfig
from transformers import PreTrainedModel
from trl import SFTConfig

from stages.shared.embeddings import names_of_embeddings
from stages.shared.expert_lora import target_parameters
from stages.shared.fast_path import FastPath, plain_layers
from stages.shared.linears import unadaptable_linears
from stages.shared.params import Lora, Params, Train
from stages.shared.placement import Placement


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
        target_parameters=target_parameters(model) if model and lora.experts else None,
        trainable_token_indices={name: list(trained) for name in names} or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def optimizer_steps(rows: int, train: Train) -> int:
    """Optimizer steps of a run over `rows` rows (or packs), as transformers counts them."""
    batches = math.ceil(rows / train.batch_size)
    return math.ceil(train.epochs * max(1, math.ceil(batches / train.gradient_accumulation)))


def trainer_config(
    model: PreTrainedModel,
    max_length: int,
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
        max_length=max_length if packing else None,
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

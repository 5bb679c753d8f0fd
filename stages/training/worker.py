"""A rank of train: works like a single process, on its share of every step."""

from typing import Any

from stages.shared.libraries import load_libraries
from stages.shared.params import load_params
from stages.shared.ranks import World


def work(world: World, task: dict) -> dict[str, Any]:
    """Train with the other ranks; every rank returns the result.

    task  key: that of the checkpoints, in whose folder rank 0 leaves the adapter
    """
    load_libraries("bitsandbytes", "datasets", "peft", "trl.trainer.sft_trainer")
    # The stage's script, which imports this file.
    from stages.shared.device import pick_device
    from stages.train import train
    from stages.training.checkpoints import folder_of

    return train(load_params(), pick_device(), folder_of(task["key"]), world)

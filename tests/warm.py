"""What tests/quick.py has at hand in every process that it forks: third-party modules alone."""

import gc
from importlib import import_module

LIBRARIES = ["torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate"]
# What they, and the stages, import at their first use.
LIBRARIES += ["torch._dynamo", "torch.nn.attention.varlen", "trl.trainer.sft_trainer"]
LIBRARIES += ["transformers.models.llama.modeling_llama", "transformers.integrations.bitsandbytes"]
LIBRARIES += ["peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion"]
LIBRARIES += ["pydantic.main", "pydantic.json_schema", "ruamel.yaml", "sacrebleu", "rapidfuzz.fuzz"]
for name in LIBRARIES:
    import_module(name)
# A thousand regular expressions, which transformers compiles when it first loads a model.
import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
# Otherwise every full collection of a fork would scan all of them, and copy their memory.
gc.collect()
gc.freeze()

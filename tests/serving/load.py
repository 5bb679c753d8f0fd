"""What an environment makes of a release, as JSON: run by its Python, which has no pytest.

python tests/serving/load.py FOLDER
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: str) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": "  Say 'it', Zoë! <|im_end|> <unk>\n"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0].double()
        generated = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return {
        "prompt": prompt,
        "ids": ids[0].tolist(),
        "around": tokenizer("a text")["input_ids"],
        "special": sorted(tokenizer.all_special_ids),
        "ends": model.generation_config.eos_token_id,
        "logits": logits[:, :: max(1, logits.shape[1] // 50)].tolist(),
        "generated": generated[0].tolist(),
        "answer": tokenizer.decode(generated[0], skip_special_tokens=True),
    }


transformers.utils.logging.set_verbosity_error()
print(json.dumps({"transformers": transformers.__version__} | {f: load(f) for f in sys.argv[1:]}))

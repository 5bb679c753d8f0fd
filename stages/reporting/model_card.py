"""The model card of models/release: the report's content behind the metadata the Hub reads."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.reporting.page import Section, to_markdown
from stages.reporting.results import Results, scored_sets

# Left out of the card: of no use to whoever only wants to use the model.
LEFT_OUT = ("Memory",)

HOW_TO_LOAD = """\
## How to use it

With `transformers` alone; neither `peft` nor `bitsandbytes` is needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "models/release"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "…"}],
    add_generation_prompt=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=80, do_sample=False)
print(tokenizer.decode(output[0][inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`sha256sum -c SHA256SUMS` in the folder checks that every file is whole.
"""


def model_card(title: str, results: Results, sections: list[Section]) -> str:
    """README.md with YAML metadata; ids that the Hub does not know stay out of the metadata."""
    base, data = results.model_source, results.data_source
    tags = (
        ["lora", "dvc"]
        if results.params["quantize"]["type"] == "none"
        else ["qlora", "lora", "dvc"]
    )
    card = ModelCardData(
        model_name=title,
        base_model=base["id"] if base["source"] == "hub" else None,
        datasets=[data["id"]] if data["source"] == "hub" and results.train else None,
        license=base["license"].lower() if base["license"] else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=data["id"],
                dataset_name=data["id"],
                dataset_split=name,
                metric_type="perplexity",
                metric_value=results.eval[f"{prefix}tuned_perplexity"],
            )
            for prefix, name in scored_sets(results).items()
        ],
    )
    kept = [section for section in sections if section.title not in LEFT_OUT]
    heading, _, rest = to_markdown(title, kept).partition("\n")
    return str(ModelCard(f"---\n{card.to_yaml()}\n---\n\n{heading}\n\n{HOW_TO_LOAD}{rest}"))

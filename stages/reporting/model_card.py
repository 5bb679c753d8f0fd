"""The model card of models/release: the public part of the report, with the Hub's metadata.

The folder may be published, so the card contains no paths of this machine and no rows of data
that is not public.
"""

from dataclasses import replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.reporting.page import to_markdown
from stages.reporting.report import sections
from stages.reporting.results import Results, data_sources, scored_sets, title
from stages.shared.multimodal import MULTIMODAL

# Sections of the report that a user of the model does not need.
LEFT_OUT = ("Memory",)
LOCAL_DATA = "local data"
TEXT_CLASS, TOWERS_CLASS = "AutoModelForCausalLM", "AutoModelForImageTextToText"

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

`sha256sum -c SHA256SUMS` in the folder checks every file.
"""


def shows_rows(results: Results) -> bool:
    """Whether the card may contain rows, by export.rows_in_card and the source of the data."""
    wish = results.params["export"]["rows_in_card"]
    public = all(
        data["source"] in ("hub", "pypi") and not data.get("private")
        for data in data_sources(results).values()
    )
    return wish == "always" or (wish == "public" and public)


def without_places(results: Results) -> Results:
    """The results with paths of this machine replaced."""
    model, data, text = results.model_source, results.data_source, results.retention_source
    params = {key: results.params[key] for key in ("model", "dataset", "prepare")}
    if model["source"] == "local":
        name = Path(model["id"]).name
        model, params["model"] = model | {"id": name}, params["model"] | {"id": name}
    data, params["dataset"] = (
        each | {"mix": [_hidden(one) for one in each["mix"]]} if each.get("mix") else each
        for each in (data, params["dataset"])
    )
    if data["source"] == "local":
        data, params["dataset"] = _hidden(data), _hidden(params["dataset"])
        if params["prepare"]["eval_file"]:
            params["prepare"] = params["prepare"] | {"eval_file": LOCAL_DATA}
    text = _hidden(text)
    if text.get("source") == "local":
        params["retention"] = results.params["retention"] | {"id": LOCAL_DATA}
    return replace(
        results,
        params=results.params | params,
        model_source=model,
        data_source=data,
        retention_source=text,
    )


def _hidden(source: dict) -> dict:
    """A source, or its section of params.yaml, without its path."""
    if source.get("source") != "local":
        return source
    return source | {"id": LOCAL_DATA} | ({"files": {}} if "files" in source else {})


def model_card(results: Results) -> str:
    """README.md with YAML metadata, which names only ids that exist on the Hub."""
    results, rows = without_places(results), shows_rows(results)
    base, sources = results.model_source, data_sources(results)
    hub = dict.fromkeys(each["id"] for each in sources.values() if each["source"] == "hub")
    towers = results.model_type in MULTIMODAL
    shown = dict.fromkeys(("exact_match", "rouge_l", "chrf"), results.answers)
    shown["perplexity"] = results.eval
    tags = (
        ["lora", "dvc"]
        if results.params["quantize"]["type"] == "none"
        else ["qlora", "lora", "dvc"]
    )
    card = ModelCardData(
        model_name=title(results),
        base_model=base["id"] if base["source"] == "hub" else None,
        datasets=[*hub] if hub and results.train else None,
        license=base["license"].lower() if base["license"] else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if towers else "text-generation",
        tags=tags,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=sources.get(prefix, sources[""])["id"],
                dataset_name=sources.get(prefix, sources[""])["id"],
                dataset_split=name,
                metric_type=metric,
                metric_value=values[f"{prefix}tuned_{metric}"],
            )
            for metric, values in shown.items()
            for prefix, name in scored_sets(results).items()
            if f"{prefix}tuned_{metric}" in values
        ],
    )
    kept = [section for section in sections(results, rows) if section.title not in LEFT_OUT]
    heading, _, rest = to_markdown(title(results), kept).partition("\n")
    how = HOW_TO_LOAD.replace(TEXT_CLASS, TOWERS_CLASS) if towers else HOW_TO_LOAD
    return str(ModelCard(f"---\n{card.to_yaml()}\n---\n\n{heading}\n\n{how}{rest}"))

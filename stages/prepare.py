"""Parse, clean, split, render and tokenize the rows, and check them against the data contract.

    python -m stages.prepare

Reads data/raw and models/tokenizer, and dataset, prepare and lora.new_tokens from params.yaml.
Writes data/prepared (described in stages/shared/rows.py), metrics/data.json and
metrics/lengths.csv.

Every row is read and checked once, and kept on disk with a few hashes in memory. The hashes
decide which rows are duplicates, held out or trained on; only the chosen ones are tokenized.
"""

import shutil
from pathlib import Path

from stages.shared.libraries import load_libraries
from stages.shared.outputs import (
    check_sums,
    read_json,
    whole_folder,
    write_json,
    write_metrics,
    write_text,
)
from stages.shared.params import Dataset, Prepare, load_params
from stages.shared.process import begin

if __name__ == "__main__":
    begin("prepare")
    load_libraries("transformers", without=["torch"])

import numpy as np
from transformers import AutoTokenizer

from stages.preparing.chat_template import ChatTemplate
from stages.preparing.choosing import remove_duplicates, write_sets
from stages.preparing.contract import lengths_table, metrics_of, sample_of, show
from stages.preparing.encoding import Encoder
from stages.preparing.formats import Example, Format
from stages.preparing.mixing import check_together
from stages.preparing.new_tokens import add_tokens
from stages.preparing.scanning import Scanned, owners, scan
from stages.preparing.splitting import Store, hash_order, make_pools
from stages.preparing.summary import summary
from stages.preparing.templates import settle
from stages.preparing.writing import SHORTER, seconds_for_turns
from stages.shared.bounded import SECONDS, bounded
from stages.shared.end_tokens import GENERATION
from stages.shared.mix import sources_of
from stages.shared.paths import PREPARED, RAW, TOKENIZER
from stages.shared.rows import read_rows, set_sha256
from stages.shared.screen import tell
from stages.shared.sets import held_out_sets

METRICS = Path("metrics/data.json")
LENGTHS = Path("metrics/lengths.csv")
# Rows that decide the template and its EOS.
SAMPLES = 100


def prepare(
    dataset: Dataset, params: Prepare, out: Path, new_tokens: list[str]
) -> tuple[dict, str, dict]:
    """Fill `out`; returns metrics/data.json, metrics/lengths.csv and a training row to show."""
    store = Store(out)
    sources = sources_of(dataset)
    parts = [
        scan(folder, source, number, params, store)
        for number, (folder, source) in enumerate(sources.items())
    ]
    store.finish()
    of, settling = owners(store, parts), check_together(parts)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    new = add_tokens(tokenizer, new_tokens)
    candidates = np.flatnonzero(np.isin(of, settling))
    spread = np.linspace(0, len(candidates) - 1, min(len(candidates), SAMPLES)).astype(int)
    samples = [store.example(row) for row in candidates[spread]]
    tell(f"prepare: {settle_bounded(tokenizer, params, parts[settling[0]].form, samples)}")
    held = store.in_files(parts[0].given)
    rows, given, removed = remove_duplicates(store, held, of, params)
    pools = make_pools(store, rows[of[rows] == 0], given, params)
    others = [hash_order(store, rows[of[rows] == n]) for n in range(1, len(parts))]
    encoder = Encoder(tokenizer, params)
    sets, unused = write_sets(store, pools, others, parts, encoder, params, out)
    about = write_about(out, tokenizer, list(sources), parts, params, sets, new)
    drops = [[part.unreadable, each] for part, each in zip(parts, unused, strict=True)]
    metrics = metrics_of(store, sets, removed, drops, params, of)
    return metrics, lengths_table(sets["train"].lengths, params.max_length), about["sample"]


def settle_bounded(tokenizer, params: Prepare, form: Format, samples: list[Example]) -> str:
    """`settle`, and the first use of an Encoder, in a process that is ended if it hangs."""

    def work() -> tuple:
        said = settle(tokenizer, params, form, samples)
        Encoder(tokenizer, params)
        return said, tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token

    remedy = "set another prepare.template, or another model if its tokenizer is the cause"
    where, seconds = f"{TOKENIZER}: rendering and tokenizing the first rows", None
    if params.loss_on != "completion":
        remedy, seconds = f"{SHORTER}, {remedy}", SECONDS + seconds_for_turns(samples)
    said, template, eos, pad = bounded(work, where, remedy, seconds)
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token = template, eos, pad
    return said


def write_about(
    out: Path,
    tokenizer,
    folders: list[str],
    parts: list[Scanned],
    params: Prepare,
    sets: dict,
    new: dict,
) -> dict:
    """Write the tokenizer, source.json and prepared.json, with `new` in it; returns the last."""
    tokenizer.save_pretrained(out / "tokenizer")
    config = read_json(out / "tokenizer/tokenizer_config.json")
    # These say how the tokenizer was loaded, and would differ between equal runs.
    config = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only")}
    write_json(out / "tokenizer/tokenizer_config.json", config, ensure_ascii=False)
    marks = set(ChatTemplate(tokenizer).special) - {tokenizer.eos_token}
    others = [t for t in sorted(marks) if tokenizer.convert_tokens_to_ids(t) in sets["train"].ends]
    if others:
        ids = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, *others])
        write_json(out / "tokenizer" / GENERATION, {"eos_token_id": ids})
        tell(f"prepare: other tokens that end answers, saved in {GENERATION}: {', '.join(others)}")
    first, *further = [RAW / folder / "source.json" for folder in folders]
    shutil.copyfile(first, out / "source.json")
    if further:
        mixed = read_json(first) | {"mix": [read_json(each) for each in further]}
        write_json(out / "source.json", mixed)
    about = {
        "format": ", ".join(dict.fromkeys(part.form.name for part in parts)),
        "template": params.template,
        "loss_on": params.loss_on,
        "max_length": params.max_length,
        "splits": {
            name: {"rows": len(w.rows), "tokens": int(w.lengths.sum()), "learned_tokens": w.learned}
            for name, w in sets.items()
        },
        **new,
    }
    for prefix, file in held_out_sets(out).items():
        about[f"{prefix}eval_set_sha256"] = set_sha256(read_rows(file))
    about["sample"] = sample_of(out / "train.arrow", tokenizer)
    write_json(out / "prepared.json", about, ensure_ascii=False)
    return about


def main() -> None:
    params = load_params()
    check_sums(RAW, "fetch_data")
    check_sums(TOKENIZER, "fetch_model")
    with whole_folder(PREPARED) as out:
        new = params.lora.new_tokens
        metrics, lengths, sample = prepare(params.dataset, params.prepare, out, new)
    write_text(LENGTHS, lengths)
    write_metrics(METRICS, metrics)
    show(sample)
    print(summary(metrics, params.prepare, params.dataset))


if __name__ == "__main__":
    main()

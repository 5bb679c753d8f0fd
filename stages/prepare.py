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
from stages.shared.params import Dataset, Mixed, Prepare, Source, load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("prepare")
    load_libraries("transformers", without=["torch"])

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from stages.preparing.chat_template import ChatTemplate
from stages.preparing.contract import MOST_LEAKED, Drops, lengths_table, metrics_of, sample_of, show
from stages.preparing.encoding import Encoder
from stages.preparing.formats import Example, Format
from stages.preparing.messages import Unusable, names_of
from stages.preparing.mixing import Scanned, check_together, owners, write_mixed
from stages.preparing.new_tokens import add_tokens
from stages.preparing.recognizing import recognize
from stages.preparing.splitting import (
    Pools,
    Store,
    after_held_out,
    asked_before,
    asked_by,
    distinct,
    hash_order,
    make_pools,
    may_be_held_out,
    near_duplicates,
)
from stages.preparing.templates import settle
from stages.preparing.writing import Written, write_set
from stages.shared.bounded import bounded
from stages.shared.end_tokens import GENERATION
from stages.shared.mix import label, sources_of
from stages.shared.paths import PREPARED, RAW, TOKENIZER
from stages.shared.readers import files_to_read, read_file, split_of
from stages.shared.rows import read_rows, set_sha256
from stages.shared.screen import on_screen, tell
from stages.shared.sets import SET_NAMES, held_out_sets

METRICS = Path("metrics/data.json")
LENGTHS = Path("metrics/lengths.csv")
# Why a row is in no set: the metrics' name and a description.
UNUSED = {
    "beyond_train_rows": "beyond train_rows",
    "beyond_eval_rows": "beyond eval_rows",
    "margin": "in the margin between held-out and training",
}
# Metrics that the summary shows of each source, if there are several.
PER_SOURCE = (
    "train_examples",
    "train_share_percent",
    "train_tokens",
    "eval_examples",
    "asked_before_examples",
)
# Rows that decide the template and its EOS.
SAMPLES = 100


def scan(folder: str, source: Source, number: int, params: Prepare, store: Store) -> Scanned:
    """Read every row of the source in `folder` of data/raw into `store`.

    A further source is read as its entry of dataset.mix says, without groups or evaluation file.
    """
    own: Prepare | Mixed = params
    section, eval_file, group_by, share = "prepare", params.eval_file, params.group_by, None
    if isinstance(source, Mixed):
        own, section, eval_file, group_by = source, source.section, None, None
        share = source.share
    train, given = (
        [f"{folder}/{name}" if folder else name for name in names]
        for names in files_to_read(RAW / folder, source, eval_file)
    )
    form: Format | None = None
    drops, names = Drops(), train + given
    size = sum((RAW / name).stat().st_size for name in names)
    files = "1 file" if len(names) == 1 else f"{len(names)} files"
    tell(f"prepare: reading {size / 1e6:.2f} MB in {files}: {', '.join(names[:5])}")
    for name in names:
        path = RAW / name
        for line, row in tqdm(read_file(path), on_screen(name), unit=" rows", disable=None):
            where = f"{path}:{line}"
            if form is None:
                form = recognize(own.format, own.columns, row, where, section)
                tell(f"prepare: {describe(form, row, group_by)}")
            drops.seen += 1
            if name not in given:
                refuse_test_row(row, source, where)
            try:
                store.add(name, line, form.example(row, where), group_of(row, group_by, where))
            except Unusable as why:
                drops.add(where, why)
    assert form is not None  # Every file has a row.
    drops.check()
    if form.unused:
        counts = ", ".join(f"{key} ({count:,})" for key, count in sorted(form.unused.items()))
        tell(f"prepare: not used: {counts}")
    return Scanned(label(source, number), share, train, given, form, drops)


def refuse_test_row(row: dict, source: Source, where: str) -> None:
    """Raise StageError for a training row whose column `split` names another split."""
    split = row.get("split")
    if not isinstance(split, str) or split == source.split:
        return
    if split_of(split) in ("test", "validation"):
        mixed = isinstance(source, Mixed)
        remedy = " and leave it out" if mixed else ", and name that in prepare.eval_file"
        raise StageError(
            f"{where}: its column 'split' says {split!r}, but it would be trained on: move such "
            f"rows to a file of their own{remedy}"
        )


def group_of(row: dict, group_by: str | None, where: str) -> str:
    if group_by is None:
        return ""
    if group_by not in row:
        raise StageError(
            f"{where}: no column {group_by!r} (prepare.group_by); the columns are "
            f"{names_of(row)}: name one of them, or set prepare.group_by: null"
        )
    if row[group_by] in (None, ""):
        raise Unusable("empty", f"{group_by!r} is empty: name the row's group")
    return str(row[group_by])


def describe(form: Format, row: dict, group_by: str | None) -> str:
    """A description of the format and the columns that it uses."""
    named = [(name, own) for name, own in form.columns.items() if own in row]
    used = [f"{own} as {name}" if own != name else own for name, own in named]
    ignored = [c for c in row if c not in (*form.columns.values(), group_by)]
    shape = f" in the {form.shape.name} shape" if form.shape else ""
    rest = f"; not used: {names_of(ignored)}" if ignored else ""
    return f"format {form.name}{shape}, columns {', '.join(used)}{rest}"


def remove_duplicates(
    store: Store, held: np.ndarray, of: np.ndarray, params: Prepare
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(rows to split or train on, rows of the evaluation file, removed rows by reason).

    held: bool [N], whether a row is in the evaluation file; of: int [N], the number of its source.
    """
    rows, given = distinct(store, np.flatnonzero(~held)), distinct(store, np.flatnonzero(held))
    every = np.arange(len(store))
    removed = {"duplicate_examples": np.setdiff1d(every, np.concatenate([rows, given]))}
    if of.any():
        removed["asked_before_examples"] = asked_before(store, rows, given, of)
        rows = np.setdiff1d(rows, removed["asked_before_examples"])
    near = rows[:0]
    if params.near_duplicates:
        # Of two near duplicates the later is removed, so rows of the evaluation file come first.
        both = np.concatenate([given, rows])
        near = near_duplicates(store, tqdm(both, "near duplicates", unit=" rows", disable=None))
    removed["near_duplicate_examples"] = near
    rows, given = np.setdiff1d(rows, near), np.setdiff1d(given, near)
    if len(shared := asked_by(store, rows, given)) > MOST_LEAKED:
        raise StageError(
            f"{RAW / store.where(shared[0])}: has the same prompt as a row of {params.eval_file}, "
            f"as do {len(shared) - 1} others; delete them from one of the two"
        )
    return rows, given, removed


def write_sets(
    store: Store,
    pools: Pools,
    others: list[np.ndarray],
    parts: list[Scanned],
    encoder: Encoder,
    params: Prepare,
    out: Path,
) -> tuple[dict[str, Written], list[Drops]]:
    """Write group.arrow, eval.arrow, validation.arrow, source_1.arrow, … and train.arrow; returns
    them by name, and the rows dropped of each source.

    Each has the first usable rows of its pool. Only validation.arrow has the last ones, so that it
    does not change what is held out. `others` are the pools of further sources, in hash order.
    """
    of = owners(store, parts)
    drops = [Drops() for _ in parts]

    def drop(row: int, why: Unusable) -> None:
        if why.reason == "too_long" and params.too_long == "error":
            raise StageError(f"{RAW / store.where(row)}: {why.message}")
        drops[of[row]].add(f"{RAW / store.where(row)}", why)

    def write(name: str, pool: np.ndarray, limit: int | None) -> Written:
        written = write_set(out / f"{name}.arrow", store, encoder, pool, limit, drop)
        number = of[pool[0]] if len(pool) else 0
        drops[number].seen += written.candidates
        drops[number].check()
        return written

    def filled(name: str, pool: np.ndarray, limit: int | None) -> Written:
        written = write(name, pool, limit)
        if not len(written.rows):
            asked = len(np.unique(store.prompts))
            raise StageError(
                f"no row is left for the {name} set; add rows: these {len(store)} have only "
                f"{asked} different prompts, and rows with the same prompt stay in one set"
            )
        return written

    sets: dict[str, Written] = {}
    if params.group_by:
        sets["group"] = filled("group", pools.group, params.eval_rows)
    sets["eval"] = filled("eval", pools.eval, params.eval_rows)
    seen = 0 if params.eval_file else sets["eval"].candidates
    rest = after_held_out(store, pools.train, seen)
    if params.validation_rows:
        last = rest[::-1]
        sets["validation"] = filled("validation", may_be_held_out(last), params.validation_rows)
        rest = after_held_out(store, last, sets["validation"].candidates)[::-1]
    to_train = [rest]
    for number, order in enumerate(others, 1):
        held = write(f"source_{number}", may_be_held_out(order), params.eval_rows)
        if not len(held.rows):
            raise StageError(
                f"{parts[number].label}: no row is left to hold out, of {len(order)} that no other "
                "source has; add rows, or remove the source from dataset.mix"
            )
        sets[f"source_{number}"] = held
        to_train.append(after_held_out(store, order, held.candidates))
    if others:
        sets["train"] = write_mixed(out, to_train, parts, params.train_rows, write)
    else:
        sets["train"] = filled("train", to_train[0], params.train_rows)
    return sets, drops


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


def summary(metrics: dict, params: Prepare, dataset: Dataset) -> str:
    counts = {called: metrics.get(f"{name}_examples") for name, called in SET_NAMES.items()}
    kept = [f"{called} {count:,}" for called, count in counts.items() if count]
    unused = {said: metrics[f"unused_{name}_examples"] for name, said in UNUSED.items()}
    reasons = ", ".join(f"{count:,} {said}" for said, count in unused.items() if count)
    reasons = f" ({reasons})" if reasons else ""
    said = (
        f"prepare: {metrics['rows_in']:,} rows: {', '.join(kept)}; dropped "
        f"{metrics['dropped_examples']:,}, duplicates {metrics['duplicate_examples']:,}, "
        f"unused {metrics['unused_examples']:,}{reasons}; {metrics['train_tokens']:,} tokens to "
        f"train on, {metrics['learned_token_share_percent']:.0f} % of them learned"
    )
    if metrics["eval_examples"] < params.eval_rows and not params.eval_file:
        said += (
            f"\nprepare: too few rows to hold out {params.eval_rows} (prepare.eval_rows); half of "
            "them stay in training, and some are in no set, so that adding rows moves no others"
        )
    if metrics.get("validation_examples", 0) < params.validation_rows:
        said += (
            f"\nprepare: too few rows to validate on {params.validation_rows} "
            "(prepare.validation_rows); half of those not held out stay in training"
        )
    for number, source in enumerate(sources_of(dataset).values() if dataset.mix else []):
        of = {key: metrics[f"source_{number}_{key}"] for key in PER_SOURCE}
        said += (
            f"\nprepare: source {number}, {source.id}: training {of['train_examples']:,} rows "
            f"({of['train_share_percent']:.3g} %) of {of['train_tokens']:,} tokens, held out "
            f"{of['eval_examples']:,}, prompts of an earlier source "
            f"{of['asked_before_examples']:,}"
        )
    return said


def settle_bounded(tokenizer, params: Prepare, form: Format, samples: list[Example]) -> str:
    """`settle`, and the first use of an Encoder, in a process that is ended if it hangs."""

    def work() -> tuple:
        said = settle(tokenizer, params, form, samples)
        Encoder(tokenizer, params)
        return said, tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token

    remedy = "set another prepare.template, or another model if its tokenizer is the cause"
    where = f"{TOKENIZER}: rendering and tokenizing the first rows"
    said, template, eos, pad = bounded(work, where, remedy)
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token = template, eos, pad
    return said


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

"""A fresh run is compared with the committed one: what must be equal, close, or may differ."""

import copy
import json

import pytest
import stub_pipeline as stub

from tools.check_repro import differences

MD5 = {"one": "a" * 32, "two": "b" * 32}
METRICS = {
    "data": {"train_examples": 200},
    "plan": {"weights_gb": 0.1},
    "train": {"train_loss": 2.9, "steps": 25},
    "train_cost": {"train_seconds": 90.0},
    "eval": {"tuned_perplexity": 13.7, "eval_set_sha256": "aaaa"},
    "verify": {
        "merged_perplexity": 13.7,
        "perplexity_change_percent": -0.05,
        "mean_kl": 7e-5,
        "other_base_mean_kl": 0.19,
        "token_agreement": 0.995,
        "nonfinite_values": 0,
        "kl_tokens": 3729,
    },
    "summary": {"perplexity_after": 13.7, "merge_change_percent": -0.05, "train_minutes": 1.5},
}
LOCK = {
    "stages": {
        "prepare": {
            "cmd": "run",
            "deps": [{"path": "stages/prepare.py", "md5": MD5["one"]}],
            "params": {"params.yaml": {"seed": 1}},
            "outs": [
                {"path": "data/prepared", "md5": MD5["one"]},
                {"path": "metrics/lengths.csv", "md5": MD5["one"]},
                {"path": "models/adapter", "md5": MD5["one"]},
            ],
        }
    }
}


def revision(name, metrics=METRICS, lock=LOCK):
    declared = [{f"metrics/{key}.json": {"cache": False}} for key in METRICS]
    files = {f"metrics/{key}.json": json.dumps(values) for key, values in metrics.items()}
    dvc = json.dumps({"stages": {"all": {"metrics": declared}}})
    return stub.Texts(name, files | {"dvc.yaml": dvc, "dvc.lock": json.dumps(lock)})


@pytest.mark.parametrize(
    ("file", "key", "value", "agrees"),
    [
        ("data", "train_examples", 201, False),
        ("plan", "weights_gb", 0.1001, False),
        ("train", "train_loss", 2.9 * 1.04, True),
        ("train", "train_loss", 2.9 * 1.06, False),
        ("train", "train_loss", float("nan"), False),
        ("train", "train_loss", float("inf"), False),
        ("train_cost", "train_seconds", 9.0, True),
        ("eval", "tuned_perplexity", 13.0, False),
        ("eval", "eval_set_sha256", "bbbb", False),
        ("eval", "more", 1, False),
        ("verify", "merged_perplexity", 12.9, False),
        # Near zero, a relative difference is meaningless.
        ("verify", "perplexity_change_percent", 0.1, True),
        ("verify", "perplexity_change_percent", -1.78, False),
        ("verify", "mean_kl", 1.5e-3, True),
        ("verify", "mean_kl", 0.19, False),
        ("verify", "other_base_mean_kl", 0.25, False),
        ("verify", "token_agreement", 0.78, False),
        ("verify", "nonfinite_values", 1, False),
        ("verify", "nonfinite_values", "0", False),
        ("summary", "perplexity_after", 9.0, False),
        ("summary", "train_minutes", 60.0, True),
    ],
)
def test_metrics(file, key, value, agrees):
    metrics = copy.deepcopy(METRICS)
    metrics[file][key] = value
    for old, new in ((METRICS, metrics), (metrics, METRICS)):
        found = differences(revision("HEAD", old), revision("run", new))
        assert [line.split(": ")[:2] for line in found] == (
            [] if agrees else [[f"metrics/{file}.json", key]]
        )


@pytest.mark.parametrize("file", ["data", "verify", "summary"])
def test_a_missing_file_is_a_difference(file):
    metrics = {key: values for key, values in METRICS.items() if key != file}
    complete, lacking = revision("a"), revision("b", metrics)
    assert differences(complete, lacking) == [f"metrics/{file}.json: missing"]
    assert differences(lacking, complete) == [f"metrics/{file}.json: missing in what is committed"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda stage: stage.update(cmd="walk"), ["prepare: cmd"]),
        (lambda stage: stage["params"]["params.yaml"].update(seed=2), ["prepare: params"]),
        (lambda stage: stage["deps"][0].update(md5=MD5["two"]), ["prepare: stages/prepare.py"]),
        (lambda stage: stage["outs"][0].update(md5=MD5["two"]), ["prepare: data/prepared"]),
        (lambda stage: stage["outs"][1].update(md5=MD5["two"]), ["prepare: metrics/lengths.csv"]),
        # Another CPU rounds differently.
        (lambda stage: stage["outs"][2].update(md5=MD5["two"]), []),
        (lambda stage: stage["outs"].pop(), ["prepare: models/adapter"]),
    ],
)
def test_what_dvc_lock_records(change, found):
    lock = copy.deepcopy(LOCK)
    change(lock["stages"]["prepare"])
    assert differences(revision("HEAD"), revision("run", lock=lock)) == found


def test_a_stage_of_one_side_alone():
    more = {"stages": LOCK["stages"] | {"extra": {"cmd": "run"}}}
    assert differences(revision("HEAD"), revision("run", lock=more)) == [
        "extra: only in the new run"
    ]
    assert differences(revision("HEAD", lock=more), revision("run")) == ["extra: only in dvc.lock"]


MADE = {"device": "CPU, 2 cores", "torch_version": "2.13.0"}


def on(machine, **changes):
    """Metrics and lock of a run on `machine`, with other values of metrics/eval.json."""
    costs = {name: {"seconds": 1.0} | machine for name in ("quantize", "train", "eval", "merge")}
    metrics = METRICS | {f"{name}_cost": cost for name, cost in costs.items()}
    return metrics | {"eval": METRICS["eval"] | changes}


def revision_on(name, machine, lock=LOCK, **changes):
    metrics = on(machine, **changes)
    declared = [{f"metrics/{key}.json": {"cache": False}} for key in metrics]
    files = {f"metrics/{key}.json": json.dumps(values) for key, values in metrics.items()}
    dvc = json.dumps({"stages": {"all": {"metrics": declared}}})
    return stub.Texts(name, files | {"dvc.yaml": dvc, "dvc.lock": json.dumps(lock)})


@pytest.mark.parametrize(
    ("other", "exact"),
    [
        (MADE, True),
        (MADE | {"torch_version": "2.14.0"}, False),
        (MADE | {"device": "NVIDIA H200"}, False),
        ({}, False),
    ],
)
def test_on_the_same_machine_with_the_same_versions_all_is_equal(other, exact):
    lock = copy.deepcopy(LOCK)
    lock["stages"]["prepare"]["outs"][2]["md5"] = MD5["two"]
    near = revision_on("run", other, lock=lock, tuned_perplexity=13.7001)
    found = differences(revision_on("HEAD", MADE), near)
    assert [line.split(": ")[:2] for line in found] == (
        [["prepare", "models/adapter"], ["metrics/eval.json", "tuned_perplexity"]] if exact else []
    )

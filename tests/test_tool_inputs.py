"""How gate, compare, check_repro and free handle invalid files."""

import hashlib
import json

import pytest
from stub_pipeline import must, tool

MD5 = "d41d8cd98f00b204e9800998ecf8427e"
EVAL = json.dumps({"tuned_perplexity": 12.0, "eval_set_sha256": "aaaa"})
GOOD = {
    "dvc.yaml": """\
stages:
  evaluate:
    cmd: run
    params: [train]
    outs: [merged: {push: false}]
    metrics: [metrics/eval.json: {cache: false}]
""",
    "dvc.lock": f"""\
stages:
  evaluate:
    cmd: run
    params: {{params.yaml: {{train: 1}}}}
    outs:
    - {{path: merged, md5: {MD5}}}
    - {{path: metrics/eval.json, md5: {hashlib.md5(EVAL.encode()).hexdigest()}}}
""",
    "gate.yaml": "metrics/eval.json: {tuned_perplexity: {at_most: 20}}",
    "params.yaml": "train: 1",
    "metrics/eval.json": EVAL,
    "benchmarks/results/noise.json": json.dumps(
        {"commit": "abc", "device": "CPU", "seeds": [1], "metrics": {}}
    ),
}
READERS = {
    "dvc.yaml": ["gate", "compare", "check_repro", "free"],
    "dvc.lock": ["gate", "check_repro", "free"],
    "gate.yaml": ["gate"],
    "params.yaml": ["gate", "compare"],
    "metrics/eval.json": ["gate", "compare", "check_repro"],
    "benchmarks/results/noise.json": ["compare"],
}
ARGUMENTS = {"gate": ["--base=HEAD"], "compare": ["--base=HEAD"]}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
WRONG_YAML = [
    "[1]",
    "5",
    "text",
    "",
    "a: [",
    "\x00",
    b"a: \xff",
    "[" * 500,
    f"a: {'9' * 5000}",
    "a: !!int x",
    "a: !!bool x",
    "a: 2001-99-99",
    "a: !!python/object:os.system x",
    "? {a: 1}\n: 2",
    BOMB,
    "a: &a [*a]",
    "x: 1\n" * 2 + "\x1b]0;title\x07",
    "k: 1 #" + "x" * 2_000_000,
]
# Each file is read by the same function.
SOME_YAML = ["[1]", "", "a: [", BOMB, f"a: 0x{'f' * 5000}", f"? 1{'0' * 400}\n: a"]
WRONG_JSON = ["[1]", "5", '"text"', "null", "NaN", "", "{", "\x00", b"\xff", "[" * 100_000]
OUT = "stages: {{evaluate: {{outs: [{}]}}}}"
WRONG = {
    "dvc.yaml": [
        *SOME_YAML,
        "stages: 5",
        "stages: [a]",
        "stages: {evaluate: 5}",
        "stages: {1: {cmd: run}}",
        "stages: {evaluate: {metrics: 5}}",
        "stages: {evaluate: {metrics: {metrics/eval.json: 1}}}",
        "stages: {evaluate: {metrics: [5]}}",
        "stages: {evaluate: {metrics: [[a]]}}",
        "stages: {evaluate: {metrics: [{a: 1, b: 2}]}}",
        "stages: {evaluate: {outs: [{5: {push: false}}]}}",
        'stages: {"\\e[31m\\nred": {outs: 5}}',
    ],
    "dvc.lock": [
        *SOME_YAML,
        "stages: []",
        "stages: {evaluate: 5}",
        "stages: {evaluate: {params: [train]}}",
        "stages: {evaluate: {params: {params.yaml: 5}}}",
        "stages: {evaluate: {deps: {a: b}}}",
        *(
            OUT.format(one)
            for one in (
                "5",
                "{path: merged}",
                f"{{md5: {MD5}}}",
                "{path: merged, md5: 5}",
                f"{{path: [a], md5: {MD5}}}",
                "{path: merged, md5: ''}",
                "{path: merged, md5: ../../../../precious}",
                "{path: merged, md5: '..//tmp/precious'}",
                f"{{path: merged, md5: '{MD5}/../../x'}}",
                f'{{path: merged, md5: "{MD5}\\n"}}',
            )
        ),
    ],
    "gate.yaml": WRONG_YAML,
    "params.yaml": SOME_YAML,
    "metrics/eval.json": [
        *WRONG_JSON,
        '{"tuned_perplexity": [1]}',
        '{"tuned_perplexity": {"a": 1}}',
        f'{{"tuned_perplexity": 1{"0" * 400}}}',
        f'{{"tuned_perplexity": 1{"0" * 5000}}}',
        f'{{"tuned_perplexity": -{2**63}}}',
        '{"\\u001b[31m\\n# heading": [1]}',
    ],
    "benchmarks/results/noise.json": [
        *WRONG_JSON,
        "{}",
        '{"metrics": 5}',
        *(
            json.dumps(json.loads(GOOD["benchmarks/results/noise.json"]) | changed)
            for changed in (
                {"commit": 5},
                {"seeds": "1"},
                {"measured_on": {}},
                {"measured_on": {"params": [], "data": {}}},
                {"metrics": {"metrics/eval.json": 5}},
                {"metrics": {"metrics/eval.json": {"a": {}}}},
                {"metrics": {"metrics/eval.json": {"a": {"noise_percent": "5"}}}},
                {"metrics": {"metrics/eval.json": {"a": {"noise_percent": -1}}}},
                {"metrics": {"metrics/eval.json": {"a": {"noise_percent": float("nan")}}}},
            )
        ),
    ],
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    must(folder, "git", "init", "-q", "-b", "main")
    must(folder, "dvc", "init", "-q")
    write(folder, GOOD)
    return folder


def write(folder, files):
    """Write and commit `files`, text or bytes by their path."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    must(folder, "git", "add", "-A")
    must(folder, "git", "commit", "-qm", "files", "--allow-empty")


def test_the_files_that_are_spoiled_below_are_good(repository):
    write(repository, GOOD)
    for name in ("gate", "compare", "check_repro", "free"):
        done = tool(repository, name, *ARGUMENTS.get(name, []))
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", WRONG)
def test_a_file_of_wrong_types_ends_in_one_line(repository, path):
    for content in WRONG[path]:
        write(repository, GOOD | {path: content})
        for name in READERS[path]:
            done = tool(repository, name, *ARGUMENTS.get(name, []))
            seen = (name, content[:80], done.stdout, done.stderr)
            assert done.returncode == 2, seen
            assert len(done.stderr.splitlines()) == 1, seen
            assert done.stderr.rstrip("\n").isprintable(), seen
            assert len(done.stderr) < 400, seen
            assert f"{path}:" in done.stderr, seen


def test_names_steer_no_terminal_and_start_no_line(repository):
    name = "\x1b[2J\ngate: passed\u2028\u202e"
    values = {"tuned_perplexity": 12.0, name: float("nan")}
    content = json.dumps(values)
    lock = GOOD["dvc.lock"].replace(
        hashlib.md5(EVAL.encode()).hexdigest(), hashlib.md5(content.encode()).hexdigest()
    )
    write(repository, GOOD)
    write(
        repository,
        {"metrics/eval.json": content, "dvc.lock": lock, "gate.yaml": "m: {a: {at_most: 1}}"},
    )
    done = tool(repository, "gate", "--base", "HEAD")
    assert done.returncode == 1
    *_, broken, missing, verdict = done.stdout.splitlines()
    assert r"\x1b[2J\ngate: passed\u2028\u202e is nan" in broken
    assert (missing, verdict) == ("broken: m: a is missing", "gate: FAILED: 2 broken")
    write(repository, {"metrics/eval.json": EVAL})
    (repository / "metrics/eval.json").write_text(content)
    done = tool(repository, "check_repro")
    assert done.returncode == 1
    assert all(line.isprintable() for line in done.stderr.splitlines())


def test_free_deletes_nothing_outside_the_cache(repository, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for md5 in (f"..{precious}", f"../{'../' * 12}{str(precious)[1:]}"):
        write(repository, GOOD | {"dvc.lock": OUT.format(f"{{path: merged, md5: '{md5}'}}")})
        assert tool(repository, "free", "--yes").returncode == 2
        assert precious.exists()


def test_free_reads_no_damaged_listing(repository):
    write(repository, GOOD | {"dvc.lock": OUT.format(f"{{path: merged, md5: {MD5}.dir}}")})
    listing = repository / ".dvc/cache/files/md5" / MD5[:2] / f"{MD5[2:]}.dir"
    listing.parent.mkdir(parents=True, exist_ok=True)
    for content in ("{", "{}", '[{"md5": "../../x", "relpath": "a"}]', '[{"relpath": "a"}]'):
        listing.write_text(content)
        done = tool(repository, "free", "--yes")
        assert done.returncode == 2
        assert f"{listing}:" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    listing.unlink()

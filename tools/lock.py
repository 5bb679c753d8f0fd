"""Refresh the lock files: exact versions, with the hashes of all their files on PyPI.

    make lock                           keeps pins and adds what is new in pyproject.toml
    make lock UPGRADE="dvc datasets"    upgrades these and their dependencies as needed
    make lock UPGRADE=all               upgrades everything

requirements.lock has the whole environment but torch, triton and the CUDA packages. Those follow
from the build of torch, which depends on the machine, so requirements-torch.lock has only torch's
version. The other locks are maintained by hand, since their packages are installed without
dependencies; only their hashes are renewed.
"""

import argparse
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

from tools.screen import fail

LOCK, TORCH = Path("requirements.lock"), Path("requirements-torch.lock")
BY_HAND = [Path(f"requirements-{name}.lock") for name in ("harness", "gguf", "kernels", "hopper")]
UV = Path(".uv/bin/uv")
OF_TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
HEAD = "# Exact versions of everything but torch, for `make env`. Written by `make lock`.\n"
TORCH_HEAD = (
    "# No hashes: the CPU build and the CUDA builds of a version are other files, with other\n"
    "# dependencies. Written by `make lock`.\n"
)


def pins(lock: str) -> dict[str, str]:
    """Package name -> its lines in a lock file, with hashes."""
    blocks = re.findall(r"^[A-Za-z0-9](?:.*\\\n)*.*", lock, re.MULTILINE)
    return {block.partition("==")[0]: block for block in blocks}


def divided(resolved: str) -> tuple[str, str]:
    """requirements.lock and requirements-torch.lock from uv's resolution."""
    blocks = pins(resolved)
    rest = [block for block in blocks.values() if not OF_TORCH.match(block)]
    [version] = re.findall(r"^torch==\S+", blocks["torch"])
    return HEAD + "\n".join(rest) + "\n", f"{TORCH_HEAD}{version}\n"


def compiled(before: str, *arguments: str, stdin: str = "") -> str:
    """The output of `uv pip compile`, which keeps the pins in `before` where possible."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "lock")
        out.write_text(before)
        lowest = tomllib.loads(Path("pyproject.toml").read_text())["project"]["requires-python"]
        command: list[str | Path] = [UV, "--no-config", "pip", "compile", "--quiet", "--universal"]
        command += ["--python-version", lowest.removeprefix(">="), "--generate-hashes"]
        command += ["--no-header", "--no-annotate", "--output-file", out, *arguments]
        done = subprocess.run(command, input=stdin, text=True, capture_output=True, check=False)
        if done.returncode:
            reason = " ".join(done.stderr.split())
            fail("lock", f"nothing was written; fix pyproject.toml or the pin it names: {reason}")
        return out.read_text()


def by_hand(text: str) -> str:
    """A hand-maintained lock, with renewed hashes."""
    head = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    named = "\n".join(block.partition(" \\")[0] for block in pins(text).values())
    return head + compiled("", "--no-deps", "-", stdin=named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", nargs="*", default=[], help="packages, or `all`")
    names = parser.parse_args().upgrade
    upgrade = ["--upgrade"] if names == ["all"] else [f"--upgrade-package={n}" for n in names]
    before = "".join(file.read_text() for file in (LOCK, TORCH) if file.exists())
    lock, torch = divided(compiled(before, *upgrade, "--group", "dev", "pyproject.toml"))
    texts = {LOCK: lock, TORCH: torch} | {file: by_hand(file.read_text()) for file in BY_HAND}
    for file, text in texts.items():
        old = pins(file.read_text()) if file.exists() else {}
        file.write_text(text)
        for name, block in pins(text).items():
            was, now = (text.split()[0] if text else "new" for text in (old.get(name, ""), block))
            if was != now:
                print(f"lock: {file}: {was} -> {now}")


if __name__ == "__main__":
    main()

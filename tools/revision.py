"""Reads the pipeline's files from a Git revision, without checking it out, or the workspace."""

import hashlib
import os
import posixpath
import re
import shlex
import subprocess
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from stages.shared.foreign import read_json
from stages.shared.process import StageError
from tools import schemas

PARAMS, DVC_YAML, DVC_LOCK = "params.yaml", "dvc.yaml", "dvc.lock"
# Written by tools/harness.py, not by a stage.
HARNESS = "metrics/harness.json"
T = TypeVar("T")
_ABBREVIATED = r"[0-9a-f]{4,63}"


def git(*arguments: str) -> bytes:
    """Git's output. Raises StageError with Git's message and a remedy if it fails."""
    done = _run_git(*arguments)
    if done.returncode:
        raise StageError(_failure(done))
    return done.stdout


def _run_git(*arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        raise StageError("git is not installed; install it, as with: apt install git") from None
    except OSError as error:
        raise StageError(f"git does not start: {error.strerror}; reinstall it") from None


def _failure(done: subprocess.CompletedProcess) -> str:
    said = os.fsdecode(done.stderr).strip()
    line = said.partition("\n")[0] or f"git {done.args[1]} ended with status {done.returncode}"
    if trust := re.search(r"git config --global --add safe\.directory .+", said):
        return f"{line}; if you trust the owner: {trust[0]}"
    if "not a git repository" in said:
        return f"{line}; run it in the project's folder, in a clone of its repository"
    return line


class Revision:
    """The project's files at one commit; those of the workspace when `name` is None.

    The project is the current folder, which may be a subfolder of its repository. The workspace
    has an empty `commit`. Raises StageError if this clone has no commit `name`.
    """

    def __init__(self, name: str | None):
        self.name = "the workspace" if name is None else name
        self.commit = "" if name is None else _commit(name)

    @cached_property
    def prefix(self) -> str:
        """The project's folder in its repository: empty at the top, else such as `below/`."""
        return os.fsdecode(git("rev-parse", "--show-prefix")).removesuffix("\n")

    @cached_property
    def files(self) -> dict[str, str]:
        """Every file of the repository (path from its top) -> Git's hash of its content.

        For the workspace, all files that are not ignored, without hashes.
        """
        if self.commit:
            listed = git("ls-tree", "-r", "-z", "--full-tree", self.commit)
            entries = [line.split("\t", 1) for line in os.fsdecode(listed).split("\0") if line]
            return {file: about.split()[2] for about, file in entries}
        kinds = ("--cached", "--others", "--exclude-standard")
        listed = git("ls-files", "-z", "--full-name", *kinds, ":/")
        return dict.fromkeys(os.fsdecode(listed).split("\0")[:-1], "")

    def at(self, path: str) -> str:
        """A path of the project, from the top of the repository."""
        return posixpath.normpath(posixpath.join(self.prefix, path))

    def bytes(self, path: str) -> bytes | None:
        """The content of `path`, or None if there is no such file."""
        if self.commit:
            file = self.at(path)
            return git("show", f"{self.commit}:{file}") if file in self.files else None
        try:
            return Path(path).read_bytes() if Path(path).is_file() else None
        except OSError as error:
            raise StageError(f"{path}: {error.strerror}; fix its permissions") from None

    def md5(self, path: str) -> str | None:
        """The MD5 by which DVC identifies a file."""
        content = self.bytes(path)
        return None if content is None else hashlib.md5(content).hexdigest()

    def where(self, path: str) -> str:
        """`path` as Git names it in this revision, for messages."""
        return f"{self.name}:{path}" if self.commit else path

    def yaml(self, path: str, schema: TypeAdapter[T]) -> T:
        """A YAML file validated against `schema`; a missing file counts as empty.

        Raises StageError naming the file and what is wrong with it.
        """
        content = self.bytes(path)
        return schemas.read_yaml(b"{}" if content is None else content, schema, self.where(path))

    def json(self, path: str, schema: TypeAdapter[T]) -> T | None:
        """A JSON file validated against `schema`; None if there is no such file.

        Raises StageError naming the file and what is wrong with it.
        """
        content = self.bytes(path)
        return None if content is None else read_json(content, schema, self.where(path))

    @cached_property
    def params(self) -> dict[str, Any]:
        return self.yaml(PARAMS, schemas.PARAMS)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """params.yaml by dotted names, such as `lora.r`."""
        return _flat(self.params)

    @cached_property
    def pipeline(self) -> schemas.Pipeline:
        return self.yaml(DVC_YAML, schemas.PIPELINE)

    @cached_property
    def lock(self) -> schemas.Lock:
        return self.yaml(DVC_LOCK, schemas.LOCK)

    @cached_property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Metrics file -> its values, for the files that exist of dvc.yaml's and HARNESS."""
        paths = [*self.pipeline.declared("metrics"), HARNESS]
        values = {path: self.json(path, schemas.METRICS) for path in paths}
        return {path: value for path, value in values.items() if value is not None}


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return found


def _commit(name: str) -> str:
    found = _run_git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if found.returncode == 1:
        raise StageError(f"{name or repr(name)} is not a revision here; {_how_to_get(name)}")
    if found.returncode:
        raise StageError(_failure(found))
    return found.stdout.decode().strip()


def _how_to_get(name: str) -> str:
    """The command that fetches `name` into a single-branch or shallow clone."""
    remotes = git("remote").decode().split()
    if not remotes:
        return "there is no remote to fetch it from: git branch --all and git tag list what exists"
    remote = "origin" if "origin" in remotes else remotes[0]
    tracked = next((other for other in remotes if name.startswith(f"{other}/")), None)
    if tracked:
        # Both sides of the colon, since a single-branch clone would otherwise not keep the name.
        branch = name.removeprefix(f"{tracked}/")
        return _fetch(tracked, f"{branch}:refs/remotes/{name}")
    if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name):
        return _fetch(remote, name)
    if _run_git("check-ref-format", "--branch", name).returncode or re.fullmatch(
        _ABBREVIATED, name
    ):
        shallow = git("rev-parse", "--is-shallow-repository").strip() == b"true"
        history = ["--unshallow"] if shallow else []
        return _fetch(*history, remote, f"+refs/heads/*:refs/remotes/{remote}/*")
    return f"{_fetch(remote, f'{name}:refs/heads/{name}')}, a tag{_fetch(remote, 'tag', name)[6:]}"


def _fetch(*arguments: str) -> str:
    return f"get it with `{shlex.join(['git', 'fetch', *arguments])}`"

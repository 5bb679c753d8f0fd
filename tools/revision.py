"""What a Git revision, or the workspace, says about the pipeline: read without checking it out."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError

PARAMS, DVC_YAML, DVC_LOCK = "params.yaml", "dvc.yaml", "dvc.lock"


def fail(tool: str, message: str) -> NoReturn:
    """End with status 2, which says that nothing could be judged, and one line."""
    print(f"{tool}: {message}", file=sys.stderr)
    sys.exit(2)


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], capture_output=True, check=False)


class Revision:
    """Files of one commit; of the workspace, whose `commit` is empty, when `name` is None.

    Raises LookupError with one line if `name` is no commit that this clone has.
    """

    def __init__(self, name: str | None):
        self.name = name or "the workspace"
        self.commit = ""
        self.files: set[str] = set()
        if name is None:
            return
        found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if found.returncode:
            remote, _, branch = name.partition("/")
            # With both sides of the colon, since a clone of one branch would else keep no name.
            target = f"{remote} {branch}:refs/remotes/{name}"
            fetch = f"git fetch {target}" if branch else "git fetch"
            raise LookupError(
                f"{name} is no revision of this clone; get it with `{fetch}`"
                " (a shallow clone lacks history: git fetch --unshallow)"
            )
        self.commit = found.stdout.decode().strip()
        tree = git("ls-tree", "-r", "-z", "--name-only", self.commit).stdout.decode()
        self.files = set(tree.split("\0")) - {""}

    def bytes(self, path: str) -> bytes | None:
        """The content of `path`, or None where there is no such file."""
        if not self.commit:
            return Path(path).read_bytes() if Path(path).is_file() else None
        return git("show", f"{self.commit}:{path}").stdout if path in self.files else None

    def md5(self, path: str) -> str | None:
        """The hash by which DVC knows a file."""
        content = self.bytes(path)
        return None if content is None else hashlib.md5(content).hexdigest()

    def where(self, path: str) -> str:
        """`path` as Git names it in this revision, for messages."""
        return f"{self.name}:{path}" if self.commit else path

    def yaml(self, path: str) -> dict:
        """A YAML 1.2 mapping, read as DVC reads it; empty where there is no such file.

        Raises ValueError naming the file and what is wrong with it.
        """
        try:
            value = YAML(typ="safe", pure=True).load(self.bytes(path) or b"{}")
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1
            raise ValueError(f"{self.where(path)}:{line}: not YAML: {error.problem}") from None
        except YAMLError as error:
            message = str(error).splitlines()[0]
            raise ValueError(f"{self.where(path)}: not YAML: {message}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.where(path)}: not a mapping")
        return value

    def json(self, path: str) -> dict | None:
        """A JSON object, NaN and Infinity included; None where there is no such file.

        Raises ValueError naming the file and what is wrong with it.
        """
        content = self.bytes(path)
        if content is None:
            return None
        try:
            value = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{self.where(path)}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.where(path)}: not a JSON object")
        return value

    def declared(self, *kinds: str) -> list[str]:
        """Paths that dvc.yaml declares as outputs of `kinds` ("metrics", "plots"), in its order."""
        return [
            entry if isinstance(entry, str) else next(iter(entry))
            for stage in self.yaml(DVC_YAML).get("stages", {}).values()
            for kind in kinds
            for entry in stage.get(kind, [])
        ]

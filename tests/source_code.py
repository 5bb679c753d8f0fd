"""The code by `ast`: the imports of a file, and all code of a stage."""

import ast
from functools import cache

from tiny import ROOT


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@cache
def imports(file: str) -> frozenset[str]:
    """The files under stages/ that `file` imports itself."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        files = (name.replace(".", "/") + ".py" for name in names)
        found |= {name for name in files if name.startswith("stages/") and (ROOT / name).exists()}
    return frozenset(found)


def code(name: str) -> set[str]:
    """Every file whose code stage `name` runs: its script, and what it imports through others."""
    found, new = set(), {f"stages/{name}.py"}
    while new:
        found |= new
        new = {i for file in new for i in imports(file)} - found
    return found

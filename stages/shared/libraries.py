"""Imports libraries without unused parts, which would take half of a short stage's time.

A stage calls `load_libraries` before its own imports, which then find the libraries loaded.
"""

import functools
import gc
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

# transformers imports them if installed, for vision models.
UNUSED = ("scipy", "sklearn", "torchvision")


def load_libraries(*libraries: str, without: Collection[str] = UNUSED) -> None:
    """Import `libraries` in this order as if the modules `without` were not installed.

    A library that has looked for one of them stays without it; others can import it afterwards.
    bitsandbytes does not load torch's compiler. The garbage collector ignores the libraries'
    objects from then on, which saves a quarter of a second each time.
    """
    # None in sys.modules makes an import fail.
    hidden: dict[str, Any] = dict.fromkeys(name for name in without if name not in sys.modules)
    sys.modules.update(hidden)
    gc.disable()
    try:
        for library in libraries:
            with compiling_later() if library == "bitsandbytes" else nullcontext():
                importlib.import_module(library)
    finally:
        gc.enable()
        for name in hidden:
            del sys.modules[name]
    gc.freeze()


@contextmanager
def compiling_later() -> Iterator[None]:
    """Within the block, torch.compile defers compilation to the first call.

    bitsandbytes compiles its fallbacks for devices without kernels on import, for which torch
    imports its whole compiler. Fallbacks that are called are compiled as usual.
    torch._disable_dynamo, which its kernels use, is a no-op until torch._dynamo is imported.
    """
    import torch

    compile, exclude = torch.compile, torch._disable_dynamo

    def compile_later(model: Callable | None = None, **options):
        if model is None:
            return functools.partial(compile_later, **options)
        if not inspect.isfunction(model):
            return compile(model, **options)
        compiled = functools.cache(lambda: compile(model, **options))
        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    def exclude_later(fn: Callable | None = None, *args, **options):
        excluded = exclude(fn, *args, **options)
        if fn is None:
            return excluded

        @functools.wraps(fn)
        def choose(*args, **kwargs):
            return (excluded if "torch._dynamo" in sys.modules else fn)(*args, **kwargs)

        return choose

    torch.compile, torch._disable_dynamo = compile_later, exclude_later
    try:
        yield
    finally:
        torch.compile, torch._disable_dynamo = compile, exclude

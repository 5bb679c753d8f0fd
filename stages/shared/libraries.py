"""Libraries imported without what no stage uses, which is half of a short stage's time.

A stage calls `load_libraries` before its own imports, which then find the libraries there.
"""

import functools
import gc
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

# transformers imports them wherever they are installed, for models that see.
UNUSED = ("scipy", "sklearn", "torchvision")


def load_libraries(*libraries: str, without: Collection[str] = UNUSED) -> None:
    """Import `libraries` in this order as if the modules `without` were not installed.

    A library that has looked for one of them stays without it; others find it afterwards.
    bitsandbytes does not bring torch's compiler. Garbage collections leave out what the libraries
    hold, now and later: it is a quarter of a second each time.
    """
    # None is how Python marks a module that cannot be had.
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
    """torch.compile of a function compiles when the function is first called.

    bitsandbytes has its fallbacks for devices without kernels compiled when it is imported, and
    torch imports its whole compiler for that. A fallback that is called is compiled as ever.
    Its kernels ask that nothing compiled include them: without a compiler nothing does.
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

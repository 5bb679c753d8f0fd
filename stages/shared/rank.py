"""One rank, a process started by stages/shared/launch.py.

    python -m stages.shared.rank STAGE MODULE:FUNCTION

It calls the function and reports its result, or what ended it, to the stage.
"""

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

from stages.shared.interrupts import end_with_parent
from stages.shared.libraries import load_libraries
from stages.shared.process import fault_line, quiet_libraries
from stages.shared.ranks import World, is_of_waiting, look, put


def main(stage: str, function: str) -> None:
    """Run as one rank."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != int(os.environ["RANKS_PARENT"]):
        return
    quiet_libraries()
    world = World()
    try:
        world = World.of_environment()
        assert world.store  # Only a World alone has none.
        load_libraries("bitsandbytes", "peft")
        module, _, name = function.partition(":")
        call: Callable = getattr(importlib.import_module(module), name)
        result = call(world, look(world.store, "task"))
        if world.first:
            put(world.store, "result", result)
        world.leave()
        status = 0
    except BaseException as error:
        tell_fault(world, stage, error)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries, and of a lost connection, must not keep the process.
    os._exit(status)


def tell_fault(world: World, stage: str, error: BaseException) -> None:
    """Report to the stage what ended this rank."""
    line = fault_line(stage, error)
    waiting = line is None and is_of_waiting(error)
    trace = "" if line or waiting else "".join(traceback.format_exception(error))
    line = line or f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if world.store is None:
        print(trace or line, file=sys.stderr)
        return
    tell(world.store, {"rank": world.rank, "line": line, "trace": trace, "waiting": waiting})


def tell(store, fault: dict) -> None:
    """Add a report for the stages: rank, line, trace ("" for none), waiting."""
    put(store, f"fault {store.add('told', 1)}", fault)
    store.add("faults", 1)


if __name__ == "__main__":
    main(*sys.argv[1:])

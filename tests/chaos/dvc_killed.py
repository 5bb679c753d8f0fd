"""`dvc` in a process that kills itself while it writes: python dvc_killed.py PATH CHANGE SIZE repro

PATH    a file or folder below the current one; `.` for all of it
CHANGE  the change there, counted from 1, at which dvc dies
SIZE    characters of what is being written then that reach the disk
"""

import builtins
import io
import os
import signal
import sys

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod"}


class Killer:
    """Counts changes below a path, and dies at one."""

    def __init__(self, path: str, change: int, size: int):
        self.path, self.left, self.size = os.path.abspath(path), change, size
        self.open = builtins.open

    def counts(self, path) -> bool:
        """Whether this change is the one."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        path = os.path.abspath(os.fsdecode(path))
        if path != self.path and not path.startswith(self.path + os.sep):
            return False
        self.left -= 1
        return self.left == 0

    def die(self, how: str, path) -> None:
        print(f"killed: {how} {os.path.relpath(os.fsdecode(path))}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event: str, arguments: tuple) -> None:
        if event in CHANGES and self.counts(arguments[0]):
            self.die(event, arguments[0])

    def opened(self, path, mode="r", *args, **kwargs):
        file = self.open(path, mode, *args, **kwargs)
        if not set(mode) & set("wax+") or not self.counts(path):
            return file
        if self.size == 0 or not isinstance(file, io.TextIOWrapper):
            self.die("open", path)
        write = file.write

        def cut(text):
            write(text[: self.size])
            self.size -= len(text)
            if self.size <= 0:
                file.flush()
                self.die("write", path)

        file.write = cut
        return file


if __name__ == "__main__":
    from dvc.cli import main

    killer = Killer(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    builtins.open = killer.opened
    sys.addaudithook(killer.hear)
    sys.exit(main(sys.argv[4:]))

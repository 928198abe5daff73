"""Run a program with its own view of some folders, and end all that descends from it: ``FROM:TO ... -- PROGRAM``.

Each source is mounted over its target, in a mount namespace of our own: nobody else sees it. Daemons that leave their
parents (a container runtime's shims) become children of this process, which kills and reaps them when the program has
ended, a SIGTERM comes, or whoever started it has gone.
"""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def children() -> list[int]:
    return [int(pid) for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text().split()]


def reap() -> None:
    """Kill what is left until nothing is: the children of the killed become ours."""
    while left := children():
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.wait()


def main(arguments: list[str]) -> int:
    at = arguments.index("--")
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    for pair in arguments[:at]:
        source, target = (os.fsencode(path) for path in pair.split(":"))
        check(libc.mount(source, target, None, MS_BIND | MS_REC, None))
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0))
    program = subprocess.Popen(arguments[at + 1 :])
    signal.signal(signal.SIGTERM, lambda *_: program.terminate())
    try:
        return program.wait()
    finally:
        reap()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

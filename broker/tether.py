"""Becomes another program that dies with the process that started it.

    python tether.py PARENT_PID PROGRAM ARGUMENT...

A broker must not outlive a test run or a demonstration that was killed. Linux can promise that: a process may ask to
be sent a signal when its parent dies, and the wish survives exec. It is asked here, in a fresh process, because Python
code between fork and exec of a process with threads can deadlock. Other systems have no such call; there the launcher's
own clean-up is all there is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent_pid: int, command: list[str]) -> None:
    """Replace this process by `command`, to be ended when process `parent_pid` dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before we asked
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - the launcher's own argument list, no shell


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

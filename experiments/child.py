"""Runs a command that ends when the process that started it does: python child.py PID COMMAND ...

A sweep that is killed must not leave trainers behind, which would hold the workdirs that the next one goes on with.
Linux sees to it; elsewhere a run that is left behind ends by itself.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; kept over exec


def main() -> None:
    parent, *line = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it was gone before it could be named
            sys.exit(1)
    os.execv(line[0], line)


if __name__ == "__main__":
    main()

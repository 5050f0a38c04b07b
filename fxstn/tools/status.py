"""Exit statuses of the command line: done, the run failed, a wrong call."""

DONE, FAILED, USAGE = 0, 1, 2
SIGNALLED = 128  # plus the number of the signal that ended a command, as in a shell
STATUSES = "exit status: 0 done; 1 the run failed, or a check did; 2 wrong call; 130 Ctrl-C; 143 SIGTERM"


class RunFailed(RuntimeError):
    """What was asked for was right, and failed on the way. The text says why, and the remedy."""

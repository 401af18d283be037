"""How much of this machine this process may use."""

import os


def usable_cores() -> int:
    """CPU cores that this process may run on: fewer than the machine has if taskset or a batch system restricts it."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1

"""How much of this machine is ours."""

import os


def usable_cores() -> int:
    """CPU cores that this process may run on: fewer than there are where taskset or a batch system bound it to some."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1

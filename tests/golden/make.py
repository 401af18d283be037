"""Write the goldens anew: python -m tests.golden.make [NAMES], such as pick or survey_rungs; without names all of them.

Only after a change that is meant. The old store is left as it is: it was made by an earlier version, that is its point.
"""

import os
import subprocess
import sys

import torch

WRITE = "GOLDEN_WRITE"
"""The environment variable that makes `tests/test_golden.py` write what it would compare."""


def main(names: list[str]) -> int:
    tests = ["tests/test_golden.py", "-q", *(["-k", " or ".join(f"test_{name}" for name in names)] if names else [])]
    command = [sys.executable, "-m", "pytest", *tests]
    codes = [subprocess.call(command, env=os.environ | {WRITE: "1"})]
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and (not names or "deltas" in names):
        command = [sys.executable, "-m", "pytest", "tests/test_golden.py", "-q", "-k", "test_deltas"]
        codes.append(subprocess.call(command, env=os.environ | {WRITE: "1", "ATEN_CPU_CAPABILITY": "avx2"}))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

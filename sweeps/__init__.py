"""Studies of where to edit a language model: planning, running on Ray, recording in MLflow.

For notebooks: `run_study`, `load_results`, `figures` (`sweeps.notebook`), imported on first use.
"""

import gc
from typing import Any

# PyTorch, transformers, MLflow and Ray create millions of objects that stay alive. With Python's default threshold, scanning
# them repeatedly for garbage takes a fifth of the time that a command or a worker needs to start.
gc.set_threshold(50_000, 20, 20)

__all__ = ["figures", "load_results", "run_study"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from sweeps import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module 'sweeps' has no attribute {name!r}")

"""Studies of where to edit a language model: planning, running on Ray, recording in MLflow.

For notebooks: `run_study`, `load_results`, `figures` (`sweeps.notebook`), imported when they are first asked for.
"""

from typing import Any

__all__ = ["figures", "load_results", "run_study"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from sweeps import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module 'sweeps' has no attribute {name!r}")

"""The example notebook: what is shown was made by its code, and its code runs."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.conftest import write_study

WITHOUT_RAY = "import pytest, tests.trials_here as here; here.in_this_process(pytest.MonkeyPatch())\n"
ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "example.ipynb"


def outputs(notebook, kind):
    return [output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == kind]


def test_the_example_is_executed_small_and_free_of_errors():
    notebook = nbformat.read(FILE, 4)
    nbformat.validate(notebook)
    assert FILE.stat().st_size < 300_000
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert not outputs(notebook, "error")
    shown = [output.data for output in outputs(notebook, "display_data")]
    assert sum("image/png" in data for data in shown) == 2


def test_the_example_runs(workplace, tiny_folder, monkeypatch):
    """As it stands, on a study of two trials, which run in the process of the notebook."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(FILE, 4)
    (given,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    given.source = WITHOUT_RAY + f"STUDY, CHANGES = {str(write_study(workplace, tiny_folder))!r}, {{}}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(workplace)}}).execute()
    text = "".join(output.text for output in outputs(notebook, "stream"))
    assert "complete 2 trials done, 0 failed" in text and "mlp_down" in text
    assert "locft apply models:/locft-edit-" in text
    figures = [output.data for output in notebook.cells[9].outputs + notebook.cells[11].outputs if "data" in output]
    assert any("application/vnd.plotly.v1+json" in data for data in figures)
    assert (workplace / "mlflow.db").exists()

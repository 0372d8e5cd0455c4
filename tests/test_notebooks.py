"""The notebooks are the scripts beside them, and run from top to bottom."""

from pathlib import Path

import jupytext
import nbclient
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("notebooks/*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the kernel's sockets
def test_notebook_runs(script, monkeypatch):
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    cells = [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == cells, (
        f"jupytext --to ipynb {script.relative_to(ROOT)}"
    )
    assert not any(cell.get("outputs") for cell in notebook.cells)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)  # it computes
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 1, "expected pictures"

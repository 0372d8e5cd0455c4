"""The notebooks are the scripts beside them, and run from top to bottom."""

import os
import sys
from pathlib import Path

import jupytext
import nbclient
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("notebooks/*.py"))
SLOW = {"2_sparsify_and_distil"}  # it trains
RUN = [
    pytest.param(script, marks=[pytest.mark.slow] if script.stem in SLOW else [], id=script.stem)
    for script in SCRIPTS
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_notebook_is_the_script(script):
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    cells = [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == cells, (
        f"jupytext --to ipynb {script.relative_to(ROOT)}"
    )
    assert not any(cell.get("outputs") for cell in notebook.cells)
    install = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert install.splitlines()[1:] == [
        '!python -c "import d2m_jax" 2> /dev/null || pip install -q d2m_jax'
    ]


def test_all_notebooks_are_named_where_one_looks_for_them():
    for page in ("README.md", "docs/python.md"):
        text = (ROOT / page).read_text()
        assert all(f"notebooks/{script.stem}.ipynb" in text for script in SCRIPTS), page


@pytest.mark.parametrize("script", RUN)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the kernel's sockets
def test_notebook_runs(script, tmp_path, monkeypatch):
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", commands)  # d2m-convert
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)  # it computes
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 1, "expected pictures"

"""The package as a notebook meets it: names, help, and no cost to import."""

import ast
import pkgutil
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import d2m_jax
from d2m_jax.sampling.pipeline import load_pipeline
from d2m_jax.weights import load_model


def test_names_are_listed_and_handed_on():
    # What is listed, what type checkers see, and what is handed on are the same.
    tree = ast.parse(Path(d2m_jax.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [(node.module, node.names[0]) for node in typed.body]
    public = {alias.asname: f"{module}.{alias.name}" for module, alias in imports}
    listed = set(d2m_jax.__all__) - {"__version__"}
    assert listed == public.keys() and listed <= set(dir(d2m_jax))
    names = {}
    exec("from d2m_jax import *", names)
    for name, place in public.items():
        assert place == f"d2m_jax.{d2m_jax._PLACES[name]}"
        assert names[name] is pkgutil.resolve_name(place)
    assert names["load_pipeline"] is load_pipeline and names["load_model"] is load_model
    said = pydoc.render_doc(d2m_jax, renderer=pydoc.plaintext)
    assert "load_pipeline(" in said and "load_model(" in said and "images.pil" in said


def test_a_name_misspelt_suggests_the_near_one():
    with pytest.raises(AttributeError, match="'load_pipline', did you mean load_pipeline?"):
        d2m_jax.load_pipline  # noqa: B018 (it raises)
    assert not hasattr(d2m_jax, "zzz")


def test_importing_it_imports_no_jax():
    code = "import sys, d2m_jax; dir(d2m_jax); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_run_and_its_report_import_no_torch():
    """Nor does what they use: seconds of every start."""
    code = (
        "import sys, d2m_jax.training.run, d2m_jax.report.write; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_is_no_path_is_told():
    """In a process of its own, where nothing checks the types of arguments before."""
    code = """
import d2m_jax
for load in (d2m_jax.load_model, d2m_jax.load_pipeline):
    for path in (None, 3, b"a", "", [], "a" * 5000, "a\\0b"):
        try:
            load(path)
        except ValueError as error:
            print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 14 and all(line.startswith("ConfigError ") for line in said)
    for found in ("NoneType", "int", "bytes", "an empty string", "list"):
        assert f"path: found {found}, expected a path or OWNER/NAME" in done.stdout

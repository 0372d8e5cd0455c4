"""The package as a notebook meets it: names, help, and no cost to import."""

import pydoc
import subprocess
import sys

import pytest

import d2m_jax
from d2m_jax.sampling.pipeline import load_pipeline
from d2m_jax.weights import load_model


def test_names_are_listed_and_handed_on():
    assert {"load_model", "load_pipeline", "__version__"} <= set(dir(d2m_jax))
    assert set(d2m_jax.__all__) == {"load_model", "load_pipeline", "__version__"}
    names = {}
    exec("from d2m_jax import *", names)
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

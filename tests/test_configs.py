"""Configs that come along for FLUX.1 fit the teachers they are for, by shapes alone."""

import pytest

from d2m_jax import command_line
from d2m_jax.config import FluxConfig, ModelConfig
from d2m_jax.sharding import make_mesh
from d2m_jax.training.run import _check_students
from d2m_jax.weights.torch_files import random_flux

TEACHERS = {"flux_distill": FluxConfig(), "flux_random": random_flux.TRANSFORMER}


@pytest.mark.parametrize("name", TEACHERS)
def test_students_fit_their_teacher(name):
    config = command_line.load_config(name)
    _check_students(config, ModelConfig(TEACHERS[name]), make_mesh(config.mesh))


def test_a_config_is_found_by_its_name_where_a_folder_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flux_random").mkdir()
    assert command_line.load_config("flux_random").name == "flux_random"

"""Configs that come along for FLUX.1 fit the teachers they are for, by shapes alone."""

import pytest

from d2m_jax import command_line
from d2m_jax.config import FluxConfig, ModelConfig, RunConfig, StudentConfig
from d2m_jax.models.accounting import account
from d2m_jax.sharding import make_mesh
from d2m_jax.sparsification.student import student_config
from d2m_jax.training.run import _check_students
from d2m_jax.training.stage import models_of
from d2m_jax.weights.torch_files import random_flux

TEACHERS = {
    "flux_distill": FluxConfig(),
    "flux_fitted": FluxConfig(),
    "flux_random": random_flux.TRANSFORMER,
    "flux_trial": FluxConfig(),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_students_fit_their_teacher(name):
    config = command_line.load_config(name)
    _check_students(config, ModelConfig(TEACHERS[name]), make_mesh(config.mesh))


def test_rivals_of_the_trial_have_as_many_activated_parameters():
    def activated(student: StudentConfig | RunConfig) -> int:
        start = ModelConfig(student_config(FluxConfig(), student.sparsify))
        *_, (_, _, model) = models_of(student.stages, start)
        return account(model.transformer).total.activated

    trial = command_line.load_run("flux_trial")
    found = {name: activated(rival) for name, rival in trial.rivals.items()}
    assert found["mini"] == pytest.approx(activated(trial), rel=0.02)
    assert found["papers"] == found["moe"]
    assert found["pruned"] == pytest.approx(found["moe"], rel=0.02)
    assert found["shallow"] == pytest.approx(found["moe"], rel=0.02)


def test_a_config_is_found_by_its_name_where_a_folder_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flux_random").mkdir()
    assert command_line.load_config("flux_random").name == "flux_random"

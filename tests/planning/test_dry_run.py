"""Of whom a dry run is."""

import pytest

from d2m_jax import command_line
from d2m_jax.commands import train
from d2m_jax.config import ConfigError
from d2m_jax.planning.dry_run import _student_of


def test_of_the_main_student_or_of_a_rival(capsys):
    config = command_line.load_run("flux_trial")
    main, moe = _student_of(config, None), _student_of(config, "moe")
    assert (main.sparsify, main.stages) == (config.sparsify, config.stages)
    rival = config.rivals["moe"]
    assert (moe.sparsify, moe.stages) == (rival.sparsify, rival.stages)
    assert not main.rivals and not moe.rivals
    assert "--rival pruned or mini or shallow or moe or papers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [("flux_trial", "did you mean moe.*expected pruned, mini"), ("flux_fitted", "has no rivals")],
)
def test_a_rival_that_is_not_there(name, said):
    with pytest.raises(ConfigError, match=f"--rival mo: no such rival.*{said}"):
        train.main([name, "--plan", "--rival", "mo"])

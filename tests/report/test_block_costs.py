"""What the command says of blocks: on costs that are known, and from end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest

import evaluate
from d2m_jax import weights
from d2m_jax.config import ConfigError, RunConfig, StageConfig
from d2m_jax.evaluate.arguments import Blocks
from d2m_jax.report.block_costs import costs_by_time, picture, places_of, run
from d2m_jax.sparsification.left_out import LeftOut
from tests.report.conftest import DATA, model, parameters


def known(samples: int = 80) -> LeftOut:
    """Single block 0 matters near the data, 1 near the noise, 2 always and a little."""
    t = (np.arange(samples) % 8 + 0.5) / 8
    early = (t < 0.5).astype(np.float64)
    costs = {
        ("single", 0): 0.01 + early,
        ("single", 1): 0.01 + 3 * (1 - early),
        ("single", 2): np.full(samples, 0.1),
    }
    vec = np.stack([early, np.ones(samples)], axis=1)
    return LeftOut(costs, {block: np.ones((samples, 4)) for block in costs}, vec, t)


def test_a_fitted_router_loses_less_where_blocks_matter_at_other_times():
    found = known()
    first, second = places_of(found, "single", Blocks(config="a"), alpha=0.5)
    assert (first.kind, first.first, second.first) == ("single", 0, 1)
    # The second half of the samples judges: as many near the data as near the noise.
    assert first.fixed == pytest.approx(0.51)  # block 0 costs less on the whole
    assert first.fitted == first.best == pytest.approx(0.01)
    assert second.fixed == pytest.approx(0.1)
    assert second.best == pytest.approx((0.01 + 0.1) / 2) == second.fitted
    (three,) = places_of(found, "single", Blocks(config="a", size=3, active=1), alpha=0.5)
    assert three.best == three.fitted == pytest.approx(0.01 + 0.1)
    assert places_of(found, "single", Blocks(config="a", size=4), alpha=0.5) == []


def test_costs_by_time():
    found = costs_by_time(known())
    assert list(found) == ["single 0", "single 1", "single 2"]
    np.testing.assert_allclose(found["single 0"], [1.01] * 4 + [0.01] * 4)
    (axes, _) = picture(found).axes
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown[0], [0.01] * 4 + [1.01] * 4)  # from noise to data


def test_from_end_to_end(tmp_path, capsys):
    dense = model()
    weights.save(tmp_path / "teacher", dense, parameters(dense, 0))
    stages = {"moe": StageConfig()}
    config = RunConfig("a", teacher=str(tmp_path / "teacher"), data=DATA, stages=stages)
    asked = Blocks(config="a", batches=2, batch_size=8, micro_batch=4, output=tmp_path / "out")
    run(config, asked)
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out" / "costs.json").read_text())
    assert found["samples"] == 16
    assert list(found["blocks"]) == ["double 0", "single 0", "single 1"]
    assert all(cost > 0 for cost in found["blocks"].values())
    (place,) = found["groups"]
    assert place["best"] <= min(place["fixed"], place["fitted"])
    assert "1 group of single blocks" in said and "keep_single=0, keep_last_single=0" in said
    assert (tmp_path / "out" / "costs.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="--size 3: the teacher has no so many blocks"):
        run(config, replace(asked, size=3))


@pytest.mark.parametrize(
    "asked, said",
    [
        (["--active", "2"], "--active 2: expected less than --size 2"),
        (["--size", "1"], "--size 1: expected at least 2"),
        (["--batches", "1"], "--batches 1: expected at least 2"),
        (["--batch-size", "8", "--micro-batch", "3"], "expected a divisor of --batch_size 8"),
    ],
)
def test_what_cannot_be_asked(asked, said):
    with pytest.raises(ConfigError, match=said):
        evaluate.main(["blocks", "configs/icons_moe_s.py", *asked])


def test_a_config_without_a_teacher():
    with pytest.raises(ConfigError, match=r"flux_dev\.py: expected a RunConfig with a teacher"):
        evaluate.main(["blocks", "configs/flux_dev.py"])

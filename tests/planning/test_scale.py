"""benchmarks/scale.py on a small step: compiled points, and those carried on from them."""

import importlib.util
import sys
from pathlib import Path

import pytest

from d2m_jax.planning.hardware import parse

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scale():
    sys.path.insert(0, str(BENCHMARKS))  # where its own imports are, as when it is run
    spec = importlib.util.spec_from_file_location("scale", BENCHMARKS / "scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


def point(chips=256, data=4):
    """A compiled point: half a second of work, gathers of FSDP and sums over the data axis."""
    row = {"kind": "all-gather", "link": "ICI", "count": 10, "certain": True}
    traffic = [
        row | {"size": 64, "moved": 1e9, "seconds": 0.1, "hidden": 0.1},
        row | {"kind": "all-reduce", "size": data, "moved": 3e8, "seconds": 0.3, "hidden": 0.0},
    ]
    seconds = {"compute": 0.5, "memory": 0.1, "communication": 0.4, "step": 0.8}
    return {
        "topology": "v5p:4x8x8",
        "chips": chips,
        "data": data,
        "slices": 1,
        "compiled": True,
        "flops": 1e15 * chips,
        "needed": 1e9,
        "traffic": traffic,
        "seconds": seconds
        | {"step, all hidden": 0.5, "step, none hidden": 0.9, "hidden communication": 0.1},
    }


def test_carried_on(scale):
    far = scale.carried(point(), parse("v5p:16x16x16"), fsdp=64)
    gather, total = far["traffic"]
    assert not far["compiled"] and far["data"] == 64 and far["chips"] == 4096
    assert gather == point()["traffic"][0]  # within the FSDP group nothing changes
    # A ring of 64 instead of 4: each sends 63/64 of its data twice, not 3/4.
    assert total["size"] == 64 and total["seconds"] == pytest.approx(0.3 * (63 / 64) / (3 / 4))
    assert far["seconds"]["step"] == pytest.approx(0.5 + total["seconds"])
    assert far["flops"] == 1e15 * 4096


def test_between_pods_only_the_network_is_carried_on(scale):
    two = point(chips=512, data=8) | {"topology": "v6e:16x16:2", "slices": 2}
    two["traffic"][1] |= {"link": "network", "size": 2}
    far = scale.carried(two, parse("v6e:16x16:16"), fsdp=64)
    gather, total = far["traffic"]
    assert gather == two["traffic"][0] and total["size"] == 16
    assert total["moved"] == pytest.approx(3e8 * (15 / 16) / (1 / 2))


def test_curve_takes_what_is_known_and_carries_it_on(scale, tmp_path):
    known = {"v5p:4x8x8": point()}
    topologies = [parse(f"v5p:{shape}") for shape in scale.SHAPES["v5p"]]
    points = list(scale.curve(topologies, 64, 0, program=None, known=known))
    # Nothing compiled is smaller than 256 chips, so nothing is known of 64.
    assert [p["chips"] for p in points] == [256, 512, 1024, 2048, 4096]
    assert [p["compiled"] for p in points] == [True] + [False] * 4
    steps = [p["seconds"]["step"] for p in points]
    assert steps == sorted(steps)
    scale.draw(points, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000

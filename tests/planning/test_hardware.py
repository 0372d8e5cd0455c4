"""Topologies by name, and which links a group of devices has."""

import importlib.util
from types import SimpleNamespace

import pytest

from d2m_jax.config import ConfigError
from d2m_jax.planning.hardware import devices, link, parse


@pytest.mark.parametrize(
    ("text", "chips"),
    [
        ("v5p:4x4x4", 64),
        ("v5p:2x2x1", 4),
        ("v5p:16x16x16", 4096),
        ("v6e:8x8", 64),
        ("v6e:16x16:4", 1024),
        ("v5e:4x8", 32),
        ("h100:8", 8),
        ("h100:64", 64),
        ("h200:1", 1),
    ],
)
def test_topologies(text, chips):
    topology = parse(text)
    assert topology.chips == chips and str(topology) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5:4x4", "unknown kind 'v5', did you mean v5.?"),
        ("a100:8", "one of v5e, v5p, v6e, h100, h200"),
        ("v5p", "expected v5p:4x4x4"),
        ("v5p:4x4", "expected v5p:4x4x4"),
        ("v6e:8xx", "expected v6e:4x8"),
        ("h100:0", "expected h100:8"),
        ("h100:12", "found 12 GPUs, expected whole hosts of 8"),
        ("h100:8:2", "GPUs have no slices"),
        ("v6e:16x32", "expected one of 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5p:4x4x6", "multiples of 4"),
        ("v5p:32x32x32", "at most 6144 chips"),
        ("v6e:1x1:2", "slices of at least 4 chips"),
    ],
)
def test_bad_topologies(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(text)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_compiler_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"libtpu.*pip install 'd2m_jax\[tpu\]'"):
        devices(parse("v6e:2x2"))


def chips(*places, slice_index=0):
    return [SimpleNamespace(coords=(*p, 0, 0)[:3], slice_index=slice_index) for p in places]


def test_links_of_a_torus():
    ring = [(x, 0, 0) for x in range(4)]
    cube = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    assert link(parse("v5p:4x4x4"), chips(*ring)) == ("ICI", 200e9)  # both ways round
    assert link(parse("v5p:4x4x4"), chips(*cube)) == ("ICI", 600e9)
    assert link(parse("v5p:2x4x4"), chips(*ring)) == ("ICI", 100e9)  # no whole cube, no ring
    assert link(parse("v5p:8x8x8"), chips(*ring)) == ("ICI", 100e9)  # half of one
    line = [(x, 0) for x in range(16)]
    assert link(parse("v6e:16x16"), chips(*line)) == ("ICI", 200e9)
    assert link(parse("v6e:8x8"), chips(*line[:8])) == ("ICI", 100e9)
    across = chips((0, 0)) + chips((0, 0), slice_index=1)
    assert link(parse("v6e:16x16:2"), across) == ("network", 12.5e9)


def test_links_of_gpus():
    gpus = [SimpleNamespace(id=i) for i in range(16)]
    topology = parse("h100:16")
    assert link(topology, gpus[:8]) == ("NVLink", 450e9)
    assert link(topology, gpus) == ("network", 400e9)  # eight NICs of 50 GB/s on each host
    assert link(topology, gpus[::8]) == ("network", 50e9)

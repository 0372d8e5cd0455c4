"""Plans of a small distillation step, for devices that are not here."""

import json
from unittest import mock

import jax
import pytest

from d2m_jax.config import MeshConfig
from d2m_jax.planning.hardware import parse
from d2m_jax.planning.plan import needed_bytes, plan, table
from d2m_jax.sharding import make_mesh
from tests.planning import planned

GIB = 2**30
DIM, DEPTH = 64, 4
BLOCK = 12 * DIM**2  # parameters


@pytest.fixture(scope="module", params=["h100:8", "v6e:2x4"])
def made(request):
    if request.param != "h100:8":  # without a compiler for GPUs, CPU devices stand for them
        planned.skip_without_compiler(request.param)
    return planned.run(request.param, "plan", f"dim={DIM}", f"depth={DEPTH}")


def test_memory_by_part(made):
    parts = made["parts"]
    mine = DEPTH * BLOCK / 8
    assert parts["trainable"] == 4 * mine and parts["frozen"] == 2 * mine
    assert parts["optimizer"] == 8 * mine + 4  # two moments and a step
    assert parts["batch"] == 2 * 32 * DIM
    assert sum(parts.values()) == pytest.approx(made["needed"])
    saved = 2 * DEPTH * 32 * DIM * 2  # both streams before every block, bf16
    assert parts["temporaries"] > saved
    assert made["fits"] and made["needed"] < made["memory"]


def test_collectives_gather_every_block(made):
    gathered = sum(row["moved"] for row in made["traffic"] if row["kind"] == "all-gather")
    # Teacher and student once forward and once more in the backward pass, 7/8 of bf16 from others.
    # Compilers gather activations instead where that is less, and some weights twice.
    least = DEPTH * 2 * BLOCK * 2 * 7 / 8
    assert made["compiler"] != "XLA for GPU" or 0.5 * least < gathered < 3 * least
    assert made["traffic"] and all(row["certain"] for row in made["traffic"])


def test_roofline(made):
    seconds, assumed, gpu = made["seconds"], made["assumptions"], made["topology"] == "h100:8"
    forward = DEPTH * 8 * 32 * (24 * DIM**2 + 4 * 32 * DIM)
    peak = 8 * (989.4e12 if gpu else 918e12)
    assert made["flops"] == 4 * forward
    assert seconds["compute"] == pytest.approx(6 * forward / (0.6 * peak))
    rate = 450e9 if gpu else None
    total = 0.0
    for row in made["traffic"]:
        if rate:
            latency = assumed["latency"]["NVLink"] * row["count"]
            assert row["seconds"] == pytest.approx(row["moved"] / (0.8 * rate) + latency)
        assert 0 <= row["hidden"] <= row["seconds"]
        total += row["seconds"]
    assert seconds["communication"] == pytest.approx(total)
    work = max(seconds["compute"], seconds["memory"])
    assert seconds["step, none hidden"] == pytest.approx(work + total)
    least, most = seconds["step, all hidden"], seconds["step, none hidden"]
    assert least * (1 - 1e-9) <= seconds["step"] <= most * (1 + 1e-9)  # float64 rounding


def test_program_too_large_for_the_compiler():
    planned.skip_without_compiler("v5e:2x2")
    sizes = {"dim": 3072, "depth": 48, "tokens": 4608, "heads": 24}
    made = planned.run("v5e:2x2", "plan", *(f"{k}={v}" for k, v in sizes.items()))
    assert not made["fits"] and made["needed"] > made["memory"] == 15.75 * GIB
    assert made["parts"]["trainable"] == 48 * 12 * 3072**2 and made["seconds"] == {}


def test_what_the_compiler_refuses_is_told_in_its_words():
    """A kernel that is too large for a core's memory says nothing of the device's."""
    said = "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nScoped allocation with size 18M"
    refused = mock.create_autospec(jax.stages.Lowered, instance=True)
    refused.compile.side_effect = jax.errors.JaxRuntimeError(said)
    found = plan(refused, parse("v5p:1x1x1"), make_mesh(MeshConfig()), {}, 1.0, name="calibration")
    note = f"calibration: the compiler refused it: {said}".replace("\n", " ")
    assert not found.fits and found.notes == (note,)
    assert "needs ? of 95.74 GiB" in table(found) and f"note: {note}" in table(found)
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert stored["needed"] is None and stored["phases"] == {"calibration": None}


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (49.26G) exceeds available HBM (31.25G).",
            49.26 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
            " hbm. Used 16.57G of 15.75G hbm. Exceeded hbm capacity by 845.52M.",
            16.57 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: no figures", float("inf")),
    ],
)
def test_message_of_a_compiler_out_of_memory(message, needed):
    assert needed_bytes(message) == needed

"""Plans of a small distillation step, for devices that are not here."""

import pytest

from d2m_jax.planning.plan import needed_bytes
from tests.planning import planned

GIB = 2**30
DIM, DEPTH = 64, 4
BLOCK = 12 * DIM**2  # parameters


@pytest.fixture(scope="module", params=["h100:8", "v6e:2x4"])
def plan(request):
    if request.param != "h100:8":  # without a compiler for GPUs, CPU devices stand for them
        planned.skip_without_compiler(request.param)
    return planned.run(request.param, "plan", f"dim={DIM}", f"depth={DEPTH}")


def test_memory_by_part(plan):
    parts = plan["parts"]
    mine = DEPTH * BLOCK / 8
    assert parts["trainable"] == 4 * mine and parts["frozen"] == 2 * mine
    assert parts["optimizer"] == 8 * mine + 4  # two moments and a step
    assert parts["batch"] == 2 * 32 * DIM
    assert sum(parts.values()) == pytest.approx(plan["needed"])
    saved = 2 * DEPTH * 32 * DIM * 2  # both streams before every block, bf16
    assert parts["temporaries"] > saved
    assert plan["fits"] and plan["needed"] < plan["memory"]


def test_collectives_gather_every_block(plan):
    gathered = sum(row["moved"] for row in plan["traffic"] if row["kind"] == "all-gather")
    # Teacher and student once forward and once more in the backward pass, 7/8 of bf16 from others.
    # Compilers gather activations instead where that is less, and some weights twice.
    least = DEPTH * 2 * BLOCK * 2 * 7 / 8
    assert plan["compiler"] != "XLA for GPU" or 0.5 * least < gathered < 3 * least
    assert plan["traffic"] and all(row["certain"] for row in plan["traffic"])


def test_roofline(plan):
    seconds, assumed, gpu = plan["seconds"], plan["assumptions"], plan["topology"] == "h100:8"
    forward = DEPTH * 8 * 32 * (24 * DIM**2 + 4 * 32 * DIM)
    peak = 8 * (989.4e12 if gpu else 918e12)
    assert plan["flops"] == 4 * forward
    assert seconds["compute"] == pytest.approx(6 * forward / (0.6 * peak))
    rate = 450e9 if gpu else None
    total = 0.0
    for row in plan["traffic"]:
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
    plan = planned.run("v5e:2x2", "plan", *(f"{k}={v}" for k, v in sizes.items()))
    assert not plan["fits"] and plan["needed"] > plan["memory"] == 15.75 * GIB
    assert plan["parts"]["trainable"] == 48 * 12 * 3072**2 and plan["seconds"] == {}


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

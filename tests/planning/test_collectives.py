"""Collectives read from compiled programs that have known ones."""

import pytest

from d2m_jax.planning.collectives import collectives
from tests.planning import planned


@pytest.mark.parametrize("name", ["cpu", "v6e:2x4", "h100:8"])
def test_known_collectives(name):
    planned.skip_without_compiler(name)
    found = planned.run(name, "collectives")
    mebibyte = 1024 * 256 * 4
    data, fsdp = [[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]
    pairs = [[a, b] for pair in fsdp for a, b in (pair, pair[::-1])]
    # kind, times, bytes that a device sends each time, groups: by planned.communicating
    expected = [
        ("all-reduce", 5 + 1, mebibyte * 2 * 3 / 4, data),
        ("all-gather", 5, mebibyte, fsdp),
        ("collective-permute", 5 * 3, mebibyte, pairs),
        ("reduce-scatter", 5, mebibyte * 3 / 4, data),
        ("all-reduce", 1, mebibyte * 2 * 7 / 8, [list(range(8))]),
        ("all-to-all", 1, mebibyte * 3 / 4, data),
    ]

    def key(row):
        return row[0], row[1]

    assert sorted(
        ((one["kind"], one["count"], one["moved"], one["groups"]) for one in found), key=key
    ) == sorted(expected, key=key)
    assert all(one["certain"] and one["bytes"] == mebibyte for one in found)


def hlo(*lines):
    """A program of eight devices; the first line opens its entry."""
    return "\n".join(["HloModule test, num_partitions=8", "", *lines, "}"])


def test_asynchronous_fusions_of_tpus_count_once():
    gather = "bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0)"
    parts = {
        "start": 'custom-call(%g), custom_call_target="AsyncCollectiveStart"',
        "async_collective_fusion.1": "negate(%g)",
        "done": 'custom-call(%g), custom_call_target="AsyncCollectiveDone"',
    }
    lines = []
    for name, last in parts.items():
        lines += [f"%{name} (x: bf16[2,4]) -> bf16[8,4] {{", "  %x = bf16[2,4] parameter(0)"]
        lines += [f"  %g = {gather}", f"  ROOT %r = bf16[8,4] {last}", "}"]
    lines += ["ENTRY %main (x: bf16[2,4]) -> bf16[8,4] {", "  %x = bf16[2,4] parameter(0)"]
    lines += [f"  %f{i} = bf16[8,4] fusion(%x), calls=%{n}" for i, n in enumerate(parts)]
    (found,) = collectives(hlo(*lines))
    assert (found.kind, found.count, found.asynchronous) == ("all-gather", 1, True)
    assert found.groups == ((0, 2, 4, 6), (1, 3, 5, 7)) and found.moved == 3 * 16


def test_fused_reduce_scatter_and_transfer_between_slices():
    (scatter, transfer) = collectives(
        hlo(
            "%all-reduce-scatter.1 (x: f32[8]) -> f32[2] {",
            "  %x = f32[8] parameter(0)",
            "  %sum = f32[8] all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}",
            "  ROOT %mine = f32[2] dynamic-slice(%sum, %i)",
            "}",
            "ENTRY %main (x: f32[8]) -> f32[2] {",
            "  %x = f32[8] parameter(0)",
            "  %part = f32[2] fusion(%x), calls=%all-reduce-scatter.1",
            "  %sent = (f32[2]{0:T(2)}, u32[], token[]) send(%part, %token), frontend_attributes="
            '{_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
        )
    )
    assert (scatter.kind, scatter.moved, scatter.size) == ("reduce-scatter", 32 * 3 / 4, 4)
    assert (transfer.kind, transfer.moved, transfer.groups) == ("all-reduce", 8.0, ())
    assert transfer.asynchronous and transfer.size == 2


def loop(limit):
    return hlo(
        "%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {",
        "  %s = (s32[], f32[8]) parameter(0)",
        "  %i = s32[] get-tuple-element(%s), index=0",
        "  %x = f32[8] get-tuple-element(%s), index=1",
        "  %two = s32[] constant(2)",
        "  %next = s32[] add(%i, %two)",
        "  %sum = f32[8] all-reduce(%x), replica_groups={}",
        "  ROOT %t = (s32[], f32[8]) tuple(%next, %sum)",
        "}",
        "%test (s: (s32[], f32[8])) -> pred[] {",
        "  %s = (s32[], f32[8]) parameter(0)",
        "  %i = s32[] get-tuple-element(%s), index=0",
        f"  %limit = s32[] {limit}",
        "  ROOT %less = pred[] compare(%i, %limit), direction=LT",
        "}",
        "ENTRY %main (x: f32[8]) -> f32[8] {",
        "  %x = f32[8] parameter(0)",
        "  %one = s32[] constant(1)",
        "  %s = (s32[], f32[8]) tuple(%one, %x)",
        "  %w = (s32[], f32[8]) while(%s), condition=%test, body=%body",
    )


def test_loop_whose_length_only_its_condition_tells():
    (found,) = collectives(loop("constant(12)"))
    assert (found.count, found.certain) == (6, True)  # 1, 3, 5, 7, 9, 11
    assert found.groups == (tuple(range(8)),)


def test_loop_of_unknown_length_is_told():
    (found,) = collectives(loop("get-tuple-element(%s), index=0"))
    assert not found.certain


def test_conditional_counts_the_larger_branch():
    branches = [
        line
        for name, size in (("small", 8), ("large", 64))
        for line in (
            f"%{name} (x: f32[{size}]) -> f32[{size}] {{",
            f"  %x = f32[{size}] parameter(0)",
            f"  ROOT %sum = f32[{size}] all-reduce(%x), replica_groups={{{{0,1}},{{2,3}}}}",
            "}",
        )
    ]
    (found,) = collectives(
        hlo(
            *branches,
            "ENTRY %main (i: s32[]) -> f32[] {",
            "  %c = f32[] conditional(%i, %a, %b), branch_computations={%small, %large}",
        )
    )
    assert found.bytes == 64 * 4


def test_bf16_that_the_cpu_widens_counts_as_bf16():
    (found,) = collectives(
        hlo(
            "%widen (x: bf16[8]) -> f32[8] {",
            "  %x = bf16[8] parameter(0)",
            "  %wide = f32[8] convert(%x)",
            "  ROOT %same = f32[8] bitcast(%wide)",
            "}",
            "ENTRY %main (x: bf16[8]) -> f32[16] {",
            "  %x = bf16[8] parameter(0)",
            "  %f = f32[8] fusion(%x), calls=%widen",
            "  ROOT %g = f32[16] all-gather(%f), replica_groups={{0,1}}",
        )
    )
    assert found.bytes == 16


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ],
)
def test_notations_of_groups(notation, groups):
    (found,) = collectives(
        hlo(
            "ENTRY %main (x: f32[8]) -> f32[8] {",
            "  %x = f32[8] parameter(0)",
            f"  ROOT %sum = f32[8] all-reduce(%x), channel_id=1, replica_groups={notation},"
            " use_global_device_ids=true, to_apply=%add",
        )
    )
    assert found.groups == groups

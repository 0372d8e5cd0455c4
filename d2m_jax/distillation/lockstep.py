"""Teacher and student through the same scan: a step runs a group of both and compares them.

No features are stored, so memory does not grow with depth (docs/method.md).
"""

from collections.abc import Iterator
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from d2m_jax.config import KINDS, FluxConfig, check
from d2m_jax.distillation.losses import mean_square
from d2m_jax.models.flux import Flux, join
from d2m_jax.models.reports import Body, Context, GroupReport, Streams
from d2m_jax.models.stack import Stack


def check_aligned(teacher: FluxConfig, student: FluxConfig) -> None:
    """Raise ConfigError unless the teacher's stacks have the groups that the student's have, in
    order, those of one student's stack in one or more. Groups may differ in blocks: one that stands
    for more of the teacher's than it has (sparsification/depth.py)."""
    for kind in KINDS:
        theirs, mine = ([s.groups for s in getattr(c, kind)] for c in (teacher, student))
        ends = set(accumulate(theirs))
        check(
            sum(theirs) == sum(mine) and ends >= set(accumulate(mine)),
            f"lockstep: teacher's {kind} stacks have {theirs} groups, student's {mine}; expected"
            " the same",
        )


def lockstep(
    teacher: Flux,
    student: Flux,
    teacher_start: tuple[Streams, Context],
    student_start: tuple[Streams, Context],
    *,
    features: bool = True,
    remat: bool = True,
) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"], dict[str, Array], Body[GroupReport]]:
    """Both velocities; per group `feature` (mean squared difference of the streams at its end) and
    `square` (mean square of the teacher's), each [L]; and the student's report (see Flux.run).

    Of two Flux models of equal stacks, and what both are called with:

    >>> starts = teacher.embed(*inputs), student.embed(*inputs)
    >>> of_teacher, of_student, groups, report = lockstep(teacher, student, *starts)
    >>> loss = mean_square(of_teacher, of_student) + groups["feature"].mean()
    >>> bool(loss > 0)
    True
    """
    (t_streams, t_context), (s_streams, s_context) = teacher_start, student_start
    scalars, report = [], {"double": [], "single": []}
    for kind in report:
        if kind == "single":
            t_streams, s_streams = join(t_streams), join(s_streams)
        theirs = iter(getattr(teacher, kind))
        for s_stack in getattr(student, kind):
            of_stack = []
            for t_stack, s_params in _parts(theirs, s_stack):
                t_streams, s_streams, values, of_part = _stacks(
                    *(t_stack, s_stack, s_params, t_streams, s_streams, t_context, s_context),
                    *(features, remat),
                )
                scalars.append(values)
                of_stack.append(of_part)
            report[kind].append(jax.tree.map(lambda *a: jnp.concatenate(a), *of_stack))
    scalars = jax.tree.map(lambda *a: jnp.concatenate(a), *scalars)
    t_velocity = jax.lax.stop_gradient(teacher.final(t_streams, t_context))
    return t_velocity, student.final(s_streams, s_context), scalars, report


def _parts(theirs: Iterator[Stack], student: Stack) -> list[tuple[Stack, tuple]]:
    """The teacher's next stacks, as many as meet the student's one, each with the parameters of the
    groups that it meets."""
    stacks = []
    while sum(stack.config.groups for stack in stacks) < student.config.groups:
        stacks.append(next(theirs))
    _, params = student.split()
    if len(stacks) == 1:
        return [(stacks[0], params)]
    sizes = [stack.config.groups for stack in stacks]
    leaves, tree = jax.tree.flatten(params)
    # The gradient of split is one concatenation; slices would be filled up and added.
    parts = zip(*(jax.lax.split(leaf, sizes) for leaf in leaves), strict=True)
    return [(s, jax.tree.unflatten(tree, part)) for s, part in zip(stacks, parts, strict=True)]


def _stacks(
    teacher: Stack,
    student: Stack,
    s_params: tuple,
    t_streams: Streams,
    s_streams: Streams,
    t_context: Context,
    s_context: Context,
    features: bool,
    remat: bool,
):
    t_graphs, t_params = teacher.split()
    s_graphs, _ = student.split()
    # Only the student is recomputed in the backward pass: the teacher has no gradient.
    run_student = partial(student.run_group, s_graphs, context=s_context)
    if remat:
        run_student = jax.checkpoint(run_student, prevent_cse=False)

    def body(streams: tuple[Streams, Streams], params: tuple):
        with jax.named_scope("teacher"):
            t, _ = teacher.run_group(t_graphs, params[0], streams[0], t_context)
            t = jax.lax.stop_gradient(t)
        with jax.named_scope("student"):
            s, of_group = run_student(params[1], streams[1])
        with jax.named_scope("features"):
            scalars = _compare(t, s, s_context) if features else {}
        return (t, s), (scalars, of_group)

    (t, s), (scalars, report) = jax.lax.scan(body, (t_streams, s_streams), (t_params, s_params))
    return t, s, scalars, report


def _compare(t: Streams, s: Streams, context: Context) -> dict[str, Array]:
    """Means over the tokens that count of each sample, then over samples."""
    joined_t, joined_s = (jnp.concatenate(streams, axis=1) for streams in (t, s))
    text = context.text_tokens
    counted = context.counted(text, joined_t.shape[1] - text)
    if counted is None:
        square = jnp.square(joined_t.astype(jnp.float32)).mean()
        return {"feature": mean_square(joined_t, joined_s), "square": square}
    if len(t) == 2:  # (img, txt), not text first
        counted = jnp.roll(counted, -text, axis=1)
    weights = counted / counted.sum(1, keepdims=True) / len(counted)

    def mean(x: Float[Array, "b n d"]) -> Float[Array, ""]:
        return (jnp.square(x).mean(-1) * weights).sum()

    exact, other = joined_t.astype(jnp.float32), joined_s.astype(jnp.float32)
    return {"feature": mean(exact - other), "square": mean(exact)}

"""Several processes cut one student: the first computes what machines may round differently, and
all have the same, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax import hosts
from d2m_jax.config import ConfigError, MeshConfig, ModelConfig, MoEConfig, SparsifyConfig
from d2m_jax.named_arrays import fingerprint
from tests.test_hosts import assert_all_ended_well, together

ARRAYS = {
    "order": np.arange(7, dtype=np.int32)[::-1],
    "ffn": {
        "kernel": np.array([[-0.0, 1.5], [2.0**-130, 3.0]], np.float32),
        "half": np.arange(600).astype(jnp.bfloat16).reshape(3, 200),
        "wide": np.array([1 / 3]),
    },
    "none": np.zeros((0, 4), np.float32),
}


def receive():
    hosts.CHUNK = 512  # of the longest array there are three parts
    with hosts.joined():
        me = jax.process_index()

        def make():
            assert me == 0
            # A program on the devices of all would wait for the others.
            assert float(jnp.ones(4).sum()) == 4
            return ARRAYS

        with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()), ("x",))):
            found = hosts.from_first(make)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(ARRAYS), strict=True)
        for mine, wanted in pairs:
            assert (mine.dtype, mine.shape) == (wanted.dtype, wanted.shape)
            assert mine.tobytes() == wanted.tobytes()

        received = hosts._received

        def damaged(array):
            return received(array) + np.asarray(me).astype(array.dtype)

        hosts._received = damaged
        with pytest.raises(ConfigError, match="processes received different arrays"):
            hosts.from_first(lambda: {"order": ARRAYS["order"]})


def test_arrays_of_the_first_process_are_those_of_all():
    assert_all_ended_well(together(receive, processes=2))


CUT = SparsifyConfig(
    moe=MoEConfig(experts=6),
    batches=1,
    batch_size=8,
    tokens=64,
    shared="magnitude",
    refit="plain",
    modulation_rank=5,
)


def cut():
    """A process that computes for itself would make another student than the first does."""
    from d2m_jax.models.flux import initialise
    from d2m_jax.sharding import make_mesh, own_rows, put_batch, put_parameters, whole
    from d2m_jax.sparsification import deal, make_student, modulation
    from tests.sparsification.conftest import CONFIG, batches, noisy

    with hosts.joined():
        if jax.process_index():
            deal.cluster = lambda vectors, count, _: np.arange(len(vectors)) % count
            modulation.UNSEEN = 1.0
        mesh = make_mesh(MeshConfig())
        rng = np.random.default_rng(0)  # what is zero at birth would hide the FFNs
        params = jax.tree.map(
            lambda a: whole(a) + 0.1 * rng.standard_normal(a.shape).astype(np.float32),
            initialise(CONFIG, 0),
        )
        with jax.set_mesh(mesh):
            placed = put_parameters(mesh, params)
            rows = own_rows(mesh, 8)
            mine = (jax.tree.map(lambda a: a[rows], batch) for batch in batches(1))
            given = (put_batch(mesh, batch) for batch in mine)
            teacher = ModelConfig(transformer=CONFIG)
            config, made, order = make_student(teacher, placed, CUT, given, noisy, 0)
        assert config.transformer.modulation_rank == 5 and len(order) == 9
        prints = fingerprint(jax.tree.map(whole, made)), fingerprint(order)
        assert len(set(map(tuple, hosts.gather(prints)))) == 1


def test_processes_cut_one_student():
    assert_all_ended_well(together(cut, processes=2, devices=2))

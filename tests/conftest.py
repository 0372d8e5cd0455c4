"""Every test runs on a CPU, with the package's array types checked and compiled programs kept."""

import gc
import os
import pkgutil
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: an eighth of the time (cores.use_cores says why). With
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 they run the programs that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Programs in one part each: in many, to compile them on many cores, they take a sixth more time.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# The second run of the suite finds its programs compiled.
cache = Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Tracing makes many objects that stay: looking for cycles among them took 7 % of the time.
gc.set_threshold(50_000, 20, 100)

# Of many files the longest begin, or one core waits for them at the end.
LONGEST = (
    "test_flux_end_to_end.py",
    "training/test_meshes.py",
    "training/test_run.py",
    "report/test_report.py",
    "report/test_any_data.py",
    "models/test_sharded.py",
    "sparsification/test_meshes.py",
    "test_hosts.py",
    "data/test_cache.py",
    "data/test_making.py",
    "data/test_generate.py",
)


def pytest_collection_modifyitems(items):
    def place(item):
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402 (jax reads the environment when imported)

import d2m_jax  # noqa: E402

install_import_hook(
    # configs check their own types, and take lists as tuples
    [f"d2m_jax.{m.name}" for m in pkgutil.iter_modules(d2m_jax.__path__) if m.name != "config"],
    # an int may stand where a float is expected
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# hosts.start says these for the whole process; they change no program.
OF_PROCESSES = {"jax_cpu_enable_async_dispatch", "jax_enable_preemption_service"}


@pytest.fixture(autouse=True)
def settings_stay():
    """No test leaves a setting of JAX changed: the rest of its process would compile other programs
    than the processes that tests start, with other last bits."""
    before = dict(jax.config.values)
    yield
    after = jax.config.values
    changed = {name for name in after if after[name] != before.get(name)} - OF_PROCESSES
    assert not changed, f"{sorted(changed)} are left changed"


@pytest.fixture
def no_look_for_cycles():
    """What only cycles hold stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()

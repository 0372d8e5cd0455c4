"""Many processes, one run: how they start, agree, wait for one another and end.

JAX's own coordination service (jax.distributed) carries all of it, so that none of it needs a
device. A run of one process passes straight through.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from d2m_jax.config import ConfigError, check, differences, first_line
from d2m_jax.named_arrays import fingerprint, names, nested

PATIENCE = 6 * 3600  # seconds for which a process waits for one that lives; a dead one ends it
LEAVING = 10  # seconds for which a process that failed waits whether the others failed like it
GRACE = 3  # seconds for which others stay, so that process 0 can count them
# What JAX says where nothing names the other processes, and where it was used before it was told.
UNDEFINED, TOO_LATE = "should be defined", "before any JAX calls"
NOTICED = 20  # seconds after which the others end whom it did not wait for
CHUNK = 2**26  # bytes of an array that are sent at a time
_calls = itertools.count()  # the same on all processes, for all make the same calls in one order
_acting = False  # whether the first process does something alone, in by_first


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: float = 300.0,
) -> Iterator[None]:
    """Run what is inside together with the other processes, as `start` finds them.

    At the end each waits for all. A process that fails says why and exits at once, so that the
    others, which may wait for it inside a collective, end too.
    """
    start(coordinator, processes, process, timeout)
    try:
        yield
        barrier("end")
        jax.distributed.shutdown()
    except BaseException as error:
        if _jax().client is None:
            raise
        _leave(error)


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: float = 300.0,
) -> None:
    """Join the other processes of this run; to be called before JAX is asked for its devices.

    Who they are comes from the arguments (HOST:PORT of process 0, how many, which one is this),
    else from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, else from where JAX
    looks by itself: SLURM, Open MPI, Cloud TPU, Kubernetes. Without any of these it is one process,
    and nothing is looked up. Raises ConfigError for arguments that cannot be; where not all come
    within `timeout` seconds, says so in one line and exits with code 2.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process = _number("JAX_PROCESS_ID") if process is None else process
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 and _alone():
        return
    if coordinator is not None and processes is not None and process is not None:
        _check(coordinator, processes, process)
    elif len(missing) < 3:
        raise ConfigError(
            f"{missing[0]}: expected with {' and '.join(n for n in given if n not in missing)}"
        )
    # A SIGTERM is Python's to catch: the loop tells the other processes (see `flags`).
    jax.config.update("jax_enable_preemption_service", False)
    # On CPUs programs that wait for one another only by their collectives must run in one order.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    came = threading.Event()
    threading.Thread(target=_watch, args=(came, timeout), daemon=True).start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            # Told all, JAX shall not take one device of many, as it does under SLURM.
            cluster_detection_method=None if missing else "deactivate",
            # JAX aborts with a trace of C++ when its own time is up.
            initialization_timeout=int(timeout) + 60,
            shutdown_timeout_seconds=NOTICED,
        )
    except ValueError as error:
        if not missing or UNDEFINED not in str(error):
            raise
    except Exception as error:  # of Kubernetes, of metadata servers, of sockets
        # Who has used JAX before, in a notebook or a test, is alone unless he says who else is.
        if missing and TOO_LATE in str(error):
            return
        where = f" at {coordinator}" if coordinator else ""
        raise ConfigError(
            f"cannot join the other processes{where}: {first_line(error, None)}"
        ) from None
    finally:
        came.set()


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    check(value is None or value.isdigit(), f"{name} = {value!r}: expected a number")
    return None if value is None else int(value)


def _check(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    check(bool(host) and port.isdigit(), f"coordinator = {coordinator!r}: expected HOST:PORT")
    check(processes >= 1, f"processes = {processes}: expected at least 1")
    check(
        0 <= process < processes,
        f"process = {process}: expected 0 to {processes - 1} (processes = {processes})",
    )


def _alone() -> bool:
    """Whether the environment says that there are no others, where JAX would look for them."""
    known = os.environ
    if known.get("SLURM_NTASKS") == "1":  # JAX would take one device of many
        return True
    # Of a pod that belongs to no indexed job JAX would ask the cluster, or warn that it cannot.
    pod = "KUBERNETES_SERVICE_HOST" in known
    return pod and not {"JOB_COMPLETION_INDEX", "TPU_WORKER_ID"} & known.keys()


def _watch(came: threading.Event, timeout: float) -> None:
    """Where not all come in time, say who is missing, and exit: the thread that waits cannot be
    told to stop."""
    if came.wait(timeout):
        return
    state = _jax()
    address = state.coordinator_address
    if address is None:
        said = f"waited {timeout:g} s to learn who the other processes are"
    elif state.service is not None:
        there = _connections(int(address.rsplit(":", 1)[1]))
        counted = "not all" if there is None else f"{there} of {state.num_processes}"
        said = f"{counted} processes came to {address} within {timeout:g} s"
    else:
        if came.wait(GRACE):
            return
        host, port = address.rsplit(":", 1)
        try:
            socket.create_connection((host.strip("[]"), int(port)), 5).close()
            found = "process 0 is there, others are not"
        except OSError as error:
            found = f"process 0 is not there, or gave up ({error.strerror or error})"
        said = f"process {state.process_id} waited {timeout:g} s at {address}: {found}"
    print(f"error: {said}; expected all of them", file=sys.stderr, flush=True)
    os._exit(2)


def _connections(port: int) -> int | None:
    """Connections that others hold to a port of this machine; None where Linux does not tell."""
    tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    try:
        lines = [line.split() for t in tables if t.exists() for line in t.read_text().splitlines()]
    except OSError:
        return None
    here = f"{port:04X}"
    established = "01"
    return sum(f[1].endswith(f":{here}") and f[3] == established for f in lines) or None


def _jax() -> Any:
    """What JAX knows of the processes and holds to reach them; private, for its client is public
    nowhere. Orbax takes it from here too."""
    return distributed.global_state


def count() -> int:
    """How many processes work on this run; 1 inside by_first."""
    return 1 if _acting else _jax().num_processes


def first() -> bool:
    """Whether this is the process that writes what is written once."""
    return _jax().process_id == 0


def say(line: str) -> None:
    """One line for people, on stderr, from the first process of many; a live progress bar makes
    room for it."""
    if first():
        print(line, file=sys.stderr, flush=True)


def _client() -> Any:
    """JAX's line between the processes, of a type that JAX does not hand out."""
    return _jax().client


def barrier(name: str, timeout: float = PATIENCE) -> None:
    """Wait until all processes are here."""
    if count() > 1:
        _client().wait_at_barrier(f"d2m_jax/{name}", int(1000 * timeout))


def gather(value: Any) -> list[Any]:
    """The JSON values that the processes bring, in their order. All processes must call it."""
    if count() == 1:
        return [value]
    client, key = _client(), f"d2m_jax/{next(_calls)}"
    client.key_value_set(f"{key}/{_jax().process_id}", json.dumps(value))
    barrier(key)
    values = {int(name.rsplit("/", 1)[1]): text for name, text in client.key_value_dir_get(key)}
    return [json.loads(values[process]) for process in range(count())]


def by_first(action: Callable[[], Any]) -> Any:
    """The JSON value of action(), which the first process alone does while the others wait.

    A ConfigError of its is raised on all processes. All must call it. Inside, the first process is
    by itself: it waits for nobody, and must leave the devices of others alone.
    """
    global _acting
    if count() == 1:
        return action()
    client, key = _client(), f"d2m_jax/{next(_calls)}"
    if not first():
        answer = json.loads(client.blocking_key_value_get(key, 1000 * PATIENCE))
        if "error" in answer:
            raise ConfigError(answer["error"])
        return answer["value"]
    _acting = True
    try:
        value = action()
    except ConfigError as error:
        client.key_value_set(key, json.dumps({"error": str(error)}))
        raise
    finally:
        _acting = False
    client.key_value_set(key, json.dumps({"value": value}))
    return value


def from_first(make: Callable[[], dict]) -> dict:
    """A nested dict of arrays that the first process alone makes on a device of its own: on all,
    on the host, bit for bit.

    What each makes for itself may differ by what its machine rounds, and by all that follows. The
    others wait, then receive it through the devices, CHUNK bytes at a time. Raises ConfigError, on
    all, unless all have the same by its fingerprint, and FloatingPointError for what is not finite.
    """
    if count() == 1:
        return make()
    made: dict[str, np.ndarray] = {}

    def alone():
        with jax.set_mesh(Mesh(np.array(jax.local_devices()[:1]), ("alone",))):
            made.update({name: np.asarray(a) for name, a in names(make()).items()})
        return {name: [a.dtype.name, list(a.shape)] for name, a in made.items()}

    for name, (dtype, shape) in by_first(alone).items():
        made[name] = _received(made[name] if first() else np.zeros(shape, jnp.dtype(dtype)))
    check(len(set(gather(fingerprint(made)))) == 1, "processes received different arrays")
    return nested(made)


def _received(array: np.ndarray) -> np.ndarray:
    """The first process's array of this shape and type."""
    sent = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    parts = []
    for start in range(0, sent.size, CHUNK):
        part = sent[start : start + CHUNK]
        # Few sizes, for each is a program of its own.
        filled = np.zeros(max(1024, 1 << (part.size - 1).bit_length()), np.uint8)
        filled[: part.size] = part
        parts.append(np.asarray(broadcast_one_to_all(filled))[: part.size])
    whole = np.concatenate(parts) if parts else sent
    return whole.view(array.dtype).reshape(array.shape)


def agree(what: dict[str, Any]) -> None:
    """Raise ConfigError, on all processes, unless all bring the same JSON and run the same code.

    The message names processes, fields and values. What differs must not be used before.
    """
    mine = json.loads(json.dumps({"versions": _versions()} | what))
    theirs = by_first(lambda: mine)
    found = [
        f"{name} is {json.dumps(there)[:80]} on process 0 and {json.dumps(here)[:80]}"
        for name, there, here in differences(theirs, mine)
    ]
    said = [
        f"{difference} on process {process}"
        for process, others in enumerate(gather(found[:3]))
        for difference in others
    ]
    if said:
        more = f" (and {len(said) - 3} more)" if len(said) > 3 else ""
        raise ConfigError(
            f"processes differ: {'; '.join(said[:3])}{more};"
            " expected the same config, command and versions on all"
        )


def _versions() -> dict[str, str]:
    code = 0
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code = zlib.crc32(file.read_bytes(), code)
    return {
        "d2m_jax": f"code {code:08x}",  # a checkout may be another one under the same number
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
    }


def flags(mesh: Mesh, value: int) -> Int32[Array, " devices"]:
    """One number per device of the mesh, `value` on those of this process.

    Their maximum, taken inside a step, is the same on all processes at the same step: so all learn
    of a signal that reached one of them.
    """
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    mine = np.full(1, value, np.int32)
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback((mesh.size,), sharding, lambda index: mine)


def _leave(error: BaseException) -> None:
    """Tell what went wrong here and exit, by the way that leaves nobody waiting."""
    if isinstance(error, ConfigError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        code = 130
    else:
        traceback.print_exception(error)
        mine = _jax().process_id
        print(
            f"process {mine} ends; of a lost connection another's log knows more", file=sys.stderr
        )
        code = 1
    # JAX's shutdown waits until all processes have called it. Where all failed alike they all do,
    # and end together. Where only this one failed it waits for LEAVING seconds and exits; JAX then
    # ends the others too (NOTICED), even those that wait inside a collective.
    end = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    end.start()
    end.join(LEAVING)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

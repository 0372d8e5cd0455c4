"""NVIDIA's tars of encoded samples: what the reference of MLPerf's FLUX.1 benchmark saved
(preprocessed.py), array by array, under names with one beginning.

Source: NVIDIA's submission of FLUX.1 to MLPerf Training v5.1, scripts/to_webdataset.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from d2m_jax.config import ConfigError
from d2m_jax.data.sources.build import indexed, place
from d2m_jax.data.sources.index import Problems, Scanned, pack
from d2m_jax.data.sources.open import first_then_all, tell_left_out
from d2m_jax.data.sources.stores import Changed, Found, Window, look, reading
from d2m_jax.data.sources.tars import BLOCK, Members, headers_of, told

KIND = "encoded_tars"
ARRAYS = {  # name in a tar, behind that of the sample → the reference's
    b"t5.bytes": "t5_encodings",
    b"clip.bytes": "clip_encodings",
    b"mean.bytes": "mean",
    b"logvar.bytes": "logvar",
}
ROLES = {name: role for role, name in enumerate([*ARRAYS, b"json"])}
JSON = ROLES[b"json"]
STEP = 2**13  # bytes that are read at once while a tar is scanned; its arrays are jumped over


class EncodedTars(Members):
    """Rows (preprocessed.py) of many tars. Roles are those of ROLES."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """BadSample where it cannot be read, ValueError where its .json is none."""
        key, members = self.key(index), self.members(index)
        try:
            facts = json.loads(bytes(members[JSON])) if JSON in members else {}
            time = facts.get("timestep")
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{key}: its .json is no JSON object") from None
        arrays = {name: members.get(role) for role, name in enumerate(ARRAYS.values())}
        return {"__key__": key, "timestep": time} | arrays


def open_tars(folder: Path, index: str | None, max_bad: int) -> EncodedTars:
    """The samples of a folder's tars. All processes of a run must call it.

    Where they lie is kept in a file in the folder `index`, or beside them; the first call makes it.
    ConfigError where that cannot be written, where more than `max_bad` samples lack something, and
    where none is whole.
    """
    base = str(folder.absolute())
    where = str(Path(index).absolute()) if index is not None else None

    def opened() -> EncodedTars:
        files = [look(str(file)) for file in sorted(folder.absolute().glob("*.tar"))]
        path = place(f"{base}/*.tar", base, where, KIND)
        return EncodedTars(indexed(KIND, files, base, path, scan, pure=False), base)

    tars = first_then_all(opened)
    tell_left_out(base, tars.index, max_bad, "sample")
    return tars


def scan(file: Found) -> Scanned:
    """The samples of one tar that have all arrays. What is wrong is told, and the rest is found."""
    problems, rows, checked = Problems(), dict[bytes, list[int]](), b""  # blocks, then bytes
    twice = set[bytes]()
    try:
        with reading(file) as read:
            headers = headers_of(file, Window(read, STEP), problems)
            checked = headers.checksum
            for path, start, size, _ in headers.files():
                dot = path.find(b".", path.rfind(b"/") + 1)
                name, role = path[:dot], ROLES.get(path[dot + 1 :])
                if role is None or size == 0:
                    continue
                row = rows.setdefault(name, [0] * 2 * len(ROLES))
                if row[len(ROLES) + role]:
                    if name not in twice:
                        problems.add(f"{told(file, name)}: comes again; the first is used", 0)
                    twice.add(name)
                elif start + size > file.size:
                    problems.add(f"{told(file, path)}: is cut off", 0)
                else:
                    row[role], row[len(ROLES) + role] = start // BLOCK, size
    except ConfigError:  # of no tar's
        raise
    except (Changed, OSError, ValueError) as error:
        problems.add(f"{file.path}: cannot be read to its end: {error}")
    kept = []
    for name, row in rows.items():
        lacks = [array for array in ARRAYS if not row[len(ROLES) + ROLES[array]]]
        if lacks:
            problems.add(f"{told(file, name)}: has no {b', '.join(lacks).decode()}")
        else:
            kept.append(name)
    if not rows and not problems.named:
        names = ", ".join(f".{name.decode()}" for name in ARRAYS)
        problems.add(f"{file.path}: holds no samples of {names}", 0)
    table = np.array([rows[name] for name in kept], np.uint32).reshape(-1, 2, len(ROLES))
    ends, names = pack(kept)
    columns = {"block": table[:, 0], "bytes": table[:, 1], "name ends": ends}
    return Scanned(columns, {"name": names}, problems, checked)

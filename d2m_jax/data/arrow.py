"""Folders that `datasets.Dataset.save_to_disk` of Hugging Face wrote, read by rows.

`state.json` names their files. Each is one Arrow stream, which is mapped into memory: a row costs
reading that row alone.
"""

import bisect
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from d2m_jax.config import ConfigError, check
from d2m_jax.progress import bar

STATE, SPLITS = "state.json", "dataset_dict.json"
THREADS = 16  # that open files


def is_there(folder: Path) -> bool:
    """Whether a folder was written so, or holds folders that were."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


class Table:
    """The rows of such a folder, for many threads; a process that gets it maps the files itself."""

    def __init__(self, folder: Path, binary: tuple[str, ...], others: tuple[str, ...]):
        """Of the columns those of bytes must be there. ConfigError where one is not, and for a file
        that is missing or damaged."""
        self.files, self.binary, self.others = _files(folder), binary, others
        self._opened: dict[int, Any] = {}
        with ThreadPoolExecutor(THREADS) as pool, bar(len(self.files), "opening", "files") as tell:
            for part, table in enumerate(pool.map(_open, self.files)):
                names = table.column_names
                lacks = ", ".join(name for name in binary if name not in names)
                found = f"{self.files[part]}: found the columns {', '.join(names)}"
                check(not lacks, f"{found}, expected {lacks}")
                self._opened[part] = table
                tell(1)
        tables = self._opened.values()
        self.starts = [0, *itertools.accumulate(table.num_rows for table in tables)]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": {}}

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Column → value, of bytes a buffer of them where they lie; None where there is none."""
        part = bisect.bisect_right(self.starts, index) - 1
        if part not in self._opened:
            self._opened[part] = _open(self.files[part])
        table, row = self._opened[part], index - self.starts[part]
        values = {name: table.column(name)[row].as_buffer() for name in self.binary}
        for name in self.others:
            there = name in table.column_names
            values[name] = table.column(name)[row].as_py() if there else None
        return values


def _files(folder: Path) -> list[Path]:
    file = folder / STATE
    if not file.is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{STATE}")))
        raise ConfigError(f"{folder}: holds the folders {splits}; expected the path of one of them")
    try:
        names = [str(one["filename"]) for one in json.loads(file.read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{file}: damaged, expected what datasets' save_to_disk wrote") from None
    lost = [name for name in names if not (folder / name).is_file()]
    check(not lost, f"{folder / (lost or [''])[0]}: no such file, but {file} names it")
    return [folder / name for name in names]


def _open(file: Path) -> Any:
    """A file's table; what is mapped stays so when the file is closed."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            return stream.read_all()
    except (OSError, ValueError) as error:  # Arrow's are ValueErrors
        said = " ".join(str(error).split())
        raise ConfigError(f"{file}: cannot be read as an Arrow stream ({said})") from None

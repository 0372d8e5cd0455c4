"""Prompts in files as people have them: text, JSON lines, CSV, parquet."""

import csv
import json
from pathlib import Path

from d2m_jax.config import ConfigError, check
from d2m_jax.sampling.options import read_prompts

NAMES = ("prompt", "caption", "text", "Prompt", "Caption", "TEXT")  # of a field or a column


def prompts_of(file: Path, column: str | None = None) -> list[str]:
    """The prompts of a file, in its order, blank ones left out: a text file has one a line; .jsonl,
    .csv, .tsv and .parquet a field or column `column` (None: the first of NAMES that is there).

    ConfigError that names the file, and the line or the columns that were found.
    """
    check(file.is_file(), f"{file}: no such file, expected one of prompts")
    kind = file.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        found = _lines(file, column)
    elif kind in (".csv", ".tsv"):
        found = _table(file, column, "\t" if kind == ".tsv" else ",")
    elif kind == ".parquet":
        found = _parquet(file, column)
    else:
        check(column is None, f"{file}: a text file has no column {column!r}, expected none")
        found = read_prompts(file)
    found = [prompt.strip() for prompt in found if prompt.strip()]
    check(len(found) > 0, f"{file}: expected at least one prompt, found none")
    return found


def _lines(file: Path, column: str | None) -> list[str]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: expected JSON ({error})") from None
        if isinstance(value, str):
            found.append(value)
            continue
        check(isinstance(value, dict), f"{where}: expected an object or a string")
        name = _column(where, list(value), column)
        said = value[name]
        check(isinstance(said, str), f"{where}: {name} = {said!r}, expected a string")
        found.append(said)
    return found


def _table(file: Path, column: str | None, delimiter: str) -> list[str]:
    with file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened, delimiter=delimiter)
        name = _column(f"{file}, line 1", list(reader.fieldnames or []), column)
        return [row[name] or "" for row in reader]


def _parquet(file: Path, column: str | None) -> list[str]:
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
        name = _column(str(file), list(table.schema_arrow.names), column)
        values = table.read([name]).column(0).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own are such
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: cannot be read as parquet ({error})") from None
    bad = next((value for value in values if not isinstance(value, str | None)), "")
    check(isinstance(bad, str), f"{file}: {name} holds {bad!r}, expected strings")
    return [value or "" for value in values]


def _column(where: str, found: list[str], wanted: str | None) -> str:
    names = (wanted,) if wanted is not None else NAMES
    name = next((name for name in names if name in found), None)
    if name is None:
        expected = repr(wanted) if wanted is not None else "one called prompt, caption or text"
        hint = "" if wanted is not None else " (or name it: --column NAME)"
        raise ConfigError(
            f"{where}: found {', '.join(map(repr, found)) or 'nothing'}, expected {expected}{hint}"
        )
    return name

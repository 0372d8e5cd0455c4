"""Prompts in files as people have them: text, JSON lines, CSV, parquet."""

import csv
import io
import json
from pathlib import Path

from d2m_jax.config import ConfigError, check
from d2m_jax.sampling.options import read_prompts
from d2m_jax.texts import half_letter, lines_of, text_of

NAMES = ("prompt", "caption", "text", "Prompt", "Caption", "TEXT")  # of a field or a column
PROMPTS = "expected a file of prompts"


def prompts_of(file: Path, column: str | None = None) -> list[str]:
    """The prompts of a file, in its order, blank ones left out: a text file has one a line; .jsonl,
    .csv, .tsv and .parquet a field or column `column` (None: the first of NAMES that is there).

    ConfigError that names the file, and the line or the columns that were found.
    """
    return [prompt for prompt, _ in grouped_prompts_of(file, column)]


def grouped_prompts_of(
    file: Path, column: str | None = None, group: str | None = None
) -> list[tuple[str, str]]:
    """The same, each with what its field or column `group` says; without one that is empty."""
    check(file.is_file(), f"{file}: no such file, {PROMPTS}")
    found = _column_of(file, column)
    groups = [""] * len(found) if group is None else _column_of(file, group)
    pairs = [
        (prompt.strip(), of.strip())
        for prompt, of in zip(found, groups, strict=True)
        if prompt.strip()
    ]
    for prompt, _ in pairs:
        half = half_letter(prompt)
        check(half is None, f"{file}: {prompt[:40]!r} holds {half}, half a letter; expected text")
    check(len(pairs) > 0, f"{file}: expected at least one prompt, found none")
    return pairs


def _column_of(file: Path, column: str | None) -> list[str]:
    """All of a column, that of prompts by default, with what is blank."""
    kind = file.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        return _lines(file, column)
    if kind in (".csv", ".tsv"):
        return _table(file, column, "\t" if kind == ".tsv" else ",")
    if kind == ".parquet":
        return _parquet(file, column)
    check(
        column is None,
        f"{file}: a text file has no columns, found the column {column!r}, expected none",
    )
    return read_prompts(file)


def _lines(file: Path, column: str | None) -> list[str]:
    found = []
    for number, line in enumerate(lines_of(text_of(file, PROMPTS)), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: expected JSON ({error})") from None
        if isinstance(value, str):
            check(column is None, f"{where}: found a string, expected an object with {column!r}")
            found.append(value)
            continue
        check(isinstance(value, dict), f"{where}: expected an object or a string")
        name = _column(where, list(value), column)
        said = value[name]
        check(isinstance(said, str), f"{where}: {name} = {said!r}, expected a string")
        found.append(said)
    return found


def _table(file: Path, column: str | None, delimiter: str) -> list[str]:
    reader = csv.DictReader(io.StringIO(text_of(file, PROMPTS), newline=""), delimiter=delimiter)
    try:
        name = _column(f"{file}, line 1", list(reader.fieldnames or []), column)
        return [row[name] or "" for row in reader]
    except csv.Error as error:
        raise ConfigError(f"{file}: cannot be read as a table ({error})") from None


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
